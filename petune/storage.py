"""A tuning on disk: tensors as safetensors, everything else as JSON. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from petune.errors import PetuneError
from petune.files import read_json
from petune.plugins import registry

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel

    from petune.parts import Method
    from petune.tuning import Tuning

VERSION = 1
WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class Format:
    """How a folder holds a tuning: its tensors in a safetensors file, all else in a JSON file.

    Args:
        export: (tensors by name, what the JSON says) of a tuning; UnsupportedError where it has no place there.
        weights: the name of the safetensors file.
        config: that of the JSON file, by which `petune.load` knows the format.
        load: attaches what a folder holds to a model, under a name; without it the format is not read.
    """

    export: Callable[[Tuning], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
    weights: str
    config: str
    load: Callable[[PreTrainedModel, Path, str], Tuning] | None = None


def save(tuning: Tuning, path: str | PathLike[str], format: str = "petune") -> None:
    """Write a tuning into a folder, each file whole or not at all.

    Raises:
        PetuneError: no such format, or one that has no place for this tuning; nothing is written then.
    """
    form = OWN if format == "petune" else registry().get("petune_formats", format, "petune")
    tensors, config = form.export(tuning)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        save_file(tensors, Path(scratch, form.weights), metadata={"format": "pt"})
        Path(scratch, form.config).write_text(json.dumps(config, indent=2) + "\n")
        for file in (form.weights, form.config):
            os.replace(Path(scratch, file), folder / file)


def _export(tuning: Tuning) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
    return dict(tuning.state()), config


OWN = Format(_export, WEIGHTS, CONFIG)


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
    from petune.tuning import attach

    folder = Path(path)
    if (read := _reader(folder)) is not None:
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
    known: list[Format] = [form for form in registry().all("petune_formats").values() if form.load is not None]
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
