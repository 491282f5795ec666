"""Learned keys and values for every attention."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    from petune_plugins.prefix.llama_adapter import LlamaAdapter
    from petune_plugins.prefix.prefix_tuning import PrefixTuning

    return {"llama-adapter": LlamaAdapter, "prefix-tuning": PrefixTuning}
