"""One of PEFT's methods as a class of petune's."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

import petune

from .stub import Stub, close, is_affine, mixes_rows

# `where` and `train` say these
PLACES = {"target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"}
PLACES |= {"modules_to_save", "bias", "fan_in_fan_out", "trainable_token_indices"}


class Lazy:
    """A class attribute made at its first use, so that the classes are there before PEFT is imported."""

    def __init__(self, make: Callable[[type], Any]) -> None:
        self.make = cache(make)

    def __get__(self, instance: Any, owner: type) -> Any:
        made = self.make(owner)
        return MethodType(made, instance) if instance is not None and inspect.isfunction(made) else made


class Affine(Lazy):
    """Of an adapter it is its own layer that says, since options may matter."""

    def __get__(self, instance: Any, owner: type) -> bool:
        return self.make(owner) if instance is None else is_affine(instance.layer, instance.layer.base_layer)


class PeftMethod(petune.Adapter):
    """PEFT's own layer around a stub of the site: its code, and petune's quantizers, routing, switching and files."""

    where = petune.ALL_LINEAR
    kind: str

    def build(self, site: petune.Site, options: dict[str, Any]) -> None:
        """Have PEFT put its layers around all sites at once, as some share tensors, and take this site's."""
        super().__init__()
        layers, shared = site.shared("layers", lambda: inject(self.kind, site.peers, options))
        self.layer = layers[site.name]
        self.shared = nn.ParameterDict(shared if site is site.peers[0] else {})

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        stub = self.layer.base_layer
        stub.inner = inner
        try:
            return self.layer(x)
        finally:
            stub.inner = None


def method(kind: str) -> type[PeftMethod]:
    """The class of a type of PEFT's."""
    about = f"PEFT's {kind}: its layers around petune's sites. Its options are those of PEFT's configuration."
    lazy = {"__init__": Lazy(signature), "mergeable": Affine(mergeable), "starts_at_base": Lazy(starts_at_base)}
    return type(f"Peft_{kind}", (PeftMethod,), {"kind": kind, "__doc__": about, "__module__": __name__, **lazy})


def signature(cls: type[PeftMethod]) -> Callable[..., None]:
    """`__init__` with the fields of PEFT's configuration as keyword arguments."""
    import peft

    made = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(cls.kind)]
    hints = typing.get_type_hints(made)
    general = {f.name for f in dataclasses.fields(peft.PeftConfig)} | PLACES
    own = [f for f in dataclasses.fields(made) if f.init and f.name not in general]

    def __init__(self: PeftMethod, site: petune.Site, **options: Any) -> None:
        self.build(site, options)

    def parameter(f: dataclasses.Field[Any]) -> inspect.Parameter:
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        # PEFT annotates what may be missing as if it may not
        hint = hints[f.name] | None if default is None else hints[f.name]
        return inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)

    found = [parameter(f) for f in own]
    first = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "site")]
    __init__.__signature__ = inspect.Signature([*first, *found])  # type: ignore[attr-defined]
    __init__.__annotations__ = {p.name: p.annotation for p in found}
    return __init__


def inject(
    kind: str, sites: list[petune.Site], options: dict[str, Any]
) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
    """(PEFT's layers by site, the parameters that they share without owning them).

    Raises:
        PetuneError: PEFT refuses the options.
        UnsupportedError: the method is none of layers, or PEFT has none for these.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    name, tuner = f"peft:{kind.lower()}", peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(peft.PeftType(kind))
    if not isinstance(tuner, type) or not issubclass(tuner, BaseTuner):
        raise petune.UnsupportedError(f"{name} acts on the whole model, which only PEFT's own can.")
    box, paths = nn.Module(), {site.name: site.name.replace("[", ".").rstrip("]").replace("#", ".") for site in sites}
    stubs = {site.name: Stub(site) for site in sites}
    device = stubs[sites[0].name].weight.device
    box.register_parameter("device", nn.Parameter(torch.zeros(0, device=device), requires_grad=False))  # PEFT asks
    for site in sites:
        _put(box, paths[site.name], stubs[site.name])
    try:
        config: Any = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**options)
        config.target_modules = list(paths.values())
        made = tuner(box, config, "default")
    except Exception as refusal:
        raise petune.UnsupportedError(f"{name}: PEFT: {' '.join(str(refusal).split())}") from refusal
    layers = {at: box.get_submodule(path) for at, path in paths.items()}
    for at, layer in layers.items():
        if not isinstance(layer, BaseTunerLayer) or not any(p.requires_grad for p in layer.parameters()):
            raise petune.UnsupportedError(f"{name}: PEFT has nothing to train at a linear layer such as {at}.")
    _try(name, layers[sites[0].name], stubs[sites[0].name])
    for stub in stubs.values():
        stub.last = None
    owned = {id(p) for layer in layers.values() for p in layer.parameters()}
    others = {n: p for n, p in made.named_parameters() if id(p) not in owned and p.requires_grad}
    return layers, {n.replace(".", "_"): p for n, p in others.items()}


def _put(box: nn.Module, path: str, stub: Stub) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if name not in box._modules:
            box.add_module(name, nn.Module())
        box = box.get_submodule(name)
    box.add_module(last, stub)


def _try(name: str, layer: Any, stub: Stub) -> None:
    """A few forwards, so that a layer that asks for more than the input of a row is refused at once."""
    try:
        mixes = mixes_rows(layer, stub)
    except Exception as refusal:
        raise petune.UnsupportedError(f"{name}: PEFT: {' '.join(str(refusal).split())}") from refusal
    if mixes:
        raise petune.UnsupportedError(f"{name} mixes the rows of a batch, which may belong to several tunings.")


def _sample(cls: type[PeftMethod]) -> tuple[Any, Stub] | None:
    """The method at a layer of its own, with the default options: the narrowest that it takes, since some are slow."""
    for width in (64, 256):
        site = petune.Site("layer", "linear", "q", 0, width, width, nn.Linear(width, width))
        site.peers.append(site)
        with torch.random.fork_rng(), suppress(petune.UnsupportedError):
            layer: Any = inject(cls.kind, [site], {})[0]["layer"]
            return layer, layer.base_layer
    return None


def mergeable(cls: type[PeftMethod]) -> bool:
    """An affine change of the layer, tried on one where the options have defaults."""
    found = _sample(cls)
    return found is None or is_affine(*found)


@torch.no_grad()
def starts_at_base(cls: type[PeftMethod]) -> bool:
    """A fresh layer computes what it is put around."""
    found = _sample(cls)
    if found is None:
        return True
    layer, stub = found
    x = torch.randn(2, 3, stub.in_features)
    stub.inner = lambda x: nn.functional.linear(x, stub.weight, stub.bias)
    return close(layer.eval()(x), stub.inner(x))
