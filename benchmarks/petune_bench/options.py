"""The options of the programs here: one that is given twice means both where it lists words, else it is refused."""

from __future__ import annotations

import argparse
from typing import Any


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses an option with one value when it is given twice: else the last would win."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for action in (None, "store"):
            self.register("action", action, _Once)
        self.register("action", "words", _Words)


class _Told(argparse.Action):
    """An option, of which `given` is what it has come to so far."""

    given: Any = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        self.given = self.with_more(values)
        setattr(namespace, self.dest, self.given)

    def with_more(self, values: Any) -> Any:
        raise NotImplementedError


class _Once(_Told):
    def with_more(self, values: Any) -> Any:
        if self.given is not None and self.option_strings:
            said = f"{self.option_strings[0]} is given twice; give it once."
            raise argparse.ArgumentError(None, said)
        return values


class _Words(_Told):
    """Words separated by spaces, each once; the option may be given several times."""

    def with_more(self, values: Any) -> list[str]:
        return list(dict.fromkeys([*(self.given or ()), *str(values).split()]))
