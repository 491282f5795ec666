"""Sorting texts into classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from petune import PetuneError
from petune.training import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

MOST = 1000  # classes: more of them are a column of something else
UNSEEN = -100
"""A label that the training rows don't have: counted as a miss, left out of the loss."""


class Classification(Task):
    """One label a text (or pair of texts). The labels are those of the training rows, strings or integers."""

    head = "sequence-classification"
    inputs, targets, optional = ("text",), ("label",), ("text_pair",)
    metric = "accuracy"
    labels: list[Any]
    end: int | None = None
    """The token that the class is read off, of models that go by it: T5, BART."""

    def fit(self, train: Dataset) -> None:
        found = set(train["label"])
        if any(isinstance(label, float) and not label.is_integer() for label in found):
            raise PetuneError(f"column of role 'label': holds fractions such as {max(found, key=lambda x: x % 1)}; "
                              "classification needs names or integers.")  # fmt: skip
        if not 2 <= len(found) <= MOST:
            raise PetuneError(f"column of role 'label': {len(found)} different labels in the training rows; "
                              f"classification needs 2 to {MOST}.")  # fmt: skip
        self.labels = sorted(found)

    def check(self, rows: Dataset, split: str) -> None:
        unseen = [label for label in rows["label"] if self._index(label) == UNSEEN]
        if unseen:
            raise PetuneError(
                f"column of role 'label': {unseen[0]!r} is in {len(unseen)} of the {len(rows)} rows of the split "
                f"{split!r} and in none to train on; leave them out, or name labelled rows as data: {{{split}: …}}."
            )

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.labels = state["labels"]

    def model_args(self) -> dict[str, Any]:
        names = {i: str(label) for i, label in enumerate(self.labels)}
        return {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
            "ignore_mismatched_sizes": True,  # a checkpoint's head for other labels gives way to a new one
        }

    def bind(self, model: nn.Module) -> None:
        super().bind(model)
        config: Any = model.config
        self.end = config.eos_token_id if config.is_encoder_decoder else None

    def pad(
        self, examples: Sequence[dict[str, Any]], side: str = "right"
    ) -> dict[str, Tensor]:
        return super().pad([self._closed(example) for example in examples], side)

    def _closed(self, example: dict[str, Any]) -> dict[str, Any]:
        """An example with the end token, if the model goes by it and the tokenizer adds none."""
        if self.end is None or self.end in example["input_ids"]:
            return example
        most = self.recipe.training.max_length - 1
        closed = {
            key: [*value[:most], value[-1]] if isinstance(value, list) else value
            for key, value in example.items()
        }
        return {**closed, "input_ids": [*example["input_ids"][:most], self.end]}

    def encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._ask(row), "labels": self._index(row["label"])}

    def predict(self, model: nn.Module, rows: Dataset) -> list[Any]:
        return [
            self.labels[max(range(len(row)), key=row.__getitem__)]
            for row in self._logits(model, rows)
        ]

    def score(self, model: nn.Module, rows: Dataset) -> dict[str, float]:
        import torch
        from sklearn.metrics import accuracy_score, f1_score

        truth = torch.tensor([self._index(label) for label in rows["label"]])
        if bool((truth == UNSEEN).all()):
            known = ", ".join(map(str, self.labels[:10]))
            raise PetuneError(
                f"label {rows['label'][0]!r}: no label here occurs in the training rows ({known})."
            )
        logits = torch.tensor(self._logits(model, rows))  # (rows, labels)
        found = logits.argmax(-1)
        return {
            "accuracy": float(accuracy_score(truth, found)),
            "macro_f1": float(f1_score(truth, found, average="macro", zero_division=0)),
            "loss": float(
                torch.nn.functional.cross_entropy(logits, truth, ignore_index=UNSEEN)
            ),
        }

    def _ask(self, row: Mapping[str, Any]) -> dict[str, Any]:
        length = self.recipe.training.max_length
        encoded = dict(
            self.tokenizer(
                row["text"], row.get("text_pair"), truncation=True, max_length=length
            )
        )
        if not encoded[
            "input_ids"
        ]:  # a text without a token, to a tokenizer that adds none
            encoded |= {"input_ids": [self.pad_id], "attention_mask": [1]}
        return encoded

    def _logits(self, model: nn.Module, rows: Dataset) -> list[list[float]]:
        def answer(batch: dict[str, Tensor]) -> Sequence[list[float]]:
            logits: list[list[float]] = model(**batch).logits.float().tolist()
            return logits

        return self.answers(model, [self._ask(row) for row in rows], answer)

    def _index(self, label: Any) -> int:
        return self.labels.index(label) if label in self.labels else UNSEEN
