"""Attaching what PEFT has saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.core.attached.attach import attach
from petune.core.attached.load import fill
from petune.core.frozen.where import select
from petune.core.registry.sites import find_sites
from petune.errors import PetuneError, UnsupportedError
from petune.formats.choice import twins_for
from petune.formats.contents import Contents, Piece, Sites, sort_contents
from petune.formats.names import short_names
from petune.formats.options import arguments_from
from petune.formats.read import read_folder
from petune.formats.restore import check_drawn, restore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.attached.tuning import Tuning


def load(model: PreTrainedModel, folder: Path, name: str) -> Tuning:
    """Attach what PEFT has saved.

    Raises:
        PetuneError: no method here is that of the folder, or it does not fit the model; the model stays as it was.
    """
    config, saved = read_folder(folder)
    twins = twins_for(config, folder)
    sites = {site.name: site for site in find_sites(model)}
    contents = sort_contents(saved, model, twins, sites, config)
    _check_sites(contents, sites, folder)
    tuning = attach(
        model,
        name=name,
        train=contents.heads + contents.changed,
        **_methods(model, contents.pieces, sites, config),
    )
    try:
        check_drawn(tuning, contents.drawn, folder)
        fill(tuning, restore(tuning, contents, folder), folder)
    except PetuneError:
        tuning.detach()
        raise
    except (LookupError, RuntimeError, ValueError) as bad:  # a tensor has another shape
        tuning.detach()
        raise PetuneError(f"{folder} does not fit this model: {bad}.") from bad
    return tuning


def _check_sites(contents: Contents, sites: Sites, folder: Path) -> None:
    """See whether petune can act where the folder does.

    Raises:
        UnsupportedError: it adapts a module where petune has no hook point, or one whose own weight it replaces.
    """
    adapted = contents.pieces[0].adapted()
    strange = sorted(set(adapted) - sites.keys())
    if strange:
        raise UnsupportedError(
            f"{folder}: it adapts {strange[0]}, where petune has no hook point."
        )
    twice = sorted(set(adapted) & set(contents.heads + contents.changed))
    if twice:
        raise UnsupportedError(
            f"{folder}: it adapts {twice[0]} over another weight than this model's; load it on the "
            "model that it was tuned on."
        )


def _methods(
    model: PreTrainedModel,
    pieces: list[Piece],
    sites: Sites,
    config: dict[str, Any],
) -> dict[str, Any]:
    """What `attach` takes for the methods of a folder: one of them as such, several by their names."""
    wheres, given = {}, {}
    for piece in pieces:
        adapted = piece.adapted()
        wheres[piece.method] = _where(model, sites, piece)
        given[piece.method] = arguments_from(config, piece.twin, sites, adapted)
    if len(pieces) == 1:
        only = pieces[0].method
        return {"method": only, "where": wheres[only], **given[only]}
    return {"method": list(given), "where": wheres, **given}


def _where(model: PreTrainedModel, sites: Sites, piece: Piece) -> str | None:
    """What picks a method's sites in `attach`: short names where they pick the same ones, otherwise whole names;
    embeddings by their role, as `where` knows none by name.

    None where the method finds its sites itself.
    """
    adapted = piece.adapted()
    named = {name for name in adapted if sites[name].kind in ("linear", "block")}
    role = ["embed"] if piece.twin.embedding and len(named) < len(adapted) else []
    found_by_itself = not role and len(named) < len(adapted)
    if not named or found_by_itself:
        return " ".join(role) or None
    return " ".join([*role, *_words(model, sites, adapted, named)])


def _words(
    model: PreTrainedModel, sites: Sites, adapted: list[str], named: set[str]
) -> list[str]:
    """The short names of `named` where they pick the same sites, otherwise the whole ones in the folder's order."""
    short = short_names(model, named)
    picked = {site.name for site in select(list(sites.values()), " ".join(short))}
    return short if picked == named else [name for name in adapted if name in named]
