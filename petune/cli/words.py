"""The words of a command line before any command reads them: what holds for all options alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from petune.errors import PetuneError
from petune.files import expanded


def at_home(words: Sequence[str]) -> list[str]:
    """The words with `~` as the home folder, where a shell leaves it: behind `=`, and in quotes.

    Raises:
        PetuneError: there is no such user.
    """
    return [_at_home(word) for word in words]


def _at_home(word: str) -> str:
    option, equals, value = word.partition("=")
    if option.startswith("--") and equals:
        return f"{option}={expanded(value)}"
    return expanded(word)


def check_once(command: Any, words: Sequence[str]) -> None:
    """Refuse an option with a value that is given twice, where not both can be meant: the last would win.

    Raises:
        PetuneError: the message names the option.
    """
    options = words[: words.index("--")] if "--" in words else words
    given = [word.partition("=")[0] for word in options]
    for parameter in filter(_takes_one_value, command.params):
        if sum(given.count(name) for name in parameter.opts) > 1:
            raise PetuneError(f"{parameter.opts[0]} is given twice; give it once.")


def _takes_one_value(parameter: Any) -> bool:
    is_option = parameter.param_type_name == "option"
    return is_option and not (parameter.is_flag or parameter.multiple)
