"""What a task plugin brings: how rows become batches, and how a model's answers are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from petune.errors import PetuneError
from petune.training.cuts import Cuts
from petune.training.remarks import remark

if TYPE_CHECKING:
    import datasets
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from petune.training.recipe import Recipe

Example = dict[str, Any]
"""One encoded row: `input_ids` and what else the model takes, as lists of integers."""


class Task:
    """A kind of question to a model. Subclasses say what their rows hold, encode them and score the answers."""

    head: ClassVar[str]
    """What `petune.from_pretrained` puts on the model."""
    inputs: ClassVar[tuple[str, ...]]
    """Roles that a row needs to be answered."""
    targets: ClassVar[tuple[str, ...]]
    """Roles that it needs besides, to train and to score."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Roles that it may have."""
    reads: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    """By role, what makes a value of a cell, such as `as_text`, or raises a ValueError; other cells stay the same."""
    metric: ClassVar[str]
    """The main score's name among what `score` returns; higher is better."""
    eval_rows: ClassVar[int | None] = None
    """How many rows are scored at most, unless the recipe says so."""
    generates: ClassVar[bool] = False
    """Whether an answer is new tokens behind the row, `training.max_new_tokens` at most."""
    token_loss: ClassVar[bool] = False
    """Whether the model's loss is a mean over labelled tokens, to be taken over a whole accumulated batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.quiet = True
        self.embeddings: int | None = None
        """How many tokens the model has embeddings for, None before there is one."""
        self.cuts = Cuts(recipe.training.max_length)
        self.said: set[str] = set()

    @classmethod
    def roles(cls) -> tuple[str, ...]:
        """Every role that a recipe's `columns` may name."""
        return (*cls.inputs, *cls.targets, *cls.optional)

    def fit(self, train: datasets.Dataset) -> None:
        """Learn from the training rows what the model must be told, such as the labels.

        Raises:
            PetuneError: the rows are not what this task needs.
        """

    def check(self, rows: datasets.Dataset, split: str) -> None:
        """See that the rows of another split can be scored by what `fit` learned.

        Raises:
            PetuneError: they can't; the message names the split and the rows.
        """

    def state(self) -> dict[str, Any]:
        """What `fit` learned, as JSON; kept in the run."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""

    def model_args(self) -> dict[str, Any]:
        """Arguments for `petune.from_pretrained`, such as `num_labels`."""
        return {}

    def bind(self, model: nn.Module) -> None:
        """Settle with the bare model what depends on it; called before it is adapted."""
        config: Any = model.config
        text = config.get_text_config()
        if getattr(text, "pad_token_id", None) is None:
            # decoders find the last token of a row by it
            text.pad_token_id = self.pad_id

    def encode(self, row: Mapping[str, Any]) -> Example:
        """A row with its target, as one training example."""
        raise NotImplementedError

    def encoded(self, rows: datasets.Dataset, what: str) -> list[Example]:
        """Every row with its target, after a word on how many were cut; `what` says what they are for."""
        examples = [self.encode(row) for row in rows]
        self.remark(self.cuts.told(what, len(examples)))
        return examples

    def remark(self, line: str) -> None:
        """Say a line, unless it is empty or said already: a split may be scored many times."""
        if line and line not in self.said:
            self.said.add(line)
            remark(line)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch to train on."""
        return self.pad(examples)

    def score(self, model: nn.Module, rows: datasets.Dataset) -> dict[str, float]:
        """How well the model answers: `metric` and others."""
        raise NotImplementedError

    def predict(self, model: nn.Module, rows: datasets.Dataset) -> list[Any]:
        """The model's answers, one a row, as JSON values."""
        raise NotImplementedError

    @property
    def pad_id(self) -> int:
        """The token that fills a batch up."""
        chosen = self.tokenizer.pad_token_id
        return int(chosen if chosen is not None else self.tokenizer.eos_token_id or 0)

    def pad(
        self, examples: Sequence[Example], side: str = "right"
    ) -> dict[str, Tensor]:
        """Rows of like keys as rectangular tensors, (batch, length); `labels` are filled with -100."""
        import torch

        from petune.core.method.batch import SKIP

        fill = {"input_ids": self.pad_id, "labels": SKIP}
        batch = {}
        for key in examples[0]:
            values = [example[key] for example in examples]
            if isinstance(values[0], list):
                values = _padded(values, fill.get(key, 0), side)
            batch[key] = torch.tensor(values)
        if "input_ids" in batch:
            self._check_tokens(int(batch["input_ids"].max()))
        return batch

    def _check_tokens(self, last: int) -> None:
        """See that the model has an embedding for a token, and so for those before it."""
        if self.embeddings is not None and last >= self.embeddings:
            token = self.tokenizer.convert_ids_to_tokens(last)
            what = f"has token {last} ({token!r}), and the model embeddings for {self.embeddings}"
            raise PetuneError(
                f"{self.recipe.model}: its tokenizer {what}; take the tokenizer that belongs to it."
            )

    def answers(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        answer: Callable[[dict[str, Tensor]], Sequence[Any]],
        *,
        collate: Callable[[Sequence[Example]], dict[str, Tensor]] | None = None,
    ) -> list[Any]:
        """What `answer` makes of every batch, one item a row, in the order of the rows.

        Rows of like length go together (`collate` is `pad` unless given); the model is in eval mode and no gradients
        are kept.
        """
        import torch

        size = (
            self.recipe.training.eval_batch_size or 2 * self.recipe.training.batch_size
        )
        longest_first = sorted(
            range(len(examples)), key=lambda i: -len(examples[i]["input_ids"])
        )
        found: list[Any] = [None] * len(examples)
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                for chosen in self._batches(longest_first, size):
                    batch = (collate or self.pad)([examples[i] for i in chosen])
                    moved = {key: value.to(device) for key, value in batch.items()}
                    for i, item in zip(chosen, answer(moved), strict=True):
                        found[i] = item
        finally:
            model.train(training)
        return found

    def _batches(self, order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
        """An order in pieces of at most `size`, with a progress bar unless the task is quiet."""
        from tqdm import tqdm

        hidden = True if self.quiet else None  # None: where there is no terminal
        for start in tqdm(
            range(0, len(order), size), "eval", leave=False, disable=hidden
        ):
            yield order[start : start + size]


def _padded(rows: Sequence[list[int]], fill: int, side: str) -> list[list[int]]:
    """Rows filled up to the length of the longest."""
    length = max(len(row) for row in rows)
    found = []
    for row in rows:
        gap = [fill] * (length - len(row))
        found.append(gap + row if side == "left" else row + gap)
    return found
