"""A finished run: score it, ask it, fold it into its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings

from petune.core.registry.plugins import registry
from petune.errors import PetuneError, UnmergeableError
from petune.files import at_home, read_json
from petune.training import fingerprint, plugin_files, run_folder
from petune.training.disk import whole_folder
from petune.training.recipe import Recipe, load_recipe
from petune.training.remarks import remark
from petune.training.roles import assign
from petune.training.rows import one_line, read_rows
from petune.training.setup import make_model, make_splits, make_task, quietly, sample
from petune.training.table import Table
from petune.training.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from petune.core.attached.cost import Merged
    from petune.core.attached.tuning import Tuning


@dataclass
class Run:
    """A run's folder, its model loaded and adapted."""

    path: Path
    recipe: Recipe
    task: Task
    model: PreTrainedModel
    tuning: Tuning

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.task.tokenizer

    def evaluate(self, data: str | Path | None = None) -> dict[str, Any]:
        """`score`, `metric` and all metrics, on the run's test split or on all of a file's rows; on at most `eval_rows`
        where the recipe says so.

        Raises:
            PetuneError: the file can't be read, or lacks a column; or the run's data has changed, so that rows that it
                was trained on may be in the test split.
        """
        most = self.recipe.training.eval_rows
        if data is None:
            rows, what = make_splits(self.recipe)["test"], "test split"
            most = most or self.task.eval_rows
            remedy = "put it back, or name rows by --data"
            fingerprint.check_unchanged(self.path, {"test": rows}, remedy)
        else:
            roles = (*self.task.inputs, *self.task.targets)
            rows, what = self._assigned(read_rows(data), roles), str(data)
        metrics = self.task.score(self.model, sample(rows, most, what))
        return {
            "score": metrics[self.task.metric],
            "metric": self.task.metric,
            **metrics,
        }

    def predict(
        self, data: str | Path | Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """The rows of a file or a list, in their order, each with the answer under `prediction`.

        Raises:
            PetuneError: the file can't be read, or lacks a column.
        """
        rows = _read(data)
        asked = self._assigned(rows, self.task.inputs)
        if "prediction" in rows.columns:
            remark(f"{rows.source}: the answers take the place of column 'prediction'.")
        answers = self.task.predict(self.model, asked)
        return [
            {**row, "prediction": answer}
            for row, answer in zip(rows, answers, strict=True)
        ]

    def _assigned(self, rows: Table, roles: Sequence[str]) -> Dataset:
        """Rows as the task takes them, by the names that the training data's columns have."""
        optional, reads = self.task.optional, self.task.reads
        # no recipe can say any more which column plays what
        columns = {**{role: role for role in roles}, **self._columns()}
        return assign(rows, columns, roles, optional, reads)

    def merge(self, out: str | Path, *, quantized: bool = False) -> Merged:
        """Fold the tuning into the base and write a transformers folder that needs no petune.

        The run's model is merged afterwards.

        Args:
            quantized: store the layers in the run's precision, in place of dense weights.

        Returns:
            What storing the merged weights cost.

        Raises:
            UnmergeableError: the method has no merged form; nothing is written.
            PetuneError: `out` exists already, the base is not quantized, or the architecture has no place for what the
                tuning adds; nothing is written.
        """
        from petune.core.attached.quantized import dequantize
        from petune.core.frozen.config import unplaced

        out, model = _free(out), self.model
        self._check_mergeable()
        if quantized:
            self._check_quantized()
        with catch_warnings(action="ignore"):  # what can't be saved raises below
            merged = self.tuning.merge(quantize=quantized)
        if not quantized:
            dequantize(model)
        if lost := unplaced(model):
            raise PetuneError(
                f"a saved {model.config.model_type} has no place for {lost[0]}; keep the adapter instead."
            )
        with whole_folder(out) as folder:
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return merged

    def _check_mergeable(self) -> None:
        for part in self.tuning.parts:
            if not part.cls.mergeable:
                raise UnmergeableError(f"{part.name!r} has no merged form.")

    def _check_quantized(self) -> None:
        """See that the run's base is quantized and that its weights can be saved as they are stored."""
        from petune.core.frozen.weights import is_quantized
        from petune.training.host_model import SEAMS, can_save_quantized

        SEAMS.require()
        precision = self.recipe.precision
        if not any(is_quantized(module) for module in self.model.modules()):
            raise PetuneError(
                f"the base of {self.path} is not quantized (precision: {precision})."
            )
        if not can_save_quantized(self.model):
            raise PetuneError(
                f"transformers can't save {precision} weights; merge into dense ones."
            )

    def export(self, out: str | Path, format: str) -> Merged | None:
        """Write the tuning for others: `peft`, `serving` (what vLLM and llama.cpp's converter take) or `dense`.

        Returns:
            What storing merged weights cost, where the format has them.

        Raises:
            UnsupportedError: the format has no place for this tuning; nothing is written.
            PetuneError: no such format, or `out` exists already.
        """
        if format == "dense":
            return self.merge(out)
        with whole_folder(_free(out)) as folder:
            self.tuning.save(folder, format)
        return None

    def _columns(self) -> dict[str, str]:
        """The names of the training data's columns; a set's own where the recipe says nothing."""
        sets, data = registry().all("petune_datasets"), self.recipe.data
        own = sets[data].columns if isinstance(data, str) and data in sets else {}
        return {**own, **self.recipe.columns}


def _read(data: str | Path | Sequence[Mapping[str, Any]]) -> Table:
    if isinstance(data, str | Path):
        return read_rows(data)
    return Table.of_rows("rows", data)


def _free(out: str | Path) -> Path:
    """The path, at which nothing lies yet but perhaps an empty folder, and where one can be made."""
    out = at_home(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PetuneError(f"{out}: exists already; name a new folder.")
    run_folder.check_can_be_made(out)
    return out


def load_run(path: str | Path) -> Run:
    """Load a finished run's model and adapter.

    Raises:
        PetuneError: no finished run lies there.
    """
    from petune.core.attached.load import load

    path = at_home(path)
    if not (path / run_folder.ADAPTER).is_dir():
        what = "an unfinished run" if (path / run_folder.RECIPE).exists() else "no run"
        raise PetuneError(
            f"{path}: {what}; `petune train` leaves one in the recipe's output folder."
        )
    plugin_files.bring_back(path)
    recipe = load_recipe(path / run_folder.RECIPE)
    with quietly():
        task = _task(recipe, path / run_folder.TASK)
        model = make_model(recipe, task)
        tuning = load(model, path / run_folder.ADAPTER)
    return Run(path, recipe, task, model, tuning)


def _task(recipe: Recipe, path: Path) -> Task:
    """The task as the run has fitted it."""
    state = read_json(path)
    try:
        task = make_task(recipe, state)
        task.model_args()
        return task
    except PetuneError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise PetuneError(
            f"{path}: is not what the task {recipe.task!r} left ({one_line(error)})."
        ) from None


def evaluate(
    run: str | Path, data: str | Path | None = None, *, quiet: bool = True
) -> dict[str, Any]:
    """See `Run.evaluate`."""
    loaded = load_run(run)
    loaded.task.quiet = quiet
    with quietly():
        return loaded.evaluate(data)


def predict(
    run: str | Path,
    data: str | Path | Sequence[Mapping[str, Any]],
    *,
    quiet: bool = True,
) -> list[dict[str, Any]]:
    """See `Run.predict`."""
    loaded = load_run(run)
    loaded.task.quiet = quiet
    with quietly():
        return loaded.predict(data)


def merge_run(run: str | Path, out: str | Path, *, quantized: bool = False) -> Merged:
    """See `Run.merge`."""
    _free(out)  # said before a model is loaded for it
    loaded = load_run(run)
    with quietly():
        return loaded.merge(out, quantized=quantized)


def export_run(run: str | Path, out: str | Path, format: str) -> Merged | None:
    """See `Run.export`."""
    if format == "gguf":
        remedy = f"run llama.cpp's convert_lora_to_gguf.py on `petune export {run} {out} --format serving`"
        raise PetuneError(
            f"--format gguf: petune has no converter of its own; {remedy}."
        )
    if format != "dense":
        # an unknown name is said before a model is loaded for it
        registry().get("petune_formats", format, "dense")
    _free(out)
    loaded = load_run(run)
    with quietly():
        return loaded.export(out, format)
