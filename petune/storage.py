"""A tuning on disk: tensors as safetensors, everything else as JSON. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from petune import formats
from petune.errors import PetuneError, unknown
from petune.files import read_json

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel

    from petune.parts import Method
    from petune.tuning import Tuning

VERSION = 1
WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


def save(tuning: Tuning, path: str | PathLike[str], format: str = "petune") -> None:
    """Write a tuning into a folder, each file whole or not at all.

    Raises:
        PetuneError: no such format, or one that has no place for this tuning; nothing is written then.
    """
    if format in formats.EXPORTS:
        tensors, config = formats.EXPORTS[format](tuning)
        _write(Path(path), formats.peft.WEIGHTS, tensors, formats.peft.CONFIG, config)
        return
    if format != "petune":
        raise PetuneError(unknown("format", format, ["petune", *formats.EXPORTS]))
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tuning.state()}
    config = {
        "petune": VERSION,
        "method": tuning.method if len(tuning.parts) == 1 else [part.name for part in tuning.parts],
        "arguments": tuning.arguments,
        "where": tuning.where,
        "train": list(tuning.heads),
        "base": getattr(tuning.model.config, "name_or_path", "") or None,
        "architecture": tuning.model.config.model_type,
    }
    if tuning.weight != 1:
        config["weight"] = tuning.weight
    _write(Path(path), WEIGHTS, tensors, CONFIG, config)


def _write(folder: Path, weights: str, tensors: dict[str, Tensor], name: str, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        save_file(tensors, Path(scratch, weights), metadata={"format": "pt"})
        Path(scratch, name).write_text(json.dumps(config, indent=2) + "\n")
        for file in (weights, name):
            os.replace(Path(scratch, file), folder / file)


def load(
    model: PreTrainedModel,
    path: str | PathLike[str],
    *,
    name: str = "default",
    method: Method | Sequence[str | Method] | None = None,
) -> Tuning:
    """Attach a saved tuning: petune's folder or PEFT's, told apart by what is in it.

    Args:
        method: the method's class, where no plugin brings it under the saved name; of several methods, a list.

    Raises:
        PetuneError: no tuning there, its method is not installed, or it does not fit the model; the model is
            left as it was.
    """
    from petune.tuning import attach

    folder = Path(path)
    if not (folder / CONFIG).exists() and (folder / formats.peft.CONFIG).exists():
        return formats.peft.load(model, folder, name)
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


def fill(tuning: Tuning, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy saved tensors into a tuning.

    Raises:
        PetuneError: a tensor is missing, left over or of another shape; nothing was copied then.
    """
    own = dict(tuning.state())
    missing, extra = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    if missing or extra:
        what = f"has no {min(missing)!r}" if missing else f"has {min(extra)!r}, which this model has no place for"
        raise PetuneError(f"{source} does not fit this model: it {what}. Was it tuned on another architecture?")
    for key, tensor in own.items():
        if tensor.shape != tensors[key].shape:
            shapes = f"{tuple(tensors[key].shape)}, the model needs {tuple(tensor.shape)}"
            raise PetuneError(f"{source} does not fit this model: {key!r} is {shapes}.")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(tensors[key])


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter.json`, checked.

    Raises:
        PetuneError: the folder holds no tuning, or one of a later version.
    """
    if not (folder / CONFIG).is_file():
        raise PetuneError(f"{folder}: no {CONFIG} there, so no tuning.")
    config = read_json(folder / CONFIG)
    if missing := {"petune", "method", "arguments", "where", "train"} - config.keys():
        raise PetuneError(f"{folder / CONFIG} is not a tuning's: it has no {min(missing)!r}.")
    if config["petune"] > VERSION:
        raise PetuneError(f"{folder / CONFIG}: format {config['petune']} is newer than this petune; upgrade it.")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        PetuneError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise PetuneError(f"{path}: no such file.") from None
    except (SafetensorError, OSError) as bad:
        raise PetuneError(f"{path} is damaged: {bad}.") from None
