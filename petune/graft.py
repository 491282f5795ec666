"""How an adapter comes to stand around a module: the module's class gets a mixin, as `parametrize` and FSDP2 do, so
that the base's keys, `isinstance` and checkpoints survive, and taking it off restores the class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petune.adapter import Adapter
from petune.discovery import base_class
from petune.errors import UnsupportedError

if TYPE_CHECKING:
    from petune.batch import Batch
    from petune.parts import Part
    from petune.routing import Plan, Rows
    from petune.site import Site
    from petune.tuning import Tuning

Call = Callable[..., Any]


@dataclass(eq=False)
class Board:
    """What all adapted modules of one model share: switching and routing change it, and nothing walks the model."""

    tunings: dict[str, Tuning] = field(default_factory=dict)
    plan: Plan | None = None
    inserted: int | None = None
    """During `generate`, how many columns of virtual tokens stand before the user's tokens."""
    vocabulary: int = 0
    """Ids from here on are virtual."""
    causal: bool = True
    """The model reads left to right, so that virtual tokens may stand before its first token."""
    prompted: int | None = None
    """During `generate`, how many columns are the prompt's, those of virtual tokens included."""
    mask: Tensor | None = None
    """During `generate`, which columns of the prompts hold tokens, (rows, columns)."""
    batch: dict[str, Batch] = field(default_factory=dict)
    """What adapters may know of the forward that runs, by stack."""
    flags: dict[str, bool] = field(default_factory=dict)
    """Which base parameters asked for gradients before the first attach."""


@cache
def _reads(cls: Any) -> bool:
    """The method's `forward` asks for the batch."""
    return "batch" in inspect.signature(cls.forward).parameters


@dataclass(eq=False)
class Link:
    """One adapter at one site. Those of a module act in the order of its list, the first innermost."""

    adapter: Adapter
    site: Site
    tuning: Tuning
    part: Part | None = None
    """The method that it belongs to; None for a module that trains along."""
    stack: str = "decoder"
    """Whose batch it sees."""

    def __post_init__(self) -> None:
        kind: Any = type(self.adapter)
        self.reads = _reads(kind)

    def bound(self, index: Rows | None = None, *args: Any, **kwargs: Any) -> Call:
        """The adapter as it acts: with the batch that it asks for, or the rows `index` of it, and at its weight.
        After `inner` and x it gets what else is given here.
        """
        call: Call = self.adapter
        if args or kwargs:
            call = lambda inner, x: self.adapter(inner, x, *args, **kwargs)  # noqa: E731
        if self.reads:
            batch = graft_of(self.site.module).board.batch.get(self.stack)
            if batch is None:
                raise UnsupportedError(f"{self.tuning.method!r} acts by position: call the model itself, with its "
                                       f"{self.stack}'s input, not {self.site.name}.")  # fmt: skip
            call = partial(call, batch=batch if index is None else batch.rows(index))
        return call if self.tuning.weight == 1 else partial(_weighted, call, self.tuning.weight)

    @property
    def _method(self) -> str:
        return f"{self.part.name}:" if self.part is not None and len(self.tuning.parts) > 1 else ""

    @property
    def label(self) -> str:
        """What tells it from the tuning's others: the site's name, and the method's where there are several."""
        return self._method + self.site.name

    @property
    def key(self) -> str:
        """Where the adapter is registered: one tuning can act twice on a module, on parts or kinds of it."""
        tag = self.site.name.removeprefix(_plain(self.site.name))
        method = f":{self._method}" if self._method else ""
        return (self.tuning.name + method + tag).replace(".", "_")


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

    _tied_weights_keys = {"": ""}  # any may share tensors with others: transformers' `save_pretrained` writes one


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


class Computation:
    """One forward of the frozen module as a map from tensor to tensor; other arguments and results pass it by."""

    def __init__(self, base: Call, args: tuple[Any, ...], kwargs: dict[str, Any], first: str) -> None:
        self.base = base
        self.kwargs = dict(kwargs)
        self.x: Tensor = args[0] if args else self.kwargs.pop(first)
        self.args = args[1:]
        self.rest: tuple[Any, ...] | list[Any] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        out = self.base(x, *self.args, **self.kwargs)
        if isinstance(out, tuple | list):
            self.rest = out[1:]
            return out[0]
        return out

    @property
    def alone(self) -> bool:
        """The result depends on x alone, so that it can be computed for some of the rows."""
        others = [*self.args, *self.kwargs.values()]
        return not any(value is not None and not isinstance(value, bool | int | float | str) for value in others)

    def finish(self, out: Tensor) -> Any:
        return out if self.rest is None else type(self.rest)([out, *self.rest])


def chain(links: list[Link], inner: Call, call: Computation, index: Rows | None = None) -> Call:
    """`inner` with the adapters of `links` around it, for the rows `index` of the batch."""
    for link in links:
        inner = _around(link, inner, call, index)
    return inner


def _around(link: Link, inner: Call, call: Computation, index: Rows | None) -> Call:
    site = link.site
    adapter = link.bound(index, *call.args, **call.kwargs) if site.kind == "module" else link.bound(index)
    if isinstance(site.module, nn.Embedding):  # ids have no dtype to follow
        return lambda ids: adapter(inner, ids).to(site.module.weight.dtype)
    if site.part is not None:
        return lambda x: _on_part(adapter, inner, x, site.part)  # type: ignore[arg-type]
    if site.entry is not None:
        return lambda x: _spanning(adapter, inner, x, site)
    return lambda x: apply(adapter, inner, x)


def _weighted(adapter: Call, weight: float, inner: Call, x: Tensor, *rest: Any, **others: Any) -> Tensor:
    """Y + weight (adapter(inner, x) - y), y = inner(x) computed once."""
    y = inner(x, *rest)

    def once(h: Tensor, *more: Any) -> Tensor:
        same = h is x and all(a is b for a, b in zip(more, rest, strict=True))
        return y if same else inner(h, *more)

    return torch.lerp(y, adapter(once, x, *rest, **others).to(y.dtype), weight)


def _on_part(adapter: Call, inner: Call, x: Tensor, part: slice | Tensor) -> Tensor:
    """Adapt the outputs `part` of a fused projection, which is computed once unless the adapter changes x."""
    whole = inner(x)
    if isinstance(part, Tensor):
        part = part.to(whole.device)
    out = apply(adapter, lambda h: (whole if h is x else inner(h))[..., part], x)
    if isinstance(part, Tensor):
        return whole.index_copy(-1, part, out)
    return torch.cat([whole[..., : part.start], out, whole[..., part.stop :]], -1)


def _spanning(adapter: Call, inner: Call, x: Tensor, site: Site) -> Tensor:
    """Adapt a computation that several modules share: it begins at `site.entry` and ends here, with x."""
    assert site.entry is not None
    begin = graft_of(site.entry).seen
    assert begin is not None, f"{site.name}: its first module did not run"

    def whole(h: Tensor) -> Tensor:
        if h is not begin:
            raise UnsupportedError(f"{site.name} is computed by several modules: its input can't be changed there.")
        return inner(x)

    return apply(adapter, whole, begin)


def apply(adapter: Call, inner: Call, x: Tensor, *rest: Tensor | None) -> Tensor:
    """Call an adapter under the dtype policy: its parameters stay float32, a 16-bit base stays 16-bit, and no
    float32 copy of an activation is kept for backward (autocast casts the small parameters instead).
    """
    device, dtype = x.device.type, x.dtype
    if dtype in (torch.float32, torch.float64) or torch.is_autocast_enabled(device):
        return adapter(inner, x, *rest)

    def plain(*args: Tensor | None) -> Tensor:
        cast = [a.to(dtype) if a is not None and a.is_floating_point() else a for a in args]
        with torch.autocast(device, enabled=False):
            return inner(*cast)

    with torch.autocast(device, dtype=dtype):
        return adapter(plain, x, *rest).to(dtype)


@cache
def grafted_class(cls: Any, mixin: Any) -> type[nn.Module]:
    """`cls` with the mixin in front: one class for all modules of a kind, so that compiled code is shared."""

    @wraps(cls.forward)  # Trainer and generate read the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    own = {"forward": forward, "petune_base": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
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
    return graft.attention if graft.board.plan else [link for link in graft.attention if link.tuning.enabled]


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


def _plain(site: str) -> str:
    return site.partition("#")[0].partition("[")[0]
