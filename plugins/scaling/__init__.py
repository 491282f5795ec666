"""Vectors that scale or shift what a layer computes."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    from petune_plugins.scaling.bitfit import BitFit
    from petune_plugins.scaling.ia3 import IA3
    from petune_plugins.scaling.ln_tuning import LNTuning

    return {"bitfit": BitFit, "ia3": IA3, "ln-tuning": LNTuning}
