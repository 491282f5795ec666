"""What a folder of PEFT's holds, sorted: which tensor belongs to which module of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from petune.core.frozen.site import Site
from petune.formats.base import Base
from petune.formats.names import (
    WHOLE_KEY,
    in_model,
    input_embedding,
    is_wrapped,
    outermost,
)
from petune.formats.parameters import by_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.method.twin import PeftTwin

Sites = Mapping[str, Site]
"""A model's sites by name."""
Owners = dict[str, tuple[str, str]]
"""A tensor's name in the folder -> (its site, our name of the tensor there)."""


@dataclass(frozen=True)
class Piece:
    """What a folder holds of one method.

    Args:
        method: its name.
        owners: whose each of its tensors is.
    """

    method: str
    twin: PeftTwin
    owners: Owners

    def adapted(self) -> list[str]:
        """The names of the sites that have tensors, each once."""
        return list(dict.fromkeys(site for site, _ in self.owners.values()))


@dataclass(frozen=True)
class Contents:
    """A folder's tensors, and what each is.

    Args:
        tensors: every tensor but those of `drawn` and those that only repeat the base's, by its name in the model.
        pieces: the methods, the one that PEFT's type is first.
        heads: the modules that PEFT has saved whole.
        changed: other modules of the base that the folder holds other values for, be it for some of their tensors.
        drawn: our buffer -> what PEFT has saved of it, None where it has not.
    """

    tensors: dict[str, Tensor]
    pieces: list[Piece]
    heads: list[str]
    changed: list[str]
    drawn: dict[str, Tensor | None]

    def left(self) -> list[str]:
        """The names of the tensors that are no method's."""
        owned = {key for piece in self.pieces for key in piece.owners}
        return sorted(self.tensors.keys() - owned - {WHOLE_KEY})


def sort_contents(
    saved: Mapping[str, Tensor],
    model: PreTrainedModel,
    twins: Mapping[str, PeftTwin],
    sites: Sites,
    config: Mapping[str, Any],
) -> Contents:
    """Sort the tensors of a folder, under the names that PEFT has saved them by.

    Args:
        twins: the methods, the one that PEFT's type is first.
        config: PEFT's configuration.
    """
    base, listed = Base(model), config.get("modules_to_save") or ()
    saved = by_parameter(saved, model, sites, config)
    named = {in_model(key): t for key, t in saved.items() if not is_wrapped(key)}
    heads = _modules(named, tuple(listed), base)
    kept = tuple(f"{head}." for head in heads)
    tensors = _without_copies(named, kept, base)
    main = next(iter(twins.values()))
    drawn = {ours: tensors.pop(theirs, None) for ours, theirs in main.drawn.items()}
    table = _embedding_site(model, sites)
    free = [key for key in tensors if not key.startswith(kept)]
    pieces = _pieces(free, twins, sites, table, base)
    changed = _changed(free, pieces, base)
    return Contents(tensors, pieces, heads, changed, drawn)


def _pieces(
    free: Sequence[str],
    twins: Mapping[str, PeftTwin],
    sites: Sites,
    table: Mapping[str, str],
    base: Base,
) -> list[Piece]:
    """What is whose, of the tensors that are in no head."""
    (method, main), *others = twins.items()
    new = [key for key in free if key not in base.parameters]
    beside = [
        Piece(name, twin, _beside(free, twin, sites, table)) for name, twin in others
    ]
    own = Piece(method, main, _owners(new, main, sites, table))
    return [own, *filter(Piece.adapted, beside)]


def _without_copies(
    named: Mapping[str, Tensor], kept: tuple[str, ...], base: Base
) -> dict[str, Tensor]:
    """What does not only repeat the base, and all that is below the heads `kept`."""
    return {
        key: tensor
        for key, tensor in named.items()
        if key.startswith(kept) or not base.has(key, tensor)
    }


def _changed(keys: Iterable[str], pieces: Iterable[Piece], base: Base) -> list[str]:
    """The modules of the base whose own tensors are among these and no method's."""
    owned = {key for piece in pieces for key in piece.owners}
    names = {key for key in keys if key in base.parameters} - owned
    return sorted({key.rpartition(".")[0] for key in names})


def _owners(
    keys: Iterable[str], twin: PeftTwin, sites: Sites, table: Mapping[str, str]
) -> Owners:
    """Of the method that PEFT's type is.

    Args:
        table: the module of the input embedding -> its site.
    """
    if twin.tensors is None:
        return _owners_by_site(keys, sites)
    if twin.whole:
        return {}
    names = [*twin.tensors.items(), *twin.embedding.items()]
    return _owners_by_ending(keys, names, {} if twin.embedding else table)


def _beside(
    keys: Iterable[str], twin: PeftTwin, sites: Sites, table: Mapping[str, str]
) -> Owners:
    """Of a method that PEFT has as an option of others, at the sites that petune has; a head trains whole."""
    found = _owners_by_ending(keys, [*(twin.tensors or {}).items()], table)
    adapted = {name for name, site in sites.items() if site.kind != "module"}
    return {key: owner for key, owner in found.items() if owner[0] in adapted}


def _owners_by_ending(
    keys: Iterable[str],
    names: Sequence[tuple[str, str]],
    renamed: Mapping[str, str],
) -> Owners:
    """Of a method whose tensors PEFT gives names of its own, which stand at the ends of the keys.

    Args:
        names: pairs of our tensor and PEFT's.
        renamed: a module -> the site that petune has for it, where that has another name.
    """
    found = {}
    for key in keys:
        for ours, theirs in names:
            end = f".{theirs}"
            if key.endswith(end):
                module = key.removesuffix(end)
                found[key] = renamed.get(module, module), ours
    return found


def _owners_by_site(keys: Iterable[str], sites: Sites) -> Owners:
    """Of a method whose tensors have PEFT's own names: whatever lies below a linear layer belongs to it. What belongs
    to the model as a whole, PEFT may save at each layer too; here the first layer that is adapted has it.
    """
    tops = {name.partition(".")[0] for name in sites}
    listed = list(keys)
    common = [key for key in listed if key.partition(".")[0] not in tops]
    linear = [name for name, site in sites.items() if site.kind == "linear"]
    found = {}
    for name in linear:
        for key in _below(name, listed):
            inside = key.removeprefix(f"{name}.")
            found[key] = name, _slashed(inside, common)
    if found:
        first, _ = next(iter(found.values()))
        found |= {key: (first, _slashed(key, common)) for key in common}
    return found


def _below(module: str, keys: Iterable[str]) -> list[str]:
    """The tensors that lie below a module."""
    return [key for key in keys if key.startswith(f"{module}.")]


def _slashed(name: str, common: Sequence[str]) -> str:
    """A tensor's name in petune, where those that belong to the model as a whole begin with `/`."""
    return f"/{name}" if name in common else name


def _embedding_site(model: PreTrainedModel, sites: Sites) -> dict[str, str]:
    """{the module of the input embedding: its site}; empty where the model has no such site."""
    embedding = next(
        (site.name for site in sites.values() if site.kind == "embedding"), None
    )
    return {} if embedding is None else {input_embedding(model): embedding}


def _modules(keys: Iterable[str], ends: tuple[str, ...], base: Base) -> list[str]:
    """The modules with names of such ends that hold parameters of the base among these. PEFT's configuration lists the
    ends of the names of heads that there might be, of which the model need not have all.
    """
    found = {outermost(key, ends) for key in keys if key in base.parameters}
    return sorted(found - {""})
