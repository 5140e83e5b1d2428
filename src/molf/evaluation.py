"""Asking a language model: how likely completions are and what greedy decoding says, both from one run of a prompt."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from molf.encoding import Chat, Messages, encode_completion, encode_prompt, left_pad
from molf.errors import Diverged, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A prompt, the completions whose log-probabilities are wanted, and the most tokens of greedy text (0: none is wanted).
# No class, so that a task's module asks without importing torch.
Question = tuple[str, Sequence[str], int]
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What a model answers to a question."""

    logprobs: list[np.ndarray]  # of each completion, of each of its tokens: natural logarithms, float64
    text: str  # greedy, up to EOS or the question's number of tokens, without special tokens


@dataclass
class _Prompt:
    """A prompt that is run, whoever asked it, and what it is run for."""

    ids: Ids
    logprobs: dict[Ids, list[float]] = field(default_factory=dict)  # of each completion; filled in
    limit: int = 0  # tokens of greedy text
    said: list[int] = field(default_factory=list)  # filled in


class LanguageModel:
    """A model and its tokenizer as the tasks' scorers see them.

    Equal prompts are run once, in batches of like length with padding on the left, where positions count from the
    first real token. A completion's first token is read off the prompt's last logits; what follows it is run on from
    the prompt's cache, and so is greedy text.

    Args:
        model: Causal language model of transformers; put into evaluation mode.
        tokenizer: With EOS and padding tokens; BOS is put before every prompt where it has one.
        batch_size: Sequences in one forward.
        progress: Whether long calls show a bar.

    Raises:
        Diverged: From every method: the model's logits are no numbers.
    """

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int, progress: bool = False
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.progress = progress

    @property
    def places(self) -> int | None:
        """The most tokens that the model takes, prompt and answer together; None: its configuration names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def answer(self, questions: Iterable[Question]) -> list[Answer]:
        """Answers in the order of the questions."""
        asked = list(questions)
        prompts = {text: tuple(encode_prompt(self.tokenizer, text)) for text in {text for text, _, _ in asked}}
        texts = {text for _, completions, _ in asked for text in completions}
        encoded = {text: tuple(encode_completion(self.tokenizer, text)) for text in texts}
        distinct: dict[Ids, _Prompt] = {}
        for text, completions, limit in asked:
            prompt = distinct.setdefault(prompts[text], _Prompt(prompts[text]))
            prompt.logprobs.update({encoded[completion]: [] for completion in completions})
            prompt.limit = max(prompt.limit, limit)
        self._run(list(distinct.values()), [self.tokenizer.eos_token_id])
        found = [distinct[prompts[text]] for text, _, _ in asked]
        said = self._text([prompt.said[:limit] for prompt, (_, _, limit) in zip(found, asked, strict=True)])
        return [
            Answer([np.array(prompt.logprobs[encoded[completion]]) for completion in completions], greedy)
            for prompt, (_, completions, _), greedy in zip(found, asked, said, strict=True)
        ]

    def choose(
        self, prompts: Iterable[str], choices: Sequence[str], max_new_tokens: int
    ) -> tuple[np.ndarray, list[str]]:
        """Natural log-probability of each choice right after each prompt, (prompts, choices), and the greedy texts.

        Where a tokenizer splits the choices into several tokens of which just the last differs, the shared ones belong
        to the prompt. Where they differ otherwise, as " A" and " M" may that are one token and two, all tokens count.

        Raises:
            UserError: The tokenizer writes two choices alike.
        """
        ids = [encode_completion(self.tokenizer, choice) for choice in choices]
        if len({tuple(choice) for choice in ids}) < len(ids):
            raise UserError(f"the model's tokenizer does not tell {list(choices)} apart: {ids}; use another model")
        shared = len(ids[0]) - 1 if all(choice[:-1] == ids[0][:-1] for choice in ids) else 0
        answers = self.answer((prompt, choices, max_new_tokens) for prompt in prompts)
        logprobs = np.array([[of_tokens[shared:].sum() for of_tokens in answer.logprobs] for answer in answers])
        return logprobs.reshape(len(answers), len(choices)), [answer.text for answer in answers]

    def generate(self, prompts: Iterable[str], max_new_tokens: int) -> list[str]:
        """Greedy text after each prompt, up to EOS or `max_new_tokens` tokens, without special tokens."""
        return [answer.text for answer in self.answer((prompt, (), max_new_tokens) for prompt in prompts)]

    def chat(self, conversations: Iterable[Messages], max_new_tokens: int) -> list[str]:
        """The assistant's greedy answer to each conversation, up to the end of its turn or `max_new_tokens` tokens.

        What the chat template itself writes before an answer's content is not part of the text.
        """
        chat = Chat(self.tokenizer)
        prompts = [_Prompt(tuple(chat.encode_prompt(messages)), limit=max_new_tokens) for messages in conversations]
        self._run(prompts, [self.tokenizer.eos_token_id, *([] if chat.end is None else [chat.end])])
        return [text.removeprefix(chat.before) for text in self._text([prompt.said for prompt in prompts])]

    def _text(self, said: list[list[int]]) -> list[str]:
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in said]

    def _require_places(self, prompts: list[_Prompt]) -> None:
        """Raises `UserError` where a prompt and its answer have more tokens than the model has places for."""
        places = self.places
        needed = [len(p.ids) + max([p.limit, *map(len, p.logprobs)]) for p in prompts]
        long = [count for count in needed if places is not None and count > places]
        if long:
            raise UserError(
                f"{len(long)} of {len(prompts)} prompts need up to {max(long):,} tokens with their answers, and the "
                f"model has places for {places:,}; take the long rows out, lower evaluation.max_new_tokens, or use a "
                "model with a longer context"
            )

    @torch.inference_mode()
    def _run(self, prompts: list[_Prompt], stops: Sequence[int]) -> None:
        """Fills in what the prompts are run for; greedy text ends before the first of the `stops` tokens."""
        self._require_places(prompts)
        for batch in self._batches(prompts):
            padded = left_pad([prompt.ids for prompt in batch], self.tokenizer.pad_token_id)
            inputs = {name: tensor.to(self.model.device) for name, tensor in padded.items()}
            goes_on = any(prompt.limit > 1 or any(len(ids) > 1 for ids in prompt.logprobs) for prompt in batch)
            output = self.model(**inputs, logits_to_keep=1, use_cache=goes_on)
            cache = output.past_key_values if goes_on else None
            state = _State(inputs["attention_mask"], cache, self._numbers(output.logits[:, -1]))
            self._score(batch, state)
            texts = [row for row, prompt in enumerate(batch) if prompt.limit]
            if len(texts) < len(batch):
                state.take(texts)
            self._continue([batch[row] for row in texts], state, stops)

    def _score(self, batch: list[_Prompt], state: "_State") -> None:
        """Fills in the completions' log-probabilities."""
        # The first tokens follow the prompts themselves.
        pairs = [(row, ids) for row, prompt in enumerate(batch) for ids in prompt.logprobs]
        firsts = _gathered(state.logits[:, None], [(row, 0, ids[0]) for row, ids in pairs])
        for (row, ids), logprob in zip(pairs, firsts, strict=True):
            batch[row].logprobs[ids] = [logprob]
        # The others follow a beginning; what has the same one, such as choices of one last token, shares its run. A
        # completion's last token predicts nothing that is asked for, so it is not run.
        beginnings: dict[tuple[int, Ids], list[Ids]] = {}
        for row, ids in pairs:
            if len(ids) > 1:
                beginnings.setdefault((row, ids[:-1]), []).append(ids)
        order = sorted(beginnings, key=lambda beginning: -len(beginning[1]))
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            logits = self._after(state.branch([row for row, _ in chunk]), [ids for _, ids in chunk])
            wanted = [(at, row, ids) for at, (row, begun) in enumerate(chunk) for ids in beginnings[row, begun]]
            places = [(at, i, token) for at, _, ids in wanted for i, token in enumerate(ids[1:])]
            logprobs = iter(_gathered(logits, places))
            for _, row, ids in wanted:
                batch[row].logprobs[ids] += [next(logprobs) for _ in ids[1:]]

    def _after(self, state: "_State", sequences: list[Ids]) -> torch.Tensor:
        """Logits after each token of sequences that follow a state's rows: (rows, longest, vocabulary)."""
        longest = max(map(len, sequences))
        # On the right: no token sees what comes after it.
        padded = [[*ids, *[self.tokenizer.pad_token_id] * (longest - len(ids))] for ids in sequences]
        return self._numbers(self.model(**state.next(torch.tensor(padded, device=self.model.device))).logits)

    def _continue(self, prompts: list[_Prompt], state: "_State", stops: Sequence[int]) -> None:
        """Fills in greedy text, token by token; a row that is done leaves the batch."""
        while prompts:
            tokens = state.logits.argmax(dim=-1)
            going = []
            for row, (prompt, token) in enumerate(zip(prompts, tokens.tolist(), strict=True)):
                if token not in stops:
                    prompt.said.append(token)
                    if len(prompt.said) < prompt.limit:
                        going.append(row)
            if len(going) < len(prompts):
                prompts, tokens = [prompts[row] for row in going], tokens[going]
                state.take(going)
            if prompts:
                state.logits = self._numbers(self.model(**state.next(tokens[:, None])).logits[:, -1])

    def _numbers(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits as they are; a broken model would else be scored like one that knows nothing."""
        # NaN is below nothing. A token that a model rules out may have minus infinity.
        if not bool((logits < math.inf).all()):
            raise Diverged(
                f"the model's logits hold NaN or infinity: its weights are broken, or {self.model.dtype} is too narrow "
                "for them; look at its training's loss, and at `training.dtype`"
            )
        return logits

    def _batches(self, prompts: list[_Prompt]) -> Iterator[list[_Prompt]]:
        """Batches of like length, those with greedy text together and first; then the longest first.

        So too little memory shows at once.
        """
        order = sorted(prompts, key=lambda prompt: (prompt.limit == 0, -len(prompt.ids)))
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc="asking", unit="batch", disable=not self.progress, leave=False):
            yield order[start : start + self.batch_size]


@dataclass
class _State:
    """Sequences that were run so far, a row each, and where they go on.

    Attributes:
        mask: Which of the positions so far are real: (rows, positions).
        cache: Of transformers; None where nothing goes on.
        logits: After the last position: (rows, vocabulary).
    """

    mask: torch.Tensor
    cache: Any
    logits: torch.Tensor

    def take(self, rows: list[int]) -> None:
        """Goes on with some of the rows, in the given order, one of them perhaps several times."""
        index = torch.tensor(rows, dtype=torch.long, device=self.mask.device)
        self.mask, self.logits = self.mask[index], self.logits[index]
        if self.cache is not None:
            self.cache.reorder_cache(index)

    def branch(self, rows: list[int]) -> "_State":
        """A state of its own for some of the rows, while this one can go on otherwise."""
        cache = copy.copy(self.cache)
        # Taking rows makes new tensors, so only what holds them is copied; recurrent layers have dictionaries of them.
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in cache.layers:
            vars(layer).update({name: copy.copy(held) for name, held in vars(layer).items() if isinstance(held, dict)})
        branched = _State(self.mask, cache, self.logits)
        branched.take(rows)
        return branched

    def next(self, ids: torch.Tensor) -> dict[str, Any]:
        """The model's arguments for tokens that follow, (rows, tokens), which from now on belong to the state."""
        positions = self.mask.sum(dim=1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        return {
            "input_ids": ids,
            "attention_mask": self.mask,
            "position_ids": positions,
            "past_key_values": self.cache,
            "use_cache": True,
        }


def _gathered(logits: torch.Tensor, places: list[tuple[int, int, int]]) -> list[float]:
    """Natural log-probabilities at places (row, position, token) of logits (rows, positions, vocabulary)."""
    if not places:
        return []
    index = torch.tensor(places, device=logits.device)
    return torch.log_softmax(logits.float(), dim=-1)[tuple(index.T)].double().tolist()
