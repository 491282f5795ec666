"""The recipe: what to train, on what, how, and where the result goes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from petune.errors import PetuneError, unknown

Count = Annotated[int, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Training(_Strict):
    """The optimization, of which every figure has a default."""

    steps: Count | None = Field(
        default=None, description="optimizer steps; takes the place of epochs"
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="passes over the training data (3)"
    )
    batch_size: Count = 8
    eval_batch_size: Count | None = Field(
        default=None, description="twice the batch size unless given"
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    schedule: str = Field(
        default="linear",
        description="one of transformers' schedules: linear, cosine, constant…",
    )
    warmup: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="below 1 a share of the steps, else steps"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    optimizer: str = Field(
        default="adamw_torch",
        description="an optimizer that transformers' Trainer knows",
    )
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool | Count = Field(
        default=False, description="true: every block; 3: every third"
    )
    recompute: bool = Field(
        default=True,
        description="norms and activations are computed again rather than kept",
    )
    compile: Literal["regions"] | None = Field(
        default=None, description="regions: every block by torch.compile"
    )
    memory_budget: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="the share of what compiled blocks would keep that they may keep",
    )
    packing: bool | None = Field(
        default=None,
        description="rows end to end instead of padding; where the model can unless given",
    )
    offload: bool = Field(
        default=False,
        description="what is kept for backward waits in the CPU's memory; CUDA only",
    )
    liger: bool = Field(default=False, description="the Liger kernels; CUDA only")
    mixed_precision: bool = Field(default=False, description="bf16 autocast; CUDA only")
    max_length: Annotated[int, Field(gt=1)] = Field(
        default=512, description="tokens of a row; longer ones are cut"
    )
    max_new_tokens: Count = Field(
        default=64, description="tokens of a generated answer, at most"
    )
    group_by_length: bool = Field(
        default=True, description="rows of like length share a batch: less padding"
    )
    labelled_logits: bool = Field(
        default=True,
        description="logits only where there is a label, where the model can",
    )
    checkpoint_every: Count | None = Field(
        default=None, description="steps between checkpoints"
    )
    log_every: Count = Field(
        default=10, description="steps between rows of metrics.jsonl"
    )
    eval_every: Count | None = Field(
        default=None, description="steps between evaluations on the validation split"
    )
    eval_rows: Count | None = Field(
        default=None,
        description="rows scored at most; the task's own limit unless given",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.steps and self.epochs:
            raise ValueError(
                "training.steps and training.epochs exclude each other: give one"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_recompute(self) -> Training:
        if self.memory_budget is not None and not self.compile:
            raise ValueError(
                "training.memory_budget is the compiler's: add training.compile=regions"
            )
        if self.compile and self.gradient_checkpointing:
            raise ValueError(
                "training.compile excludes gradient_checkpointing: training.memory_budget does its work"
            )
        return self


class Recipe(_Strict):
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

    def check(self, *, method: bool = True, source: str = "recipe") -> None:
        """Look up every name and the method's arguments, before anything is loaded or downloaded.

        Args:
            method: whether to look at `method` too; a caller that brings its own has no use for it.
            source: what an error calls the recipe: its file.

        Raises:
            PetuneError: a name that nothing installed goes by, or an argument that the method doesn't take.
        """
        from petune.core.attached.parts import parts
        from petune.core.registry.plugins import registry
        from petune.training.data import check_source

        try:
            self._check_names()
            if method:
                parts(self.method, self.method_args, self.where)
            check_source(self.data)
            self._check_training()
            roles = registry().get("petune_tasks", self.task).roles()
            for role in self.columns:
                _choice("columns", role, roles)
        except PetuneError as error:
            raise type(error)(f"{source}: {error}") from error

    def _check_names(self) -> None:
        """Look up the task, the precision and the head."""
        from petune.core.registry.plugins import registry
        from petune.loading.models import DTYPES, HEADS

        registry().get("petune_tasks", self.task)
        if self.precision not in DTYPES:
            _quantizer(self.precision, list(DTYPES))
        if self.head is not None:
            _choice("head", self.head, list(HEADS))

    def _check_training(self) -> None:
        """Look up the schedule and the optimizer, and see that the device has what the settings need."""
        import torch
        from transformers import SchedulerType
        from transformers.training_args import OptimizerNames
        from transformers.utils.import_utils import is_liger_kernel_available

        training = self.training
        _choice(
            "training.schedule", training.schedule, [s.value for s in SchedulerType]
        )
        _choice(
            "training.optimizer", training.optimizer, [o.value for o in OptimizerNames]
        )
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
        is_here = Path(self.model).expanduser().exists()
        model = _absolute(self.model) if is_here else self.model
        return self.model_copy(update={"data": data, "model": model})


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


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
        name, values = str(source), _read(Path(source))
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


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes `1e-3` for a string and the last of two equal keys; nobody means that."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789")
)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise PetuneError(f"{path}: {error.strerror or error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise PetuneError(
            f"{path}{line}: {getattr(error, 'problem', None) or 'not YAML'}."
        ) from None
    if not isinstance(values, dict):
        raise PetuneError(
            f"{path}: a recipe is a mapping of keys to values (model, task, data, output, …)."
        )
    return values


def _override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise PetuneError(
            f"override {override!r}: write key=value, such as training.steps=10."
        )
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise PetuneError(
            f"override {override!r}: {text!r} is not a YAML value; quote it."
        ) from None
    *parents, key = dotted.split(".")
    for parent in parents:
        inner = values.get(parent)
        inner = dict(inner) if isinstance(inner, Mapping) else {}
        values[parent] = inner
        values = inner
    values[key] = value


def _quantizer(precision: str, plain: Sequence[str]) -> None:
    from petune.core.registry.plugins import registry

    try:
        registry().get("petune_quantizers", precision)
    except PetuneError as error:
        raise PetuneError(f"{error} Without a plugin: {', '.join(plain)}.") from None


def _choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise PetuneError(
            f"{key}: {unknown('value' if '.' in key else 'role', value, known)}"
        )


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
    if problem["type"] == "extra_forbidden":
        inner = [f"training.{name}" for name in Training.model_fields]
        return unknown("key", key, inner if nested else list(Recipe.model_fields))
    if problem["type"] == "missing":
        return f"key {key!r} is missing."
    if problem["type"] == "value_error":
        return f"{problem['ctx']['error']}."
    reason = problem["msg"].replace("Input should be", "should be").partition(", ")[0]
    return f"{key}: {problem['input']!r} {reason}."
