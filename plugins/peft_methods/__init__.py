"""The methods of the peft package as petune's: `peft:hra`, `peft:miss`, …"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    """One for each of PEFT's types. Their names are read from its source, since importing it takes seconds."""
    spec = find_spec("peft")
    if spec is None or spec.origin is None:
        return {}
    from petune_plugins.peft_methods.method import method

    text = (
        Path(spec.origin)
        .with_name("utils")
        .joinpath("peft_types.py")
        .read_text(encoding="utf-8")
    )
    kinds = re.findall(
        r'^    ([A-Z]\w+) = "\1"', text.partition("class TaskType")[0], re.MULTILINE
    )
    return {f"peft:{kind.lower()}": method(kind) for kind in kinds}
