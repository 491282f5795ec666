"""Having PEFT put its layers around petune's sites."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

import petune

from .stub import Stub, mixes_rows


def tuner(kind: str) -> Any:
    """PEFT's class that puts a method's layers into a model, None where it has none."""
    import peft

    return peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(peft.PeftType(kind))


class Injected(NamedTuple):
    """What PEFT has made.

    Attributes:
        layers: its layers by site.
        shared: the parameters that they share without owning them, by names that a ParameterDict takes.
        names: what PEFT calls the tensors that belong to the model as a whole, by their identities.
        complete: the layers and what they share hold all of these, so that a folder of PEFT's can be made of them.
    """

    layers: dict[str, nn.Module]
    shared: dict[str, nn.Parameter]
    names: dict[int, str]
    complete: bool


def inject(kind: str, sites: list[petune.Site], options: dict[str, Any]) -> Injected:
    """Have PEFT put its layers around the sites.

    Raises:
        PetuneError: PEFT refuses the options.
        UnsupportedError: the method is none of layers, or PEFT has none for these.
    """
    name = f"peft:{kind.lower()}"
    make = _layer_tuner(name, kind)
    for site in sites:
        if site.kind != "linear":
            raise petune.UnsupportedError(
                f"{name} acts on linear layers, which {site.name} is not."
            )
    stubs = {site.name: Stub(site) for site in sites}
    paths = {site.name: _path(site) for site in sites}
    box = _box({paths[at]: stub for at, stub in stubs.items()})
    try:
        config = _configuration(kind, options)
        config.target_modules = list(paths.values())
        made = make(box, config, "default")
    except AttributeError as missing:
        raise petune.UnsupportedError(
            f"{name} asks for more of the model than its layers ({missing})."
        ) from missing
    except Exception as refusal:
        raise _refused(name, refusal) from refusal
    layers = {at: box.get_submodule(path) for at, path in paths.items()}
    _check_layers(name, layers)
    first = sites[0].name
    _try(name, layers[first], stubs[first])
    for stub in stubs.values():
        stub.last = None
    return _injected(made, layers)


def _injected(made: nn.Module, layers: dict[str, nn.Module]) -> Injected:
    """The layers, and what the model that holds them has besides."""
    own = made.state_dict(keep_vars=True)
    names = {id(t): plain_name(name) for name, t in own.items() if name[:6] != "model."}
    shared = _shared_parameters(made, layers)
    held = set(map(id, shared.values()))
    for layer in layers.values():
        held.update(map(id, layer.state_dict(keep_vars=True).values()))
    complete = held >= names.keys() and not held <= names.keys()
    return Injected(layers, shared, names, complete)


def plain_name(name: str) -> str:
    """The name of a tensor in PEFT's folders, which leave out that of the adapter."""
    return name.replace(".default", "")


def _layer_tuner(name: str, kind: str) -> Any:
    """PEFT's class that puts layers into a model.

    Raises:
        UnsupportedError: this method of PEFT's puts none there.
    """
    from peft.tuners.tuners_utils import BaseTuner

    make = tuner(kind)
    if isinstance(make, type) and issubclass(make, BaseTuner):
        return make
    raise petune.UnsupportedError(
        f"{name} acts on the whole model, which only PEFT's own can."
    )


def _configuration(kind: str, options: dict[str, Any]) -> Any:
    import peft

    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**options)


def _path(site: petune.Site) -> str:
    """The site's name as that of a module: `…c_attn[q]` as `…c_attn.q`."""
    return site.name.replace("[", ".").rstrip("]").replace("#", ".")


def _box(stubs: dict[str, Stub]) -> nn.Module:
    """A module that holds the stubs under these paths, as the model that PEFT puts its layers into."""
    box = nn.Module()
    device = next(iter(stubs.values())).weight.device
    nothing = nn.Parameter(torch.zeros(0, device=device), requires_grad=False)
    box.register_parameter("device", nothing)  # PEFT asks a parameter for its device
    for path, stub in stubs.items():
        *parents, last = path.split(".")
        inner = box
        for name in parents:
            if name not in dict(inner.named_children()):
                inner.add_module(name, nn.Module())
            inner = inner.get_submodule(name)
        inner.add_module(last, stub)
    return box


def _check_layers(name: str, layers: dict[str, nn.Module]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for at, layer in layers.items():
        trains = any(p.requires_grad for p in layer.parameters())
        if not isinstance(layer, BaseTunerLayer) or not trains:
            raise petune.UnsupportedError(
                f"{name}: PEFT has nothing to train at a linear layer such as {at}."
            )


def _shared_parameters(
    made: nn.Module, layers: dict[str, nn.Module]
) -> dict[str, nn.Parameter]:
    """What trains besides the layers' own parameters, by names that a ParameterDict takes."""
    owned = {id(p) for layer in layers.values() for p in layer.parameters()}
    found = {}
    for name, parameter in made.named_parameters():
        if parameter.requires_grad and id(parameter) not in owned:
            found[name.replace(".", "_")] = parameter
    return found


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
        layer = nn.Linear(width, width)
        site = petune.Site("layer", "linear", "q", 0, width, width, layer)
        site.peers.append(site)
        with torch.random.fork_rng(), _quiet(), suppress(petune.UnsupportedError):
            wrapped: Any = inject(kind, [site], {}).layers["layer"]
            return wrapped, wrapped.base_layer
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and the output of PEFT's that a trial has no reader for."""
    with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
        yield
