"""The rows of one file: .jsonl, .json, .csv, .tsv or .parquet."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from petune.errors import PetuneError, unknown
from petune.files import at_home
from petune.training.delimited import read_delimited
from petune.training.objects import read_objects
from petune.training.table import Table


def read_rows(path: str | Path) -> Table:
    """The rows of one file; the kind is told by its ending.

    Raises:
        PetuneError: no such file, an ending that is not known, or content that is not what the ending says.
    """
    path = existing(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise PetuneError(f"{path}: {unknown('kind of file', path.suffix, READERS)}")
    try:
        rows = reader(path)
    except PetuneError:
        raise
    except Exception as error:
        # pyarrow's own errors share no base class with the system's
        raise PetuneError(f"{path}: {one_line(error)}") from error
    if not len(rows):
        raise PetuneError(f"{path}: no rows.")
    return rows


def existing(path: str | Path) -> Path:
    """The path of a file or a folder that is there.

    Raises:
        PetuneError: it is not; the message names the nearest beside it.
    """
    path = at_home(path)
    if not path.exists():
        siblings = (
            [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        )
        near = get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise PetuneError(f"{path}: no such file.{hint}")
    return path


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _parquet(path: Path) -> Table:
    from pyarrow import parquet

    found = parquet.read_table(path)
    names = found.column_names
    if len(set(names)) < len(names):
        raise PetuneError(f"{path}: several columns have one name; rename them.")
    return Table(str(path), {name: found[name].to_pylist() for name in names})


READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": read_objects,
    ".json": read_objects,
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".parquet": _parquet,
}
