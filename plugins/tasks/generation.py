"""Answering a prompt with text."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from petune.training import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

SKIP = -100
"""The label that a loss leaves out."""


class Generation(Task):
    """A completion for a prompt, by a decoder. The loss is on the completion alone.

    The prompt goes through the tokenizer's chat template if it has one. A completion may be a list of right ones:
    the first is trained on, all count in scoring. Scores: `chrf` (the mean over rows, 0 to 1), `exact_match` (letter
    case, punctuation and spaces aside), and the held-out completions' `loss` a token and `perplexity`.
    """

    head = "causal-lm"
    inputs, targets = ("prompt",), ("completion",)
    metric = "chrf"
    eval_rows = 200
    token_loss, generates = True, True

    def encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        answer = _answers(row["completion"])[0] + (self.tokenizer.eos_token or "")
        completion = self._ids(answer)[: self.recipe.training.max_length // 2]
        prompt = self._prompt(
            row["prompt"], self.recipe.training.max_length - len(completion)
        )
        ids = prompt + completion
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

        prompts = [
            self._prompt(row["prompt"], self.recipe.training.max_length) for row in rows
        ]
        examples = [
            {"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in prompts
        ]
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
            model, [self.encode(row) for row in rows], answer
        )
        return sum(loss for loss, _ in found) / max(1, sum(count for _, count in found))

    def _prompt(self, text: str, most: int) -> list[int]:
        """The prompt's ids; of one that is too long the middle is left out, so that both its ends stay."""
        if self.tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            ids = self._ids(
                str(
                    self.tokenizer.apply_chat_template(
                        turn, add_generation_prompt=True, tokenize=False
                    )
                )
            )
        else:
            ids = list(self.tokenizer(text)["input_ids"])
        return (
            ids
            if len(ids) <= most
            else ids[: most // 2] + ids[len(ids) - (most - most // 2) :]
        )

    def _pad_left(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return self.pad(
            examples, side="left"
        )  # what is generated follows the prompt at once

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _answers(completion: str | Sequence[str]) -> list[str]:
    return [completion] if isinstance(completion, str) else list(completion)


def _plain(text: str) -> str:
    return " ".join(
        text.casefold().translate(str.maketrans("", "", string.punctuation)).split()
    )
