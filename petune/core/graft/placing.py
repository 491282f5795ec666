"""Adapters are put on modules and taken off, and with the last one the mixin goes."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from petune.core.forward.link import Link
from petune.core.frozen.modules import base_class, hooked_forward, set_hooked_forward
from petune.core.graft.board import Board
from petune.core.graft.module import (
    Adapters,
    Graft,
    Grafted,
    attention_links,
    graft,
    graft_of,
)
from petune.core.host.torch_modules import children_of


def add(link: Link, board: Board, mixin: type[nn.Module] = Grafted) -> None:
    """Put an adapter at its site."""
    site = link.site
    here = graft(site.module, board, mixin)
    if site.kind in ("attention", "experts"):
        here.attention.append(link)
        _rewire(here, link)
    else:
        here.links.append(link)
    if site.entry is not None:
        hold(site.entry, board)
    if "petune" not in children_of(site.module):
        site.module.add_module("petune", Adapters())
    _adapters(site.module)[link.key] = link.adapter


def _adapters(module: nn.Module) -> nn.ModuleDict:
    found = module.petune
    assert isinstance(found, nn.ModuleDict)
    return found


def _rewire(here: Graft, link: Link) -> None:
    """Let the link's methods take the places of the module's own."""
    module = link.site.module
    for name, method in link.methods.items():
        either = partial(_either, module, name, method)
        if name == "forward":
            here.rewired = either
        else:
            vars(module)[name] = either


def _either(
    module: nn.Module, name: str, method: Any, *args: Any, **kwargs: Any
) -> Any:
    """A method that a link replaces, and the module's own where no attention adapter acts."""
    chosen = method if attention_links(module) else getattr(base_class(module), name)
    return chosen(module, *args, **kwargs)


def remove(link: Link) -> None:
    """Take an adapter away, and the graft with the last one."""
    module, entry = link.site.module, link.site.entry
    here = graft_of(module)
    for links in (here.links, here.attention):
        if link in links:
            links.remove(link)
    del _adapters(module)[link.key]
    if not here.attention:
        here.rewired = None
        for name in link.methods:
            vars(module).pop(name, None)
    if entry is not None:
        release(entry)
    restore(module)


def hold(module: nn.Module, board: Board, mixin: type[nn.Module] = Grafted) -> None:
    """Graft a module that has no adapter of its own."""
    graft(module, board, mixin).held += 1


def release(module: nn.Module) -> None:
    """The counterpart of `hold`."""
    graft_of(module).held -= 1
    restore(module)


def restore(module: nn.Module) -> None:
    """Give a module its own class back if nothing of petune is left on it."""
    here = graft_of(module)
    if here.links or here.attention:
        return
    children_of(module).pop("petune", None)
    if here.held:
        return
    del vars(module)["petune_graft"]
    module.__class__ = base_class(module)
    hooked = hooked_forward(module)
    set_hooked_forward(module, None)
    if hooked is not None:
        module.forward = hooked
