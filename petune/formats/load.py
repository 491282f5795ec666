"""Attaching what PEFT has saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from petune.core.attached.attach import attach
from petune.core.attached.load import fill
from petune.core.attached.saved import read_tensors
from petune.core.frozen.where import select
from petune.core.registry.sites import find_sites
from petune.errors import PetuneError, UnsupportedError
from petune.files import read_json
from petune.formats.choice import method_for
from petune.formats.contents import Contents, sort_contents
from petune.formats.names import CONFIG, WEIGHTS, short_names
from petune.formats.options import arguments_from
from petune.formats.restore import check_drawn, restore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from petune.core.attached.tuning import Tuning
    from petune.core.frozen.site import Site
    from petune.core.method.twin import PeftTwin


def load(model: PreTrainedModel, folder: Path, name: str) -> Tuning:
    """Attach what PEFT has saved.

    Raises:
        PetuneError: no method here is that of the folder, or it does not fit the model; the model stays as it was.
    """
    config = read_json(folder / CONFIG)
    method, twin = method_for(config, folder)
    saved = read_tensors(folder / WEIGHTS)
    sites = {site.name: site for site in find_sites(model)}
    contents = sort_contents(
        saved, model, twin, sites, config.get("modules_to_save") or ()
    )
    adapted = contents.adapted()
    strange = sorted(set(adapted) - sites.keys())
    if strange:
        raise UnsupportedError(
            f"{folder}: it adapts {strange[0]}, where petune has no hook point."
        )
    tuning = attach(
        model,
        method,
        name=name,
        where=_where(model, sites, adapted),
        train=contents.heads,
        **arguments_from(config, twin, sites, adapted),
    )
    try:
        _fill(tuning, contents, twin, folder)
    except PetuneError:
        tuning.detach()
        raise
    except (LookupError, RuntimeError, ValueError) as bad:  # a tensor has another shape
        tuning.detach()
        raise PetuneError(f"{folder} does not fit this model: {bad}.") from bad
    return tuning


def _where(
    model: PreTrainedModel, sites: Mapping[str, Site], adapted: list[str]
) -> str | None:
    """What picks these sites in `attach`: short names where they pick the same ones, otherwise whole names.

    None where the method finds its sites itself: `where` knows no embedding and no prompt by name.
    """
    if not adapted or any(
        sites[name].kind not in ("linear", "block") for name in adapted
    ):
        return None
    short = " ".join(short_names(model, set(adapted)))
    picked = {site.name for site in select(list(sites.values()), short)}
    return short if picked == set(adapted) else " ".join(adapted)


def _fill(tuning: Tuning, contents: Contents, twin: PeftTwin, folder: Path) -> None:
    """Copy the folder's tensors into the tuning."""
    check_drawn(tuning, contents.drawn, folder)
    fill(tuning, restore(tuning, contents, twin, folder), folder)
