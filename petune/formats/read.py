"""The two files of a PEFT folder, read and looked over before anything is attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from petune.core.attached.saved import read_tensors
from petune.errors import PetuneError
from petune.files import read_json
from petune.formats.names import CONFIG, WEIGHTS

PICKLED = "adapter_model.bin"


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what the configuration says, the tensors by the names that PEFT has saved them by).

    Raises:
        PetuneError: a file is missing or damaged, or holds what no adapter can be made of.
    """
    config = read_json(folder / CONFIG)
    _check_there(folder)
    tensors = read_tensors(folder / WEIGHTS)
    if not tensors:
        raise PetuneError(f"{folder / WEIGHTS} holds no tensors.")
    return config, tensors


def _check_there(folder: Path) -> None:
    """See whether the tensors are there in the one file that PEFT writes.

    Raises:
        PetuneError: they are pickled, in several files, or nowhere.
    """
    if (folder / WEIGHTS).exists():
        return
    if (folder / PICKLED).exists():
        raise PetuneError(
            f"{folder / PICKLED} is a pickle, which petune never opens: load it in PEFT and "
            f"save_pretrained anew, which writes {WEIGHTS}."
        )
    pieces = sorted(folder.glob("adapter_model-*.safetensors"))
    if pieces:
        raise PetuneError(
            f"{pieces[0]}: PEFT keeps an adapter in one file, {WEIGHTS}: join these {len(pieces)} into it."
        )
    raise PetuneError(f"{folder / WEIGHTS} is missing, beside its {CONFIG}.")
