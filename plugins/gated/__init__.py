"""Methods behind gates, to be combined."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    from petune_plugins.gated.gates import GatedLoRA, GatedPfeiffer, GatedPrefixTuning

    return {
        "gated-lora": GatedLoRA,
        "gated-pfeiffer": GatedPfeiffer,
        "gated-prefix-tuning": GatedPrefixTuning,
    }
