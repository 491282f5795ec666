"""Rotations of what goes into linear layers."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    from petune_plugins.orthogonal.boft import BOFT
    from petune_plugins.orthogonal.oft import OFT

    return {"boft": BOFT, "oft": OFT}
