"""The text of a file, whatever its encoding says of itself, or an error that names the encoding."""

from __future__ import annotations

import codecs
from pathlib import Path

from petune.errors import PetuneError

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    # before UTF-16, whose mark is how UTF-32's begins
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""The byte order marks that a file may begin with, and what each says."""
_PACKED = {
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\xfd7zXZ": "an xz archive",
}
"""How files begin that hold no text, and what each is."""
_BEGIN = 1000  # bytes, of which every second is 0 in most texts of UTF-16


def read_text(path: Path) -> str:
    r"""A file's text: UTF-8, or UTF-16 or UTF-32 where its first bytes say so. Lines end with "\n", also on Windows.

    Raises:
        PetuneError: bytes that are no such text; the message names the line and the remedy.
    """
    raw = path.read_bytes()
    for begin, what in _PACKED.items():
        if raw.startswith(begin):
            raise PetuneError(f"{path}: is {what}, no text; unpack it.")
    encoding = _encoding(raw)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        found, start = error.object, error.start  # without the mark
        line = found.count(b"\n", 0, start) + 1
        raise PetuneError(
            f"{path} line {line}: byte 0x{found[start]:02x} is not {encoding.upper()}. Save the file as UTF-8; "
            f"one in Latin-1 by `iconv -f latin1 -t utf-8`."
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise PetuneError(
            f"{path} line {line}: a NUL character, which no text has. Take it out, or save the file as UTF-8."
        )
    text = text.replace("\r\n", "\n")
    return text if "\n" in text else text.replace("\r", "\n")  # as old Macs wrote it


def _encoding(raw: bytes) -> str:
    """What a file's first bytes say that it is written in; UTF-8 if they say nothing."""
    for mark, name in _MARKS.items():
        if raw.startswith(mark):
            return name
    begin = raw[:_BEGIN]
    odd, even = begin[1::2].count(0), begin[::2].count(0)
    if max(odd, even) * 4 > len(begin):
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8"
