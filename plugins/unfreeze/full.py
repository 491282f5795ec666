from collections.abc import Iterable

import petune


class Full(petune.Unfreeze):
    """Every parameter of the model trains, in float32, also over a quantized base.

    Not routable where a table inside the blocks is looked up once for all rows (T5's position bias).
    """

    def modules(self, sites: list[petune.Site]) -> Iterable[str]:
        return [""]
