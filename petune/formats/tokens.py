"""Trained rows of tables of tokens: which tables PEFT has trained some of, and which rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from petune.errors import UnsupportedError
from petune.formats.base import same
from petune.formats.names import input_embedding, is_listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.forward.link import Link
    from petune.core.frozen.site import Site
    from petune.formats.contents import Piece


def has_own_head(
    piece: Piece, sites: Mapping[str, Site], tensors: Mapping[str, Tensor]
) -> bool:
    """Whether a head has other rows than the embedding: PEFT may save those that a tied one shares with it too."""
    if not piece.twin.tables:
        return False
    rows = {site: tensors[key] for key, (site, _) in piece.owners.items()}
    heads = [site for site in rows if sites[site].kind == "linear"]
    others = [rows[site] for site in rows if site not in heads]
    return any(
        not others or not sites[head].tied or not same(rows[head], others[0])
        for head in heads
    )


def check_reached(model: PreTrainedModel, sites: Iterable[Site]) -> None:
    """See that PEFT's rows, which stand at the input embedding, act where the model looks tokens up.

    Raises:
        UnsupportedError: the model's stacks have embeddings of their own, and PEFT knows no tie between them.
    """
    table = input_embedding(model)
    for site in sites:
        if site.kind == "embedding" and site.name != table and not site.tied:
            raise UnsupportedError(
                f"PEFT trains the tokens' rows at {table}, which no forward of this model calls, where petune trains "
                f"them at {site.name}: tune them anew, and save in petune's own."
            )


def token_arguments(
    config: Mapping[str, Any], piece: Piece, apart: bool
) -> dict[str, Any]:
    """The ids of the tokens, where PEFT has them as an option of another method, and those of other tables by site.

    Args:
        apart: a head has rows of its own.
    """
    twin = piece.twin
    more = {twin.tables: True} if apart else {}
    listed = config.get(twin.beside) if twin.tables else None
    if not listed:
        return more
    ours = next(iter(twin.arguments.values()))
    by_site = {
        site: _ids_of(key.rpartition(".")[0], listed)
        for key, (site, _) in piece.owners.items()
    }
    first = next(iter(by_site.values()))
    others = {site: ids for site, ids in by_site.items() if ids != first}
    return {ours: first, **({f"{ours}_pattern": others} if others else {}), **more}


def _ids_of(module: str, listed: Any) -> Any:
    """The ids that PEFT's option, which may be a list for each table, has for one."""
    if not isinstance(listed, dict):
        return listed
    return next((ids for end, ids in listed.items() if is_listed(module, [end])), [])


def token_option(
    model: PreTrainedModel, links: Iterable[Link], modules: Iterable[str]
) -> Any:
    """PEFT's option for the rows of some tables: the ids, where they are the input embedding's alone, or by module."""
    table = input_embedding(model)
    adapters: dict[str, Any] = {
        table if link.site.kind == "embedding" else link.site.name: link.adapter
        for link in links
    }
    option = {module: adapters[module].ids.tolist() for module in modules}
    return option[table] if [*option] == [table] else option
