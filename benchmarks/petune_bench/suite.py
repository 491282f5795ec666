"""A suite: cells that share a recipe and differ in what is compared.

    title: Seven methods on a 4-bit encoder
    defaults: {model: minilm, precision: nf4, task: classification, data: vader-movies, training: {steps: 100}}
    seeds: [0, 1, 2]
    cells:
      - {method: lora, method_args: {rank: 16}, training: {learning_rate: 2.0e-3}}
      - {name: peft's lora, method: lora, method_args: {rank: 16}, implementation: peft}
      - {method: full, precision: fp32}
      - {method: [prefix-tuning, parallel-adapter], method_args: {prefix-tuning: {length: 30}}}

A cell overrides the defaults key by key, within `training` too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from petune.errors import PetuneError, unknown
from petune.files import at_home
from petune.training.recipe import Recipe, parse, shown
from petune.training.settings import Training
from petune.training.yaml_text import read_file, read_text, read_value

SHARED = [key for key in Recipe.model_fields if key != "output"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CellSpec(_Strict):
    """One method to compare, and where its recipe departs from the defaults."""

    method: str | list[str] = Field(description="or several, which act as one tuning")
    name: str = Field(
        "", description="what the report calls it; the method's own name unless given"
    )
    implementation: Literal["petune", "peft"] = "petune"
    method_args: dict[str, Any] = {}
    model: str | None = None
    precision: str | None = None
    where: str | dict[str, str] | None = None
    training: dict[str, Any] = {}

    @property
    def label(self) -> str:
        """The cell's name."""
        methods = self.method if isinstance(self.method, str) else "+".join(self.method)
        return self.name or methods + (
            f" ({self.implementation})" if self.implementation != "petune" else ""
        )


class Suite(_Strict):
    """What `petune bench` runs."""

    title: str = ""
    about: str = ""
    defaults: dict[str, Any] = {}
    seeds: list[int] = Field([0], min_length=1)
    cells: list[CellSpec] = Field(min_length=1)

    @field_validator("defaults")
    @classmethod
    def _known(cls, defaults: dict[str, Any]) -> dict[str, Any]:
        for key in defaults:
            if key not in SHARED:
                raise PetuneError(
                    unknown(
                        "key",
                        f"defaults.{key}",
                        [f"defaults.{known}" for known in SHARED],
                    )
                )
        return defaults

    def recipe(self, cell: CellSpec, seed: int, output: Path, source: str) -> Recipe:
        """The cell's recipe.

        Raises:
            PetuneError: a key or value that no recipe has.
        """
        own = cell.model_dump(
            exclude={"name", "implementation", "training"}, exclude_unset=True
        )
        training = {**self.defaults.get("training", {}), **cell.training, "seed": seed}
        return parse(
            {**self.defaults, **own, "training": training, "output": str(output)},
            f"{source}: {cell.label}",
        )


def load_suite(name: str) -> tuple[Suite, str, str]:
    """(the suite, its name, what errors call it), from a suite's name or a YAML file.

    Raises:
        PetuneError: no such suite, or a key or value in it that no suite has.
    """
    path = at_home(name)
    if path.suffix not in (".yaml", ".yml"):
        found = files("petune_bench.suites").iterdir()
        known = {
            Path(file.name).stem: file for file in found if file.name.endswith(".yaml")
        }
        if name not in known:
            raise PetuneError(unknown("suite", name, known) + " Or name a .yaml file.")
        return (
            _suite(
                read_text(known[name].read_text(encoding="utf-8"), f"suite {name}"),
                f"suite {name}",
            ),
            name,
            f"suite {name}",
        )
    return _suite(read_file(path), str(path)), path.stem, str(path)


def extra_cell(words: str) -> CellSpec:
    """A cell from `name [key=value …]`: keys of `training` go there, the others are the method's arguments."""
    method, *pairs = words.split() or [""]
    given: dict[str, dict[str, Any]] = {"training": {}, "method_args": {}}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise PetuneError(f"--method {words!r}: {pair!r} is no key=value.")
        own = given["training" if key in Training.model_fields else "method_args"]
        if key in own:
            raise PetuneError(f"--method {words!r}: {key!r} is given twice.")
        own[key] = read_value(value, f"--method {words!r}")
    return CellSpec(method=method, name=words if pairs else "", **given)  # type: ignore[arg-type]


def check_names(cells: Iterable[CellSpec], source: str) -> None:
    """Each cell goes by a name of its own.

    Raises:
        PetuneError: two go by the same.
    """
    seen: set[str] = set()
    for cell in cells:
        if cell.label in seen:
            raise PetuneError(
                f"{source}: two cells are called {cell.label!r}; give one another `name`."
            )
        seen.add(cell.label)


def _suite(values: Any, source: str) -> Suite:
    if not isinstance(values, Mapping):
        raise PetuneError(
            f"{source}: a suite is a mapping of keys to values (defaults, cells, …)."
        )
    try:
        suite = Suite.model_validate(values)
    except ValidationError as error:
        raise PetuneError(f"{source}: {_first(error)}") from None
    check_names(suite.cells, source)
    return suite


def _first(error: ValidationError) -> str:
    problems = error.errors()
    # a misspelt key is also a missing one: the misspelling says more
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    *parents, last = (str(part) for part in problem["loc"])
    key = ".".join([*parents, last])
    if problem["type"] == "extra_forbidden":
        known = (
            CellSpec.model_fields if parents[:1] == ["cells"] else Suite.model_fields
        )
        return unknown("key", key, [".".join([*parents, name]) for name in known])
    if problem["type"] == "missing":
        return f"key {key!r} is missing."
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key}: {shown(problem['input'])}: {problem['msg'].lower()}."
