"""The tensors of a PEFT folder as petune's own, for a tuning that was attached for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from petune.errors import UnsupportedError
from petune.formats.advice import MERGE_THERE
from petune.formats.base import same
from petune.formats.export import adapter_links
from petune.formats.layouts import LAYOUTS, Surroundings
from petune.formats.names import WHOLE_KEY
from petune.formats.options import listed_roles, part_of
from petune.formats.whole import WHOLES

if TYPE_CHECKING:
    from petune.core.attached.tuning import Tuning
    from petune.core.forward.link import Link
    from petune.core.frozen.site import Site
    from petune.core.method.twin import PeftTwin
    from petune.formats.contents import Contents, Piece


def restore(tuning: Tuning, contents: Contents, folder: Path) -> dict[str, Tensor]:
    """The folder's tensors under the keys of `Tuning.state`.

    Raises:
        UnsupportedError: a tensor is neither a method's nor the model's.
        LookupError, RuntimeError, ValueError: a tensor is missing or has another shape.
    """
    found = _whole_modules(tuning, contents, folder)
    for piece in contents.pieces:
        links = [link for link in adapter_links(tuning) if link.method == piece.method]
        if piece.twin.whole:
            sites = [link.site for link in links]
            one = contents.tensors[WHOLE_KEY]
            length = part_of(tuning, piece.method).arguments["length"]
            found |= WHOLES[piece.twin.whole].read(tuning.model, one, sites, length)
            continue
        own = _site_tensors(tuning, links, contents, piece)
        _fill_cut_ranks(links, own, piece.twin)
        found |= own | _starts(links, piece.twin)
    return found


def _whole_modules(
    tuning: Tuning, contents: Contents, folder: Path
) -> dict[str, Tensor]:
    """The tensors of the modules that train in a copy."""
    copied = tuple(f"{module}." for module in contents.heads + contents.changed)
    changed = tuple(f"{module}.module." for module in contents.changed)
    keys = _keys_of_copies(tuning)
    own = {name: t for name, t in tuning.state() if name.startswith(changed)}
    found: dict[str, Tensor] = {}
    for key in contents.left():
        tensor = contents.tensors[key]
        if not key.startswith(copied):
            raise UnsupportedError(
                f"{folder}: it holds {key}, which neither {tuning.method!r} has nor this model; {MERGE_THERE}."
            )
        module, _, parameter = key.rpartition(".")
        name = f"{module}.module.{parameter}"
        name = keys.get(name, name)
        if name in found and not same(found[name], tensor):
            raise UnsupportedError(
                f"{folder}: {key} is tied to another table in this model, and PEFT has trained them "
                "apart: load it on a model with tie_word_embeddings=False."
            )
        found[name] = tensor
    return own | found


def _keys_of_copies(tuning: Tuning) -> dict[str, str]:
    """{the name of a copy's tensor: the key of `Tuning.state`}, which differ where tables are tied."""
    key_of = {id(tensor): key for key, tensor in tuning.state()}
    return {
        f"{link.label}.{name}": key_of[id(tensor)]
        for link in tuning.links
        if link.site.kind == "module"
        for name, tensor in link.adapter.state_dict(keep_vars=True).items()
    }


def _site_tensors(
    tuning: Tuning, links: list[Link], contents: Contents, piece: Piece
) -> dict[str, Tensor]:
    """A method's tensors by the keys of `Tuning.state`."""
    keys = _state_keys(tuning, links)
    found = {}
    drawn = {link.site.name: link.adapter.drawn() for link in links}
    for site, tensors in _by_site(tuning, links, contents, piece).items():
        for ours, tensor in tensors.items():
            if ours in drawn.get(site, ()):
                _check_as_drawn(f"{site}.{ours}", tensor, drawn[site][ours])
                continue
            name = f"{site}.{ours}"
            found[keys.get(name, name)] = tensor
    return found


def _check_as_drawn(name: str, theirs: Tensor, ours: Tensor) -> None:
    """See that a folder holds what the arguments determine here.

    Raises:
        UnsupportedError: it does not.
    """
    if not same(theirs, ours):
        raise UnsupportedError(
            f"{name} is not what PEFT draws for these options here; save it in PEFT by this version of torch."
        )


def _by_site(
    tuning: Tuning, links: list[Link], contents: Contents, piece: Piece
) -> dict[str, dict[str, Tensor]]:
    """{site: {our tensor: its value in petune's shape}}.

    A layout may ask for tensors of its site that stand before its own in `PeftTwin.tensors`, so these are read first.
    """
    order = list(piece.twin.tensors or ())
    roles = listed_roles(part_of(tuning, piece.method), piece.twin)
    sites = {link.site.name: link.site for link in links}

    def rank(key: str) -> int:
        _, ours = piece.owners[key]
        return order.index(ours) if order else 0

    found: dict[str, dict[str, Tensor]] = {}
    for key in sorted(piece.owners, key=rank):
        name, ours = piece.owners[key]
        own = found.setdefault(name, {})
        tensor = contents.tensors[key]
        layout = piece.twin.layouts.get(ours)
        if layout is not None and name in sites:
            around = Surroundings(sites[name], sites[name].role in roles, own)
            tensor = LAYOUTS[layout].read(tensor, around)
        own[ours] = tensor
    return found


def _state_keys(tuning: Tuning, links: list[Link]) -> dict[str, str]:
    """{site and tensor: the key of `Tuning.state`}. They differ where several sites share a tensor: petune keeps it
    under the first of them, PEFT may name it after another.
    """
    key_of = {id(tensor): key for key, tensor in tuning.state()}
    return {
        f"{link.site.name}.{name}": key_of[id(tensor)]
        for link in links
        for name, tensor in link.adapter.plain().items()
        if id(tensor) in key_of
    }


def _starts(links: list[Link], twin: PeftTwin) -> dict[str, Tensor]:
    """What the adapters start at, of those that take it out of the base's weights, by the keys of `Tuning.state`.

    Raises:
        UnsupportedError: PEFT changes another module's weight with it.
    """
    found = {}
    for link in links if twin.starts else ():
        for name, tensor in link.adapter.state_dict().items():
            if name in ("A0", "B0"):
                _check_own_weight(link.site)
                found[f"{link.label}.{name}"] = tensor
    return found


def _check_own_weight(site: Site) -> None:
    """See that PEFT takes a start out of no other weight than this layer's."""
    if site.tied or site.kind != "linear":
        raise UnsupportedError(
            f"init_lora_weights: at {site.name}, whose weight is another module's too or a table, PEFT takes the start "
            f"out of what is not adapted, or not at all; {MERGE_THERE}."
        )


def _fill_cut_ranks(
    links: list[Link], found: dict[str, Tensor], twin: PeftTwin
) -> None:
    """Append zeros for the ranks that training has cut, which PEFT leaves out and petune keeps."""
    if not twin.cut:
        return
    for link in links:
        own = link.adapter.plain()
        for name, axis in twin.cut.items():
            key = f"{link.label}.{name}"
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
            if ours is not None and not same(
                theirs[: len(ours), : ours.shape[1]], ours
            ):
                raise UnsupportedError(
                    f"{folder}: its {name} is not the one that its seed draws here."
                )
