"""Attaching what PEFT has saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petune.core.attached.attach import attach
from petune.core.attached.load import fill
from petune.core.frozen.where import select
from petune.core.registry.sites import find_sites
from petune.errors import PetuneError, PetuneWarning, UnsupportedError
from petune.formats.advice import MERGE_THERE
from petune.formats.choice import twins_for
from petune.formats.contents import Contents, Piece, Sites, sort_contents
from petune.formats.names import CONFIG, input_embedding, short_names
from petune.formats.options import arguments_from
from petune.formats.read import read_folder
from petune.formats.restore import check_drawn, restore
from petune.formats.shapes import shaped_arguments
from petune.formats.tokens import check_reached, has_own_head, token_arguments
from petune.formats.whole import check_submodules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.attached.tuning import Tuning
    from petune.core.method.twin import PeftTwin


def load(model: PreTrainedModel, folder: Path, name: str) -> Tuning:
    """Attach what PEFT has saved.

    Raises:
        PetuneError: no method here is that of the folder, or it does not fit the model; the model stays as it was.
    """
    try:
        return _loaded(model, folder, name)
    except PetuneError as wrong:
        if str(folder) in str(wrong):
            raise
        raise type(wrong)(f"{folder}: {wrong}") from wrong


def _loaded(model: PreTrainedModel, folder: Path, name: str) -> Tuning:
    config, saved = read_folder(folder)
    twins = twins_for(config, folder)
    config = {**next(iter(twins.values())).defaults, **config}
    for twin in twins.values():
        check_submodules(model, twin, config.get("num_transformer_submodules"))
        _say_dropouts(config, twin, folder)
    sites = {site.name: site for site in find_sites(model)}
    contents = sort_contents(saved, model, twins, sites, config)
    _check_sites(model, contents, sites)
    tuning = attach(
        model,
        name=name,
        train=contents.heads + contents.changed,
        **_methods(model, contents, sites, config),
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


def _say_dropouts(config: dict[str, Any], twin: PeftTwin, folder: Path) -> None:
    """One line for what training in PEFT would go on with and petune's does without."""
    if twin.tensors is None or twin.beside in config:
        return
    left = [
        f"{option}={config[option]}"
        for option in sorted(config)
        if option.endswith("dropout")
        and config[option]
        and option not in twin.arguments
    ]
    if left:
        what = f"{folder / CONFIG}: training goes on without PEFT's {', '.join(left)}"
        warnings.warn(
            f"{what}; what it computes is the same.", PetuneWarning, stacklevel=6
        )


def _check_sites(model: PreTrainedModel, contents: Contents, sites: Sites) -> None:
    """See whether petune can act where the folder does.

    Raises:
        UnsupportedError: it adapts a module where petune has no hook point, or one whose own weight it replaces.
    """
    main = contents.pieces[0]
    adapted = sorted(main.adapted())
    if not adapted and main.twin.tensors is None:
        raise UnsupportedError(
            f"PEFT's {main.twin.kind} has no tensors of single layers, by which to know where it acts; run it in PEFT."
        )
    replaced = contents.heads + contents.changed
    for name in adapted:
        if name not in sites:
            raise UnsupportedError(f"it adapts {name}, {_why_not(model, name)}.")
        if sites[name].kind == "module":
            raise UnsupportedError(
                f"it adapts {name}, a head, which petune trains whole alone; {MERGE_THERE}."
            )
        if name in replaced:
            raise UnsupportedError(
                f"it adapts {name} over another weight than this model's; load it on the model that it was tuned on."
            )


def _why_not(model: PreTrainedModel, name: str) -> str:
    """Why there is no hook point."""
    if name == input_embedding(model):
        return (
            "which no forward of this model calls: PEFT's layer does nothing there; give its stacks' own embeddings "
            "as target_modules"
        )
    return f"where petune has no hook point; {MERGE_THERE}"


def _methods(
    model: PreTrainedModel,
    contents: Contents,
    sites: Sites,
    config: dict[str, Any],
) -> dict[str, Any]:
    """What `attach` takes for the methods of a folder: one of them as such, several by their names."""
    pieces = contents.pieces
    wheres, given = {}, {}
    for piece in pieces:
        adapted = piece.adapted()
        if piece.twin.tables:
            check_reached(model, map(sites.__getitem__, adapted))
        apart = has_own_head(piece, sites, contents.tensors)
        wheres[piece.method] = (
            " ".join(adapted) if apart else _where(model, sites, piece)
        )
        given[piece.method] = (
            arguments_from(config, piece.twin, sites, adapted)
            | shaped_arguments(piece, contents.tensors)
            | token_arguments(config, piece, apart)
        )
    if len(pieces) == 1:
        only = pieces[0].method
        return {"method": only, "where": wheres[only], **given[only]}
    return {"method": list(given), "where": wheres, **given}


def _where(model: PreTrainedModel, sites: Sites, piece: Piece) -> str | None:
    """What picks a method's sites in `attach`: short names where they pick the same ones, otherwise whole names.

    None where the method finds its sites itself.
    """
    adapted = piece.adapted()
    kinds = {sites[name].kind for name in adapted}
    named = {"linear", "block", "experts"} | (
        {"embedding"} if piece.twin.embedding else set()
    )
    if not adapted or not kinds <= named:
        return None
    short = short_names(model, set(adapted))
    picked = {site.name for site in select(list(sites.values()), " ".join(short))}
    return " ".join(short if picked == set(adapted) else adapted)
