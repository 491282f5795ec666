import torch
from torch import Tensor, nn

import petune


class LNTuning(petune.Adapter):
    """y = s * norm(x) + t   (Zhao et al. 2023, arXiv:2312.11420).

    The gains of the norms train, as a scale on their output, and the shifts of those that have one (LayerNorm; RMSNorm
    has none). s starts at one, t at zero.
    """

    where, mergeable = "norm final", True
    peft = petune.PeftTwin(
        "LN_TUNING",
        arguments={},
        tensors={"scale": "ln_tuning_layers.weight", "shift": "ln_tuning_layers.bias"},
        layouts={"scale": "gain", "shift": "shift"},
    )

    def __init__(self, site: petune.Site) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(site.out_features))
        has_bias = getattr(site.module, "bias", None) is not None
        self.shift = nn.Parameter(torch.zeros(site.out_features)) if has_bias else None

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        h = inner(x) * self.scale
        return h if self.shift is None else h + self.shift
