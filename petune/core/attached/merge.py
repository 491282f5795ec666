"""Folding adapters into the base: what a layer computes with them is read off its values and written into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petune.core.attached.quantized import _replace, _requantized
from petune.core.forward.chain import Computation, chain
from petune.core.forward.link import Link
from petune.core.frozen.config import forget_quantization, settle
from petune.core.frozen.modules import base_forward, features, is_norm, walk
from petune.core.frozen.norms import probe_norm, swapped, write_norm
from petune.core.frozen.weights import compute_dtype, is_dense, is_quantized, linear, probe, stored
from petune.core.graft.module import graft_of, remove
from petune.core.method.copies import TrainedCopy, TrainedParameters
from petune.errors import PetuneError, UnmergeableError

if TYPE_CHECKING:
    from petune.core.attached.tuning import Tuning


@dataclass(frozen=True)
class Merged:
    """What it cost to store the merged weights W as W': rounding, or quantizing them again.

    Args:
        errors: |W' - W| / |W| by layer, in the Frobenius norm.
        losses: the same relative to what the tuning had changed, |W' - W| / |W - W_0|: near 1 and above, little of the
            tuning is left.
    """

    errors: dict[str, float]
    losses: dict[str, float]

    def add(self, name: str, before: Tensor, wanted: Tensor, stored: Tensor) -> None:
        """Note the cost of one layer, of weights in float32."""
        error, whole, change = (float(t.norm()) for t in (stored - wanted, wanted, wanted - before))
        self.errors[name] = error / whole if whole else 0.0
        self.losses[name] = error / change if change else 0.0

    def __str__(self) -> str:
        if not self.errors:
            return "no linear layer was written"
        worst = max(self.errors, key=self.errors.__getitem__)
        error, loss = (sum(each.values()) / len(each) for each in (self.errors, self.losses))
        most = f"worst {self.errors[worst]:.2g}, {worst}"
        return f"{len(self.errors)} layers: relative error {error:.2g} ({most}), {loss:.2g} of what the tuning changes"


@torch.no_grad()
def merge(tuning: Tuning, quantize: bool = False) -> Merged:
    """Fold a tuning into the base, which changes nothing that the model computes but for what `Merged` says.

    All layers are tried before the first is written. Then they are written one by one, so that no second copy of the
    model is held, and each gives up its adapter: an interruption leaves a model that computes the same.

    Raises:
        UnmergeableError: the method is no affine change of a layer.
        UnsupportedError: `quantize`, and no installed quantizer knows a layer's storage.
        PetuneError: the merged weights would not be finite, or another tuning stands inside this one at a site
            and the two do not commute. Nothing is changed then.
    """
    for link in tuning.links:
        if not link.adapter.mergeable or (
            link.site.kind == "block" and not is_norm(link.site.module)
        ):
            raise UnmergeableError(
                f"{tuning.method!r} has no merged form: it is no affine change of a linear layer."
            )
        if isinstance(link.adapter, TrainedCopy) and tuning.weight != 1:
            raise UnmergeableError(
                f"{tuning.method!r} trains {link.site.name} itself, which merges at weight 1 alone."
            )
    by_module: dict[nn.Module, list[Link]] = {}
    for link in tuning.links:
        by_module.setdefault(link.site.module, []).append(link)
    modes = [(link.adapter, link.adapter.training) for link in tuning.links]
    for adapter, _ in modes:
        adapter.eval()
    merged = Merged({}, {})
    try:
        for module, links in by_module.items():
            _check(tuning, module, links, quantize)
        for module, links in by_module.items():
            _fold(tuning, module, links, quantize, merged)
    finally:
        for adapter, mode in modes:
            adapter.train(mode)
    tuning.detach()
    if not any(is_quantized(m) for _, m in walk(tuning.model)):
        forget_quantization(tuning.model)
    settle(tuning.model)
    return merged


def _chained(links: list[Link], base: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    """A computation with these adapters around it, whatever is switched on."""

    def f(x: Tensor) -> Tensor:
        call = Computation(base, (x,), {}, "")
        return chain(links, call, call)(x)

    return f


def _map(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a norm computes, or a layer in float32, whatever it rounds or quantizes on its way."""
    return base_forward(module) if is_norm(module) else _with(module, *stored(module))


def _with(module: nn.Module, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """The module's computation with this weight and bias."""

    def norm(x: Tensor) -> Tensor:
        with swapped(module, weight, bias):
            out: Tensor = base_forward(module)(x)
        return out

    return norm if is_norm(module) else lambda x: F.linear(x, weight, bias)


def _read(module: nn.Module, links: list[Link]) -> tuple[Tensor, Tensor]:
    """(weight, bias) in float32 with which the module alone computes what it does with these adapters."""
    base = _map(module)
    f = _chained(links, base)
    return probe_norm(f, base, module) if is_norm(module) else probe(f, module, torch.float32)


def _alike(one: Tensor, other: Tensor) -> bool:
    near = 1e-3 if one.dtype in (torch.float32, torch.float64) else 3e-2
    return torch.allclose(one.float(), other.float(), atol=near * float(one.abs().max()), rtol=near)


def _copy_of(links: list[Link]) -> nn.Module | None:
    """The trained copy that takes the module's place, if all that the tuning has here is one."""
    adapter = links[0].adapter
    return adapter.module if isinstance(adapter, TrainedCopy) and len(links) == 1 else None


def _check(tuning: Tuning, module: Any, links: list[Link], quantize: bool) -> None:
    own = _copy_of(links)
    if own is None and isinstance(module, nn.Embedding):
        rows = torch.arange(min(4, module.num_embeddings), device=module.weight.device)
        if not torch.equal(base_forward(module)(rows), module.weight[rows]):
            raise UnmergeableError(
                f"{tuning.method!r} can't be merged here: {links[0].site.name} changes its rows."
            )
    elif own is None:
        _check_order(tuning, module, links)
    values: tuple[Tensor, ...]
    if _rewritten(module, links, quantize):
        values = stored(_layer(module, links, quantize)[0])
    elif own is None and is_norm(module):
        values = _check_norm(tuning, module, links)
    else:
        tensors = (
            t for link in links for t in link.adapter.state_dict().values() if t.is_floating_point()
        )
        values = tuple(t.to(_dtype(tuning, module)) for t in tensors)
    if not all(bool(t.isfinite().all()) for t in values):
        raise PetuneError(
            f"{links[0].site.name}: the merged weights are not finite; nothing was changed."
        )


def _check_norm(tuning: Tuning, module: Any, links: list[Link]) -> tuple[Tensor, ...]:
    weight, bias = (t.to(module.weight.dtype) for t in _read(module, links))
    x = torch.randn(4, len(weight), dtype=weight.dtype, device=weight.device)
    finite = bool(weight.isfinite().all() and bias.isfinite().all())
    if finite and not _alike(
        _chained(links, base_forward(module))(x), _with(module, weight, bias)(x)
    ):
        raise UnmergeableError(
            f"{tuning.method!r} does more to {links[0].site.name} than scale and shift it."
        )
    return weight, bias


def _rewritten(module: nn.Module, links: list[Link], quantize: bool) -> bool:
    """The module becomes a layer made of a weight; a trained copy takes its place as it is, an embedding stays."""
    return features(module) is not None and (
        _copy_of(links) is None or (quantize and is_quantized(module))
    )


def _dtype(tuning: Tuning, module: nn.Module) -> torch.dtype:
    return tuning.model.dtype if is_quantized(module) else next(module.parameters()).dtype


def _check_order(tuning: Tuning, module: Any, links: list[Link]) -> None:
    """A tuning that stands inside this one will stand around the merged weights: that must be the same map."""
    everything = graft_of(module).links
    inside = [link for link in everything[: everything.index(links[0])] if link.tuning.enabled]
    if inside:
        base = _map(module)
        weight, bias = _read(module, links)
        dtype = module.weight.dtype if is_norm(module) else torch.float32
        x = torch.randn(4, weight.shape[-1], dtype=dtype, device=weight.device)
        before, after = (
            _chained([*inside, *links], base)(x),
            _chained(inside, _with(module, weight, bias))(x),
        )
        if not _alike(before, after):
            first = inside[0].tuning.name
            raise PetuneError(
                f"merge {first!r} first: {tuning.name!r} stands around it and they do not commute."
            )


def _layer(module: Any, links: list[Link], quantize: bool) -> tuple[nn.Module, Tensor]:
    """The linear layer that the module is to become, and the weight that it should have."""
    own = _copy_of(links)
    weight, bias = stored(own) if own is not None else _read(module, links)
    given = bias if module.bias is not None or bool(bias.any()) else None
    if quantize and is_quantized(module):
        return _requantized(module, weight, given), weight
    return linear(module, weight, given, compute_dtype(module)), weight


def _fold(tuning: Tuning, module: Any, links: list[Link], quantize: bool, merged: Merged) -> None:
    name, own = links[0].site.name.partition("#")[0].partition("[")[0], _copy_of(links)
    if _rewritten(module, links, quantize):
        new, weight = _layer(module, links, quantize)
        merged.add(name, stored(module)[0], weight, stored(new)[0])
        if is_dense(module):
            module.weight, module.bias = new.weight, new.bias  # not in place: it may be tied
        else:
            _replace(tuning.model, name, module, new)
    elif isinstance(links[0].adapter, TrainedParameters):
        links[0].adapter.write()
    elif own is not None:
        dtype = _dtype(tuning, module)
        if features(module) is not None and is_dense(own):
            weight = stored(own)[0]
            merged.add(name, stored(module)[0], weight, weight.to(dtype).float())
        links[0].adapter.module = nn.Identity()  # the copy is moved, so that ties survive
        _replace(tuning.model, name, module, own.to(dtype).requires_grad_(False))
    elif is_norm(module):
        write_norm(module, *_read(module, links))
    else:
        ids = torch.arange(module.num_embeddings, device=module.weight.device)
        module.weight.copy_(_chained(links, base_forward(module))(ids))
    for link in links:
        remove(link)
        tuning.links.remove(link)
