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

    file = Path(spec.origin).with_name("utils") / "peft_types.py"
    types, _, _ = file.read_text(encoding="utf-8").partition("class TaskType")
    kinds = re.findall(r'^    ([A-Z]\w+) = "\1"', types, re.MULTILINE)
    return {f"peft:{kind.lower()}": method(kind) for kind in kinds}
