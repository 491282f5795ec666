"""What the training leans on in transformers' Trainer and in datasets that has no public name, each with a check that
it still holds; and all seams of the training together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from fnmatch import fnmatch
from functools import partial
from typing import Any

from torch import nn

from petune.core.host.seam import Seams
from petune.training import host_model, host_operations, host_torch
from petune.training.bytecode import mentions, used_names

SEAMS = Seams(
    host_model.LOSSES, host_model.SEAMS, host_torch.SEAMS, host_operations.SEAMS
)
"""Everything that a training leans on. The checks import Trainer, which takes a second or two."""


def _trainer_calls(name: str) -> bool:
    from transformers import Trainer

    return callable(getattr(Trainer, name)) and mentions(Trainer, name)


OVERRIDDEN = {
    "get_train_dataloader": "visit the rows in an order that a resumed run repeats",
    "training_step": "let the rows of each process count as they are many",
    "compute_loss": "let the rows of each process count as they are many",
    "create_optimizer": "train by the learning rates that the method asks for",
    "evaluate": "score the model by its task",
    "save_model": "write the adapter into a checkpoint and not the base",
}
"""The methods of Trainer that petune's own takes the place of, and what for."""

for _name, _why in OVERRIDDEN.items():
    _declare = SEAMS.lean("transformers", f"Trainer.{_name}", since="3.1", why=_why)
    _declare(partial(_trainer_calls, _name))


@SEAMS.lean(
    "transformers",
    "Trainer._load_from_checkpoint(resume_from_checkpoint, model)",
    since="4.23",
    why="resume from a checkpoint that holds no base model",
)
def _trainer_loads_weights_there() -> bool:
    from transformers import Trainer

    parameters = inspect.signature(Trainer._load_from_checkpoint).parameters
    known = list(parameters) == ["self", "resume_from_checkpoint", "model"]
    return known and mentions(Trainer, "_load_from_checkpoint")


class ResumesWithoutWeights:
    """A mixin of Trainer for a model whose weights were loaded before."""

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Nothing: a checkpoint of petune's has no weights of the base."""


@SEAMS.lean(
    "transformers",
    "Trainer.model_accepts_loss_kwargs",
    since="4.46",
    why="take the mean of a loss over all tokens of an accumulated batch",
)
def _trainer_asks_how_a_loss_is_averaged() -> bool:
    from transformers import Trainer

    own = (Trainer.compute_loss, Trainer.training_step)
    return all("model_accepts_loss_kwargs" in used_names(f.__code__) for f in own)


def average_over_tokens(trainer: Any, whether: bool) -> None:
    """Tell a Trainer what the model's loss is.

    Args:
        whether: a mean over labelled tokens, to be taken over the whole accumulated batch. Else it is a mean over the
            rows of a batch, and is divided by the number of accumulated batches.
    """
    trainer.model_accepts_loss_kwargs = whether


@SEAMS.lean(
    "transformers",
    "Trainer.callback_handler.on_evaluate(args, state, control, metrics)",
    since="4.0",
    why="tell callbacks that a score was computed",
)
def _callbacks_hear_of_scores() -> bool:
    from transformers import Trainer
    from transformers.trainer_callback import CallbackHandler

    known = ["self", "args", "state", "control", "metrics"]
    parameters = list(inspect.signature(CallbackHandler.on_evaluate).parameters)
    return parameters[: len(known)] == known and mentions(Trainer, "callback_handler")


def tell_scores(trainer: Any, metrics: dict[str, float]) -> None:
    """Let a Trainer's callbacks know the metrics of an evaluation."""
    tell = trainer.callback_handler.on_evaluate
    trainer.control = tell(trainer.args, trainer.state, trainer.control, metrics)


@SEAMS.lean(
    "transformers",
    "ProgressCallback.training_bar",
    since="4.0",
    why="show the loss beside the progress bar",
)
def _progress_has_a_bar() -> bool:
    from transformers import ProgressCallback

    return ProgressCallback().training_bar is None


STATE_FILE = "trainer_state.json"
"""The file of a checkpoint that Trainer writes last."""


OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt")
"""The files of a checkpoint without which Trainer begins anew with the optimizer, and says nothing."""
RANDOM_FILES = "rng_state*.pth"
"""What the states of the random generators are called, one file a process; Trainer does without them too."""


@SEAMS.lean(
    "transformers",
    f"checkpoint-<step>/{', '.join(OPTIMIZER_FILES)} and {RANDOM_FILES}",
    since="3.0",
    why="see that an optimizer can go on where it stood",
)
def _optimizers_are_saved_there() -> bool:
    from transformers import Trainer
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

    read = Trainer._load_rng_state.__code__.co_consts
    named = any(fnmatch(str(name), RANDOM_FILES) for name in read)
    return named and (OPTIMIZER_NAME, SCHEDULER_NAME) == OPTIMIZER_FILES


@SEAMS.lean(
    "transformers",
    f"checkpoint-<step>/{STATE_FILE} with global_step, max_steps and num_input_tokens_seen",
    since="4.39",
    why="find the last whole checkpoint",
)
def _checkpoints_hold_a_state() -> bool:
    from transformers import TrainerState
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    names = {field.name for field in fields(TrainerState)}
    named = (PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME) == ("checkpoint", STATE_FILE)
    return named and {"global_step", "max_steps", "num_input_tokens_seen"} <= names


@SEAMS.lean(
    "transformers",
    "TrainingArguments.n_gpu",
    since="3.0",
    why="keep a model on one device where a machine has several",
)
def _trainer_asks_for_the_number_of_devices() -> bool:
    from transformers import Trainer, TrainingArguments

    return isinstance(
        inspect.getattr_static(TrainingArguments, "n_gpu"), property
    ) and mentions(Trainer, "n_gpu")


@SEAMS.lean(
    "transformers",
    "optimization.TYPE_TO_SCHEDULER_FUNCTION",
    since="4.0",
    why="know which arguments a schedule takes",
)
def _schedules_are_functions() -> bool:
    from transformers import get_linear_schedule_with_warmup

    return schedule_function("linear") is get_linear_schedule_with_warmup


def schedule_function(name: str) -> Callable[..., Any]:
    """What makes transformers' schedule of that name."""
    from transformers import SchedulerType
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    made_by: dict[Any, Any] = TYPE_TO_SCHEDULER_FUNCTION
    found: Callable[..., Any] = made_by[SchedulerType(name)]
    return found


@SEAMS.lean(
    "datasets",
    "the package datasets.packaged_modules, with a module for each kind of file",
    since="2.0",
    why="read plain data from the Hub and nothing that runs code",
)
def _builders_are_named_by_their_files() -> bool:
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    return (kind_of_files(Json), kind_of_files(Csv)) == ("json", "csv")


def kind_of_files(builder: type) -> str:
    """What a class of `datasets.DatasetBuilder` reads, such as `json`."""
    return builder.__module__.rpartition(".")[2]
