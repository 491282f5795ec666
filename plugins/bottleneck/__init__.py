"""Small networks beside or behind the sublayers."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    from petune_plugins.bottleneck.compacter import Compacter
    from petune_plugins.bottleneck.houlsby import Houlsby
    from petune_plugins.bottleneck.parallel_adapter import ParallelAdapter
    from petune_plugins.bottleneck.pfeiffer import Pfeiffer

    return {
        "compacter": Compacter,
        "houlsby": Houlsby,
        "parallel-adapter": ParallelAdapter,
        "pfeiffer": Pfeiffer,
    }
