"""From what a recipe calls `data` to rows whose columns go by their roles.

A source is a built-in set, a file (.jsonl .json .csv .tsv .parquet), a folder or a mapping of `train`, `validation`
and `test` files, or a Hub id (`owner/name`, or `{hub: owner/name, config: …, test: …}` to name its splits).

Splits that a source doesn't have are cut from `train`: its rows are shuffled with seed 0, then a tenth (one row at
least) goes to each missing split, `test` first.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.core.registry.plugins import registry
from petune.errors import PetuneError, unknown
from petune.training.roles import Reads, assign
from petune.training.rows import READERS, existing, one_line, read_rows
from petune.training.table import Table

if TYPE_CHECKING:
    import datasets

    from petune.training.dataset import Dataset

Splits = dict[str, "datasets.Dataset"]
"""Rows by the names of their splits."""
SPLITS = ("train", "validation", "test")
_OTHER_NAMES = {
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
}
_PLAIN = ("json", "csv", "parquet", "arrow", "text")
"""The kinds of files that are read from the Hub; others may run code or unpickle."""


def check_source(data: str | Mapping[str, str]) -> None:
    """Whether `data` can be what it says, without reading or downloading it.

    Raises:
        PetuneError: no such file or built-in set.
    """
    if isinstance(data, Mapping):
        if "hub" not in data:
            for split, path in data.items():
                if split not in SPLITS:
                    raise PetuneError(f"data: {unknown('split', split, SPLITS)}")
                existing(path)
        return
    if is_local(data):
        existing(data)
    elif "/" not in data:
        _alias(data)


def load_splits(
    data: str | Mapping[str, str],
    columns: Mapping[str, str],
    roles: Iterable[str],
    optional: Iterable[str] = (),
    reads: Reads | None = None,
) -> Splits:
    """`train`, `validation` and `test`, each with a column for every role. An optional role that one split has a column
    for, all must have.

    Raises:
        PetuneError: the source can't be read, a role has no column in it, or a cell is nothing that the role can be.
    """
    name = data if isinstance(data, str) else ", ".join(data.values())
    tables, known = _read_source(data)
    if "train" not in tables:
        raise PetuneError(
            f"data {name}: no 'train' split; it has {', '.join(tables) or 'none'}. "
            "Name a file: data: {train: …}."
        )
    named = {**known, **columns}
    wanted = [*roles, *(role for role in optional if _occurs(role, named, tables))]
    splits = {
        split: assign(table, named, wanted, reads=reads, source=f"data {table.source}")
        for split, table in tables.items()
    }
    return _complete(splits, name)


def _occurs(role: str, named: Mapping[str, str], tables: Mapping[str, Table]) -> bool:
    """Whether the recipe names a column for it, or a split has one of its name."""
    return role in named or any(role in table.columns for table in tables.values())


def _read_source(
    data: str | Mapping[str, str],
) -> tuple[dict[str, Table], Mapping[str, str]]:
    """The splits that a source has, and which of its columns play which roles, where it says so itself."""
    if not isinstance(data, str):
        if "hub" in data:
            return _tables(data["hub"], _hub(data)), {}
        return {split: read_rows(path) for split, path in data.items()}, {}
    if is_local(data):
        path = existing(data)
        return (_folder(path) if path.is_dir() else {"train": read_rows(data)}), {}
    if "/" in data:
        return _tables(data, _hub({"hub": data})), {}
    built_in = _alias(data)
    return _tables(data, built_in.splits()), built_in.columns


def _tables(name: str, splits: Mapping[str, datasets.Dataset]) -> dict[str, Table]:
    return {
        split: Table.of_dataset(f"{name} ({split})", rows)
        for split, rows in splits.items()
    }


def is_local(data: str) -> bool:
    """Whether it names a file or folder here, rather than a built-in set or a Hub id."""
    path = Path(data)
    looks_local = data.startswith((".", "/", "~"))
    return path.exists() or path.suffix.lower() in READERS or looks_local


def _alias(name: str) -> Dataset:
    """A built-in set."""
    try:
        found: Dataset = registry().get("petune_datasets", name)
    except PetuneError as error:
        raise PetuneError(
            f"data: {error} Else give a file, a folder or a Hub id (owner/name)."
        ) from None
    return found


def _folder(folder: Path) -> dict[str, Table]:
    splits: dict[str, Table] = {}
    for path in sorted(folder.iterdir()):
        split = _OTHER_NAMES.get(path.stem, path.stem)
        if path.suffix.lower() in READERS and split in SPLITS:
            if split in splits:
                raise PetuneError(f"{folder}: two files for the split {split!r}.")
            splits[split] = read_rows(path)
    return splits


def _hub(source: Mapping[str, str]) -> Splits:
    """The splits of a set on the Hub: all that have a known name, or those that `source` names."""
    _check_keys(source)
    name = source["hub"]
    try:
        found = _downloaded(name, source.get("config"))
    except PetuneError:
        raise
    except Exception as error:
        # the hub's client, its server and the network have errors of their own
        raise PetuneError(f"data {name}: {one_line(error)}") from error
    named = {split: source[split] for split in SPLITS if split in source}
    for split in named.values():
        if split not in found:
            raise PetuneError(f"data {name}: {unknown('split', split, found)}")
    wanted = named or _by_known_names(found)
    return {split: _named_labels(found[theirs]) for split, theirs in wanted.items()}


def _check_keys(source: Mapping[str, str]) -> None:
    known = ("hub", "config", *SPLITS)
    for key in source:
        if key not in known:
            raise PetuneError(f"data: {unknown('key', key, known)}")


def _by_known_names(theirs: Iterable[str]) -> dict[str, str]:
    """A set's own names of the three splits; other splits are left out."""
    known = {_OTHER_NAMES.get(name, name): name for name in theirs}
    return {split: name for split, name in known.items() if split in SPLITS}


def _downloaded(name: str, config: str | None) -> Any:
    """The splits of a set on the Hub under the names that it has there, if its files are plain data."""
    import datasets

    from petune.training.host import kind_of_files  # imports torch

    builder = datasets.load_dataset_builder(name, config)
    kind = kind_of_files(type(builder))
    if kind not in _PLAIN:
        raise PetuneError(
            f"data {name}: its files are {kind!r}; petune reads {', '.join(_PLAIN)}."
        )
    builder.download_and_prepare()
    return builder.as_dataset()


def _named_labels(rows: datasets.Dataset) -> datasets.Dataset:
    """Class labels by their names, as a file would have them."""
    import datasets

    for column, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel):
            named = [_label(feature, number) for number in rows[column]]
            rows = rows.remove_columns(column).add_column(column, named)
    return rows


def _label(names: datasets.ClassLabel, number: int | None) -> str | None:
    """The name of a class, None where a row has none: some sets say -1."""
    if number is None or number < 0:
        return None
    found: str = names.int2str(number)
    return found


def _complete(splits: Splits, name: str) -> Splits:
    """All three splits, those that are missing cut from `train`."""
    missing = [split for split in ("test", "validation") if split not in splits]
    if not missing:
        return {split: splits[split] for split in SPLITS}
    train = splits["train"]
    share = max(1, len(train) // 10)
    if len(train) <= share * len(missing):
        raise PetuneError(
            f"data {name}: {len(train)} rows are too few to cut off {' and '.join(missing)}."
        )
    order = list(range(len(train)))
    random.Random(0).shuffle(order)
    found = dict(splits)
    for i, split in enumerate(missing):
        found[split] = train.select(order[i * share : (i + 1) * share])
    found["train"] = train.select(order[share * len(missing) :])
    return {split: found[split] for split in SPLITS}
