from collections.abc import Iterable

import petune


class Full(petune.Unfreeze):
    """Every parameter of the model trains, in float32, also over a quantized base."""

    def modules(self, sites: list[petune.Site]) -> Iterable[str]:
        return [""]
