"""Conversations as tokens: the loss on the assistant's turns alone, whatever the template's shape."""

from collections.abc import Callable

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from molf import tiny
from molf.encoding import IGNORED, PLAIN_CHAT, Chat, Messages, with_chat_template
from molf.errors import UserError

# Three shapes that models have, in words of our own.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
    "{% endif %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MARKS = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]"),
]
TALK = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four.\n\nIt is even."},
    {"role": "user", "content": "And three more?"},
    {"role": "assistant", "content": "Seven."},
]


@pytest.fixture(scope="module")
def make() -> Callable[[str | None], PreTrainedTokenizerFast]:
    """A byte-level tokenizer with every mark of the templates, and the given template."""
    text = " ".join(message["content"] for message in TALK) * 3 + "user assistant model system\n\n"

    def made(template: str | None) -> PreTrainedTokenizerFast:
        tokenizer = tiny.train_tokenizer([text], 320)
        # As many have it: a text that is encoded as it comes gets a BOS, whatever it begins with.
        start = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id or 0)])
        tokenizer.backend_tokenizer.post_processor = start
        # The last is an ordinary token of the vocabulary: decoding does not leave it out.
        tokenizer.add_special_tokens({"additional_special_tokens": MARKS[:-1]})
        tokenizer.add_tokens(MARKS[-1])
        tokenizer.chat_template = template
        return tokenizer

    return made


def expected(tokenizer: PreTrainedTokenizerFast, marked: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a text whose learnt parts stand between « and »."""
    ids: list[int] = []
    labels: list[int] = []
    for i, piece in enumerate(marked.replace("»", "«").split("«")):
        tokens = tokenizer.encode(piece, add_special_tokens=False)
        ids += tokens
        labels += tokens if i % 2 else [IGNORED] * len(tokens)
    return ids, labels


CHATML_TEXT = (
    "<|im_start|>user\nWhat is two and two?<|im_end|>\n<|im_start|>assistant\n«Four.\n\nIt is even.<|im_end|>»\n"
    "<|im_start|>user\nAnd three more?<|im_end|>\n<|im_start|>assistant\n«Seven.<|im_end|>»"
)
LLAMA3_TEXT = (
    "<bos><|start_header_id|>user<|end_header_id|>\n\nWhat is two and two?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«Four.\n\nIt is even.<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd three more?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«Seven.<|eot_id|>»"
)
GEMMA_TEXT = (
    "<bos><start_of_turn>user\nWhat is two and two?<end_of_turn>\n"
    "<start_of_turn>model\n«Four.\n\nIt is even.<end_of_turn>»\n"
    "<start_of_turn>user\nAnd three more?<end_of_turn>\n<start_of_turn>model\n«Seven.<end_of_turn>»"
)
PLAIN_TEXT = (
    "<bos>User: What is two and two?\nAssistant:« Four.\n\nIt is even.<eos>»\n"
    "User: And three more?\nAssistant:« Seven.<eos>»"
)
SHAPES = {
    "chatml": (CHATML, CHATML_TEXT, "<|im_end|>"),
    "llama-3": (LLAMA3, LLAMA3_TEXT, "<|eot_id|>"),
    "gemma": (GEMMA, GEMMA_TEXT, "<end_of_turn>"),
    "ours": (None, PLAIN_TEXT, "<eos>"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_learnt_is_what_the_assistant_says_and_the_end_of_its_turn(
    make: Callable[[str | None], PreTrainedTokenizerFast], shape: str
) -> None:
    template, marked, end = SHAPES[shape]
    tokenizer = make(template)
    chat = Chat(tokenizer)
    ids, labels = chat.encode(TALK)
    assert (ids, labels) == expected(tokenizer, marked)
    assert chat.end == tokenizer.convert_tokens_to_ids(end) == ids[-1]
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == marked.count("<bos>") <= 1
    # What the model is asked is what it was trained on up to there, of one answer and of several.
    for turns in (1, 3):
        asked = chat.encode_prompt(TALK[:turns])
        assert asked == ids[: len(asked)] and labels[len(asked) - 1] == IGNORED != labels[len(asked)]
    # Nothing is added to what the template says; the border between two pieces falls into no token.
    whole = str(tokenizer.apply_chat_template(TALK, tokenize=False))
    assert tokenizer.decode(ids) == whole[: whole.rindex(end) + len(end)]


def test_the_system_speaks_first(make: Callable[[str | None], PreTrainedTokenizerFast]) -> None:
    tokenizer = make(CHATML)
    ids, labels = Chat(tokenizer).encode([{"role": "system", "content": "Be brief."}, *TALK[:2]])
    text = "<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML_TEXT.split("»")[0] + "»"
    assert (ids, labels) == expected(tokenizer, text)


def test_an_answer_that_begins_with_line_breaks_is_learnt_as_it_is_asked(
    make: Callable[[str | None], PreTrainedTokenizerFast],
) -> None:
    """Together with the template's own they would make one token, which no generation prompt ends with."""
    tokenizer = make(CHATML)
    chat = Chat(tokenizer)
    talk = [TALK[0], {"role": "assistant", "content": "\n\nFour."}]
    ids, labels = chat.encode(talk)
    asked = chat.encode_prompt(talk[:1])
    assert ids[: len(asked)] == asked
    assert tokenizer.decode(ids[len(asked) :]) == "\n\nFour.<|im_end|>"
    assert labels == [IGNORED] * len(asked) + ids[len(asked) :]


def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_into_a_conversation(
    make: Callable[[str | None], PreTrainedTokenizerFast],
) -> None:
    from tokenizers import normalizers

    tokenizer = make(CHATML.replace("<|im_start|>", "## "))
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    assert tokenizer.decode(tokenizer.encode("Seven.", add_special_tokens=False)) == " Seven."
    ids, labels = Chat(tokenizer).encode(TALK)
    learnt = tokenizer.decode([label for label in labels if label != IGNORED])
    assert learnt == "Four.\n\nIt is even.<|im_end|>Seven.<|im_end|>"
    assert str(tokenizer.decode(ids)).startswith(" ## user\nWhat")


def test_a_space_before_the_end_is_learnt_and_what_stands_before_the_content_is_known(
    make: Callable[[str | None], PreTrainedTokenizerFast],
) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = make(template)
    chat = Chat(tokenizer)
    assert (chat.before, chat.end) == (" ", tokenizer.eos_token_id)
    text = "<bos>[INST] What is two and two? [/INST]« Four.\n\nIt is even. <eos>»"
    assert chat.encode(TALK[:2]) == expected(tokenizer, text)


def test_an_end_that_is_no_special_token(make: Callable[[str | None], PreTrainedTokenizerFast]) -> None:
    tokenizer = make(CHATML.replace("<|im_end|>", "[INST]"))
    chat = Chat(tokenizer)
    assert chat.end == tokenizer.convert_tokens_to_ids("[INST]")
    assert chat.encode(TALK) == expected(tokenizer, CHATML_TEXT.replace("<|im_end|>", "[INST]"))


def test_eos_ends_the_last_answer_where_the_template_marks_no_end(
    make: Callable[[str | None], PreTrainedTokenizerFast],
) -> None:
    template = (
        "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    )
    tokenizer = make(template)
    chat = Chat(tokenizer)
    assert chat.end is None
    text = (
        "### user:\nWhat is two and two?\n\n### assistant:\n«Four.\n\nIt is even.»\n\n"
        "### user:\nAnd three more?\n\n### assistant:\n«Seven.<eos>»"
    )
    assert chat.encode(TALK) == expected(tokenizer, text)


def test_todays_date_is_the_same_on_every_day(make: Callable[[str | None], PreTrainedTokenizerFast]) -> None:
    tokenizer = make("\n {{ strftime_now('%A, %-d %B %Y') if strftime_now is defined else 'none' }}" + CHATML)
    assert str(tokenizer.decode(Chat(tokenizer).encode(TALK)[0])).startswith("\n Friday, 26 July 2024<|im_start|>")
    assert tokenizer.chat_template.startswith("\n {{ strftime_now(")


def refusal(tokenizer: PreTrainedTokenizerFast, messages: Messages) -> str:
    with pytest.raises(UserError) as caught:
        Chat(tokenizer).encode(messages)
    return str(caught.value)


def test_what_a_template_refuses_is_said_with_its_words(
    make: Callable[[str | None], PreTrainedTokenizerFast],
) -> None:
    said = refusal(make(GEMMA), [{"role": "system", "content": "Be brief."}, *TALK[:2]])
    assert "refuses the conversation of system, user" in said and "begins 'Be brief.'" in said
    assert "System role not supported" in said and "use another model" in said
    assert "Roles must alternate" in refusal(make(GEMMA), [TALK[0], TALK[2], TALK[1]])
    assert "refuses" in refusal(make("{% for %}"), TALK)
    assert "refuses" in refusal(make("{{ messages + 'text' }}"), TALK)
    assert "does not write what the assistant says" in refusal(make("{{ messages[0]['content'] }}"), TALK)


def test_a_template_that_writes_earlier_turns_in_another_way_is_refused(
    make: Callable[[str | None], PreTrainedTokenizerFast],
) -> None:
    """As those that leave the thoughts of earlier answers out."""
    template = CHATML.replace(
        "message['content'] }}",
        "('<think></think>' if loop.last and message['role'] == 'assistant' else '') + message['content'] }}",
    )
    tokenizer = make(template)
    chat = Chat(tokenizer)
    assert chat.before == "<think></think>"
    ids, labels = chat.encode(TALK[:2])
    assert str(tokenizer.decode([i for i in labels if i != IGNORED])).startswith("<think></think>Four.")
    for asked in (chat.encode, chat.encode_prompt):
        with pytest.raises(UserError, match="in another way once the next turn follows.*only appends"):
            asked(TALK[: 4 if asked == chat.encode else 3])
    thinks = CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>' }}")
    assert "in another way once the next turn follows" in refusal(make(thinks), TALK[:2])
    ends = CHATML.replace("'<|im_end|>'", "('<|im_end|>' if message['content'] != 'Seven.' else '')")
    assert "does not end all answers alike" in refusal(make(ends), TALK)


def test_a_tokenizer_keeps_its_own_template(make: Callable[[str | None], PreTrainedTokenizerFast]) -> None:
    own, none = make(CHATML), make(None)
    assert with_chat_template(own) is own and own.chat_template == CHATML
    assert with_chat_template(none) is none and none.chat_template == PLAIN_CHAT
