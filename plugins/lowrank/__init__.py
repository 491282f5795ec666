"""Low-rank updates of linear layers."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    from petune_plugins.lowrank.lora import LoRA

    return {"lora": LoRA}
