"""Learned rows before the embedded input."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    from petune_plugins.prompt.p_tuning import PTuning
    from petune_plugins.prompt.prompt_tuning import PromptTuning

    return {"p-tuning": PTuning, "prompt-tuning": PromptTuning}
