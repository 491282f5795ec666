"""How an adapter comes to stand around a module: the module's class gets a mixin, as `parametrize` and FSDP2 do, so
that the base's keys, `isinstance` and checkpoints survive, and taking it off restores the class.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from functools import cache, update_wrapper
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import nn

from petune.core.forward.chain import chain
from petune.core.forward.computation import ModuleForward
from petune.core.forward.forward_pass import ForwardPass
from petune.core.forward.link import Call, Link
from petune.core.forward.routed import run_routed
from petune.core.frozen.modules import base_class, set_hooked_forward
from petune.core.graft.board import Board
from petune.core.host.parallel import NotReplicated


@dataclass(eq=False)
class Graft:
    """What petune keeps on one module.

    Args:
        parameters: the names of the arguments of the module's forward.
        links: the adapters around its forward, the first innermost.
        attention: the adapters around what it computes inside its forward: an attention, or the projections of
            stacked experts.
        rewired: a forward that takes the place of the module's own while an attention adapter is there.
        held: how many adapters elsewhere need this graft: a site that ends at another module begins here, or a
            prompt has its rows here.
        alone: held by the one thread that runs the module, where adapters change the base while they run.
    """

    board: Board
    parameters: list[str]
    links: list[Link] = field(default_factory=list)
    attention: list[Link] = field(default_factory=list)
    rewired: Call | None = None
    held: int = 0
    alone: Alone | None = None


class Alone:
    """A lock that a copy of a model gets anew."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: Any) -> Alone:
        return Alone()

    def __reduce__(self) -> Any:
        return Alone, ()


class Adapters(nn.ModuleDict):
    """The adapters of one module, by tuning."""

    _tied_weights_keys = {
        "": ""
    }  # any may share tensors with others: transformers' `save_pretrained` writes one


class Grafted(NotReplicated, nn.Module):
    """The mixin of every adapted module but the model itself."""

    signed: ClassVar[dict[str, str]] = {"forward": "forward"}
    """The methods of the base whose signatures transformers reads, and the mixin's that take their places."""
    petune_graft: Graft
    petune_hooked: Call | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        graft = self.petune_graft
        base = self.petune_hooked or graft.rewired or super().forward
        forward = graft.board.forward_pass()
        if graft.held:
            forward.inputs[self] = args[0] if args else kwargs[graft.parameters[0]]
        links = forward.acting(graft.links)
        if not links:
            return base(*args, **kwargs)
        call = ModuleForward(forward, base, args, kwargs, graft.parameters[0])
        if graft.alone is None or torch.compiler.is_compiling():
            out = _adapted(links, call)
        else:
            with graft.alone.lock:
                out = _adapted(links, call)
        if forward.part_alone:
            _forget_inputs(links, forward)
        return call.finish(out)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by the base's class, since the class with the mixin is made at run time."""
        return _restored, (base_class(self), type(self).__mro__[1]), vars(self)


def _adapted(links: list[Link], call: ModuleForward) -> torch.Tensor:
    plan = call.forward.plan
    if plan is None:
        return chain(links, call)(*call.inputs)
    if (
        call.forward.part_alone
    ):  # the model, which would have looked at the batch, does not run
        plan.check(call.inputs[0].shape[0])
    return run_routed(plan, links, call)


def _forget_inputs(links: list[Link], forward: ForwardPass) -> None:
    """No pass ends when a part of the model is called by itself, so that what it has kept goes here."""
    for link in links:
        forward.inputs.pop(link.site.entry, None)


def _restored(base: Any, mixin: Any) -> nn.Module:
    made: nn.Module = object.__new__(grafted_class(base, mixin))
    return made


@cache
def grafted_class(cls: Any, mixin: Any) -> type[nn.Module]:
    """`cls` with the mixin in front: one class for all modules of a kind, so that compiled code is shared."""
    own = {"petune_base": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    for name, method in mixin.signed.items():
        if hasattr(cls, name):
            own[name] = _signed(getattr(cls, name), getattr(mixin, method))
    return type(cls.__name__, (mixin, cls), own)


def _signed(shown: Call, method: Call) -> Call:
    """A method that shows the signature of another one: a copy, since a call in between would cost its time at every
    layer of every token.
    """
    copy = FunctionType(
        method.__code__,
        method.__globals__,
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    return update_wrapper(copy, shown)


@cache
def _parameters(cls: Any) -> list[str]:
    return [
        name for name in inspect.signature(cls.forward).parameters if name != "self"
    ]


def graft(module: nn.Module, board: Board, mixin: type[nn.Module] = Grafted) -> Graft:
    """Put the mixin on a module, once."""
    found: Graft | None = vars(module).get("petune_graft")
    if found is None:
        kind: Any = type(module)
        around: Any = mixin
        found = Graft(board, _parameters(kind))
        set_hooked_forward(module, vars(module).pop("forward", None))
        vars(module)["petune_graft"] = found
        module.__class__ = grafted_class(kind, around)
    return found


def graft_of(module: nn.Module) -> Graft:
    """What petune keeps on a module that it has adapted."""
    found: Graft = vars(module)["petune_graft"]
    return found


def attention_links(module: nn.Module) -> tuple[ForwardPass, list[Link]] | None:
    """The forward that runs, and the module's attention adapters that act in it; None if there are none."""
    found: Graft | None = vars(module).get("petune_graft")
    if found is None or not found.attention:
        return None
    forward = found.board.forward_pass()
    links = forward.acting(found.attention)
    return (forward, links) if links else None
