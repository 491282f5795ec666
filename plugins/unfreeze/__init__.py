"""Training parts of the base itself."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    from petune_plugins.unfreeze.full import Full
    from petune_plugins.unfreeze.last_layers import LastLayers

    return {"full": Full, "last-layers": LastLayers}
