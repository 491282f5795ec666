"""The tensors of a PEFT folder as petune's own, for a tuning that was attached for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from petune.errors import UnsupportedError
from petune.formats.export import adapter_links
from petune.formats.layouts import LAYOUTS, Surroundings
from petune.formats.options import listed_roles
from petune.formats.whole import WHOLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.attached.tuning import Tuning
    from petune.core.method.twin import PeftTwin
    from petune.formats.contents import Contents

WHOLE_KEY = "prompt_embeddings"


def restore(
    tuning: Tuning, contents: Contents, twin: PeftTwin, folder: Path
) -> dict[str, Tensor]:
    """The folder's tensors under the keys of `Tuning.state`.

    Raises:
        UnsupportedError: a tensor is neither the method's, nor of a head, nor a copy of the base's.
        LookupError, RuntimeError, ValueError: a tensor is missing or has another shape.
    """
    left = contents.left()
    if twin.whole:
        left = [key for key in left if key != WHOLE_KEY]
        sites = [link.site for link in adapter_links(tuning)]
        found = WHOLES[twin.whole].read(
            tuning.model, contents.tensors[WHOLE_KEY], sites
        )
    else:
        found = _site_tensors(tuning, contents, twin)
        _fill_cut_ranks(tuning, found, twin)
    heads = tuple(f"{head}." for head in contents.heads)
    for key in left:
        if key.startswith(heads):
            module, _, parameter = key.rpartition(".")
            found[f"{module}.module.{parameter}"] = contents.tensors[key]
        elif not _is_of_the_base(tuning.model, key, contents.tensors[key]):
            raise UnsupportedError(
                f"{folder}: {key} is nothing that {tuning.method!r} has."
            )
    return found


def _site_tensors(
    tuning: Tuning, contents: Contents, twin: PeftTwin
) -> dict[str, Tensor]:
    """The method's tensors by the keys of `Tuning.state`."""
    keys = _state_keys(tuning)
    found = {}
    for site, tensors in _by_site(tuning, contents, twin).items():
        for ours, tensor in tensors.items():
            name = f"{site}.{ours}"
            found[keys.get(name, name)] = tensor
    return found


def _by_site(
    tuning: Tuning, contents: Contents, twin: PeftTwin
) -> dict[str, dict[str, Tensor]]:
    """{site: {our tensor: its value in petune's shape}}.

    A layout may ask for tensors of its site that stand before its own in `PeftTwin.tensors`, so these are read first.
    """
    order = list(twin.tensors or ())
    roles = listed_roles(tuning, twin)
    sites = {link.site.name: link.site for link in tuning.links}

    def rank(key: str) -> int:
        _, ours = contents.owners[key]
        return order.index(ours) if order else 0

    found: dict[str, dict[str, Tensor]] = {}
    for key in sorted(contents.owners, key=rank):
        name, ours = contents.owners[key]
        own = found.setdefault(name, {})
        tensor = contents.tensors[key]
        layout = twin.layouts.get(ours)
        if layout is not None and name in sites:
            around = Surroundings(sites[name], sites[name].role in roles, own)
            tensor = LAYOUTS[layout].read(tensor, around)
        own[ours] = tensor
    return found


def _state_keys(tuning: Tuning) -> dict[str, str]:
    """{site and tensor: the key of `Tuning.state`}. They differ where several sites share a tensor: petune keeps it
    under the first of them, PEFT may name it after another.
    """
    key_of = {id(tensor): key for key, tensor in tuning.state()}
    found = {}
    for link in adapter_links(tuning):
        for name, tensor in link.adapter.plain().items():
            found[f"{link.site.name}.{name}"] = key_of[id(tensor)]
    return found


def _fill_cut_ranks(tuning: Tuning, found: dict[str, Tensor], twin: PeftTwin) -> None:
    """Append zeros for the ranks that training has cut, which PEFT leaves out and petune keeps."""
    if not twin.cut:
        return
    for link in tuning.links:
        own = link.adapter.plain()
        for name, axis in twin.cut.items():
            key = f"{link.site.name}.{name}"
            if key in found:
                found[key] = _padded(found[key], axis, own[name].shape[axis])


def _padded(tensor: Tensor, axis: int, length: int) -> Tensor:
    """The tensor with zeros at the end of one axis, up to this length."""
    missing = length - tensor.shape[axis]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def check_drawn(
    tuning: Tuning, drawn: Mapping[str, Tensor | None], folder: Path
) -> None:
    """Both sides draw some buffers from a seed. PEFT may have saved what it drew, of which each site has a corner.

    Raises:
        UnsupportedError: the seed draws something else here.
    """
    for name, theirs in drawn.items():
        if theirs is None:
            continue
        for link in tuning.links:
            ours = getattr(link.adapter, name, None)  # a head has none
            if ours is not None and not _same(
                theirs[: len(ours), : ours.shape[1]], ours
            ):
                raise UnsupportedError(
                    f"{folder}: its {name} is not the one that its seed draws here."
                )


def _is_of_the_base(model: PreTrainedModel, key: str, tensor: Tensor) -> bool:
    """A copy of the base's own weight, which PEFT adds where a head or an embedding is adapted."""
    own = dict(model.named_parameters()).get(key.replace(".base_layer.", "."))
    return own is not None and _same(own, tensor)


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding."""
    if one.shape != other.shape:
        return False
    return torch.allclose(one.cpu().float(), other.cpu().float(), rtol=1e-5, atol=1e-6)
