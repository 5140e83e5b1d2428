"""Text and conversations to token ids, alike in training and evaluation: BOS, prompt, completion, left padding."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import torch

from molf.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A conversation's turns, each with `role` (system, user, assistant) and `content`.
Messages = Sequence[Mapping[str, str]]

# Positions without a loss, as torch's cross-entropy knows them.
IGNORED = -100
# For a tokenizer that has no chat template of its own.
PLAIN_CHAT = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\\n' }}"
    "{% endfor %}{{ 'Assistant:' if add_generation_prompt else '' }}"
)
# What stands before a template that asks for today's date: a conversation has the same tokens on every day. The date is
# the one that Llama 3's templates fall back on. The line break ends the block and is none of the text.
FIXED_DAY = (
    "{% macro strftime_now(format) %}{{ format | replace('%-', '%')"
    + "".join(f" | replace('%{code}', '{datetime(2024, 7, 26):%{code}}')" for code in "aAbBdHIjmMpSyY")
    + " }}{% endmacro %}\n"
)


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """BOS, where the tokenizer has one, and the prompt's tokens."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + tokenizer.encode(prompt, add_special_tokens=False)


def encode_completion(tokenizer: "PreTrainedTokenizerBase", completion: str) -> list[int]:
    """The completion's tokens alone: encoded apart from the prompt, so that the border never falls inside a token."""
    return tokenizer.encode(completion, add_special_tokens=False)


def with_chat_template(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The same tokenizer, which from now on has a chat template, and is saved with it: its own, or `PLAIN_CHAT`."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT
    return tokenizer


class Chat:
    """Conversations as a tokenizer's chat template writes them.

    The template is asked for the conversation up to each answer, and up to its end; what the second adds to the first
    is the answer. So it needs no marks for the loss. It alone decides on special tokens, BOS included, as it does
    wherever the model is served.

    Args:
        tokenizer: Gets a template if it has none (`with_chat_template`).

    Attributes:
        before: What the template writes of an answer before its content, such as a space or an empty thought.
        end: Id of the token that ends the assistant's turn; None: the template has none, and EOS ends the last turn.

    Raises:
        UserError: Here and in the methods: the template fails, or does not write the start of a longer conversation
            as it writes a shorter one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = with_chat_template(tokenizer)
        try:
            template = tokenizer.get_chat_template()  # of several the default one
        except ValueError as error:
            raise UserError(f"the model's tokenizer has no default chat template: {first_line(error)}") from None
        self._template = FIXED_DAY + template if "strftime_now" in template else template
        asked = [{"role": "user", "content": "Question"}]
        answered = [*asked, {"role": "assistant", "content": "Answer"}]
        prompt = self._render(asked, ask=True)
        self.before, content, tail = _added(prompt, self._render(answered), answered).partition("Answer")
        if not content:
            raise UserError("the model's chat template does not write what the assistant says; use another model")
        marks = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        mark = max((mark for mark in marks if tail.lstrip().startswith(mark)), key=len, default="")
        self.end: int | None = tokenizer.convert_tokens_to_ids(mark) if mark else None  # type: ignore[assignment]
        # Some tokenizers put a space before a text, which a piece within a text must not get.
        self._spaces = self._within("\n", "Answer") != self._tokens("Answer")
        # How an answer ends; of this, what follows the turn's last token belongs to no turn.
        self._tail = tail
        self._after = tail.lstrip()[len(mark) :] if mark else tail

    def encode(self, messages: Messages) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation whose last turn is the assistant's.

        Labelled is what the model itself has to write: of each of the assistant's turns all that follows the
        generation prompt, the token that ends the turn included. Other labels are -100.
        """
        ids, labels = self._encoded(self._pieces(messages))
        if self.end is None:
            ids.append(self.tokenizer.eos_token_id)
            labels.append(self.tokenizer.eos_token_id)
        return ids, labels

    def encode_prompt(self, messages: Messages) -> list[int]:
        """Token ids of a conversation up to where the assistant is to speak: those that `encode` gives of it there."""
        return self._encoded(self._pieces(messages, ask=True))[0]

    def _pieces(self, messages: Messages, ask: bool = False) -> list[tuple[str, bool]]:
        """The conversation's text in pieces, each with whether the model has to write it.

        Args:
            messages: Of it.
            ask: Whether the generation prompt is to follow the last turn.
        """
        pieces: list[tuple[str, bool]] = []
        written = rest = ""  # so far; its end that is in no piece yet
        for count, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:count], ask=True)
            pieces.append((rest + _added(written, prompt, messages), False))
            written = self._render(messages[: count + 1])
            answer, rest = _added(prompt, written, messages), self._after
            if not answer.endswith(self._tail):
                raise UserError(f"the model's chat template does not end all answers alike, see {_shown(messages)}")
            pieces.append((answer[: len(answer) - len(rest)], True))
        if ask:
            pieces.append((rest + _added(written, self._render(messages, ask=True), messages), False))
        return pieces

    def _encoded(self, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        """Token ids and labels. Pieces are encoded apart: no token crosses the border where an answer begins."""
        ids: list[int] = []
        labels: list[int] = []
        before = ""
        for text, learnt in pieces:
            tokens = self._within(before, text) if self._spaces else self._tokens(text)
            ids += tokens
            labels += tokens if learnt else [IGNORED] * len(tokens)
            before = text
        return ids, labels

    def _within(self, before: str, text: str) -> list[int]:
        """Tokens of a text that follows another, as far as no token crosses their border."""
        alone, both = self._tokens(before), self._tokens(before + text)
        return both[len(alone) :] if both[: len(alone)] == alone else self._tokens(text)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _render(self, messages: Messages, ask: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            # In Jinja's sandbox.
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                chat_template=self._template,
                add_generation_prompt=ask,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise UserError(
                f"the model's chat template refuses {_shown(messages)}: {first_line(error)}; change the rows or use "
                "another model"
            ) from None
        return str(text)


def _added(shorter: str, longer: str, messages: Messages) -> str:
    """What the longer rendering of a conversation has more than the shorter one.

    Raises:
        UserError: The one is not the start of the other.
    """
    if not longer.startswith(shorter):
        raise UserError(
            "the model's chat template writes what was said in another way once the next turn follows, so the model "
            f"would not be trained on what it is asked later, see {_shown(messages)}; give its tokenizer a template "
            "(chat_template.jinja) that only appends, or use another model"
        )
    return longer[len(shorter) :]


def _shown(messages: Messages) -> str:
    roles = ", ".join(message["role"] for message in messages)
    return f"the conversation of {roles} that begins {messages[0]['content'][:60]!r}"


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pads sequences on the left to the longest.

    Returns:
        `input_ids`, `attention_mask` and `position_ids`, each (sequences, longest) of int64; positions count from each
        sequence's first real token.
    """
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, longest - len(sequence) :] = torch.tensor(sequence, dtype=torch.long)
        attention_mask[row, longest - len(sequence) :] = 1
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
