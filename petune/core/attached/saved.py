"""A saved tuning as it is read: its JSON and its tensors, each checked before anything is made of them."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from petune.core.attached.folder import CONFIG, VERSION
from petune.errors import PetuneError, unknown
from petune.files import read_json


@dataclass(frozen=True)
class Config:
    """What `adapter.json` says. The files of earlier versions have no `roles`, no `plugins` and no `version`.

    `arguments` are those of the method, with its defaults as they were; of several methods those of each by its name,
    as `where` then is. `roles` says for each method where it acted by itself, `plugins` what brought it.
    """

    petune: int
    method: str | list[str]
    arguments: dict[str, Any]
    where: str | dict[str, str | None] | None
    train: list[str]
    base: str | None = None
    architecture: str | None = None
    weight: float = 1.0
    roles: dict[str, str] | None = None
    plugins: dict[str, str | None] | None = None
    version: str | None = None


KEYS = {field.name: field.default is MISSING for field in fields(Config)}
"""The keys of `adapter.json`, and whether each must be there."""


def read_config(folder: Path) -> Config:
    """`adapter.json`, checked.

    Raises:
        PetuneError: the folder holds no tuning, or one of a later version, or a key is unknown or has a value of the
            wrong type.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise PetuneError(f"{folder}: no {CONFIG} there, so no tuning.")
    config = read_json(file)
    missing = [key for key, needed in KEYS.items() if needed and key not in config]
    if missing:
        raise PetuneError(f"{file} is not a tuning's: it has no {min(missing)!r}.")
    _check_version(file, config["petune"])
    for key in config.keys() - KEYS.keys():
        raise PetuneError(f"{file}: {unknown('key', key, KEYS)}")
    return _typed(file, config)


def _check_version(file: Path, version: object) -> None:
    if version == VERSION:
        return
    if isinstance(version, int) and version > VERSION:
        what = "is newer than this petune; upgrade it"
    else:
        what = f"is none; this petune reads {VERSION}"
    raise PetuneError(f"{file}: format {version!r} {what}.")


def _typed(file: Path, config: Mapping[str, Any]) -> Config:
    # a second to import, and only needed here
    from pydantic import TypeAdapter, ValidationError

    try:
        text = json.dumps(config, allow_nan=False)
        typed = TypeAdapter(Config).validate_json(text, strict=True)
        if math.isfinite(typed.weight):
            return typed
    except ValidationError as bad:
        first = bad.errors()[0]
        if not first["loc"]:  # it is nested too deeply, or one of its texts is none
            raise PetuneError(f"{file}: {first['msg']}.") from None
        key = str(first["loc"][0])
        what = f"{first['msg']}, not {reprlib.repr(config[key])}"
        raise PetuneError(f"{file}: {key!r}: {what}.") from None
    except RecursionError:
        raise PetuneError(f"{file}: its JSON is nested too deeply.") from None
    except ValueError:
        pass
    raise PetuneError(
        f"{file}: one of its numbers is NaN or infinite; save the tuning again."
    )


@dataclass(frozen=True)
class Form:
    """What of a tensor has to fit its place: the shape, and whether its numbers are floating-point ones."""

    shape: tuple[int, ...]
    is_float: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """That of a tensor, which need not have any memory."""
        return cls(tuple(tensor.shape), tensor.is_floating_point())


def check_fits(
    places: Mapping[str, Form], saved: Mapping[str, Form], source: Path
) -> None:
    """Compare saved tensors with the places for them; of a place for which nothing is saved nothing is said.

    Raises:
        PetuneError: one has another shape, or integers for floating-point numbers.
    """
    for key in filter(saved.__contains__, places):
        place, found = places[key], saved[key]
        if place.shape != found.shape:
            shapes = f"{found.shape}, the model needs {place.shape}"
            raise PetuneError(f"{source} does not fit this model: {key!r} is {shapes}.")
        if place.is_float != found.is_float:
            kind = "floating-point" if place.is_float else "whole"
            raise PetuneError(f"{source}: {key!r} does not hold {kind} numbers.")


def read_forms(path: Path) -> dict[str, Form]:
    """The forms of the tensors in a safetensors file, from its header alone.

    Raises:
        PetuneError: the file is missing or damaged.
    """
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {
            key: Form(tuple(part.get_shape()), _is_float(part.get_dtype()))
            for key, part in slices.items()
        }


def _is_float(dtype: str) -> bool:
    """Of a dtype as safetensors writes it: `F32`, `BF16`, `F8_E4M3`, `I64`, …"""
    return dtype.startswith(("F", "BF"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        PetuneError: the file is missing or damaged, or one of its tensors is not finite.
    """
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, tensor in tensors.items():
        if not _is_finite(tensor):
            what = "holds NaN or infinite numbers; its training had failed"
            raise PetuneError(f"{path}: {key!r} {what}.")
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    # as float32, in which it will be: larger numbers are infinite there, and of 8-bit ones torch can't ask this
    narrow = tensor if tensor.element_size() in (2, 4) else tensor.float()
    return bool(torch.isfinite(narrow).all())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise PetuneError(f"{path}: no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as bad:
        raise PetuneError(f"{path} is damaged: {bad}.") from None
