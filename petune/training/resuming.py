"""A run that is gone on with: whether it can be, and where that is not the same as never having stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from petune.errors import PetuneError
from petune.training.adapting import Checkpoint
from petune.training.checkpoints import check_whole, steps_planned, way_out
from petune.training.rates import rates
from petune.training.recorder import Recorder
from petune.training.remarks import remark
from petune.training.rows import one_line
from petune.training.run_folder import ADAPTER, CHECKPOINTS, RESULT
from petune.training.settings import Training

_LOOKED_AT = 1000
"""At how many steps two schedules are compared."""


def check_goes_on(run: Path, checkpoint: Checkpoint | None, steps: int) -> None:
    """See that a run has not gone beyond `steps`, and can go on if it is finished.

    Raises:
        PetuneError: one of them does not hold.
    """
    _say_broken(run, checkpoint)
    if checkpoint is None:
        if (run / RESULT).exists() or (run / ADAPTER).exists():
            raise PetuneError(
                f"{run}: is finished and has no checkpoint to go on from; --overwrite trains it anew."
            )
        return
    folder, done = checkpoint
    if done > steps:
        raise PetuneError(
            f"{folder}: has trained {done} steps and the recipe asks for {steps}; ask for more, or --overwrite."
        )
    check_whole(folder)


def _say_broken(run: Path, checkpoint: Checkpoint | None) -> None:
    """One line of a newer checkpoint, which is of no use: a crash, or another hand, has left it without its state."""
    done = checkpoint[1] if checkpoint else 0
    steps = [
        int(path.name.partition("-")[2])
        for path in (run / CHECKPOINTS).glob("checkpoint-*")
        if path.name.partition("-")[2].isdecimal()
    ]
    newest = max(steps, default=0)
    if newest > done:
        begins = f"the run goes on from step {done}" if done else "the run begins anew"
        remark(f"{run / CHECKPOINTS}/checkpoint-{newest}: is not whole; {begins}.")


def prepare(
    run: Path, training: Training, tuning: Any, checkpoint: Checkpoint, steps: int
) -> None:
    """Before a run trains on to `steps`: it is finished no more, and it is said where the steps so far are not those
    that it would have trained if so many had been asked for from the start.
    """
    folder, done = checkpoint
    (run / RESULT).unlink(missing_ok=True)
    planned = steps_planned(folder)
    looked_at = range(0, done, max(1, done // _LOOKED_AT))
    if rates(training, looked_at, planned) != rates(training, looked_at, steps):
        what = f"the schedule {training.schedule!r}"
    elif planned != steps and getattr(tuning, "progress", dict)():
        what = f"the method's schedule ({tuning.method})"
    else:
        return
    remark(
        f"{run}: its first {done} steps followed {what} of {planned} steps, not that of {steps}: "
        f"the result is not that of {steps} steps from the start."
    )


class Rejoined(TrainerCallback):
    """Puts a training that goes on onto the settings of this session: a checkpoint holds how often there was to be
    logged, scored and saved, and the rate of the next step by the schedule that was planned then.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        state.compute_steps(args, state.max_steps)
        schedule: Any = given["lr_scheduler"]
        # accelerate's holds torch's
        schedule = getattr(schedule, "scheduler", schedule)
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            return
        pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        rates = [first * factor(schedule.last_epoch) for first, factor in pairs]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule.load_state_dict({**schedule.state_dict(), "_last_lr": rates})


@contextmanager
def blamed(checkpoint: Checkpoint | None, recorder: Recorder) -> Iterator[None]:
    """Within the context, what goes wrong between a checkpoint and the first step after it is the checkpoint's fault.

    Raises:
        PetuneError: the checkpoint is of no use.
    """
    try:
        yield
    except (PetuneError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if checkpoint is None or recorder.steps_begun:
            raise
        raise PetuneError(
            f"{checkpoint[0]}: can't be gone on from ({one_line(error)}); {way_out(checkpoint[0])}."
        ) from error
