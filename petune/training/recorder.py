"""The record of a training: a row in metrics.jsonl at every logging step, and how long the steps took."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from petune.files import read_json, write_text
from petune.training.checkpoints import CLOCK
from petune.training.order import EpochSampler
from petune.training.processes import Processes
from petune.training.result import finite

LOGGED = ("loss", "learning_rate", "grad_norm")
"""What a row takes over of what Trainer logs at a step."""
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
        self._began = 0.0
        self._tokens = 0

    def resume(self, checkpoint: Path, step: int) -> None:
        """Go on from a checkpoint: rows that a crashed session wrote after it are dropped."""
        clock = read_json(checkpoint / CLOCK)
        self.seconds = clock["seconds"]
        self.loss = clock["loss"] or float("nan")
        rows = (
            self.path.read_text(encoding="utf-8").splitlines()
            if self.path.exists()
            else []
        )
        kept = [row for row in rows if _step(row) <= step]
        if self.processes.writes:
            write_text(self.path, "".join(row + "\n" for row in kept))

    def clock(self) -> dict[str, float]:
        """What `resume` needs back."""
        return {"seconds": self.seconds, "loss": self.loss}

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
        self._began = _now()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        spent = _now() - self._began
        seen = int(state.num_input_tokens_seen)
        self.steps.append((spent, seen - self._tokens))
        self.seconds += spent
        self._tokens = seen
        is_last = state.global_step >= state.max_steps
        # a signal reaches processes at different moments, and they have to stop at the same step
        if self.processes.sum(self.stopping) and not is_last:
            control.should_save = True
            control.should_training_stop = True
        # a row at every checkpoint: the mean loss in it starts anew there, whether or not the run is stopped
        if control.should_save or is_last:
            control.should_log = True

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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")


def _told(logs: dict[str, Any]) -> dict[str, Any]:
    """What a row says of a step or of an evaluation; nothing where Trainer logs something else."""
    if "loss" in logs:
        return {key: logs[key] for key in LOGGED if key in logs}
    return {key: value for key, value in logs.items() if key.startswith("eval_")}


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
