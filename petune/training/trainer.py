"""transformers' Trainer, with checkpoints that hold the adapter and not the base, and a record of every step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

from petune.core.attached.tuning import Tuning
from petune.training.checkpoints import write_checkpoint
from petune.training.host import (
    SEAMS,
    ResumesWithoutWeights,
    average_over_tokens,
    tell_scores,
)
from petune.training.host_model import checkpointing_arguments, plain_input
from petune.training.lean import lean
from petune.training.packing import check_packing
from petune.training.processes import (
    LONGEST_WAIT,
    ROWS,
    Processes,
    SharedCollate,
    Shares,
    on_cpu,
)
from petune.training.progress import Progress
from petune.training.rates import schedule_of
from petune.training.recipe import Recipe
from petune.training.recorder import Recorder
from petune.training.schedule import Schedule
from petune.training.tasks import Task

LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Which of the Liger kernels stay off: those for the loss want all logits."""


class Adapted(Protocol):
    """What trains: a `petune.Tuning`, or a peer's adapter in its place."""

    def parameters(self) -> Any: ...

    def save(self, folder: str | Path) -> Any: ...


class AdapterTrainer(ResumesWithoutWeights, Trainer):
    """Saves and reads back only what trains; evaluates by the task's own score; takes a recipe's settings.

    A peer's adapter is trained as it is: it has no schedule and no learning rates of its own, and is not packed.
    """

    def __init__(
        self,
        model: nn.Module,
        tuning: Adapted,
        task: Task,
        recorder: Recorder,
        processes: Processes,
        **kwargs: Any,
    ) -> None:
        SEAMS.require()
        self.processes = processes
        self.row_weight = 1.0
        self.settings = task.recipe.training
        self.acting = model
        self.task = task
        self.recorder = recorder
        self.tuning = tuning
        # Trainer makes its folder; what can't be is said before
        self.savings = self._savings()
        check_packing(model, self.savings["packing"])
        super().__init__(
            model=model, callbacks=[recorder], data_collator=task.collate, **kwargs
        )
        average_over_tokens(self, task.token_loss)
        if isinstance(tuning, Tuning):
            self.add_callback(Schedule(tuning))
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(Progress)

    def _savings(self) -> dict[str, Any]:
        """What `lean` is told. A peer's adapter is compared as it is, without petune's savings."""
        t = self.settings
        ours = isinstance(self.tuning, Tuning)
        # in vain where every block is computed again as a whole
        recompute = t.recompute and t.gradient_checkpointing is not True
        return {
            "recompute": ours and recompute,
            "labelled_logits": ours and t.labelled_logits,
            "packing": t.packing if ours or t.packing else False,
            "compile": t.compile,
            "memory_budget": t.memory_budget,
            "tile": t.tile,
            "offload": t.offload,
        }

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training rows in the recorder's order, of which each process gets its share."""
        rows: Any = self.train_dataset
        if self.processes.count > 1:
            return self._shared_rows(rows)
        loader: DataLoader[Any] = DataLoader(
            rows,
            batch_size=self.args.train_batch_size,
            sampler=self.recorder.sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def _shared_rows(self, rows: Any) -> DataLoader[Any]:
        batches = Shares(
            self.recorder.sampler, self.settings.batch_size, self.processes
        )
        by_token = self.task.token_loss
        loader: DataLoader[Any] = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=SharedCollate(self.data_collator, rows[0], by_token=by_token),
            pin_memory=self.args.dataloader_pin_memory,
        )
        # accelerate would share each batch out once more
        prepared: DataLoader[Any] = prepare_data_loader(
            loader,
            self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
        )
        return prepared

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, its groups split by the learning rates that the method asks for."""
        fresh = self.optimizer is None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        if fresh and isinstance(self.tuning, Tuning):
            for wanted in self.tuning.parameter_groups(self.args.learning_rate):
                _set_rate(optimizer, wanted["params"], wanted["lr"])
        return optimizer

    @contextmanager
    def lean(self) -> Iterator[None]:
        """The model as it is trained."""
        with plain_input(self.acting), lean(self.acting, **self.savings):
            yield

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        with self._weighed(inputs):
            loss = super().training_step(model, inputs, *args, **kwargs)
        if self.recorder.first_loss is None:
            self.recorder.first_loss = float(loss)
        return loss

    @contextmanager
    def _weighed(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Let the rows of this process count as much as those of the others, where the loss is a mean over rows."""
        rows = inputs.pop(ROWS, None)
        if rows is not None and not self.task.token_loss:
            of_all = self.processes.sum(int(rows))
            self.row_weight = int(rows) * self.processes.count / of_all
        yield
        self.row_weight = 1.0
        stands_in = rows is not None and not rows
        if stands_in:  # its tokens are not seen
            inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The model's loss, which counts as much as the rows of this process."""
        loss: Any = super().compute_loss(*args, **kwargs)
        return loss if self.row_weight == 1 else loss * self.row_weight

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The task's own metrics on the validation rows, each `eval_<name>`."""
        scores = None
        if self.processes.writes:
            scores = self.task.score(self.acting, self.eval_dataset)
        scores = self.processes.told(scores)
        metrics = {f"eval_{key}": value for key, value in scores.items()}
        self.log(dict(metrics))
        tell_scores(self, metrics)
        return metrics

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        """Write what a checkpoint needs beside Trainer's own state: the adapter, and no base."""
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            write_checkpoint(folder, self.tuning, self.recorder.clock())


def _set_rate(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Any], rate: float
) -> None:
    """Train parameters at a rate of their own: they move out of their groups into new ones, else the same."""
    own = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in own]
        if not moved or group["lr"] == rate:
            continue
        group["params"] = [
            parameter for parameter in group["params"] if id(parameter) not in own
        ]
        optimizer.add_param_group({**group, "params": moved, "lr": rate})


class OneDevice(TrainingArguments):
    """Arguments by which Trainer keeps a model on one device, also where a machine has several."""

    @property
    def n_gpu(self) -> int:
        found: int = super().n_gpu
        return min(found, 1)


def arguments(
    recipe: Recipe, folder: Path, steps: int, *, quiet: bool, several: bool = False
) -> TrainingArguments:
    """A recipe in Trainer's words, for one process or for several that train together."""
    t = recipe.training
    return OneDevice(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=t.batch_size,
        gradient_accumulation_steps=t.gradient_accumulation,
        learning_rate=t.learning_rate,
        lr_scheduler_type=schedule_of(t),
        lr_scheduler_kwargs=dict(t.schedule_args),
        warmup_steps=t.warmup if t.warmup < 1 else int(t.warmup),
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        use_liger_kernel=t.liger,
        liger_kernel_config=LIGER if t.liger else None,
        optim=t.optimizer,
        seed=t.seed,
        bf16=t.mixed_precision,
        logging_steps=t.log_every,
        logging_nan_inf_filter=False,  # a loss that is not a number has to be seen
        eval_strategy="steps" if t.eval_every else "no",
        eval_steps=t.eval_every,
        save_strategy="steps" if t.checkpoint_every else "no",
        save_steps=t.checkpoint_every or steps,
        save_total_limit=2,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=quiet or not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=several and on_cpu(),
        ddp_timeout=int(LONGEST_WAIT.total_seconds()),
        ddp_broadcast_buffers=False,  # they are the frozen base's
        **checkpointing_arguments(int(t.gradient_checkpointing)),
    )
