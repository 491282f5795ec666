"""Small networks beside or behind the sublayers."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    from petune_plugins.bottleneck.houlsby import Houlsby

    return {"houlsby": Houlsby}
