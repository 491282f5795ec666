"""How an adapter comes to stand around a module: the module's class gets a mixin, as `parametrize` and FSDP2 do, so
that the base's keys, `isinstance` and checkpoints survive, and taking it off restores the class.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from petune.core.forward.chain import Computation, chain
from petune.core.forward.link import Call, Link
from petune.core.frozen.modules import base_class
from petune.core.graft.board import Board

if TYPE_CHECKING:
    from petune.core.frozen.site import Site


@dataclass(eq=False)
class Graft:
    """What petune keeps on one module."""

    board: Board
    parameters: list[str]
    """The names of `forward`'s arguments."""
    links: list[Link] = field(default_factory=list)
    attention: list[Link] = field(default_factory=list)
    rewired: Call | None = None
    """A forward that takes the place of the module's own while an attention adapter is there."""
    hooked: Call | None = None
    """A `forward` that someone (accelerate) had put on the instance; it is the base then."""
    held: int = 0
    """How many adapters elsewhere need this graft: sites that span modules begin here, prompts have rows here."""
    seen: Tensor | None = None
    """The last input, for those that begin here."""


class Adapters(nn.ModuleDict):
    """The adapters of one module, by tuning."""

    _tied_weights_keys = {
        "": ""
    }  # any may share tensors with others: transformers' `save_pretrained` writes one


class Grafted(nn.Module):
    """The mixin of every adapted module but the model itself."""

    petune_graft: Graft

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        graft = self.petune_graft
        base = graft.hooked or graft.rewired or super().forward
        if graft.held:
            graft.seen = args[0] if args else kwargs[graft.parameters[0]]
        plan = graft.board.plan
        links = graft.links if plan else [link for link in graft.links if link.tuning.enabled]
        if not links:
            return base(*args, **kwargs)
        call = Computation(base, args, kwargs, graft.parameters[0])
        out = plan.run(links, call) if plan else chain(links, call, call)(call.x)
        for link in links:
            if link.site.entry is not None:
                graft_of(link.site.entry).seen = None
        return call.finish(out)


@cache
def grafted_class(cls: Any, mixin: Any) -> type[nn.Module]:
    """`cls` with the mixin in front: one class for all modules of a kind, so that compiled code is shared."""

    @wraps(cls.forward)  # Trainer and generate read the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    own = {
        "forward": forward,
        "petune_base": cls,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (mixin, cls), own)


@cache
def _parameters(cls: Any) -> list[str]:
    return [p for p in inspect.signature(cls.forward).parameters if p != "self"]


def graft(module: nn.Module, board: Board, mixin: type[nn.Module] = Grafted) -> Graft:
    """Put the mixin on a module, once."""
    found: Graft | None = vars(module).get("petune_graft")
    if found is None:
        kind: Any = type(module)
        around: Any = mixin
        found = Graft(board, _parameters(kind), hooked=vars(module).pop("forward", None))
        vars(module)["petune_graft"] = found
        module.__class__ = grafted_class(kind, around)
    return found


def graft_of(module: nn.Module) -> Graft:
    """What petune keeps on a module that it has adapted."""
    found: Graft = vars(module)["petune_graft"]
    return found


def add(link: Link, board: Board, mixin: type[nn.Module] = Grafted) -> None:
    """Put an adapter at its site."""
    site = link.site
    here = graft(site.module, board, mixin)
    (here.attention if site.kind == "attention" else here.links).append(link)
    if site.kind == "attention":
        _rewire(here, site)
    if site.entry is not None:
        hold(site.entry, board)
    if "petune" not in site.module._modules:
        site.module.add_module("petune", Adapters())
    adapters = site.module.petune
    assert isinstance(adapters, nn.ModuleDict)
    adapters[link.key] = link.adapter


def serving(module: nn.Module) -> list[Link]:
    """The module's attention adapters that act in this call."""
    graft: Graft | None = vars(module).get("petune_graft")
    if graft is None:
        return []
    return (
        graft.attention
        if graft.board.plan
        else [link for link in graft.attention if link.tuning.enabled]
    )


def _rewire(here: Graft, site: Site) -> None:
    for name, method in site.methods.items():
        either = partial(_either, site.module, name, method)
        if name == "forward":
            here.rewired = either
        else:
            vars(site.module)[name] = either


def _either(module: nn.Module, name: str, method: Call, *args: Any, **kwargs: Any) -> Any:
    """A method that its site replaces, and the module's own where no attention adapter acts."""
    chosen = method if serving(module) else getattr(base_class(module), name)
    return chosen(module, *args, **kwargs)


def remove(link: Link) -> None:
    """Take an adapter away, and the graft with the last one."""
    module, entry = link.site.module, link.site.entry
    here, adapters = graft_of(module), module.petune
    assert isinstance(adapters, nn.ModuleDict)
    for links in (here.links, here.attention):
        if link in links:
            links.remove(link)
    del adapters[link.key]
    if not here.attention:
        here.rewired = None
        for name in link.site.methods:
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
    if not here.links and not here.attention:
        module._modules.pop("petune", None)
        if not here.held:
            del vars(module)["petune_graft"]
            module.__class__ = base_class(module)
            if here.hooked is not None:
                module.forward = here.hooked
