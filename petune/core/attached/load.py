"""A tuning on disk: tensors as safetensors, everything else as JSON. Nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from petune.core.attached.attach import attach
from petune.core.attached.folder import (
    CONFIG,
    WEIGHTS,
    Format,
    read_config,
    read_tensors,
)
from petune.core.attached.sharded import scattered
from petune.core.attached.tuning import Tuning
from petune.core.registry.methods import Method
from petune.core.registry.plugins import registry
from petune.errors import PetuneError

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
    """
    folder = Path(path)
    read = _reader(folder)
    if read is not None:
        return read(model, folder, name)
    config = read_config(folder)
    tensors = read_tensors(folder / WEIGHTS)
    tuning = attach(
        model,
        method or config["method"],
        name=name,
        where=config["where"],
        train=config["train"],
        **config["arguments"],
    )
    try:
        fill(tuning, tensors, folder)
        tuning.weight = config.get("weight", 1.0)
    except PetuneError:
        tuning.detach()
        raise
    return tuning


def _reader(folder: Path) -> Callable[[PreTrainedModel, Path, str], Tuning] | None:
    """What reads a folder that is not petune's: the first format with both its files there, else with the JSON."""
    if (folder / CONFIG).exists():
        return None
    known: list[Format] = [
        form
        for form in registry().all("petune_formats").values()
        if form.load is not None
    ]
    found = [form for form in known if (folder / form.config).exists()]
    found.sort(key=lambda form: not (folder / form.weights).exists())
    return found[0].load if found else None


def fill(tuning: Tuning, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy saved tensors into a tuning.

    Raises:
        PetuneError: a tensor is missing, left over or of another shape; nothing was copied then.
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
    for key, tensor in own.items():
        if tensor.shape != tensors[key].shape:
            shapes = (
                f"{tuple(tensors[key].shape)}, the model needs {tuple(tensor.shape)}"
            )
            raise PetuneError(f"{source} does not fit this model: {key!r} is {shapes}.")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(scattered(tensors[key], tensor))
