"""Small files, read with an error that names them and written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from petune.errors import PetuneError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PetuneError: no such file, or no JSON object in it, or a key is given twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text, object_pairs_hook=_each_once)
    except OSError as error:
        raise PetuneError(f"{path}: {error.strerror or error}.") from None
    except ValueError as error:
        raise PetuneError(f"{path}: not JSON ({error}).") from None
    except RecursionError:
        raise PetuneError(f"{path}: its JSON is nested too deeply.") from None
    if not isinstance(found, dict):
        raise PetuneError(f"{path}: not a JSON object.")
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values; of a key that is given twice the last value would win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def write_text(path: Path, text: str) -> None:
    """All of it or nothing: a reader never sees half a file. What is no plain file, such as `/dev/stdout`, is written
    to as it is.

    Raises:
        PetuneError: it can't be written.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within the context a full disk, a missing permission and their like end in one line.

    Args:
        path: what is written, for systems that don't name the file themselves.

    Raises:
        PetuneError: the system refused to write.
    """
    try:
        yield
    except OSError as error:
        # a replaced file is the second name
        culprit = error.filename2 or error.filename or path
        raise PetuneError(f"{culprit}: {error.strerror or error}.") from error


def at_home(path: str | os.PathLike[str]) -> Path:
    """A path that a user names, `~` at its beginning replaced by the home folder that it stands for.

    Raises:
        PetuneError: no path, no such user, or a path that no system has.
    """
    try:
        named = os.fsdecode(path)
    except TypeError:
        raise PetuneError(f"{path!r} is no path; give a text or a Path.") from None
    return Path(expanded(named))


def expanded(path: str) -> str:
    """The same for a text that may be a path, or a name of something else."""
    if "\0" in path:
        raise PetuneError(f"{path!r}: a path has no NUL character in it.")
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        user = path.partition("/")[0]
        raise PetuneError(f"{path}: there is no home folder of {user}.") from None
