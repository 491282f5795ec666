"""Small files, read with an error that names them and written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from petune.errors import PetuneError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PetuneError: no such file, or no JSON object in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise PetuneError(f"{path}: {error.strerror or error}.") from None
    except ValueError as error:
        raise PetuneError(f"{path}: not JSON ({error}).") from None
    except RecursionError:
        raise PetuneError(f"{path}: its JSON is nested too deeply.") from None
    if not isinstance(found, dict):
        raise PetuneError(f"{path}: not a JSON object.")
    return found


def write_text(path: Path, text: str) -> None:
    """All of it or nothing: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
