"""A tuning is written: tensors as safetensors, everything else as JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from petune.core.attached.parts import Part, Where
from petune.core.attached.settled import brought_by, own_version, settled
from petune.core.attached.sharded import gathered, is_sharded, write_once
from petune.core.registry.plugins import registry
from petune.errors import PetuneError
from petune.files import at_home

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel


VERSION = 1
WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


class Kept(Protocol):
    """What of a tuning a folder keeps; see `petune.Tuning`."""

    model: Any
    parts: tuple[Part, ...]
    heads: tuple[str, ...]

    @property
    def method(self) -> str: ...

    @property
    def where(self) -> Where: ...

    @property
    def weight(self) -> float: ...

    def state(self) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class Format:
    """How a folder holds a tuning: its tensors in a safetensors file, all else in a JSON file.

    Args:
        export: (tensors by name, what the JSON says) of a tuning; UnsupportedError where it has no place there.
        weights: the name of the safetensors file.
        config: that of the JSON file, by which `petune.load` knows the format.
        load: attaches what a folder holds to a model, under a name; without it the format is not read.
    """

    export: Callable[[Any], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
    weights: str
    config: str
    load: Callable[[PreTrainedModel, Path, str], Any] | None = None


def save(tuning: Kept, path: str | PathLike[str], format: str = "petune") -> None:
    """Write a tuning into a folder, each file whole or not at all. Of a model that is spread over processes all of
    them call it, and one writes.

    Raises:
        PetuneError: no such format, or one that has no place for this tuning; nothing is written then.
    """
    form = (
        OWN
        if format == "petune"
        else registry().get("petune_formats", format, "petune")
    )
    tensors, config = form.export(tuning)
    spread = any(map(is_sharded, tensors.values()))
    tensors = {
        key: tensor.detach().cpu().contiguous()
        for key, tensor in gathered(tensors).items()
    }
    write = partial(_write, at_home(path), form, tensors, config)
    write_once(write) if spread else write()


def _write(
    folder: Path, form: Format, tensors: dict[str, Tensor], config: Mapping[str, Any]
) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PetuneError(f"{folder}: {error.strerror or error}.") from None
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        save_file(tensors, Path(scratch, form.weights), metadata={"format": "pt"})
        Path(scratch, form.config).write_text(json.dumps(config, indent=2) + "\n")
        for file in (form.weights, form.config):
            os.replace(Path(scratch, file), folder / file)


def _export(tuning: Kept) -> tuple[dict[str, Tensor], dict[str, Any]]:
    names = [part.name for part in tuning.parts]
    arguments = {part.name: settled(part) for part in tuning.parts}
    config = {
        "petune": VERSION,
        "method": tuning.method if len(names) == 1 else names,
        "arguments": arguments[names[0]] if len(names) == 1 else arguments,
        "where": tuning.where,
        "roles": {part.name: part.own_roles for part in tuning.parts},
        "train": list(tuning.heads),
        "base": getattr(tuning.model.config, "name_or_path", "") or None,
        "architecture": tuning.model.config.model_type,
        "plugins": {part.name: brought_by(part) for part in tuning.parts},
        "version": own_version(),
    }
    if tuning.weight != 1:
        config["weight"] = tuning.weight
    return dict(tuning.state()), config


OWN = Format(_export, WEIGHTS, CONFIG)
