"""A method's schedule within Trainer, such as AdaLoRA's, which cuts ranks between steps of the optimizer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from petune.core.attached.tuning import Tuning


class Schedule(TrainerCallback):
    """Runs `Tuning.step` around every step of the optimizer."""

    def __init__(self, tuning: Tuning) -> None:
        self.tuning = tuning
        self.running = ExitStack()

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
