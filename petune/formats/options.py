"""A method's arguments as the options of PEFT's configuration, and back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from petune.core.method.arguments import arguments
from petune.errors import UnsupportedError
from petune.formats.advice import instead
from petune.formats.names import exceptions_by_module, is_listed

if TYPE_CHECKING:
    from petune.core.attached.parts import Part
    from petune.core.attached.tuning import Tuning
    from petune.core.forward.link import Link
    from petune.core.frozen.site import Site
    from petune.core.method.twin import PeftTwin
    from petune.formats.layouts import TensorsBySite

PATTERNS = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
"""Our argument -> PEFT's option that lists the exceptions from it, by module."""


def part_of(tuning: Tuning, method: str) -> Part:
    """One method of a tuning."""
    return next(part for part in tuning.parts if part.name == method)


def options_of(part: Part, twin: PeftTwin, beside: bool = False) -> dict[str, Any]:
    """A method's arguments under PEFT's names.

    Args:
        beside: it is an option of another method's, which may list tokens for each table.

    Raises:
        UnsupportedError: PEFT has no such argument, or not with this value.
    """
    defaults = {key: p.default for key, p in arguments(part.cls).items()}
    said = _names_with_a_place(twin)
    if beside:
        said |= {f"{ours}_pattern" for ours in twin.arguments.values() if twin.tables}
    for key, value in part.arguments.items():
        if key not in said and value != defaults.get(key):
            raise UnsupportedError(
                f"{part.name!r} with {key}={value!r} has no place in PEFT's format; "
                f"{instead([part])}."
            )
    found = {}
    for theirs, ours in twin.arguments.items():
        value = found[theirs] = part.arguments.get(ours, defaults[ours])
        if value not in twin.neutral.get(theirs, (value,)):
            raise UnsupportedError(
                f"{part.name!r} with {ours}={value!r} is another method in PEFT; "
                f"{instead([part])}."
            )
    return found


def _names_with_a_place(twin: PeftTwin) -> set[str]:
    """The arguments of ours that PEFT's format keeps, or that need not be kept."""
    found = {*twin.arguments.values(), *twin.roles.values(), *twin.unsaid, twin.tables}
    if twin.ranked:
        found |= {*PATTERNS.values()}
    if twin.blocks:
        found.add("block_pattern")
    return found


def check_same(
    links: Iterable[Link], twin: PeftTwin, config: Mapping[str, Any]
) -> None:
    """A site may have changed an argument (a rank above its width) that PEFT has one value of for all sites.

    Raises:
        UnsupportedError: a site has another value than the configuration says.
    """
    for theirs, ours in twin.arguments.items():
        if ours not in twin.same:
            continue
        for link in links:
            value = getattr(link.adapter, ours)
            if value != config[theirs]:
                raise UnsupportedError(
                    f"{link.site.name} has {ours}={value!r}, not {config[theirs]!r}, "
                    f"and PEFT has one for all; attach with a {ours} that fits all."
                )


def ranks_of(
    links: Iterable[Link],
    plain: TensorsBySite,
    twin: PeftTwin,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """PEFT's rank and alpha, and the exceptions by module, of a method whose sites may differ in them.

    PEFT keeps alpha where petune keeps the scale: scale = alpha / rank, or alpha / √rank with `use_rslora`.
    """
    if not twin.ranked:
        return {}
    root = math.sqrt if config.get("use_rslora") else float
    adapters: dict[str, Any] = {link.site.name: link.adapter for link in links}
    ranks: dict[str, float] = {
        name: own[twin.ranked].shape[-2] if twin.ranked in own else adapters[name].rank
        for name, own in plain.items()
    }
    alphas = {
        name: _as_written(adapters[name].scale * root(rank))
        for name, rank in ranks.items()
    }
    option = {ours: theirs for theirs, ours in twin.arguments.items()}
    return _with_exceptions(option["rank"], "rank", ranks) | _with_exceptions(
        option["alpha"], "alpha", alphas
    )


def _as_written(alpha: float) -> float:
    rounded = round(alpha, 6)
    return int(rounded) if rounded.is_integer() else rounded


def _with_exceptions(
    option: str, ours: str, values: Mapping[str, float]
) -> dict[str, Any]:
    """The most frequent value as the option itself, all others by module."""
    most = Counter(values.values()).most_common(1)[0][0]
    others = {name: value for name, value in values.items() if value != most}
    return {option: most, PATTERNS[ours]: others}


def listed_roles(part: Part, twin: PeftTwin) -> set[str]:
    """The roles that the arguments in `twin.roles` list (IA³'s feed-forward layers)."""
    known = arguments(part.cls)
    found: set[str] = set()
    for ours in twin.roles.values():
        found.update(part.arguments.get(ours, known[ours].default).split())
    return found


def arguments_from(
    config: dict[str, Any],
    twin: PeftTwin,
    sites: Mapping[str, Site],
    adapted: Iterable[str],
) -> dict[str, Any]:
    """Our method's arguments from PEFT's configuration.

    Args:
        sites: the model's, by name.
        adapted: the names of the sites that the folder has tensors for.
    """
    given = {}
    for theirs, ours in twin.arguments.items():
        if config.get(theirs) is not None:
            given[ours] = config[theirs]
    for theirs, ours in twin.roles.items():
        listing = config.get(theirs) or ()
        roles = {sites[name].role for name in adapted if is_listed(name, listing)}
        given[ours] = " ".join(sorted(roles))
    begun = twin.starts.get(config.get("init_lora_weights", ""))
    return (
        given
        | _patterns_from(config, twin, adapted)
        | ({"init": begun} if begun else {})
    )


def _patterns_from(
    config: Mapping[str, Any], twin: PeftTwin, adapted: Iterable[str]
) -> dict[str, Any]:
    """The exceptions by module, of a method that may have some."""
    if not twin.ranked:
        return {}
    return {
        pattern: exceptions_by_module(config.get(pattern), adapted)
        for pattern in PATTERNS.values()
    }
