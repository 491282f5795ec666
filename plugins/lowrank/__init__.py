"""Low-rank updates of linear layers."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    from petune_plugins.lowrank.adalora import AdaLoRA
    from petune_plugins.lowrank.dora import DoRA
    from petune_plugins.lowrank.loha import LoHa
    from petune_plugins.lowrank.lokr import LoKr
    from petune_plugins.lowrank.lora import LoRA
    from petune_plugins.lowrank.vera import VeRA

    return {
        "adalora": AdaLoRA,
        "lora": LoRA,
        "dora": DoRA,
        "vera": VeRA,
        "loha": LoHa,
        "lokr": LoKr,
    }
