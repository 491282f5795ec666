"""Everything a plugin can bring. Each hook returns a mapping from the name that users type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:  # they load torch, which `petune --help` does without
    from torch import nn

    from petune.core.frozen.site import Site
    from petune.core.method.adapter import Adapter, Unfreeze
    from petune.core.registry.quantizer import Quantizer


hookspec = pluggy.HookspecMarker("petune")


hookimpl = pluggy.HookimplMarker("petune")


@hookspec
def petune_methods() -> Mapping[str, type[Adapter] | type[Unfreeze]]:
    """Tuning methods: the class, whose keyword arguments are the hyperparameters."""


@hookspec
def petune_sites() -> Mapping[str, Callable[[nn.Module], list[Site]]]:
    """Hook points of an architecture (`config.model_type`) that discovery can't read."""


@hookspec
def petune_quantizers() -> Mapping[str, Quantizer]:
    """Precisions: what `from_pretrained` must be told to load a model in one."""


@hookspec
def petune_formats() -> Mapping[str, Any]:
    """Folders of other programs, as `save(format=…)` writes and `petune.load` reads them:
    a `petune.Format` each.
    """


@hookspec
def petune_models() -> Mapping[str, Any]:
    """Model aliases: where each can be had, a `petune.Source`."""


@hookspec
def petune_datasets() -> Mapping[str, Any]:
    """Data set aliases: a `petune.training.Dataset` each."""


@hookspec
def petune_tasks() -> Mapping[str, Any]:
    """Tasks: a `petune.training.Task` class each."""


@hookspec
def petune_commands() -> Mapping[str, Callable[..., Any]]:
    """Subcommands of `petune`: a function that typer can read."""
