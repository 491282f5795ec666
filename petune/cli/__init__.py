"""The `petune` command. Thin: each command calls one function of the library and prints what it returns."""

from petune.cli.app import main

__all__ = ["main"]
