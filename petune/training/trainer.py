"""transformers' Trainer, with checkpoints that hold the adapter and not the base, and a record of every step."""

from __future__ import annotations

import json
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from petune.core.attached.tuning import Tuning
from petune.errors import PetuneError
from petune.files import read_json, write_text
from petune.training.lean import plain_input, recomputed
from petune.training.logits import labelled_logits
from petune.training.order import EpochSampler
from petune.training.packing import flatten, is_padded, packed, refusal
from petune.training.recipe import Recipe, Training
from petune.training.regions import compiled
from petune.training.result import finite, write_json
from petune.training.tasks import Task

PROGRESS = "progress.safetensors"
"""In a checkpoint, where a method's schedule stands."""


class Adapted(Protocol):
    """What trains: a `petune.Tuning`, or a peer's adapter in its place."""

    def parameters(self) -> Any: ...

    def save(self, folder: str | Path) -> Any: ...


class Recorder(TrainerCallback):
    """Times every step, writes metrics.jsonl, and stops the training at a step's end when told to."""

    def __init__(
        self, path: Path, sampler: EpochSampler, updates_per_epoch: int
    ) -> None:
        self.path, self.sampler, self.updates_per_epoch = (
            path,
            sampler,
            updates_per_epoch,
        )
        self.seconds = 0.0
        self.steps: list[tuple[float, int]] = []  # (seconds, tokens) of this session
        self.loss = float("nan")
        self.stopping = False
        self._began = 0.0
        self._tokens = 0

    def resume(self, checkpoint: Path, step: int) -> None:
        """Go on from a checkpoint: rows that a crashed session wrote after it are dropped."""
        clock = read_json(checkpoint / "clock.json")
        self.seconds, self.loss = clock["seconds"], clock["loss"] or float("nan")
        rows = (
            self.path.read_text(encoding="utf-8").splitlines()
            if self.path.exists()
            else []
        )
        kept = [row for row in rows if _step(row) <= step]
        write_text(self.path, "".join(row + "\n" for row in kept))

    def clock(self) -> dict[str, float]:
        """What `resume` needs back."""
        return {"seconds": self.seconds, "loss": self.loss}

    @property
    def timed(self) -> list[tuple[float, int]]:
        """The steps to measure by: the first two also fill caches."""
        return self.steps[2:] or self.steps

    @property
    def step_seconds(self) -> float:
        return (
            statistics.median(seconds for seconds, _ in self.timed)
            if self.steps
            else float("nan")
        )

    @property
    def tokens_per_second(self) -> float:
        spent = sum(seconds for seconds, _ in self.timed)
        return (
            sum(tokens for _, tokens in self.timed) / spent if spent else float("nan")
        )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        self._tokens = state.num_input_tokens_seen

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        self.sampler.epoch = state.global_step // self.updates_per_epoch

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        self._began = _now()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        spent, seen = _now() - self._began, int(state.num_input_tokens_seen)
        self.steps.append((spent, seen - self._tokens))
        self.seconds += spent
        self._tokens = seen
        if self.stopping and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        # a row at every checkpoint: the mean loss in it starts anew there, whether or not the run is stopped
        control.should_log |= (
            control.should_save or state.global_step >= state.max_steps
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        row: dict[str, Any] = {"step": state.global_step}
        if "loss" in logs:
            self.loss = logs["loss"]
            row |= {
                key: logs[key]
                for key in ("loss", "learning_rate", "grad_norm")
                if key in logs
            }
        elif any(key.startswith("eval_") for key in logs):
            row |= {
                key: value for key, value in logs.items() if key.startswith("eval_")
            }
        else:
            return
        row |= {
            "tokens": int(state.num_input_tokens_seen),
            "seconds": round(self.seconds, 6),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")


class Schedule(TrainerCallback):
    """Stands around every step of the optimizer, for methods with a schedule."""

    def __init__(self, tuning: Tuning) -> None:
        self.tuning, self.running = tuning, ExitStack()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        self.running.enter_context(self.tuning.step(state.global_step, state.max_steps))

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        self.running.close()


class Progress(ProgressCallback):
    """Trainer's bar, with the figures beside it instead of a line each."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(
                loss=f"{logs['loss']:.4g}", lr=f"{logs['learning_rate']:.2g}"
            )


class AdapterTrainer(Trainer):
    """Saves and reads back only what trains; evaluates by the task's own score; takes a recipe's settings."""

    def __init__(
        self,
        model: nn.Module,
        tuning: Adapted,
        task: Task,
        recorder: Recorder,
        **kwargs: Any,
    ) -> None:
        self.settings, self.acting, self.task, self.recorder = (
            task.recipe.training,
            model,
            task,
            recorder,
        )
        self.tuning: Any = tuning
        self.packs = (
            self._packs()
        )  # Trainer makes its folder; what can't be is said before
        super().__init__(
            model=model, callbacks=[recorder], data_collator=task.collate, **kwargs
        )
        self.model_accepts_loss_kwargs = (
            task.token_loss
        )  # else a mean over the batch, which is divided as it is
        self.scheduled = isinstance(
            tuning, Tuning
        )  # a peer's adapter has no schedule and no learning rates
        if isinstance(tuning, Tuning):
            self.add_callback(Schedule(tuning))
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(Progress)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.recorder.sampler

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, its groups split by the learning rates that the method asks for."""
        fresh = self.optimizer is None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        for wanted in (
            self.tuning.parameter_groups(self.args.learning_rate)
            if fresh and self.scheduled
            else []
        ):
            own, lr = {id(p) for p in wanted["params"]}, wanted["lr"]
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in own]
                if moved and group["lr"] != lr:
                    group["params"] = [p for p in group["params"] if id(p) not in own]
                    optimizer.add_param_group({**group, "params": moved, "lr": lr})
        return optimizer

    @contextmanager
    def lean(self) -> Iterator[None]:
        """The model as it is trained: compiled, or with what is cheap computed again."""
        s = self.settings
        with ExitStack() as stack:
            stack.enter_context(plain_input(self.acting))
            if s.compile:
                stack.enter_context(compiled(self.acting, s.memory_budget))
            elif (
                s.recompute
                and s.gradient_checkpointing is not True
                and isinstance(self.acting, PreTrainedModel)
            ):
                stack.enter_context(recomputed(self.acting))
            yield

    def _packs(self) -> bool:
        wanted = self.settings.packing
        if wanted is False or (
            wanted is None and not isinstance(self.tuning, Tuning)
        ):  # a peer trains as it does
            return False
        reason = refusal(self.acting, self.tuning)
        if wanted and reason:
            raise PetuneError(f"training.packing: {reason}; leave it out.")
        return not reason

    @contextmanager
    def laid_out(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A batch as the model takes it, end to end if it is padded. Stands around forward and backward, since
        gradient checkpointing runs attention in both.
        """
        batch = self._prepare_inputs(batch)
        if not self.packs or not is_padded(batch):
            yield batch
            return
        batch, rows = flatten(batch)
        with packed(rows):
            yield batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        with self.laid_out(inputs) as batch:
            return super().training_step(model, batch, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        with ExitStack() as stack:
            if self.settings.labelled_logits:
                stack.enter_context(labelled_logits(self.acting))
            if self.settings.offload:
                stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=True))
            return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {
            f"eval_{key}": value
            for key, value in self.task.score(self.acting, self.eval_dataset).items()
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        self.tuning.save(folder / "adapter")
        if self.scheduled and (progress := self.tuning.progress()):
            save_file(progress, folder / PROGRESS)
        write_json(folder / "clock.json", self.recorder.clock())

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Nothing: the tuning was loaded before the optimizer was made."""


def arguments(
    recipe: Recipe, folder: Path, steps: int, *, quiet: bool
) -> TrainingArguments:
    """A recipe in Trainer's words."""
    t = recipe.training
    schedule = (
        "constant_with_warmup" if t.schedule == "constant" and t.warmup else t.schedule
    )
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=t.batch_size,
        gradient_accumulation_steps=t.gradient_accumulation,
        activation_checkpointing=bool(t.gradient_checkpointing),
        activation_checkpointing_kwargs=_checkpointing(t),
        learning_rate=t.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=t.warmup if t.warmup < 1 else int(t.warmup),
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        use_liger_kernel=t.liger,
        liger_kernel_config={
            "cross_entropy": False,
            "fused_linear_cross_entropy": False,
        }
        if t.liger
        else None,
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
    )
    made._n_gpu = min(made.n_gpu, 1)  # no DataParallel behind the user's back
    return made


def _checkpointing(t: Training) -> dict[str, Any] | None:
    every = int(t.gradient_checkpointing)
    return {"use_reentrant": False, "every_n_layers": every} if every else None


def last_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint and its step; one that a crash cut short lacks its last file."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            found.append(
                (int(read_json(path / "trainer_state.json")["global_step"]), path)
            )
        except (
            ValueError,
            KeyError,
        ):  # PetuneError, which read_json raises, is a ValueError
            continue
    step, newest = max(found, default=(0, None))
    return (newest, step) if newest else None


def resume_schedule(tuning: Tuning, checkpoint: Path) -> None:
    """Put a method's schedule where it stood."""
    if (checkpoint / PROGRESS).exists():
        for key, tensor in load_file(checkpoint / PROGRESS).items():
            tuning.progress()[key].copy_(tensor)


@contextmanager
def stop_on_signal(recorder: Recorder) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends the training after the step, with a checkpoint; the second at once."""
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # signals reach only that one
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if recorder.stopping:
            raise KeyboardInterrupt
        recorder.stopping = True

    watched = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in watched]
    try:
        yield
    finally:
        for number, handler in zip(watched, before, strict=True):
            signal.signal(number, handler)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels run on after Python has gone on
    return time.perf_counter()


def _step(row: str) -> float:
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):  # the half line of a crash
        return float("inf")
