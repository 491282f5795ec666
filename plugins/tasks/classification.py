"""Sorting texts into classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from petune import PetuneError
from petune.training import Task, as_label, as_text

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
    reads = {"text": as_text, "text_pair": as_text, "label": as_label}
    metric = "accuracy"
    labels: list[Any]
    paired = False
    """Whether the training rows have a `text_pair`."""
    end: int | None = None
    """The token that the class is read off, of models that go by it: T5, BART."""

    def fit(self, train: Dataset) -> None:
        source = (
            f"{self.recipe.data}: column {self.recipe.columns.get('label', 'label')!r}"
        )
        try:
            found = {as_label(label) for label in train["label"]}
        except ValueError as error:
            raise PetuneError(f"{source}: {error}") from None
        if not 2 <= len(found) <= MOST:
            raise PetuneError(f"{source}: {len(found)} different labels in the training rows; "
                              f"classification needs 2 to {MOST}.")  # fmt: skip
        self.labels = sorted(found)
        if len({str(label).strip() for label in found}) < len(found):
            self.remark(
                f"{source}: some labels differ in spaces at their ends only; they are classes of their own."
            )
        self.paired = "text_pair" in train.column_names

    def check(self, rows: Dataset, split: str) -> None:
        unseen = [label for label in rows["label"] if self._index(label) == UNSEEN]
        if unseen:
            raise PetuneError(
                f"column of role 'label': {unseen[0]!r} is in {len(unseen)} of the {len(rows)} rows of the split "
                f"{split!r} and in none to train on; leave them out, or name labelled rows as data: {{{split}: …}}."
            )

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels} | ({"paired": True} if self.paired else {})

    def restore(self, state: Mapping[str, Any]) -> None:
        labels = state["labels"]
        if not isinstance(labels, list) or len(labels) < 2:
            raise ValueError("its labels are no list")
        self.labels = [as_label(label) for label in labels]
        self.paired = bool(state.get("paired", False))

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
        self._tell_of_unseen(rows["label"], truth.tolist())
        logits = torch.tensor(self._logits(model, rows))  # (rows, labels)
        found = logits.argmax(-1)
        return {
            "accuracy": float(accuracy_score(truth, found)),
            "macro_f1": float(f1_score(truth, found, average="macro", zero_division=0)),
            "loss": float(
                torch.nn.functional.cross_entropy(logits, truth, ignore_index=UNSEEN)
            ),
        }

    def _tell_of_unseen(self, given: Sequence[Any], truth: Sequence[int]) -> None:
        """Say of how many rows no answer can be right; refuse if of all."""
        unseen = [label for label, i in zip(given, truth, strict=True) if i == UNSEEN]
        if not unseen:
            return
        known = ", ".join(map(str, self.labels[:4])) + ", …" * (len(self.labels) > 4)
        if len(unseen) == len(truth):
            raise PetuneError(
                f"label {unseen[0]!r}: no label here occurs in the training rows ({known})."
            )
        self.remark(
            f"{len(unseen)} of {len(truth)} scored rows have a label, such as {unseen[0]!r}, that no training row has "
            f"({known}): they count as misses."
        )

    def _ask(self, row: Mapping[str, Any]) -> dict[str, Any]:
        texts, most = (
            (row["text"], row.get("text_pair")),
            self.recipe.training.max_length,
        )
        encoded = dict(self.tokenizer(*texts))
        length = len(encoded["input_ids"])
        if length > most:
            encoded = dict(self.tokenizer(*texts, truncation=True, max_length=most))
            self.cuts.add(length - len(encoded["input_ids"]))
        if not length:  # a text without a token, to a tokenizer that adds none
            encoded |= {"input_ids": [self.pad_id], "attention_mask": [1]}
        return encoded

    def _logits(self, model: nn.Module, rows: Dataset) -> list[list[float]]:
        self._check_pairs(rows)

        def answer(batch: dict[str, Tensor]) -> Sequence[list[float]]:
            logits: list[list[float]] = model(**batch).logits.float().tolist()
            return logits

        examples = [self._ask(row) for row in rows]
        self.remark(self.cuts.told("answers", len(examples)))
        return self.answers(model, examples, answer)

    def _check_pairs(self, rows: Dataset) -> None:
        """Refuse texts alone where the training rows were pairs; say so the other way round."""
        has_pairs = "text_pair" in rows.column_names
        if self.paired and not has_pairs:
            raise PetuneError(
                "no column 'text_pair', and the training rows were pairs; add it."
            )
        if has_pairs and not self.paired:
            self.remark(
                "column 'text_pair' is read, though the training rows had none."
            )

    def _index(self, label: Any) -> int:
        """The class of a label; one file may write the number 7 and another the text "7"."""
        if label in self.labels:
            return self.labels.index(label)
        spelled = [str(known) for known in self.labels]
        return spelled.index(str(label)) if str(label) in spelled else UNSEEN
