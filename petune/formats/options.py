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

RANK, ALPHA = "r", "lora_alpha"
PATTERNS = {RANK: "rank_pattern", ALPHA: "alpha_pattern"}
"""PEFT's option -> the option that lists the exceptions from it, by module."""


def part_of(tuning: Tuning, method: str) -> Part:
    """One method of a tuning."""
    return next(part for part in tuning.parts if part.name == method)


def options_of(part: Part, twin: PeftTwin) -> dict[str, Any]:
    """A method's arguments under PEFT's names.

    Raises:
        UnsupportedError: PEFT has no such argument, or not with this value.
    """
    defaults = {key: p.default for key, p in arguments(part.cls).items()}
    said = _names_with_a_place(twin)
    for key, value in part.arguments.items():
        if key not in said and value != defaults[key]:
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
    found = {*twin.arguments.values(), *twin.roles.values(), *twin.unsaid}
    if twin.ranked:
        found |= {f"{twin.arguments[option]}_pattern" for option in PATTERNS}
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
    ranks: dict[str, float] = {
        name: len(own[twin.ranked]) for name, own in plain.items()
    }
    scales: dict[str, Any] = {link.site.name: link.adapter.scale for link in links}
    alphas = {
        name: _as_written(scales[name] * root(rank)) for name, rank in ranks.items()
    }
    return _with_exceptions(RANK, ranks) | _with_exceptions(ALPHA, alphas)


def _as_written(alpha: float) -> float:
    rounded = round(alpha, 6)
    return int(rounded) if rounded.is_integer() else rounded


def _with_exceptions(option: str, values: Mapping[str, float]) -> dict[str, Any]:
    """The most frequent value as the option itself, all others by module."""
    most = Counter(values.values()).most_common(1)[0][0]
    others = {name: value for name, value in values.items() if value != most}
    return {option: most, PATTERNS[option]: others}


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
    if twin.beside in config and twin.arguments:
        config = config | dict.fromkeys(twin.arguments, _tokens(config[twin.beside]))
    given = {}
    for theirs, ours in twin.arguments.items():
        if config.get(theirs) is not None:
            given[ours] = config[theirs]
    for theirs, ours in twin.roles.items():
        listing = config.get(theirs) or ()
        roles = {sites[name].role for name in adapted if is_listed(name, listing)}
        given[ours] = " ".join(sorted(roles))
    return given | _patterns_from(config, twin, adapted)


def _patterns_from(
    config: Mapping[str, Any], twin: PeftTwin, adapted: Iterable[str]
) -> dict[str, Any]:
    """The exceptions by module, of a method that may have some."""
    if not twin.ranked:
        return {}
    return {
        f"{twin.arguments[option]}_pattern": exceptions_by_module(
            config.get(pattern), adapted
        )
        for option, pattern in PATTERNS.items()
    }


def _tokens(option: Any) -> Any:
    """The ids of PEFT's option, which may be listed for each table.

    Raises:
        UnsupportedError: the tables have other ids.
    """
    if not isinstance(option, dict):
        return option
    first, *others = option.values()
    if any(ids != first for ids in others):
        raise UnsupportedError(
            f"trainable_token_indices={option}: petune trains the same tokens in all tables."
        )
    return first
