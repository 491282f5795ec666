"""Answering a prompt with text."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from petune import PetuneError
from petune.training import Task, as_text, as_texts

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

SKIP = -100
"""The label that a loss leaves out."""


class Generation(Task):
    """A completion for a prompt, by a decoder. The loss is on the completion alone.

    The prompt goes through the tokenizer's chat template if it has one. A completion may be a list of right ones:
    the first is trained on, all count in scoring. A row that is too long loses the middle of its prompt; the end of its
    completion too, where that takes more than half of `max_length`, but never the end token. Scores: `chrf` (the mean
    over rows, 0 to 1), `exact_match` (letter case, punctuation and spaces aside), and the held-out completions' `loss`
    a token and `perplexity`.
    """

    head = "causal-lm"
    inputs, targets = ("prompt",), ("completion",)
    reads = {"prompt": as_text, "completion": as_texts}
    metric = "chrf"
    eval_rows = 200
    token_loss, generates = True, True

    def encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        most = self.recipe.training.max_length
        prompt = self._prompt(row["prompt"])
        completion = self._completion(_answers(row["completion"])[0])
        length = len(prompt) + len(completion)
        completion = self._shortened(completion, max(most // 2, most - len(prompt)))
        prompt = _without_middle(prompt, most - len(completion))
        ids = prompt + completion
        self.cuts.add(length - len(ids))
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [SKIP] * len(prompt) + completion,
        }

    def predict(self, model: Any, rows: Dataset) -> list[str]:
        import transformers

        config: Any = transformers.GenerationConfig
        own = model.generation_config.eos_token_id
        ends = {
            self.tokenizer.eos_token_id,
            *(own if isinstance(own, list) else [own]),
        } - {None}
        greedy = config(
            max_new_tokens=self.recipe.training.max_new_tokens,
            do_sample=False,
            use_cache=True,  # Trainer turns the model's own setting off
            eos_token_id=sorted(ends) or None,
            pad_token_id=self.pad_id,
            bos_token_id=self.tokenizer.bos_token_id,
        )

        def answer(batch: dict[str, Tensor]) -> Sequence[str]:
            out = model.generate(
                **batch, generation_config=greedy
            )  # (batch, prompt + answer)
            texts = self.tokenizer.batch_decode(
                out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
            return [text.strip() for text in texts]

        examples = [self._ask(row["prompt"]) for row in rows]
        self.remark(self.cuts.told("prompts", len(examples)))
        return self.answers(model, examples, answer, collate=self._pad_left)

    def score(self, model: Any, rows: Dataset) -> dict[str, float]:
        from sacrebleu.metrics.chrf import CHRF

        chrf = CHRF()
        found = self.predict(model, rows)
        wanted = [_answers(completion) for completion in rows["completion"]]
        pairs = list(zip(found, wanted, strict=True))
        loss = self._loss(model, rows)
        return {
            "chrf": sum(chrf.sentence_score(text, right).score for text, right in pairs)
            / 100
            / len(pairs),
            "exact_match": sum(
                _plain(text) in map(_plain, right) for text, right in pairs
            )
            / len(pairs),
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),  # beyond that a float ends
        }

    def _loss(self, model: nn.Module, rows: Dataset) -> float:
        from petune.training import labelled_logits

        def answer(batch: dict[str, Tensor]) -> Sequence[tuple[float, int]]:
            counts = (batch["labels"][:, 1:] != SKIP).sum(1).tolist()
            with (
                labelled_logits(model)
                if self.recipe.training.labelled_logits
                else nullcontext()
            ):
                loss = float(model(**batch).loss)  # the mean over all of the batch's
            return [(loss * count if count else 0.0, count) for count in counts]

        found: list[tuple[float, int]] = self.answers(
            model, self.encoded(rows, "held-out loss"), answer
        )
        return sum(loss for loss, _ in found) / max(1, sum(count for _, count in found))

    def _ask(self, prompt: str) -> dict[str, Any]:
        """A prompt alone, for an answer."""
        ids = self._prompt(prompt)
        kept = _without_middle(ids, self.recipe.training.max_length)
        self.cuts.add(len(ids) - len(kept))
        return {"input_ids": kept, "attention_mask": [1] * len(kept)}

    def _prompt(self, text: str) -> list[int]:
        """The ids of a prompt; of one without a token, what a text begins with."""
        if self.tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            written = self.tokenizer.apply_chat_template(
                turn, add_generation_prompt=True, tokenize=False
            )
            ids = self._ids(str(written))
        else:
            ids = list(self.tokenizer(text)["input_ids"])
        begin = self.tokenizer.bos_token_id
        return ids or [self.pad_id if begin is None else begin]

    def _completion(self, text: str) -> list[int]:
        """The ids of a completion with the end token, if the tokenizer has one."""
        ids = self._ids(text + (self.tokenizer.eos_token or ""))
        if not ids:
            raise PetuneError(
                f"completion {text!r}: no token to train on, and this tokenizer has no end token; leave the row out."
            )
        return ids

    def _shortened(self, completion: list[int], most: int) -> list[int]:
        """At most so many ids, the end token among them: an answer that was cut still ends."""
        if len(completion) <= most:
            return completion
        if completion[-1] != self.tokenizer.eos_token_id:
            return completion[:most]
        return completion[: most - 1] + completion[-1:]

    def _pad_left(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return self.pad(
            examples, side="left"
        )  # what is generated follows the prompt at once

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _without_middle(ids: list[int], most: int) -> list[int]:
    """At most so many ids, from both ends: what is asked stands at one or the other."""
    if len(ids) <= most:
        return ids
    return ids[: most // 2] + ids[len(ids) - (most - most // 2) :]


def _answers(completion: str | Sequence[str]) -> list[str]:
    return [completion] if isinstance(completion, str) else list(completion)


def _plain(text: str) -> str:
    return " ".join(
        text.casefold().translate(str.maketrans("", "", string.punctuation)).split()
    )
