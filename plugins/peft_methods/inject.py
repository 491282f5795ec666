"""Having PEFT put its layers around petune's sites."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr, suppress
from typing import Any

import torch
from torch import nn

import petune

from .stub import Stub, mixes_rows


def tuner(kind: str) -> Any:
    """PEFT's class that puts a method's layers into a model, None where it has none."""
    import peft

    return peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(peft.PeftType(kind))


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

    name, make = f"peft:{kind.lower()}", tuner(kind)
    if not isinstance(make, type) or not issubclass(make, BaseTuner):
        raise petune.UnsupportedError(
            f"{name} acts on the whole model, which only PEFT's own can."
        )
    if other := next((site.name for site in sites if site.kind != "linear"), None):
        raise petune.UnsupportedError(
            f"{name} acts on linear layers, which {other} is not."
        )
    box, paths = (
        nn.Module(),
        {
            site.name: site.name.replace("[", ".").rstrip("]").replace("#", ".")
            for site in sites
        },
    )
    stubs = {site.name: Stub(site) for site in sites}
    device = stubs[sites[0].name].weight.device
    box.register_parameter(
        "device", nn.Parameter(torch.zeros(0, device=device), requires_grad=False)
    )  # PEFT asks
    for site in sites:
        _put(box, paths[site.name], stubs[site.name])
    try:
        config: Any = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](
            **options
        )
        config.target_modules = list(paths.values())
        made = make(box, config, "default")
    except AttributeError as missing:
        raise petune.UnsupportedError(
            f"{name} asks for more of the model than its layers ({missing})."
        ) from missing
    except Exception as refusal:
        raise _refused(name, refusal) from refusal
    layers = {at: box.get_submodule(path) for at, path in paths.items()}
    for at, layer in layers.items():
        if not isinstance(layer, BaseTunerLayer) or not any(
            p.requires_grad for p in layer.parameters()
        ):
            raise petune.UnsupportedError(
                f"{name}: PEFT has nothing to train at a linear layer such as {at}."
            )
    _try(name, layers[sites[0].name], stubs[sites[0].name])
    for stub in stubs.values():
        stub.last = None
    owned = {id(p) for layer in layers.values() for p in layer.parameters()}
    others = {
        n: p
        for n, p in made.named_parameters()
        if id(p) not in owned and p.requires_grad
    }
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
        raise _refused(name, refusal) from refusal
    if mixes:
        raise petune.UnsupportedError(
            f"{name} mixes the rows of a batch, which may belong to several tunings."
        )


def _refused(name: str, reason: Exception) -> petune.UnsupportedError:
    return petune.UnsupportedError(
        f"{name}: PEFT: {' '.join(str(reason).split()) or type(reason).__name__}"
    )


def sample(kind: str) -> tuple[Any, Stub] | None:
    """The method at a layer of its own, with the default options: the narrowest that it takes, since some are slow."""
    for width in (64, 256):
        site = petune.Site(
            "layer", "linear", "q", 0, width, width, nn.Linear(width, width)
        )
        site.peers.append(site)
        quiet = warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO())
        with (
            torch.random.fork_rng(),
            quiet[0],
            quiet[1],
            suppress(petune.UnsupportedError),
        ):
            layer: Any = inject(kind, [site], {})[0]["layer"]
            return layer, layer.base_layer
    return None
