"""Answering a prompt with text."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from petune.tune import Task

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
    token_loss = True
    _labelled_only = False

    def bind(self, model: nn.Module) -> None:
        import inspect

        from transformers import modeling_utils

        super().bind(model)
        # a (batch, length) mask of the positions to keep is understood by models that slice by this function
        takes_mask = "logits_to_keep" in inspect.signature(model.forward).parameters
        takes_mask &= hasattr(modeling_utils, "slice_logits_to_keep")
        self._labelled_only = self.recipe.training.labelled_logits and takes_mask

    def encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        answer = _answers(row["completion"])[0] + (self.tokenizer.eos_token or "")
        completion = self._ids(answer)[: self.recipe.training.max_length // 2]
        prompt = self._prompt(row["prompt"], self.recipe.training.max_length - len(completion))
        ids = prompt + completion
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [SKIP] * len(prompt) + completion}

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        import torch

        batch = self.pad(examples)
        if self._labelled_only:
            following = torch.nn.functional.pad(batch["labels"], (0, 1), value=SKIP)[:, 1:]  # (batch, length)
            batch["logits_to_keep"] = following != SKIP
            batch["shift_labels"] = following[batch["logits_to_keep"]]  # (labelled,)
        return batch

    def predict(self, model: Any, rows: Dataset) -> list[str]:
        import transformers

        config: Any = transformers.GenerationConfig
        own = model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        greedy = config(
            max_new_tokens=self.recipe.training.max_new_tokens,
            do_sample=False,
            use_cache=True,  # Trainer turns the model's own setting off
            eos_token_id=sorted(ends) or None,
            pad_token_id=self.pad_id,
            bos_token_id=self.tokenizer.bos_token_id,
        )

        def answer(batch: dict[str, Tensor]) -> Sequence[str]:
            out = model.generate(**batch, generation_config=greedy)  # (batch, prompt + answer)
            texts = self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            return [text.strip() for text in texts]

        prompts = [self._prompt(row["prompt"], self.recipe.training.max_length) for row in rows]
        examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in prompts]
        return self.answers(model, examples, answer, collate=self._pad_left)

    def score(self, model: Any, rows: Dataset) -> dict[str, float]:
        from sacrebleu.metrics.chrf import CHRF

        chrf = CHRF()
        found = self.predict(model, rows)
        wanted = [_answers(completion) for completion in rows["completion"]]
        pairs = list(zip(found, wanted, strict=True))
        loss = self._loss(model, rows)
        return {
            "chrf": sum(chrf.sentence_score(text, right).score for text, right in pairs) / 100 / len(pairs),
            "exact_match": sum(_plain(text) in map(_plain, right) for text, right in pairs) / len(pairs),
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),  # beyond that a float ends
        }

    def _loss(self, model: nn.Module, rows: Dataset) -> float:
        import torch

        def answer(batch: dict[str, Tensor]) -> Sequence[tuple[float, int]]:
            labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=SKIP)[:, 1:]  # (batch, length)
            labelled = labels != SKIP
            flat = batch.get("shift_labels", labels[labelled])  # (labelled,); the labels also say where prompts end
            logits = model(**batch).logits
            logits = logits if self._labelled_only else logits[labelled]  # (labelled, vocabulary)
            losses = torch.nn.functional.cross_entropy(logits.float(), flat, reduction="none")
            rows = torch.split(losses, labelled.sum(1).tolist())
            return [(float(row.sum()), len(row)) for row in rows]

        found: list[tuple[float, int]] = self.answers(
            model, [self.encode(row) for row in rows], answer, collate=self.collate
        )
        return sum(loss for loss, _ in found) / max(1, sum(count for _, count in found))

    def _prompt(self, text: str, most: int) -> list[int]:
        """The prompt's ids; of one that is too long the middle is left out, so that both its ends stay."""
        if self.tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            ids = self._ids(str(self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)))
        else:
            ids = list(self.tokenizer(text)["input_ids"])
        return ids if len(ids) <= most else ids[: most // 2] + ids[len(ids) - (most - most // 2) :]

    def _pad_left(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return self.pad(examples, side="left")  # what is generated follows the prompt at once

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _answers(completion: str | Sequence[str]) -> list[str]:
    return [completion] if isinstance(completion, str) else list(completion)


def _plain(text: str) -> str:
    return " ".join(text.casefold().translate(str.maketrans("", "", string.punctuation)).split())
