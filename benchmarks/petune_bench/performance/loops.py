"""Plain training loops with and without `petune.lean`, and PEFT in transformers' Trainer: who takes part where the
model is no causal one, or the loop is not petune's.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import petune
from petune.training.host_model import checkpoint_blocks
from petune.training.memory import measure_step, resident_bytes
from petune.training.recipe import parse
from petune.training.setup import make_splits, make_task
from petune_bench.peers import configure
from petune_bench.performance.contenders import Batch, shared_copy

RATE = 5e-4


@dataclass(frozen=True)
class Work:
    """What is trained, and how large it is.

    Args:
        base: makes the base model; contenders share its weights.
        method: petune's method, of which PEFT's form takes part.
        task: what PEFT calls the task.
        options: the method's arguments.
        fresh: the modules that train along.
    """

    base: Callable[[], Any]
    task: str
    method: str = "lora"
    options: Mapping[str, Any] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()


@cache
def minilm(precision: str = "nf4", dtype: str = "fp32") -> Any:
    """MiniLM with a head for two classes."""
    petune_dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return petune.from_pretrained(
        "minilm",
        precision=precision,
        head="sequence-classification",
        dtype=petune_dtypes[dtype],
    )


@cache
def t5() -> Any:
    """A T5 of 60 million parameters, the sizes of T5-small, with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0))  # type: ignore[call-arg]


@cache
def smollm2(precision: str = "fp32") -> Any:
    """SmolLM2-135M."""
    return petune.from_pretrained("smollm2-135m", precision=precision, head="causal-lm")


class Loop:
    """A model and a way to take a training step.

    Args:
        name: what it is called in tables.
        lean: what `petune.lean` is told; None for a loop without it.
        trainer: whether transformers' Trainer takes the steps.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        base: Any,
        lean: Mapping[str, Any] | None = None,
        *,
        trainer: bool = False,
    ) -> None:
        self.name, self.model = name, model.train()
        self.base_bytes = resident_bytes(base)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.trainer = _trainer(model) if trainer else None
        self.optimizer: Any = (
            self.trainer.create_optimizer()
            if self.trainer
            else torch.optim.AdamW(self.trainable, lr=RATE, fused=True)
        )
        self.stack = ExitStack()
        if lean is not None:
            self.stack.enter_context(petune.lean(model, **lean))

    def step(self, batch: Batch) -> tuple[float, float]:
        """(seconds, loss) of one training step."""
        began = time.perf_counter()
        if self.trainer is None:
            loss = self.loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            (given,), labelled = self.trainer.get_batch_samples(
                iter([batch]), 1, torch.device("cpu")
            )
            loss = self.trainer.training_step(self.model, given, labelled)
        nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began, float(loss.detach())

    def loss(self, batch: Batch) -> Tensor:
        """The model's own loss."""
        if self.trainer is not None:
            found: Any = self.trainer.compute_loss(self.model, dict(batch))
            return found
        return self.model(**batch).loss

    def memory(self, batch: Batch) -> tuple[int, int]:
        """(peak bytes above the base, bytes kept for backward) of a step."""
        told = measure_step(
            self.model, self.optimizer, lambda: self.loss(batch), batch.values()
        )
        return told[0] - self.base_bytes, told[1]

    def close(self) -> None:
        """Take the savings off."""
        self.stack.close()


def _trainer(model: Any) -> Trainer:
    folder = tempfile.mkdtemp()
    defaults = TrainingArguments(
        folder, report_to="none", disable_tqdm=True, learning_rate=RATE
    )
    made = Trainer(model, defaults)
    made.current_gradient_accumulation_steps = 1
    return made


def ours(
    name: str,
    work: Work,
    lean: Mapping[str, Any] | None,
    *,
    trainer: bool = False,
    checkpointing: bool = False,
) -> Loop:
    """Petune's method on a copy of the base.

    Args:
        checkpointing: whether its blocks are computed again in backward.
    """
    model = shared_copy(work.base())
    torch.manual_seed(0)
    petune.attach(model, work.method, **work.options)
    _train_along(model, work.fresh)
    if checkpointing:
        checkpoint_blocks(model)
    return Loop(name, model, work.base(), lean, trainer=trainer)


def peft(name: str, work: Work, *, checkpointing: bool = False) -> Loop:
    """PEFT's form of the method on a copy of the base, in Trainer with its defaults.

    Args:
        checkpointing: whether its blocks are computed again in backward.
    """
    import peft

    model = shared_copy(work.base())
    torch.manual_seed(0)
    config = configure(model, work.method, None, work.options)
    config.task_type = work.task
    config.modules_to_save = list(work.fresh) or None
    adapted: Any = peft.get_peft_model(model, config)
    if checkpointing:
        checkpoint_blocks(adapted.base_model.model)
    return Loop(name, adapted, work.base(), trainer=True)


def _train_along(model: Any, names: Sequence[str]) -> None:
    for name in names:
        model.get_submodule(name).requires_grad_(True)


def sentences(count: int, size: int = 32) -> Iterator[Batch]:
    """Batches of sentences of movie reviews with their labels, in a random order, as the quickstart has them."""
    told = parse({"model": "minilm", "precision": "nf4", "task": "classification", "data": "vader-movies",
                  "output": "-", "training": {"max_length": 64, "batch_size": size}})  # fmt: skip
    task, train = make_task(told), make_splits(told)["train"]
    task.fit(train)
    order = random.Random(0).sample(range(len(train)), count * size)
    for start in range(0, len(order), size):
        picked = order[start : start + size]
        yield task.pad([task.encode(train[i]) for i in picked])


def translations(count: int, size: int = 8) -> Iterator[Batch]:
    """Batches of 8 sources of 32 to 128 tokens and targets of 8 to 48, as a T5 takes them."""
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        sources = [draw.randint(32, 128) for _ in range(size)]
        targets = [draw.randint(8, 48) for _ in range(size)]
        ids = torch.randint(5, 32_000, (size, max(sources)), generator=generator)
        labels = torch.randint(5, 32_000, (size, max(targets)), generator=generator)
        mask = torch.arange(max(sources)) < torch.tensor(sources)[:, None]
        padding = torch.arange(max(targets)) >= torch.tensor(targets)[:, None]
        yield {
            "input_ids": ids * mask,
            "attention_mask": mask.long(),
            "labels": labels.masked_fill(padding, -100),
        }
