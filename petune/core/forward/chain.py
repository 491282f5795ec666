"""How an adapter comes to stand around a module: the module's class gets a mixin, as `parametrize` and FSDP2 do, so
that the base's keys, `isinstance` and checkpoints survive, and taking it off restores the class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from petune.core.forward.link import Call, Link

graft_of = lambda module: vars(module)["petune_graft"]  # noqa: E731
from petune.errors import UnsupportedError

if TYPE_CHECKING:
    from petune.core.forward.plan import Rows
    from petune.core.frozen.site import Site


class Computation:
    """One forward of the frozen module as a map from tensor to tensor; other arguments and results pass it by."""

    def __init__(
        self, base: Call, args: tuple[Any, ...], kwargs: dict[str, Any], first: str
    ) -> None:
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
        return not any(
            value is not None and not isinstance(value, bool | int | float | str)
            for value in others
        )

    def finish(self, out: Tensor) -> Any:
        return out if self.rest is None else type(self.rest)([out, *self.rest])


def chain(links: list[Link], inner: Call, call: Computation, index: Rows | None = None) -> Call:
    """`inner` with the adapters of `links` around it, for the rows `index` of the batch."""
    for link in links:
        inner = _around(link, inner, call, index)
    return inner


def _around(link: Link, inner: Call, call: Computation, index: Rows | None) -> Call:
    site = link.site
    adapter = (
        link.bound(index, *call.args, **call.kwargs) if site.kind == "module" else link.bound(index)
    )
    if isinstance(site.module, nn.Embedding):  # ids have no dtype to follow
        return lambda ids: adapter(inner, ids).to(site.module.weight.dtype)
    if site.part is not None:
        return lambda x: _on_part(adapter, inner, x, site.part)  # type: ignore[arg-type]
    if site.entry is not None:
        return lambda x: _spanning(adapter, inner, x, site)
    return lambda x: apply(adapter, inner, x)


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
            raise UnsupportedError(
                f"{site.name} is computed by several modules: its input can't be changed there."
            )
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
