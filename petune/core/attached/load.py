"""A tuning is read and attached. Nothing of it is ever unpickled."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from petune.core.attached.attach import attach_parts, check_name, planned
from petune.core.attached.folder import CONFIG, WEIGHTS, Format
from petune.core.attached.parts import Part, parts
from petune.core.attached.reach import decided_before
from petune.core.attached.room import room_for
from petune.core.attached.saved import (
    Config,
    Form,
    check_fits,
    read_config,
    read_forms,
    read_tensors,
)
from petune.core.attached.settled import differences
from petune.core.attached.sharded import scattered
from petune.core.attached.tuning import Tuning
from petune.core.host.seams import SEAMS
from petune.core.registry.methods import Method
from petune.core.registry.plugins import registry
from petune.errors import PetuneError, PetuneWarning
from petune.files import at_home

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel


def load(
    model: PreTrainedModel,
    path: str | PathLike[str],
    *,
    name: str = "default",
    method: Method | Sequence[str | Method] | None = None,
) -> Tuning:
    """Attach a saved tuning: petune's folder, or one of another format that a plugin reads (PEFT's), told apart by
    their files.

    Args:
        method: the method's class, where no plugin brings it under the saved name; of several methods, a list.

    Raises:
        PetuneError: no tuning there, its method is not installed, or it does not fit the model; the model is
            left as it was.
        MovedError: a library has changed something that petune leans on.
    """
    SEAMS.require()  # here, since a check may ask for more memory than the tuning may
    check_name(model, name)
    folder = at_home(path)
    form = _format(folder)
    if form is not None:
        return _loaded_by(form, model, folder, name)
    config = read_config(folder)
    forms = read_forms(folder / WEIGHTS)
    wanted = _parts(config, method, folder / CONFIG)
    _check_planned(model, wanted, forms, folder / WEIGHTS)
    tensors = read_tensors(folder / WEIGHTS)
    with room_for(model, forms, folder / CONFIG), decided_before():
        tuning = _attached(model, wanted, name, config, folder / CONFIG)
    try:
        fill(tuning, tensors, folder / WEIGHTS)
        tuning.weight = config.weight
    except BaseException:
        tuning.detach()
        raise
    _say_differences(config, wanted, folder / CONFIG)
    return tuning


def _parts(
    config: Config, method: Method | Sequence[str | Method] | None, file: Path
) -> tuple[Part, ...]:
    """The saved methods with their saved arguments.

    Raises:
        PetuneError: a method is not installed, or an argument is not what it takes.
    """
    chosen = method or config.method
    try:
        found = parts(chosen, config.arguments, config.where)
    except PetuneError as wrong:
        raise type(wrong)(f"{file}: {wrong}") from None
    is_one = isinstance(chosen, str | type)
    for part in found:
        said = config.arguments if is_one else config.arguments.get(part.name, {})
        _check_as_said(part, said, file)
    roles = config.roles or {}
    return tuple(replace(part, roles=roles.get(part.name)) for part in found)


def _check_as_said(part: Part, said: Mapping[str, Any], file: Path) -> None:
    """A file's arguments have the types that they were saved with: no text stands for a number, no truth for one."""
    for key, value in part.arguments.items():
        is_same = said[key] == json.loads(json.dumps(value, default=str))
        if not is_same or isinstance(said[key], bool) != isinstance(value, bool):
            what = f"{key}={said[key]!r} is no {type(value).__name__}"
            raise PetuneError(f"{file}: method {part.name!r}: {what}.")


def _say_differences(config: Config, wanted: Sequence[Part], file: Path) -> None:
    """One line where what is installed is not what the tuning was saved with."""
    if config.plugins is None:
        return
    found = differences(wanted, config.plugins, config.version)
    if found:
        what = f"{file}: {found}; see that it still computes the same."
        warnings.warn(what, PetuneWarning, stacklevel=3)


def _check_planned(
    model: PreTrainedModel,
    wanted: Sequence[Part],
    saved: Mapping[str, Form],
    file: Path,
) -> None:
    """Compare the saved tensors with those that the arguments ask for, before there is memory for any."""
    try:
        plan = planned(model, wanted)
        places = {key: Form.of(tensor) for key, tensor in plan.state()}
    except Exception:  # a method that needs values: what it makes is compared by `fill`
        return
    check_fits(places, saved, file)


def _attached(
    model: PreTrainedModel,
    wanted: Sequence[Part],
    name: str,
    config: Config,
    file: Path,
) -> Tuning:
    """The methods on the model, with fresh tensors.

    Raises:
        PetuneError: they can't act there, or not with these arguments.
    """
    try:
        return attach_parts(model, wanted, name, config.train)
    except PetuneError as wrong:
        raise type(wrong)(f"{file}: {wrong}") from None
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as bad:
        # values of the right types that the method can't work with
        what = f"arguments {config.arguments}: {' '.join(str(bad).split())}"
        raise PetuneError(f"{file}: {what}.") from bad


def _format(folder: Path) -> Format | None:
    """The format of a folder that is not petune's: the first with both its files there, else with the JSON."""
    if (folder / CONFIG).exists():
        return None
    known: list[Format] = [
        form
        for form in registry().all("petune_formats").values()
        if form.load is not None
    ]
    found = [form for form in known if (folder / form.config).exists()]
    found.sort(key=lambda form: not (folder / form.weights).exists())
    return found[0] if found else None


def _loaded_by(form: Format, model: PreTrainedModel, folder: Path, name: str) -> Tuning:
    """What the plugin of a format makes of a folder; it gets no memory for what the folder does not hold."""
    assert form.load is not None
    weights = folder / form.weights
    saved = read_forms(weights) if weights.is_file() else {}
    with room_for(model, saved, folder / form.config), decided_before():
        tuning: Tuning = form.load(model, folder, name)
    return tuning


def fill(tuning: Tuning, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy saved tensors into a tuning.

    Raises:
        PetuneError: a tensor is missing, left over, of another shape or of integers; nothing was copied then.
    """
    own = dict(tuning.state())
    missing, extra = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    if missing or extra:
        what = (
            f"has no {min(missing)!r}"
            if missing
            else f"has {min(extra)!r}, which this model has no place for"
        )
        raise PetuneError(
            f"{source} does not fit this model: it {what}. Was it tuned on another architecture?"
        )
    check_fits(
        {key: Form.of(tensor) for key, tensor in own.items()},
        {key: Form.of(tensor) for key, tensor in tensors.items()},
        source,
    )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(scattered(tensors[key], tensor))
