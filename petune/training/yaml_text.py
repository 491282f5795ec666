"""YAML as people write it: `1e-3` is a number, and no key is given twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from petune.errors import PetuneError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes `1e-3` for a string and the last of two equal keys; nobody means that."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no key of petune's; the loader says what is wrong with it
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789")
)


def read_file(path: Path) -> Any:
    """The value in a YAML file.

    Raises:
        PetuneError: no such file, or no YAML; the message names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PetuneError(f"{path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise PetuneError(f"{path}: not YAML in UTF-8 ({error.reason}).") from None
    return read_text(text, str(path))


def read_text(text: str, source: str) -> Any:
    """The value of a YAML text; errors call it `source`.

    Raises:
        PetuneError: it is no YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise PetuneError(f"{source}: nested too deeply to be read.") from None
    except (yaml.YAMLError, ValueError) as error:
        # a ValueError is of a value that looks like a date or a number and is none
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        said = getattr(error, "problem", None) or f"not YAML ({_one_line(error)})"
        raise PetuneError(f"{source}{line}: {said}.") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_value(text: str, said: str) -> Any:
    """The value of a `key=value` word; `said` is the word as the user wrote it.

    Raises:
        PetuneError: it is no YAML.
    """
    try:
        return read_text(text, said)
    except PetuneError:
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise PetuneError(f"{said}: {shown!r} is not a YAML value; quote it.") from None
