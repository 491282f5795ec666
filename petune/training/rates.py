"""The learning rate over the steps of a training: the recipe's schedule, its arguments and its warmup."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import SchedulerType, get_scheduler

from petune.errors import PetuneError, unknown
from petune.training.host import schedule_function
from petune.training.settings import Training

BY_SCORE = ("reduce_lr_on_plateau", "greedy")
"""The schedules that go by the loss on the validation rows."""
_GIVEN = ("optimizer", "num_training_steps", "last_epoch", "mode", "verbose")
"""What schedules take and no recipe gives: a loss is better the lower it is, and the rates are logged anyway."""
_WARMUP = "num_warmup_steps"
_LOOKED_AT = 1000
"""At how many steps the rates of a schedule are computed beforehand, and how many there are where rows tell."""


def schedule_of(training: Training) -> str:
    """The schedule's name for transformers, where a constant rate with a warmup is another schedule."""
    constant = training.schedule == "constant"
    return "constant_with_warmup" if constant and training.warmup else training.schedule


def check_schedule(training: Training) -> None:
    """See that there is such a schedule, and that it gets what it needs and nothing else.

    Raises:
        PetuneError: it is unknown, an argument is unknown or missing, or the recipe lacks what it goes by.
    """
    known = [schedule.value for schedule in SchedulerType]
    if training.schedule not in known:
        raise PetuneError(
            f"training.schedule: {unknown('value', training.schedule, known)}"
        )
    _check_arguments(training)
    if schedule_of(training) in BY_SCORE and not training.eval_every:
        raise PetuneError(
            f"training.schedule: {training.schedule!r} goes by the loss on the validation rows; "
            "add training.eval_every."
        )
    if training.steps:
        check_rates(training, training.steps)
    else:
        rates(training, range(_LOOKED_AT + 1), _LOOKED_AT)


def _check_arguments(training: Training) -> None:
    schedule = schedule_of(training)
    takes = _parameters(schedule)
    if training.warmup and _WARMUP not in takes:
        raise PetuneError(f"training.warmup: {schedule!r} has none; leave it out.")
    own = {name: takes[name] for name in takes.keys() - {*_GIVEN, _WARMUP}}
    _check_names(training, own)
    for name, parameter in own.items():
        if parameter.default is parameter.empty and name not in training.schedule_args:
            raise PetuneError(
                f"training.schedule: {schedule!r} needs training.schedule_args.{name}."
            )


def _check_names(training: Training, known: Mapping[str, Any]) -> None:
    for name in training.schedule_args:
        if not known:
            raise PetuneError(
                f"training.schedule_args: {training.schedule!r} takes none; leave them out."
            )
        if name not in known:
            said = unknown("argument", name, known)
            raise PetuneError(
                f"training.schedule_args of {training.schedule!r}: {said}"
            )


def _parameters(schedule: str) -> dict[str, inspect.Parameter]:
    """What a schedule takes, by name."""
    function: Any = schedule_function(schedule)
    if schedule in BY_SCORE:  # what it makes says more than the function
        function = type(function(_optimizer(1.0)))
    return dict(inspect.signature(function).parameters)


def _optimizer(rate: float) -> torch.optim.Optimizer:
    """One that has a schedule and trains nothing."""
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def warmup_steps(training: Training, steps: int) -> int:
    """The steps of the warmup, a share of all rounded up."""
    whole = training.warmup >= 1
    return int(training.warmup) if whole else math.ceil(steps * training.warmup)


def check_rates(training: Training, steps: int) -> None:
    """See that the schedule comes to a learning rate at each of so many steps, and not to hardly any.

    Raises:
        PetuneError: it can't work with its arguments, or a rate is no number, below zero or far too low throughout.
    """
    looked_at = range(0, steps, max(1, steps // _LOOKED_AT))
    found = rates(training, looked_at, steps)
    for step, rate in zip(looked_at, found, strict=True):
        if not (math.isfinite(rate) and rate >= 0):
            raise PetuneError(
                f"training.schedule: {training.schedule!r} comes to a learning rate of {rate} at step {step}."
            )
    if max(found) < training.learning_rate / 10:
        raise PetuneError(
            f"training.schedule: {training.schedule!r} stays below {training.learning_rate / 10:g}, a tenth of "
            f"training.learning_rate, for all {steps} steps; see training.warmup and training.schedule_args."
        )
    rates(training, [steps], steps)  # it is asked once more when the last is done


def rates(training: Training, steps: Sequence[int], total: int) -> list[float]:
    """The learning rates at some steps of a training of `total` steps; the first one where scores tell the others.

    Raises:
        PetuneError: the schedule can't work with its arguments.
    """
    first = training.learning_rate
    try:
        schedule: Any = get_scheduler(
            schedule_of(training),
            _optimizer(first),
            num_warmup_steps=warmup_steps(training, total),
            num_training_steps=total,
            scheduler_specific_kwargs=dict(training.schedule_args),
        )
        if training.schedule in BY_SCORE:
            for _ in range(2 * _LOOKED_AT):
                schedule.step(1.0)  # what is wrong with an argument shows only there
            return [first for _ in steps]
        factor = schedule.lr_lambdas[0]
        return [first * float(factor(step)) for step in steps]
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        said = " ".join(str(error).split()).rstrip(".")
        said = said.replace("the `lr_scheduler_kwargs`", "training.schedule_args")
        raise PetuneError(
            f"training.schedule: {training.schedule!r}: {said}."
        ) from None
