"""What a run's rows were: a digest of every split, by which a run notices that its data has changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.errors import PetuneError
from petune.files import read_json

if TYPE_CHECKING:
    import datasets

FILE = "data.json"
Splits = Mapping[str, "datasets.Dataset"]


def fingerprint(splits: Splits) -> dict[str, Any]:
    """By split, how many rows it has and the sha256 of them, in their order and by their roles."""
    return {
        split: {"rows": len(rows), "sha256": _digest(rows)}
        for split, rows in splits.items()
    }


def _digest(rows: datasets.Dataset) -> str:
    digest = sha256()
    for row in rows:
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def check_unchanged(run: Path, splits: Splits, remedy: str) -> None:
    """See that these are the rows of a run. A run that has noted none is taken at its word.

    Raises:
        PetuneError: a split has other rows, or the run's note of them can't be read.
    """
    noted = read_json(run / FILE) if (run / FILE).exists() else {}
    for split, about in fingerprint(splits).items():
        was = noted.get(split, about)
        if was == about:
            continue
        had = was.get("rows") if isinstance(was, dict) else None
        counts = f"it has {about['rows']} rows, and had {had}"
        raise PetuneError(
            f"{run}: the data has changed since the run was begun: the split {split!r} is another ({counts}); {remedy}."
        )
