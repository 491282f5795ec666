"""One of PEFT's methods as a class of petune's."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

import petune

from .inject import inject, plain_name, sample
from .stub import close, is_affine

# options of PEFT's that `where` and `train` take the place of
WHERE_AND_TRAIN = {
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
}
WHERE_AND_TRAIN |= {
    "modules_to_save",
    "bias",
    "fan_in_fan_out",
    "runtime_config",
    "trainable_token_indices",
}

KEPT_IN_PART: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "VBLORA": (
        {"save_only_topk_weights": (False,)},
        {
            "save_only_topk_weights": "such a folder lacks the logits that training goes on from; in PEFT set it to "
            "False and save anew",
        },
    )
}
"""PEFT's type -> its options with which a folder does not hold all of the method, and why."""


class Lazy:
    """A class attribute made at its first use, so that the classes are there before PEFT is imported."""

    def __init__(self, make: Callable[[type], Any]) -> None:
        self.make = cache(make)

    def __get__(self, instance: Any, owner: type) -> Any:
        made = self.make(owner)
        if instance is not None and inspect.isfunction(made):
            return MethodType(made, instance)
        return made


class Affine(Lazy):
    """Of an adapter it is its own layer that says, since options may matter."""

    def __get__(self, instance: Any, owner: type) -> bool:
        if instance is None:
            return self.make(owner)
        return is_affine(instance.layer, instance.layer.base_layer)


class PeftMethod(petune.Adapter):
    """PEFT's own layer around a stub of the site: its code, and petune's quantizers, routing, switching and files."""

    where = petune.ALL_LINEAR
    kind: str

    def build(self, site: petune.Site, options: dict[str, Any]) -> None:
        """Have PEFT put its layers around all sites at once, as some share tensors, and take this site's."""
        super().__init__()
        made = site.shared("layers", lambda: inject(self.kind, site.peers, options))
        self.layer = made.layers[site.name]
        self.shared = nn.ParameterDict(made.shared if site is site.peers[0] else {})
        self.complete = made.complete
        self.names = {
            name: "/" + made.names[id(tensor)]
            for name, tensor in self._tensors().items()
            if id(tensor) in made.names
        }

    def _tensors(self) -> dict[str, Tensor]:
        """The layer's own tensors, then those that the layers share without owning them."""
        own = self.layer.state_dict(keep_vars=True)
        return own | self.shared.state_dict(prefix="shared.", keep_vars=True)

    def plain(self) -> dict[str, Tensor]:
        if not self.complete:
            raise petune.UnsupportedError(
                f"peft:{self.kind.lower()} shares tensors between layers that no layer holds, which PEFT alone reads "
                "from its folders and petune from its own: save in petune's own format."
            )
        return {
            self.names.get(name, plain_name(name)): tensor
            for name, tensor in self._tensors().items()
        }

    def drawn(self) -> dict[str, Tensor]:
        """What PEFT keeps in a dict of the layer, such as SHiRA's indices."""
        found = {}
        for name in self.layer.other_param_names:
            kept = getattr(self.layer, name, None)
            tensor = kept.get("default") if isinstance(kept, dict) else None
            if isinstance(tensor, Tensor):
                found[name] = tensor
        return found

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        stub = self.layer.base_layer
        stub.inner = inner
        try:
            return self.layer(x)
        finally:
            stub.inner = None


class Options(Mapping[str, str]):
    """The options of a method, each under its own name; looked up when needed."""

    def __init__(self, cls: type[PeftMethod]) -> None:
        self.cls = cls

    def __getitem__(self, name: str) -> str:
        return name

    def __iter__(self) -> Iterator[str]:
        known = inspect.signature(self.cls.__init__).parameters.values()
        return (p.name for p in known if p.kind is p.KEYWORD_ONLY)

    def __len__(self) -> int:
        return len(list(iter(self)))


def method(kind: str) -> type[PeftMethod]:
    """The class of a type of PEFT's."""
    about = f"PEFT's {kind}: its layers around petune's sites. Its options are those of PEFT's configuration."
    lazy = {
        "__init__": Lazy(signature),
        "mergeable": Affine(mergeable),
        "starts_at_base": Lazy(starts_at_base),
    }
    made: Any = type(
        f"Peft_{kind}",
        (PeftMethod,),
        {"kind": kind, "__doc__": about, "__module__": __name__, **lazy},
    )
    neutral, reasons = KEPT_IN_PART.get(kind, ({}, {}))
    made.peft = petune.PeftTwin(
        kind, Options(made), tensors=None, neutral=neutral, reasons=reasons
    )
    cls: type[PeftMethod] = made
    return cls


def signature(cls: type[PeftMethod]) -> Callable[..., None]:
    """`__init__` with the fields of PEFT's configuration as keyword arguments."""
    import peft

    made = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(cls.kind)]
    hints = typing.get_type_hints(made)
    general = {f.name for f in dataclasses.fields(peft.PeftConfig)} | WHERE_AND_TRAIN
    own = [f for f in dataclasses.fields(made) if f.init and f.name not in general]

    def __init__(self: PeftMethod, site: petune.Site, **options: Any) -> None:
        self.build(site, options)

    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = [inspect.Parameter(name, either) for name in ("self", "site")]
    found = [_as_parameter(field, hints[field.name]) for field in own]
    __init__.__signature__ = inspect.Signature([*first, *found])  # type: ignore[attr-defined]
    __init__.__annotations__ = {p.name: p.annotation for p in found}
    return __init__


def _as_parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """A field of PEFT's configuration as a keyword argument."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    # PEFT annotates what may be missing as if it may not
    annotation = hint | None if default is None else hint
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=annotation,
    )


def mergeable(cls: type[PeftMethod]) -> bool:
    """An affine change of the layer, tried on one where the options have defaults."""
    found = sample(cls.kind)
    return found is None or is_affine(*found)


@torch.no_grad()
def starts_at_base(cls: type[PeftMethod]) -> bool:
    """A fresh layer computes what it is put around."""
    found = sample(cls.kind)
    if found is None:
        return True
    layer, stub = found
    x = torch.randn(2, 3, stub.in_features)
    stub.inner = lambda x: nn.functional.linear(x, stub.weight, stub.bias)
    return close(layer.eval()(x), stub.inner(x))
