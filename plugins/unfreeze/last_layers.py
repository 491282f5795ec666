from collections.abc import Iterable

import petune


class LastLayers(petune.Unfreeze):
    """The last `layers` blocks of each stack train, in float32, also over a quantized base.

    Not routable where a table inside those blocks is looked up once for all rows (T5 with a single layer).
    """

    def __init__(self, *, layers: petune.Positive = 1) -> None:
        self.layers = layers

    def modules(self, sites: list[petune.Site]) -> Iterable[str]:
        blocks = [site.name for site in sites if site.role == "layer"]
        stacks: dict[str, list[str]] = {}
        for name in blocks:
            stacks.setdefault(name.rpartition(".")[0], []).append(name)
        return [name for stack in stacks.values() for name in stack[-self.layers :]]
