"""What a disk refuses while a training writes: in one line, whichever library was writing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from petune.errors import PetuneError
from petune.files import writing

_OF_TORCH = ("inline_container.cc", "PytorchStreamWriter")
"""What torch's error says where a file could not be written to its end."""


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Within the context what can't be written into a folder ends in one line.

    Raises:
        PetuneError: the disk is full, or refuses for another reason.
    """
    try:
        with writing(folder):
            yield
    except SafetensorError as error:
        said = str(error)
        reason = said.rpartition(": ")[2]
        raise PetuneError(f"{folder}: {reason}.") from error
    except RuntimeError as error:
        if not any(word in str(error) for word in _OF_TORCH):
            raise
        raise PetuneError(
            f"{folder}: a checkpoint can't be written; is the disk full?"
        ) from error


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` at the end of the context, and is gone if something goes wrong.

    Args:
        out: where nothing lies yet but perhaps an empty folder.

    Raises:
        PetuneError: it can't be written.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with saving(out):
            part.mkdir(parents=True)
            yield part
            if out.exists():
                out.rmdir()
            os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
