"""Asking a model in a conversation."""

from pathlib import Path
from typing import Any

import torch

from molf import tiny
from molf.encoding import PLAIN_CHAT, Chat
from molf.evaluation import LanguageModel
from molf.models import load_model, load_tokenizer
from tests.conftest import talks


class Parrot:
    """A model that says the same to everything."""

    device = "cpu"

    def __init__(self, ids: list[int]) -> None:
        self.ids = torch.tensor([ids])
        self.asked: list[dict[str, Any]] = []

    def eval(self) -> "Parrot":
        return self

    def generate(self, **asked: Any) -> torch.Tensor:
        self.asked.append(asked)
        return torch.cat([asked["input_ids"], self.ids.expand(len(asked["input_ids"]), -1)], dim=1)


def test_an_answer_ends_with_the_turn_and_has_nothing_of_the_template() -> None:
    tokenizer = tiny.train_tokenizer(["User: Assistant: four and five"], 300)
    tokenizer.add_tokens(["<end>", "<thought>"])  # ordinary ones, which decoding does not leave out
    tokenizer.chat_template = PLAIN_CHAT.replace("eos_token if", "'<end>' if").replace(
        "}}: {{", "}}: {{ '<thought>\\n\\n' if message['role'] == 'assistant' else '' }}{{"
    )
    chat = Chat(tokenizer)
    assert (chat.before, chat.end) == (" <thought>\n\n", tokenizer.convert_tokens_to_ids("<end>"))
    said = tokenizer.encode(" <thought>\n\nfour and<end>five", add_special_tokens=False)
    model = Parrot(said)
    lm = LanguageModel(model, tokenizer, batch_size=2)  # type: ignore[arg-type]
    talk = [{"role": "user", "content": "four"}]
    assert lm.chat([talk, talk, talk], 9) == ["four and"] * 3
    config = model.asked[0]["generation_config"]
    assert config.eos_token_id == [tokenizer.eos_token_id, chat.end] and not config.do_sample
    assert model.asked[0]["input_ids"].tolist() == [chat.encode_prompt(talk)] * 2
    # Asked without a conversation, the template has no part in it.
    assert lm.generate(["four"], 9) == [" <thought>\n\nfour and<end>five"]
    assert model.asked[-1]["generation_config"].eos_token_id == [tokenizer.eos_token_id]


def test_an_answer_in_a_conversation_does_not_depend_on_the_batch(base: Path) -> None:
    asked = [turns[:-1] for turns in talks(7)["messages"]]
    answers = [
        LanguageModel(load_model(base, torch.float32), load_tokenizer(base), batch_size=size).chat(asked, 5)
        for size in (1, 8)
    ]
    assert answers[0] == answers[1] and any(answers[0])
