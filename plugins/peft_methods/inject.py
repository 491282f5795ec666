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
    name = f"peft:{kind.lower()}"
    make = _tuner_of_layers(kind, name)
    _check_linear(name, sites)
    paths = {site.name: _path(site.name) for site in sites}
    stubs = {site.name: Stub(site) for site in sites}
    first = sites[0].name
    box = nn.Module()
    nothing = torch.zeros(0, device=stubs[first].weight.device)
    box.register_parameter(
        "device", nn.Parameter(nothing, requires_grad=False)
    )  # PEFT asks
    for at, stub in stubs.items():
        _put(box, paths[at], stub)
    made = _made(kind, name, make, box, list(paths.values()), options)
    layers = {at: box.get_submodule(path) for at, path in paths.items()}
    _check_trained(name, layers)
    _try(name, layers[first], stubs[first])
    for stub in stubs.values():
        stub.last = None
    return layers, _shared(made, layers)


def _tuner_of_layers(kind: str, name: str) -> Any:
    """PEFT's class, if it puts layers into the model."""
    from peft.tuners.tuners_utils import BaseTuner

    make = tuner(kind)
    if not isinstance(make, type) or not issubclass(make, BaseTuner):
        raise petune.UnsupportedError(
            f"{name} acts on the whole model, which only PEFT's own can."
        )
    return make


def _check_linear(name: str, sites: list[petune.Site]) -> None:
    """Refuse sites that are no linear layers."""
    for site in sites:
        if site.kind != "linear":
            raise petune.UnsupportedError(
                f"{name} acts on linear layers, which {site.name} is not."
            )


def _path(site: str) -> str:
    """A site's name as the name of a module."""
    return site.replace("[", ".").rstrip("]").replace("#", ".")


def _made(
    kind: str,
    name: str,
    make: Any,
    box: nn.Module,
    targets: list[str],
    options: dict[str, Any],
) -> Any:
    """PEFT's tuner around the box, whose layers it has replaced."""
    import peft

    try:
        configuration = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
        config: Any = configuration(**options)
        config.target_modules = targets
        return make(box, config, "default")
    except AttributeError as missing:
        raise petune.UnsupportedError(
            f"{name} asks for more of the model than its layers ({missing})."
        ) from missing
    except Exception as refusal:
        raise _refused(name, refusal) from refusal


def _check_trained(name: str, layers: dict[str, nn.Module]) -> None:
    """Refuse a method that leaves a layer without anything to train."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for at, layer in layers.items():
        trains = any(p.requires_grad for p in layer.parameters())
        if not isinstance(layer, BaseTunerLayer) or not trains:
            raise petune.UnsupportedError(
                f"{name}: PEFT has nothing to train at a linear layer such as {at}."
            )


def _shared(made: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """What trains and belongs to no layer."""
    owned: set[int] = set()
    for layer in layers.values():
        owned.update(id(p) for p in layer.parameters())
    return {
        name.replace(".", "_"): p
        for name, p in made.named_parameters()
        if id(p) not in owned and p.requires_grad
    }


def _put(box: nn.Module, path: str, stub: Stub) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if name not in dict(box.named_children()):
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
