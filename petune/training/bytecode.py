"""Which names the code of a function uses: how a check sees that a library still calls what petune overrides."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any


def mentions(owner: type, name: str) -> bool:
    """Whether a method of a class, other than the one of that name, uses the attribute or method `name`."""
    methods = (
        inspect.unwrap(f) for f in vars(owner).values() if isinstance(f, FunctionType)
    )
    return any(
        name in used_names(method.__code__)
        for method in methods
        if method.__name__ != name
    )


def used_names(code: Any) -> set[str]:
    """The names of attributes and global variables in a function's code, and in the functions inside it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if inspect.iscode(constant):
            found |= used_names(constant)
    return found
