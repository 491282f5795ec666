"""What to do with a tuning that a format has no place for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from petune.core.attached.parts import Part


def instead(parts: Iterable[Part]) -> str:
    """What is possible: petune's own format always, a merge where all the methods have a merged form."""
    methods: list[Any] = [part.cls for part in parts]
    merged = all(method.mergeable for method in methods)
    return "save in petune's own" + (", or merge it" if merged else "")
