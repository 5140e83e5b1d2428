"""Asking a language model, in length-sorted batches: greedy text, log-probabilities, the likeliest choice."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from molf.encoding import Chat, Messages, encode_completion, encode_prompt, left_pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LanguageModel:
    """A model and its tokenizer as the tasks' scorers see them.

    Args:
        model: Causal language model of transformers; put into evaluation mode.
        tokenizer: With EOS and padding tokens; BOS is put before every prompt where it has one.
        batch_size: Sequences in one forward.
        progress: Whether long calls show a bar.
    """

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int, progress: bool = False
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.progress = progress

    @torch.inference_mode()
    def generate(self, prompts: Iterable[str], max_new_tokens: int) -> list[str]:
        """Greedy text after each prompt, up to EOS or `max_new_tokens` tokens, without special tokens."""
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        return self._continued(encoded, max_new_tokens, [self.tokenizer.eos_token_id])

    @torch.inference_mode()
    def chat(self, conversations: Iterable[Messages], max_new_tokens: int) -> list[str]:
        """The assistant's greedy answer to each conversation, up to the end of its turn or `max_new_tokens` tokens.

        What the chat template itself writes before an answer's content is not part of the text.
        """
        chat = Chat(self.tokenizer)
        encoded = [chat.encode_prompt(messages) for messages in conversations]
        stops = [self.tokenizer.eos_token_id, *([] if chat.end is None else [chat.end])]
        return [text.removeprefix(chat.before) for text in self._continued(encoded, max_new_tokens, stops)]

    def _continued(self, encoded: list[list[int]], max_new_tokens: int, stops: list[int]) -> list[str]:
        """Greedy text after each sequence, up to the first of the `stops` tokens, without special tokens."""
        texts = [""] * len(encoded)
        for rows in self._batches([len(ids) for ids in encoded], "generate"):
            inputs = self._inputs([encoded[i] for i in rows])
            output = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=self._greedy(max_new_tokens, stops),
            )
            # A token that ends a turn need not be one that decoding leaves out.
            new = [_before(stops, row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]
            for i, text in zip(rows, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                texts[i] = text
        return texts

    @torch.inference_mode()
    def completion_logprobs(self, prompts: Iterable[str], completions: Iterable[str]) -> list[np.ndarray]:
        """Natural log-probability of each token of each completion after its prompt: one float64 array a pair."""
        pairs = [
            (encode_prompt(self.tokenizer, prompt), encode_completion(self.tokenizer, completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        result: list[np.ndarray] = [np.empty(0)] * len(pairs)
        for rows in self._batches([len(prompt) + len(completion) for prompt, completion in pairs], "score"):
            longest = max(len(pairs[i][1]) for i in rows)
            # The last token predicts nothing that is asked for, so it need not be run.
            logits = self._logits([(pairs[i][0] + pairs[i][1])[:-1] for i in rows], keep=longest)
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            for row, i in enumerate(rows):
                ids = torch.tensor(pairs[i][1], device=logprobs.device)
                tail = logprobs[row, -len(ids) :]
                result[i] = tail.gather(1, ids[:, None])[:, 0].double().cpu().numpy()
        return result

    @torch.inference_mode()
    def choice_logprobs(self, prompts: Iterable[str], choices: Sequence[str]) -> np.ndarray:
        """Natural log-probability of each choice right after each prompt, one forward a prompt: (prompts, choices).

        A tokenizer that splits the choices into several tokens must do so alike but for the last one; the shared tokens
        then belong to the prompt.

        Raises:
            ValueError: The choices do not differ in just their last token.
        """
        ids = [encode_completion(self.tokenizer, choice) for choice in choices]
        shared = ids[0][:-1]
        last = [choice[-1] for choice in ids]
        if any(choice[:-1] != shared for choice in ids) or len(set(last)) < len(last):
            raise ValueError(f"the tokenizer does not tell {list(choices)} apart by one last token: {ids}")
        encoded = [encode_prompt(self.tokenizer, prompt) + shared for prompt in prompts]
        result = np.empty((len(encoded), len(choices)))
        for rows in self._batches([len(sequence) for sequence in encoded], "choose"):
            logits = self._logits([encoded[i] for i in rows], keep=1)[:, -1]
            result[rows] = torch.log_softmax(logits.float(), dim=-1)[:, last].double().cpu().numpy()
        return result

    def _logits(self, sequences: list[list[int]], keep: int) -> torch.Tensor:
        """Logits of the last `keep` positions: (sequences, keep, vocabulary)."""
        return self.model(**self._inputs(sequences), logits_to_keep=keep, use_cache=False).logits

    def _inputs(self, sequences: list[list[int]]) -> dict[str, torch.Tensor]:
        padded = left_pad(sequences, self.tokenizer.pad_token_id)
        return {name: tensor.to(self.model.device) for name, tensor in padded.items()}

    def _greedy(self, max_new_tokens: int, stops: list[int]):  # type: ignore[no-untyped-def]  # transformers is imported late
        from transformers import GenerationConfig

        # A model's own generation defaults (sampling, top-k) must not reach a score.
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
        )

    def _batches(self, lengths: list[int], what: str) -> Iterator[list[int]]:
        """Indices in batches of like length, the longest first, so that too little memory shows at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc=what, unit="batch", disable=not self.progress, leave=False):
            yield order[start : start + self.batch_size]


def _before(stops: Sequence[int], ids: list[int]) -> list[int]:
    """The ids up to the first of the `stops`."""
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]
