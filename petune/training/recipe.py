"""The recipe: what to train, on what, how, and where the result goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import Repr
from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from petune.errors import PetuneError, unknown
from petune.files import at_home, expanded
from petune.training.settings import Strict, Training
from petune.training.yaml_text import read_file, read_value


class Recipe(Strict):
    """One training run."""

    model: str
    precision: str = "fp32"
    head: str | None = Field(default=None, description="the task's own unless given")
    method: str | list[str] = Field(
        default="lora", description="or several, which act as one tuning"
    )
    method_args: dict[str, Any] = Field(
        default={}, description="of several methods, by their names"
    )
    where: str | dict[str, str] | None = Field(
        default=None, description="of several methods, by their names"
    )
    task: str
    data: str | dict[str, str]
    columns: dict[str, str] = {}
    training: Training = Training()
    output: str

    @field_validator("model", "data", "output")
    @classmethod
    def _at_home(
        cls, path: str | dict[str, str], info: ValidationInfo
    ) -> str | dict[str, str]:
        """`~` stands for the home folder, here and nowhere later."""
        if not path:
            raise PetuneError(f"{info.field_name}: is empty; name one, or a path.")
        if isinstance(path, str):
            return expanded(path)
        return {key: expanded(value) for key, value in path.items()}

    def check(self, *, method: bool = True, source: str = "recipe") -> None:
        """Look up every name and the method's arguments, before anything is loaded or downloaded.

        Args:
            method: whether to look at `method` too; a caller that brings its own has no use for it.
            source: what an error calls the recipe: its file.

        Raises:
            PetuneError: a name that nothing installed goes by, or an argument that the method doesn't take.
        """
        from petune.core.attached.parts import parts
        from petune.core.method.arguments import check_finite
        from petune.core.registry.plugins import registry
        from petune.training.data import check_source

        try:
            self._check_names()
            if method:
                check_finite(self.method_args, "method_args.")
                parts(self.method, self.method_args, self.where)
            check_source(self.data)
            self._check_training()
            roles = registry().get("petune_tasks", self.task).roles()
            for role in self.columns:
                if role not in roles:
                    raise PetuneError(f"columns: {unknown('role', role, roles)}")
        except PetuneError as error:
            raise type(error)(f"{source}: {error}") from error

    def _check_names(self) -> None:
        """Look up the task and the precision, and see that the head is the task's."""
        from petune.core.registry.plugins import registry
        from petune.loading.models import DTYPES, HEADS

        task = registry().get("petune_tasks", self.task)
        if self.precision not in DTYPES:
            registry().get("petune_quantizers", self.precision, *DTYPES)
        if self.head is None or self.head == task.head:
            return
        if self.head not in HEADS:
            raise PetuneError(f"head: {unknown('head', self.head, HEADS)}")
        raise PetuneError(
            f"head: the task {self.task!r} trains a {task.head!r}, not a "
            f"{self.head!r}; leave `head` out."
        )

    def _check_training(self) -> None:
        """Look up the schedule and the optimizer, and see that the device has what the settings need."""
        import torch
        from transformers.utils.import_utils import is_liger_kernel_available

        from petune.training.optimizers import check_optimizer
        from petune.training.rates import check_schedule

        training = self.training
        check_schedule(training)
        check_optimizer(training.optimizer)
        for key in ("mixed_precision", "offload", "liger"):
            if getattr(training, key) and not torch.cuda.is_available():
                raise PetuneError(f"training.{key}: needs a CUDA device; leave it out.")
        if training.liger and not is_liger_kernel_available():
            raise PetuneError(
                "training.liger: the package liger-kernel is not installed; `pip install` it."
            )

    def resolved(self) -> Recipe:
        """This recipe with local paths made absolute, so that the run it is kept in can be used from anywhere."""
        from petune.training.data import is_local

        def settle(path: str) -> str:
            return _absolute(path) if is_local(path) else path

        if isinstance(self.data, str):
            data: Any = settle(self.data)
        else:
            data = {key: settle(value) for key, value in self.data.items()}
        is_here = Path(self.model).exists()
        model = _absolute(self.model) if is_here else self.model
        return self.model_copy(update={"data": data, "model": model})


def _absolute(path: str) -> str:
    return str(Path(path).resolve())


def load_recipe(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> Recipe:
    """Read a recipe from a YAML file (or a mapping) and apply `key.key=value` overrides.

    Raises:
        PetuneError: no such file, no YAML, or a key or value that the recipe doesn't have; the message names it.
    """
    if isinstance(source, Mapping):
        name, values = "recipe", dict(source)
    else:
        path = at_home(source)
        name = str(path)
        values = _mapping(read_file(path), name)
    _check_once(overrides)
    for override in overrides:
        _override(values, override)
    return parse(values, name)


def parse(values: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """A recipe from its values; errors call it `name`.

    Raises:
        PetuneError: a key or value that the recipe doesn't have.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise PetuneError(f"{name}: {_first(error)}") from None
    except RecursionError:
        raise PetuneError(f"{name}: nested too deeply to be read.") from None
    except PetuneError as error:
        raise PetuneError(f"{name}: {error}") from None


def _mapping(values: Any, source: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise PetuneError(
            f"{source}: a recipe is a mapping of keys to values (model, task, data, output, …)."
        )
    for key in values:
        if not isinstance(key, str):
            raise PetuneError(f"{source}: key {shown(key)} should be a word.")
    return values


def _check_once(overrides: Sequence[str]) -> None:
    """Refuse a key that is given twice, or as a whole and in part: the last would win."""
    seen: list[str] = []
    for override in overrides:
        key = override.partition("=")[0]
        for other in seen:
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                raise PetuneError(f"override {key!r}: {other!r} is given already.")
        seen.append(key)


def _override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise PetuneError(
            f"override {override!r}: write key=value, such as training.steps=10."
        )
    said = override if len(override) <= _LONGEST else f"{override[:_LONGEST]}…"
    value = read_value(text, f"override {said!r}")
    *parents, key = dotted.split(".")
    for parent in parents:
        inner = values.get(parent)
        inner = dict(inner) if isinstance(inner, Mapping) else {}
        values[parent] = inner
        values = inner
    values[key] = value


def _first(error: ValidationError) -> str:
    """The first of pydantic's errors, in one line."""
    problems = error.errors()
    more = len(problems) - 1
    return _in_words(problems[0]) + (f" (And {more} more.)" if more else "")


def _in_words(problem: Any) -> str:
    """One of pydantic's errors: what is wrong with which key."""
    nested = problem["loc"][:1] in (("training",), ("columns",), ("method_args",))
    depth = 2 if nested else 1  # the rest names branches of a union
    key = ".".join(str(part) for part in problem["loc"][:depth])
    if key == "training.schedule_args" and len(problem["loc"]) > 2:
        value = f"{problem['loc'][2]}: {shown(problem['input'])}"
        return f"{key}: {value} should be a finite number, a word, true or false."
    if problem["type"] == "extra_forbidden":
        inner = [f"training.{name}" for name in Training.model_fields]
        return unknown("key", key, inner if nested else list(Recipe.model_fields))
    if problem["type"] == "missing":
        return f"key {key!r} is missing."
    if problem["type"] == "value_error":
        return f"{str(problem['ctx']['error']).rstrip('.')}."
    reason = problem["msg"].replace("Input should be", "should be").partition(", ")[0]
    return f"{key}: {shown(problem['input'])} {reason}."


_SHORT = Repr()
_SHORT.maxlevel = 2
_LONGEST = 80


def shown(value: object) -> str:
    """A value as it was given, a long one in short."""
    said = _SHORT.repr(value)
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}…"
