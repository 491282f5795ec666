"""What to do with a tuning that a format has no place for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from petune.core.attached.parts import Part

MERGE_THERE = "merge it in PEFT (merge_and_unload) and load that model"
"""What is possible where a folder of PEFT's can't be loaded."""


def instead(parts: Iterable[Part]) -> str:
    """What is possible: petune's own format always, a merge where all the methods have a merged form."""
    methods: list[Any] = [part.cls for part in parts]
    merged = all(method.mergeable for method in methods)
    return "save in petune's own" + (", or merge it" if merged else "")
