"""Thin networks beside the base."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    from petune_plugins.ladder.side_tuning import LadderSideTuning

    return {"ladder-side-tuning": LadderSideTuning}
