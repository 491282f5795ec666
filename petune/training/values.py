"""What a cell of a file means to a role: a text, right answers, or a label."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any
from uuid import UUID

Label = str | int | float
"""The name or number of a class; truth values are integers to Python."""
_NUMBERS = (int, float, Decimal)
_SPELLED = (*_NUMBERS, datetime.date, datetime.time, datetime.timedelta, UUID)
_LISTS = (list, tuple)
_BITS = 63  # of a whole number in Arrow
_SHOWN = 40  # letters of a value in a message


def as_text(value: Any) -> str:
    """A text as it is; a number, a date or a truth value as it is written.

    Raises:
        ValueError: it is anything else, such as a list; the message says what, and the remedy.
    """
    value = _plain(value)
    if isinstance(value, bool):
        return str(value).lower()  # as JSON writes it
    if isinstance(value, _SPELLED):
        return str(value)
    if isinstance(value, bytes):
        return _decoded(value)
    if not isinstance(value, str):
        raise ValueError(f"{_named(value)}, not a text. {_remedy(value)}")
    if not _can_be_written(value):
        raise ValueError("half a character (a lone surrogate). Write it anew.")
    return value


def as_texts(value: Any) -> str | list[str]:
    """A text, or a list of texts of which each is right.

    Raises:
        ValueError: it is anything else, such as an empty list; the message says what, and the remedy.
    """
    value = _plain(value)
    if not isinstance(value, _LISTS):
        return as_text(value)
    if not value:
        raise ValueError("an empty list. Give a text, or leave the row out.")
    nested = (*_LISTS, Mapping)
    if any(is_missing(inner) or isinstance(inner, nested) for inner in value):
        raise ValueError(f"{_named(value)}, not of texts. {_remedy(value)}")
    return [as_text(inner) for inner in value]


def as_label(value: Any) -> Label:
    """The class of a row.

    Raises:
        ValueError: it is blank, a fraction, a list or an object; the message says what, and the remedy.
    """
    value = _plain(value)
    if isinstance(value, _LISTS):
        raise ValueError(
            f"{_named(value)}: several labels a row (multi-label) are not supported. Give each row one."
        )
    if isinstance(value, Mapping):
        raise ValueError(f"{_named(value)}, not a label. Give a name or an integer.")
    if isinstance(value, float | Decimal) and value % 1:
        raise ValueError(
            f"holds fractions such as {value}; classification needs names or integers."
        )
    if isinstance(value, int | float):
        return value
    text = as_text(value)
    if text.strip().lower() in (
        "",
        "nan",
    ):  # what spreadsheets and pandas write for none
        raise ValueError(f"{text!r}, no label. Give one, or leave the row out.")
    return text


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, or the NaN that pandas writes in its place."""
    if isinstance(value, float | Decimal | datetime.datetime):
        return value != value
    return value is None


def alike(values: Sequence[Any]) -> list[Any]:
    """The values as one type, which a column of Arrow must have: each a list if one of them is, numbers that are whole
    as whole numbers (1.0 beside 2), and what is of several kinds as it is written (2 beside "two").
    """
    plain = [_plain(value) for value in values]
    if any(isinstance(value, _LISTS) for value in plain):
        return [value if isinstance(value, _LISTS) else [value] for value in plain]
    return _scalars_alike(plain)


def _scalars_alike(plain: list[Any]) -> list[Any]:
    kinds = set(map(_kind, plain))
    if kinds == {int, float}:
        whole = int if all(value % 1 == 0 for value in plain) else float
        return [whole(value) for value in plain]
    too_long = kinds == {int} and max(map(int.bit_length, plain)) > _BITS
    if too_long or (len(kinds) > 1 and kinds <= {bool, int, float, str}):
        return [as_text(value) for value in plain]
    return plain


def _kind(value: Any) -> type:
    """Python's own type that the value's is a kind of."""
    own = (bool, str, int, float)
    return next((kind for kind in own if isinstance(value, kind)), type(value))


def _plain(value: Any) -> Any:
    """The values of numpy and its like as Python's own."""
    convert = getattr(value, "tolist", None)
    return convert() if convert else value


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ValueError("bytes that are not UTF-8. Save them as text.") from None


def _can_be_written(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _named(value: Any) -> str:
    """What kind of value it is, and how it begins."""
    kinds = {list: "a list", tuple: "a list", dict: "an object", type(None): "nothing"}
    shown = repr(value)
    if len(shown) > _SHOWN:
        shown = shown[:_SHOWN] + "…"
    return f"{kinds.get(type(value), type(value).__name__)} ({shown})"


def _remedy(value: Any) -> str:
    """How to write what is no text."""
    first = value[0] if isinstance(value, _LISTS) and value else value
    if isinstance(first, Mapping) and "content" in first:
        return "Chat messages are not read: give one turn's text, and petune puts the chat template around it."
    if isinstance(value, Mapping) and isinstance(value.get("text"), _LISTS):
        return "Make the list under its key 'text' the column."
    return "Write it as one text."
