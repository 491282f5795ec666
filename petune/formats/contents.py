"""What a folder of PEFT's holds, sorted: which tensor belongs to which module of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from petune.formats.names import input_embedding, without_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.frozen.site import Site
    from petune.core.method.twin import PeftTwin


@dataclass(frozen=True)
class Contents:
    """A folder's tensors, and what each is.

    Args:
        tensors: every tensor but those of `drawn`, by its name without PEFT's prefix.
        owners: a tensor's name -> (the site, our name of the tensor there), of each that is the method's.
        heads: the modules that PEFT has saved whole.
        drawn: our buffer -> what PEFT has saved of it, None where it has not.
    """

    tensors: dict[str, Tensor]
    owners: dict[str, tuple[str, str]]
    heads: list[str]
    drawn: dict[str, Tensor | None]

    def adapted(self) -> list[str]:
        """The names of the sites that have tensors, each once."""
        return list(dict.fromkeys(site for site, _ in self.owners.values()))

    def left(self) -> list[str]:
        """The names of the tensors that are not the method's."""
        return sorted(self.tensors.keys() - self.owners.keys())


def sort_contents(
    saved: Mapping[str, Tensor],
    model: PreTrainedModel,
    twin: PeftTwin,
    sites: Mapping[str, Site],
    modules_to_save: Iterable[str],
) -> Contents:
    """Sort the tensors of a folder, under the names that PEFT has saved them by.

    Args:
        sites: the model's, by name.
        modules_to_save: PEFT's option of that name.
    """
    tensors = {without_prefix(key): tensor for key, tensor in saved.items()}
    drawn = {ours: tensors.pop(theirs, None) for ours, theirs in twin.drawn.items()}
    if twin.tensors is None:
        owners = _owners_by_site(tensors, sites)
    else:
        owners = _owners_by_ending(tensors, twin.tensors, _embedding_site(model, sites))
    heads = _heads(tensors.keys() - owners.keys(), tuple(modules_to_save))
    return Contents(tensors, owners, heads, drawn)


def _owners_by_ending(
    keys: Iterable[str], names: Mapping[str, str], renamed: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Of a method whose tensors PEFT gives names of its own, which stand at the ends of the keys.

    Args:
        names: our tensor -> PEFT's.
        renamed: a module -> the site that petune has for it, where that has another name.
    """
    found = {}
    for key in keys:
        for ours, theirs in names.items():
            end = f".{theirs}"
            if key.endswith(end):
                module = key.removesuffix(end)
                found[key] = renamed.get(module, module), ours
    return found


def _owners_by_site(
    keys: Iterable[str], sites: Mapping[str, Site]
) -> dict[str, tuple[str, str]]:
    """Of a method whose tensors have PEFT's own names: whatever lies below a linear layer belongs to it."""
    linear = [name for name, site in sites.items() if site.kind == "linear"]
    found = {}
    for key in keys:
        for name in linear:
            if key.startswith(f"{name}."):
                found[key] = name, key.removeprefix(f"{name}.")
    return found


def _embedding_site(
    model: PreTrainedModel, sites: Mapping[str, Site]
) -> dict[str, str]:
    """{the module of the input embedding: its site}; empty where the model has no such site."""
    embedding = next(
        (site.name for site in sites.values() if site.kind == "embedding"), None
    )
    return {} if embedding is None else {input_embedding(model): embedding}


def _heads(keys: Iterable[str], ends: tuple[str, ...]) -> list[str]:
    """The modules that PEFT has saved whole. Its configuration lists the ends of the names of heads that there might
    be, of which the model need not have all.
    """
    found = {_shortest_path(key, ends) for key in keys}
    return sorted(found - {""})


def _shortest_path(key: str, ends: tuple[str, ...]) -> str:
    """The outermost module in a tensor's name whose own name ends so; empty where none does."""
    words = key.split(".")
    for count in range(1, len(words)):
        path = ".".join(words[:count])
        if path.endswith(ends):
            return path
    return ""
