"""Reading an affine layer off its values, and folding adapters into the base with that: W = f(I) - f(0), b = f(0).

Nothing asks how the base stores its weights, so the same lines serve every method and every quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petune.adapter import TrainedCopy
from petune.discovery import base_class, features, is_norm, walk
from petune.errors import PetuneError, UnmergeableError
from petune.graft import Computation, Graft, Link, chain, graft_of, grafted_class
from petune.norms import probe_norm, swapped, write_norm

if TYPE_CHECKING:
    from petune.tuning import Tuning

ROWS = 1024
"""How many rows of the identity go through a layer at a time: the memory that probing takes."""


def base_forward(module: nn.Module) -> Callable[..., Any]:
    """The frozen computation of a module, without the adapters on it."""
    found = vars(module).get("petune_graft")
    if found is not None and found.hooked is not None:
        return found.hooked
    return partial(base_class(module).forward, module)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a layer's activations: its weight's, or what a quantized layer was told to compute in."""
    weight = module.weight
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    told = getattr(module, "compute_dtype", None)
    return told if isinstance(told, torch.dtype) else torch.float32


@torch.no_grad()
def probe(f: Callable[[Tensor], Tensor], module: Any) -> tuple[Tensor, Tensor]:
    """(W, b) in float32 of an affine map f over a linear layer's inputs: W (out, in), b (out)."""
    width, weight = (features(module) or (0, 0))[0], module.weight
    dtype, device = compute_dtype(module), weight.device
    b = f(torch.zeros(1, width, dtype=dtype, device=device))[0].float()
    columns = []
    for start in range(0, width, ROWS):
        rows = torch.zeros(min(ROWS, width - start), width, dtype=dtype, device=device)
        rows[:, start:].fill_diagonal_(1)
        columns.append(f(rows).float() - b)
    return torch.cat(columns).T.contiguous(), b


def is_dense(module: nn.Module) -> bool:
    """A layer of the plain classes, whose weight can be written."""
    return base_class(module) in (nn.Linear, Conv1D, nn.Embedding)


def is_quantized(module: nn.Module) -> bool:
    """A linear layer whose weight is stored in codes."""
    weight = getattr(module, "weight", None)
    return features(module) is not None and isinstance(weight, Tensor) and not weight.is_floating_point()


def dense(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """The layer that a (quantized) linear layer is, with its own weights."""
    weight, bias = probe(base_forward(module), module)
    return _linear(weight, bias if module.bias is not None else None, dtype)


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer


def dequantize(model: nn.Module) -> None:
    """Replace every quantized linear layer by the dense one that it stands for, in place."""
    for name, module in list(walk(model)):
        if is_quantized(module):
            _replace(model, name, module, dense(module, compute_dtype(module)))
    forget_quantization(model)


def forget_quantization(model: Any) -> None:
    """Tell transformers that nothing quantized is left, so that it saves and moves the model as any other."""
    if any(is_quantized(m) for _, m in walk(model)):
        return
    for owner, key in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, key):
            delattr(owner, key)
    model.is_quantized = False
    for key in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, key):
            setattr(model, key, False)


def _untie(model: Any) -> None:
    """Saving a model whose head was tied and now differs must write both."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not table.weight:
        model.config.tie_word_embeddings = False


def _replace(model: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `old`; the adapters on it move along."""
    parent, _, child = name.rpartition(".")
    new.train(old.training)
    here: Graft | None = vars(old).get("petune_graft")
    if here is not None:
        vars(new)["petune_graft"] = here
        if "petune" in old._modules:
            new.add_module("petune", old._modules["petune"])
        kind: Any = type(new)
        mixin: Any = type(old).__mro__[1]
        new.__class__ = grafted_class(kind, mixin)
        for link in [*here.links, *here.attention]:
            object.__setattr__(link.site, "module", new)
    setattr(model.get_submodule(parent), child, new)


@torch.no_grad()
def merge(tuning: Tuning) -> None:
    """Fold a tuning into the base, which changes nothing that the model computes.

    Raises:
        UnmergeableError: the method is no affine change of a layer.
        PetuneError: the merged weights would not be finite, or another tuning stands inside this one at a site
            and the two do not commute. Nothing is changed then.
    """
    for link in tuning.links:
        if not link.adapter.mergeable or (link.site.kind == "block" and not is_norm(link.site.module)):
            raise UnmergeableError(f"{tuning.method!r} has no merged form: it is no affine change of a linear layer.")
        if isinstance(link.adapter, TrainedCopy) and tuning.weight != 1:
            raise UnmergeableError(f"{tuning.method!r} trains {link.site.name} itself, which merges at weight 1 alone.")
    modes = [(link.adapter, link.adapter.training) for link in tuning.links]
    for adapter, _ in modes:
        adapter.eval()
    try:
        for module, links in _by_module(tuning):
            _check(tuning, module, links)
        for module, links in _by_module(tuning):
            _fold(tuning, module, links)
    finally:
        for adapter, mode in modes:
            adapter.train(mode)
    tuning.detach()
    forget_quantization(tuning.model)
    _untie(tuning.model)


def _by_module(tuning: Tuning) -> Iterator[tuple[nn.Module, list[Link]]]:
    found: dict[int, tuple[nn.Module, list[Link]]] = {}
    for link in tuning.links:
        found.setdefault(id(link.site.module), (link.site.module, []))[1].append(link)
    yield from list(found.values())


def _chained(module: nn.Module, links: list[Link]) -> Callable[[Tensor], Tensor]:
    """The module's computation with these adapters, whatever is switched on."""

    def f(x: Tensor) -> Tensor:
        call = Computation(base_forward(module), (x,), {}, "")
        return chain(links, call, call)(x)

    return f


def _check(tuning: Tuning, module: nn.Module, links: list[Link]) -> None:
    tensors = [t for link in links for t in link.adapter.state_dict().values()]
    if isinstance(module, nn.Embedding) and not isinstance(links[0].adapter, TrainedCopy):
        rows = torch.arange(min(4, module.num_embeddings), device=module.weight.device)
        if not torch.equal(base_forward(module)(rows), module.weight[rows]):
            raise UnmergeableError(f"{tuning.method!r} can't be merged here: {links[0].site.name} changes its rows.")
    if all(isinstance(link.adapter, TrainedCopy) or link.site.kind == "embedding" for link in links):
        finite = all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())
    else:
        weight, bias = _read(module, links)
        dtype = compute_dtype(module)
        finite = bool(weight.to(dtype).isfinite().all()) and bool(bias.to(dtype).isfinite().all())
        if finite and is_norm(module):
            x = torch.randn(4, len(weight), dtype=dtype, device=weight.device)
            if not _alike(_chained(module, links)(x), _with(module, weight, bias)(x)):
                raise UnmergeableError(f"{tuning.method!r} does more to {links[0].site.name} than scale and shift it.")
        _check_order(tuning, module, links, weight, bias)
    if not finite:
        raise PetuneError(f"{links[0].site.name}: the merged weights are not finite; nothing was changed.")


def _check_order(tuning: Tuning, module: nn.Module, links: list[Link], weight: Tensor, bias: Tensor) -> None:
    """A tuning that stands inside this one will stand around the merged weights: that must be the same map."""
    everything = graft_of(module).links
    inside = [link for link in everything[: everything.index(links[0])] if link.tuning.enabled]
    if inside:
        x = torch.randn(4, weight.shape[-1], dtype=compute_dtype(module), device=weight.device)
        merged = Computation(_with(module, weight, bias), (x,), {}, "")
        if not _alike(_chained(module, [*inside, *links])(x), chain(inside, merged, merged)(x)):
            first = inside[0].tuning.name
            raise PetuneError(f"merge {first!r} first: {tuning.name!r} stands around it and they do not commute.")


def _alike(one: Tensor, other: Tensor) -> bool:
    near = 1e-3 if one.dtype in (torch.float32, torch.float64) else 3e-2
    return torch.allclose(one.float(), other.float(), atol=near * float(one.abs().max()), rtol=near)


def _read(module: nn.Module, links: list[Link]) -> tuple[Tensor, Tensor]:
    """(weight, bias) with which the module alone computes what it does with these adapters."""
    f = _chained(module, links)
    return probe_norm(f, base_forward(module), module) if is_norm(module) else probe(f, module)


def _with(module: nn.Module, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """The module's computation with another weight and bias."""

    def norm(h: Tensor) -> Tensor:
        with swapped(module, weight, bias):
            return base_forward(module)(h)

    return norm if is_norm(module) else lambda h: nn.functional.linear(h.float(), weight, bias).to(h.dtype)


def _fold(tuning: Tuning, module: nn.Module, links: list[Link]) -> None:
    name = links[0].site.name.partition("#")[0].partition("[")[0]
    if isinstance(links[0].adapter, TrainedCopy) and len(links) == 1:
        trained, links[0].adapter.module = links[0].adapter.module, nn.Identity()  # moved, so that ties survive
        trained.to(tuning.model.dtype if is_quantized(module) else next(module.parameters()).dtype)
        _replace(tuning.model, name, module, trained.requires_grad_(False))
    elif isinstance(module, nn.Embedding):
        ids = torch.arange(module.num_embeddings, device=module.weight.device)
        module.weight.copy_(_chained(module, links)(ids))
    else:
        weight, bias = _read(module, links)
        _write(tuning.model, name, module, weight, bias)


def _write(model: nn.Module, name: str, module: nn.Module, weight: Tensor, bias: Tensor) -> None:
    if is_norm(module):
        write_norm(module, weight, bias)
        return
    dtype = compute_dtype(module)
    has_bias = module.bias is not None or bool(bias.any())
    if not is_dense(module):
        _replace(model, name, module, _linear(weight, bias if has_bias else None, dtype))
        return
    layout = weight.T if base_class(module) is Conv1D else weight
    module.weight = nn.Parameter(layout.to(dtype).contiguous(), requires_grad=False)  # not in place: it may be tied
    if has_bias:
        module.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
