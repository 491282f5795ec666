"""The commands as one program, and how every mistake of a user's ends: in one line, with exit code 2."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
import typer.main

from petune.cli import environment, inspect, runs
from petune.cli.doctor import doctor
from petune.cli.output import Stopped, complain
from petune.core.registry.plugins import registry
from petune.errors import PetuneError, unknown

COMMANDS = {
    "methods": inspect.methods,
    "plugins": inspect.plugins,
    "sites": inspect.sites,
    "check": inspect.check,
    "doctor": doctor,
    "install": environment.install,
    "uninstall": environment.uninstall,
    "train": runs.train,
    "eval": runs.evaluate,
    "predict": runs.predict,
    "merge": runs.merge,
    "export": runs.export,
}
_PASS_ON = {"ignore_unknown_options": True}  # options that are pip's


def main(argv: Sequence[str] | None = None) -> int:
    """Run `petune` with these arguments (the process's own by default) and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    debug = False
    try:
        rest, files, debug = _common(words)
        with _warnings_hidden(unless=debug), _remarks_as_complaints():
            for file in files:
                registry().add_file(file)
            return _run(rest)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exception(error)
        message, code = _ending(error)
        complain(message)
        return code


def _ending(error: BaseException) -> tuple[str, int]:
    """What to tell the user about an error, and the exit code."""
    if isinstance(error, PetuneError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt | Stopped):
        return str(error) or "interrupted.", 130
    # typer's usage errors have no public class of their own in every version, but all can say what is wrong
    if hasattr(error, "format_message"):
        return _usage(error), 2
    return f"{type(error).__name__}: {error} (--debug shows where.)", 1


@contextlib.contextmanager
def _remarks_as_complaints() -> Iterator[None]:
    """Within the context what the library has to say beside a result is one line on stderr."""
    log, shown = logging.getLogger("petune"), _Complaints()
    log.addHandler(shown)
    spread, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(shown)
        log.propagate = spread


class _Complaints(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


@contextlib.contextmanager
def _warnings_hidden(unless: bool) -> Iterator[None]:
    """Within the context no warnings are shown: they are a library's word to programmers, not to users. Python's own
    option -W still shows them.
    """
    with warnings.catch_warnings():
        if not unless and not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


def build() -> Any:
    """The program, the plugins' commands included."""
    app = typer.Typer(
        name="petune",
        no_args_is_help=False,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(_top)
    note = "Also: --plugin FILE.py loads a single-file plugin, --debug shows the traceback of an error."
    brought = registry().all("petune_commands")
    for name, function in {**brought, **COMMANDS}.items():
        passes_on = function in (environment.install, environment.uninstall)
        settings = _PASS_ON if passes_on else None
        app.command(name, epilog=note, context_settings=settings)(function)
    return typer.main.get_command(app)


def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE.py", help="Load a single-file plugin."),
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Parameter-efficient tuning of transformers. `petune COMMAND --help` says more about a command."""
    if version:
        from petune import __version__

        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def _run(words: list[str]) -> int:
    """Run a command and return its exit code."""
    program = build()
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and name not in program.commands:
        raise PetuneError(unknown("command", name, program.commands))
    _replace_what_cannot_be_printed()
    done = program.main(words, prog_name="petune", standalone_mode=False)
    if done == 130:
        complain("interrupted.")
    return done if isinstance(done, int) else 0


def _replace_what_cannot_be_printed() -> None:
    """Let a terminal that lacks a letter show a question mark for it."""
    no_text_file = (AttributeError, ValueError)  # what tests put in stdout's place
    with contextlib.suppress(*no_text_file):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def _common(argv: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """(the rest, plugin files, whether to debug): these two options may stand anywhere, and come before all else."""
    rest: list[str] = []
    files: list[str] = []
    debug = False
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == "--debug":
            debug = True
        elif word == "--plugin":
            file = next(words, None)
            if file is None:
                raise PetuneError("--plugin: name a Python file.")
            files.append(file)
        elif word.startswith("--plugin="):
            files.append(word.partition("=")[2])
        else:
            rest.append(word)
    return rest, files, debug


def _usage(error: Any) -> str:
    """What is wrong with a command line, after the name of the command that it was for."""
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    option = getattr(error, "option_name", None)
    if option and message.startswith("No such option"):
        message = unknown("option", option, _options(context.command))
    return f"{context.command_path}: {message}"


def _options(command: Any) -> list[str]:
    """The options that a command takes, those of every command included."""
    names: list[str] = []
    for parameter in command.params:
        names += [name for name in parameter.opts if name.startswith("-")]
    return [*names, "--plugin", "--debug", "--help"]
