"""The options of the programs here: one that is given twice means both where it lists words, else it is refused."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses an option with one value when it is given twice: else the last would win."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for action in (None, "store"):
            self.register("action", action, _Once)
        self.register("action", "words", _Words)


class _Once(argparse.Action):
    given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.given and self.option_strings:
            parser.error(f"{option_string} is given twice; give it once.")
        self.given = True
        setattr(namespace, self.dest, values)


class _Words(argparse.Action):
    """Words separated by spaces, each once; the option may be given several times."""

    given: Sequence[str] = ()

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        self.given = list(dict.fromkeys([*self.given, *str(values).split()]))
        setattr(namespace, self.dest, self.given)
