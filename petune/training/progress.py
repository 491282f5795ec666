"""The progress bar of a training."""

from __future__ import annotations

from typing import Any

from transformers import (
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class Progress(ProgressCallback):
    """Trainer's bar, with the loss and the learning rate beside it instead of a line each."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        loss, rate = f"{logs['loss']:.4g}", f"{logs['learning_rate']:.2g}"
        self.training_bar.set_postfix(loss=loss, lr=rate)
