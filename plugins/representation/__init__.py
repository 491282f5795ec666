"""Edits of the hidden states between blocks."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    from petune_plugins.representation.loreft import LoReFT

    return {"loreft": LoReFT}
