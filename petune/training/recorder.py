"""The record of a training: a row in metrics.jsonl at every logging step, and how long the steps took."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from petune.errors import PetuneError
from petune.files import read_json, write_text, writing
from petune.training.checkpoints import CLOCK
from petune.training.order import EpochSampler
from petune.training.processes import Processes
from petune.training.result import finite

LOGGED = ("loss", "learning_rate", "grad_norm")
"""What a row takes over of what Trainer logs at a step."""
ASTRAY = 100
"""By how many times a loss has risen that no longer comes down; one below 1 counts as 1."""
WARM_UP = 2
"""How many steps at the beginning are not measured by, since they also fill caches."""


class Recorder(TrainerCallback):
    """Times every step, writes metrics.jsonl, and stops the training at a step's end when told to."""

    def __init__(
        self,
        path: Path,
        sampler: EpochSampler,
        updates_per_epoch: int,
        processes: Processes,
    ) -> None:
        self.path = path
        self.processes = processes
        self.sampler = sampler
        self.updates_per_epoch = updates_per_epoch
        self.seconds = 0.0
        self.steps: list[tuple[float, int]] = []  # (seconds, tokens) of this session
        self.loss = float("nan")
        self.stopping = False
        self.diverged = False
        """Whether the training ended since a weight was no number."""
        self.first_loss: float | None = None
        """That of the first batch."""
        self.keeps_last = False
        """Whether the last step leaves a checkpoint."""
        self.steps_begun = 0
        self._began = 0.0
        self._tokens = 0

    def resume(self, checkpoint: Path, step: int) -> None:
        """Go on from a checkpoint: rows that a crashed session wrote after it are dropped.

        Raises:
            PetuneError: the checkpoint's clock can't be read.
        """
        clock = read_json(checkpoint / CLOCK)
        try:
            self.seconds = float(clock["seconds"])
            self.loss = float(clock["loss"] or "nan")
            first = clock.get("first_loss")
            self.first_loss = None if first is None else float(first)
        except (KeyError, TypeError, ValueError):
            raise PetuneError(f"{checkpoint / CLOCK}: is damaged.") from None
        rows = (
            self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            if self.path.exists()
            else []
        )
        kept = [row for row in rows if _step(row) <= step]
        if self.processes.writes:
            write_text(self.path, "".join(row + "\n" for row in kept))

    def clock(self) -> dict[str, float]:
        """What `resume` needs back."""
        first = float("nan") if self.first_loss is None else self.first_loss
        return {"seconds": self.seconds, "loss": self.loss, "first_loss": first}

    @property
    def went_astray(self) -> str | None:
        """How the training diverged, None if it did not."""
        if self.diverged:
            return "its weights are no longer finite"
        first = self.first_loss
        if first is not None and self.loss > ASTRAY * max(first, 1.0):
            return f"its loss has risen from {first:.3g} to {self.loss:.3g}"
        return None

    def check_began(self) -> None:
        """See that the training began well.

        Raises:
            PetuneError: the first loss was no number already, which is no matter of the learning rate.
        """
        first = self.first_loss
        if first is not None and not math.isfinite(first):
            raise PetuneError(
                f"{self.path}: the loss was {first} before anything was trained; see method_args and the precision."
            )

    @property
    def timed(self) -> list[tuple[float, int]]:
        """(seconds, tokens) of the steps to measure by."""
        return self.steps[WARM_UP:] or self.steps

    @property
    def step_seconds(self) -> float:
        """The median of the steps' seconds, NaN before the first."""
        if not self.steps:
            return float("nan")
        return statistics.median(seconds for seconds, _ in self.timed)

    @property
    def tokens_per_second(self) -> float:
        """Of all measured steps together, NaN before the first."""
        spent = sum(seconds for seconds, _ in self.timed)
        if not spent:
            return float("nan")
        return sum(tokens for _, tokens in self.timed) / spent

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
        self.steps_begun += 1
        self._began = _now()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        spent = _now() - self._began
        seen = int(state.num_input_tokens_seen)
        self.steps.append((spent, seen - self._tokens))
        self.seconds += spent
        self._tokens = seen
        self._decide(state.global_step >= state.max_steps, control, model)

    def _decide(
        self, is_last: bool, control: TrainerControl, model: nn.Module | None
    ) -> None:
        """What is logged and saved at the end of a step, and whether it is the last."""
        # a signal reaches processes at different moments, and they have to stop at the same step
        if self.processes.sum(self.stopping) and not is_last:
            control.should_save = True
            control.should_training_stop = True
        if self.keeps_last and is_last:
            control.should_save = True
        # a row at every checkpoint: the mean loss in it starts anew there, whether or not the run is stopped
        if control.should_save or is_last:
            control.should_log = True
        if control.should_log and model is not None and not _finite(model):
            self._end_diverged(control)

    def _end_diverged(self, control: TrainerControl) -> None:
        """End the training after a last row, and leave no checkpoint of weights that are no numbers."""
        self.diverged = True
        control.should_training_stop = control.should_log = True
        control.should_save = control.should_evaluate = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        told = _told(logs or {})
        if not told:
            return
        self.loss = told.get("loss", self.loss)
        tokens = int(state.num_input_tokens_seen)
        counted = {"tokens": tokens, "seconds": round(self.seconds, 6)}
        if not self.processes.writes:
            return
        row = {"step": state.global_step, **told, **counted}
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")


def _told(logs: dict[str, Any]) -> dict[str, Any]:
    """What a row says of a step or of an evaluation; nothing where Trainer logs something else."""
    if "loss" in logs:
        return {key: logs[key] for key in LOGGED if key in logs}
    return {key: value for key, value in logs.items() if key.startswith("eval_")}


def _finite(model: nn.Module) -> bool:
    """Whether all that trains of a model is finite."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return all(bool(parameter.isfinite().all()) for parameter in trained)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels run on after Python has gone on
    return time.perf_counter()


def _step(row: str) -> float:
    """The step of a row of metrics.jsonl, infinity where the row is no whole line."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):  # the half line of a crash
        return float("inf")
