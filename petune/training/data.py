"""From what a recipe calls `data` to rows whose columns go by their roles.

A source is a built-in set, a file (.jsonl .json .csv .tsv .parquet), a folder or a mapping of `train`, `validation`
and `test` files, or a Hub id (`owner/name`, or `{hub: owner/name, config: …, test: …}` to name its splits).

Splits that a source doesn't have are cut from `train`: its rows are shuffled with seed 0, then a tenth (one row at
least) goes to each missing split, `test` first.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.core.registry.plugins import registry
from petune.errors import PetuneError, unknown

if TYPE_CHECKING:
    import datasets
    import pyarrow

    from petune.training.dataset import Dataset

SPLITS = ("train", "validation", "test")
_OTHER_NAMES = {
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
}
_HUB_BUILDERS = (
    "json",
    "csv",
    "parquet",
    "arrow",
    "text",
)  # plain data; others may run code or unpickle


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
                _existing(path)
        return
    if is_local(data):
        _existing(data)
    elif "/" not in data:
        _alias(data)


def load_splits(
    data: str | Mapping[str, str],
    columns: Mapping[str, str],
    roles: Iterable[str],
    optional: Iterable[str] = (),
) -> dict[str, datasets.Dataset]:
    """`train`, `validation` and `test`, each with a column for every role.

    Raises:
        PetuneError: the source can't be read, or a role has no column in it.
    """
    name = data if isinstance(data, str) else ", ".join(data.values())
    mapping = dict(columns)
    if isinstance(data, str) and not is_local(data) and "/" not in data:
        alias = _alias(data)
        splits = dict(alias.splits())
        mapping = {**alias.columns, **columns}
    elif isinstance(data, Mapping) and "hub" not in data:
        splits = {split: read_rows(path) for split, path in data.items()}
    elif isinstance(data, str) and is_local(data):
        splits = (
            _folder(_existing(data))
            if Path(data).is_dir()
            else {"train": read_rows(data)}
        )
    else:
        splits = _hub({"hub": data} if isinstance(data, str) else data)
    if "train" not in splits:
        raise PetuneError(
            f"data {name}: no 'train' split; it has {', '.join(splits) or 'none'}."
        )
    return {
        split: assign(rows, mapping, roles, optional, source=f"data {name}")
        for split, rows in _complete(splits, name).items()
    }


def assign(
    rows: datasets.Dataset,
    columns: Mapping[str, str],
    roles: Iterable[str],
    optional: Iterable[str] = (),
    *,
    source: str,
) -> datasets.Dataset:
    """The columns that play the roles, under the roles' names, and nothing else.

    Raises:
        PetuneError: a role has no column; the message names the source, its columns and the nearest.
    """
    chosen = {role: columns.get(role, role) for role in roles}
    chosen |= {
        role: columns.get(role, role)
        for role in optional
        if role in columns or role in rows.column_names
    }
    for role, column in chosen.items():
        if column not in rows.column_names:
            hint = (
                f"It plays {role!r}."
                if role in columns
                else f"Say which plays {role!r}: columns: {{{role}: …}}."
            )
            raise PetuneError(
                f"{source}: {unknown('column', column, rows.column_names)} {hint}"
            )
        holes = rows.with_format("arrow")[column].null_count
        if holes:
            first = next(i for i, value in enumerate(rows[column], 1) if value is None)
            raise PetuneError(
                f"{source}: column {column!r} is empty in {holes} rows; row {first} is the first."
            )
    shared = next(
        (c for c in chosen.values() if list(chosen.values()).count(c) > 1), None
    )
    if shared:
        raise PetuneError(
            f"{source}: column {shared!r} can't play two roles ({', '.join(chosen)})."
        )
    return rows.select_columns(list(chosen.values())).rename_columns(
        {column: role for role, column in chosen.items()}
    )


def read_rows(path: str | Path) -> datasets.Dataset:
    """The rows of one file; the kind is told by its ending.

    Raises:
        PetuneError: no such file, an ending that is not known, or content that is not what the ending says.
    """
    from datasets import Dataset

    path = _existing(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise PetuneError(f"{path}: {unknown('kind of file', path.suffix, _READERS)}")
    try:
        found = reader(path)
        rows = Dataset.from_list(found) if isinstance(found, list) else Dataset(found)
    except PetuneError:
        raise
    except (
        Exception
    ) as error:  # pyarrow's own errors share no base class with one another
        raise PetuneError(f"{path}: {_line(error)}") from error
    if not len(rows):
        raise PetuneError(f"{path}: no rows.")
    return rows


def is_local(data: str) -> bool:
    """Whether it names a file or folder here, rather than a built-in set or a Hub id."""
    return (
        Path(data).exists()
        or Path(data).suffix.lower() in _READERS
        or data.startswith((".", "/", "~"))
    )


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        siblings = (
            [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        )
        near = get_close_matches(path.name, siblings, n=1)
        raise PetuneError(
            f"{path}: no such file."
            + (f" Did you mean {path.parent / near[0]}?" if near else "")
        )
    return path


def _alias(name: str) -> Dataset:
    try:
        found: Dataset = registry().get("petune_datasets", name)
    except PetuneError as error:
        raise PetuneError(
            f"data: {error} Else give a file, a folder or a Hub id (owner/name)."
        ) from None
    return found


def _folder(folder: Path) -> dict[str, datasets.Dataset]:
    splits: dict[str, datasets.Dataset] = {}
    for path in sorted(folder.iterdir()):
        split = _OTHER_NAMES.get(path.stem, path.stem)
        if path.suffix.lower() in _READERS and split in SPLITS:
            if split in splits:
                raise PetuneError(f"{folder}: two files for the split {split!r}.")
            splits[split] = read_rows(path)
    return splits


def _hub(source: Mapping[str, str]) -> dict[str, datasets.Dataset]:
    import datasets

    wanted = {split: source[split] for split in SPLITS if split in source}
    others = [key for key in source if key not in (*SPLITS, "hub", "config")]
    if others:
        raise PetuneError(
            f"data: {unknown('key', others[0], ['hub', 'config', *SPLITS])}"
        )
    name = source["hub"]
    try:
        builder = datasets.load_dataset_builder(name, source.get("config"))
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in _HUB_BUILDERS:
            raise PetuneError(
                f"data {name}: its files are {kind!r}; petune reads {', '.join(_HUB_BUILDERS)}."
            )
        builder.download_and_prepare()
        found = builder.as_dataset()
    except PetuneError:
        raise
    except Exception as error:  # the hub's client, its server and the network each have errors of their own
        raise PetuneError(f"data {name}: {_line(error)}") from error
    for split in wanted.values():
        if split not in found:
            raise PetuneError(f"data {name}: {unknown('split', split, found)}")
    wanted = wanted or {_OTHER_NAMES.get(split, split): split for split in found}
    return {
        split: _named_labels(found[theirs])
        for split, theirs in wanted.items()
        if split in SPLITS
    }


def _named_labels(rows: datasets.Dataset) -> datasets.Dataset:
    """Class labels by their names, as a file would have them."""
    import datasets

    for column, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel):
            named = [
                None if i is None or i < 0 else feature.int2str(i) for i in rows[column]
            ]
            rows = rows.remove_columns(column).add_column(column, named)
    return rows


def _complete(
    splits: dict[str, datasets.Dataset], name: str
) -> dict[str, datasets.Dataset]:
    missing = [split for split in ("test", "validation") if split not in splits]
    train = splits["train"]
    share = max(1, len(train) // 10)
    if missing and len(train) <= share * len(missing):
        raise PetuneError(
            f"data {name}: {len(train)} rows are too few to cut off {' and '.join(missing)}."
        )
    order = list(range(len(train)))
    if missing:
        random.Random(0).shuffle(order)
    cut = {
        split: train.select(order[i * share : (i + 1) * share])
        for i, split in enumerate(missing)
    }
    cut["train"] = train.select(order[share * len(missing) :]) if missing else train
    return {split: {**splits, **cut}[split] for split in SPLITS}


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PetuneError(f"{path} line {number}: {error.msg}.") from None
        if not isinstance(row, dict):
            raise PetuneError(
                f'{path} line {number}: each line is an object, such as {{"text": …}}.'
            )
        rows.append(row)
    return rows


def _json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, under the other ending
            return _jsonl(path)
        raise PetuneError(f"{path} line {error.lineno}: {error.msg}.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise PetuneError(
            f"{path}: a .json file is a list of objects; put one object a line into a .jsonl file."
        )
    return rows


def _csv(path: Path, delimiter: str = ",") -> pyarrow.Table:
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    return csv.read_csv(path, parse_options=parse)


def _parquet(path: Path) -> pyarrow.Table:
    from pyarrow import parquet

    return parquet.read_table(path)


_READERS: dict[str, Callable[[Path], Any]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": lambda path: _csv(path, "\t"),
    ".parquet": _parquet,
}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
