"""Who takes part: PEFT with Trainer's defaults, and petune's loop at some settings, on one frozen base."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import petune
from petune.loading.models import DTYPES
from petune.training.host_model import checkpoint_blocks
from petune.training.memory import measure_step, resident_bytes
from petune.training.order import EpochSampler
from petune.training.processes import Processes
from petune.training.recipe import Recipe, parse
from petune.training.recorder import Recorder
from petune.training.setup import make_splits, make_task
from petune.training.tasks import Example, Task
from petune.training.trainer import AdapterTrainer, arguments

MODEL, RANK = "smollm2-135m", 16
Batch = dict[str, Tensor]


@cache
def base(precision: str) -> Any:
    """The loaded base model, at "nf4" or "nf4 in bf16", as which it computes; contenders share its weights."""
    precision, _, computes = precision.partition(" in ")
    dtype: dict[str, Any] = {"dtype": DTYPES[computes]} if computes else {}
    return petune.from_pretrained(MODEL, precision=precision, head="causal-lm", **dtype)


def recipe(data: str, settings: Mapping[str, Any], precision: str = "fp32") -> Recipe:
    """LoRA on a set of prompts and completions."""
    training = {"learning_rate": 5e-4, "schedule": "constant", **settings}
    return parse({"model": MODEL, "precision": precision, "task": "generation", "data": data, "output": "-",
                  "training": training})  # fmt: skip


def rows(
    data: str, count: int, max_length: int, seed: int = 0
) -> tuple[Task, list[Example]]:
    """Encoded training rows in a random order, and the task that makes batches of them."""
    told = recipe(data, {"max_length": max_length})
    task, train = make_task(told), make_splits(told)["train"]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator).tolist()
    return task, [task.encode(train[i]) for i in order[:count]]


def plain_batch(size: int = 2, length: int = 128, labelled: int = 16) -> Batch:
    """Rows of one length, without padding, whose last tokens are labelled."""
    ids = torch.randint(
        5, 40_000, (size, length), generator=torch.Generator().manual_seed(0)
    )
    labels = ids.masked_fill(torch.arange(length) < length - labelled, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Contender:
    """A trainer and its model, ready to step."""

    def __init__(self, name: str, trainer: Trainer, model: Any, precision: str) -> None:
        self.name, self.trainer, self.model = name, trainer, model
        self.base_bytes = resident_bytes(base(precision))
        self.optimizer = trainer.create_optimizer()
        self.stack = ExitStack()
        if isinstance(trainer, AdapterTrainer):
            self.stack.enter_context(trainer.lean())
            every = int(trainer.settings.gradient_checkpointing)
            if every:  # as Trainer does when it begins to train
                checkpoint_blocks(model, every)
        trainer.current_gradient_accumulation_steps = 1
        model.config.use_cache = False
        model.train()

    def step(self, batch: Batch) -> tuple[float, float]:
        """(seconds, loss) of one training step, as Trainer takes it."""
        began = time.perf_counter()
        (given,), labelled = self.trainer.get_batch_samples(
            iter([batch]), 1, torch.device("cpu")
        )
        loss = self.trainer.training_step(self.model, given, labelled)
        torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.requires_grad], 1.0
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began, float(loss)

    def memory(self, batch: Batch) -> tuple[int, int]:
        """(peak bytes above the base, bytes kept for backward) of a step."""
        trainer = self.trainer

        def loss() -> Any:
            return trainer.compute_loss(self.model, dict(batch))

        peak, kept = measure_step(self.model, self.optimizer, loss, batch.values())
        return peak - self.base_bytes, kept

    def close(self) -> None:
        """Take compiled and recomputing forwards off."""
        self.stack.close()


def contend(
    name: str,
    task: Task,
    settings: Mapping[str, Any] | None,
    precision: str = "fp32",
    dropout: float = 0.0,
) -> Contender:
    """PEFT where `settings` is None, else petune with these training settings; all start from the same weights."""
    model = shared_copy(base(precision))
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    tuning = petune.attach(model, "lora", rank=RANK, dropout=dropout)
    if settings is None:
        weights = {name: tensor.detach() for name, tensor in tuning.state()}
        tuning.detach()
        model = peft_lora(model, weights, dropout)
        defaults = TrainingArguments(
            str(folder), report_to="none", disable_tqdm=True, learning_rate=5e-4
        )
        return Contender(name, Trainer(model, defaults), model, precision)
    told = recipe("nq-sample", settings, precision.partition(" ")[0])
    nothing: Any = []  # the batches are given to `step`
    alone = Processes()
    recorder = Recorder(folder, EpochSampler(nothing, 1, 0, False), 1, alone)
    ours = AdapterTrainer(
        model,
        tuning,
        type(task)(task.tokenizer, told),
        recorder,
        alone,
        args=arguments(told, folder, 1, quiet=True),
        train_dataset=nothing,
    )
    return Contender(name, ours, model, precision)


def batches(task: Task, examples: list[Example], size: int = 8) -> Iterator[Batch]:
    """Padded batches in the rows' order."""
    for start in range(0, len(examples), size):
        yield task.pad(examples[start : start + size])


def shared_copy(model: Any) -> Any:
    """A model of its own around the same frozen tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def peft_lora(
    model: Any, weights: Mapping[str, Tensor], dropout: float = 0.0, rank: int = RANK
) -> Any:
    """PEFT's LoRA with the weights that petune's started from."""
    import peft

    targets = sorted({name.rpartition(".")[0] for name in weights})
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=16,
        lora_dropout=dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    made = peft.get_peft_model(model, config)
    told = {
        f"base_model.model.{n[:-2]}.lora_{n[-1]}.weight": t for n, t in weights.items()
    }
    peft.set_peft_model_state_dict(made, told)
    return made
