import torch.nn.functional as F
from torch import Tensor, nn

import petune


class Houlsby(petune.Adapter):
    """h + U gelu(D h), behind the attention and behind the MLP   (Houlsby et al. 2019, arXiv:1902.00751).

    Acts on what each sublayer adds to the residual stream. U starts at zero, so that training starts at the base.
    """

    where = "attn mlp"

    def __init__(self, site: petune.Site, *, width: petune.Positive = 64) -> None:
        super().__init__()
        self.down = nn.Linear(site.out_features, width)
        self.up = nn.Linear(width, site.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        h = inner(x)
        return petune.bottleneck_update(h, h, self.down, F.gelu, self.up)
