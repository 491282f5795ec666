"""Training: from a recipe to a run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.errors import PetuneError
from petune.training import fingerprint, run_folder
from petune.training.processes import Processes
from petune.training.recipe import Recipe, load_recipe
from petune.training.result import Result
from petune.training.session import PUT_BACK, Session
from petune.training.setup import make_splits, quietly

if TYPE_CHECKING:
    from petune.training.adapting import Adapt


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    adapt: Adapt | None = None,
    quiet: bool = False,
    final_eval: bool = True,
    last_checkpoint: bool = True,
) -> Result:
    """Train what the recipe says and leave a run in its `output` folder.

    Args:
        recipe: a recipe, its values, or a YAML file.
        resume: go on from the last checkpoint as if the run had not been stopped, or finished at fewer steps.
        overwrite: throw away a run that is there already.
        adapt: in place of `petune.attach`: `adapt(model, recipe)` returns an object with `parameters()` and
            `save(folder)`; its `model`, if it has one, is what is called, and with `load(folder)` it can resume.
        quiet: no progress bar.
        final_eval: score the test split at the end.
        last_checkpoint: leave a checkpoint of the last step, from which the run can be trained on.

    Raises:
        PetuneError: a mistake in the recipe or its data, a run that is in the way, or a disk that takes no more.
        DivergedError: the weights are no longer finite; the last checkpoint is the last one of finite weights.
        MovedError: an installed library has changed something that the training leans on.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    if resume and overwrite:
        raise PetuneError("--resume and --overwrite exclude each other: give one.")
    processes = Processes.joined()
    recipe = _checked(recipe, processes, method=adapt is None)
    run = Path(recipe.output)
    with run_folder.room(run, recipe, resume=resume, overwrite=overwrite), quietly():
        if resume and run_folder.is_done(run, recipe):
            return _finished(run, recipe)
        session = Session(recipe, run, resume, adapt, quiet, processes)
        if overwrite:
            processes.once(partial(run_folder.clear, run))
        return session.run(final_eval, last_checkpoint)


def _finished(run: Path, recipe: Recipe) -> Result:
    """The result of a run that has nothing left to do, if its rows are what they were."""
    fingerprint.check_unchanged(run, make_splits(recipe), PUT_BACK)
    return Result.read(run)


def _checked(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    processes: Processes,
    *,
    method: bool,
) -> Recipe:
    """The recipe as the model can do it; see `train` for what is raised."""
    from petune.training.fit import fitted
    from petune.training.host import SEAMS
    from petune.training.host_model import check_every

    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    recipe.check(method=method)
    SEAMS.require()
    check_every(int(recipe.training.gradient_checkpointing))
    processes.check_share(recipe.training.batch_size)
    with processes.first_alone():  # it may fetch the model's configuration
        return fitted(recipe, method=method)
