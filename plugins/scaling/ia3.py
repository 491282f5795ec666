import torch
from torch import Tensor, nn

import petune


class IA3(petune.Adapter):
    """k' = s_k * k, v' = s_v * v, and y = W_down (s_ff * x) in the MLP   (Liu et al. 2022, arXiv:2205.05638).

    The scales start at one. At the roles in `before` the input of the layer is scaled, at others its output. Where q,
    k and v come out of one projection that interleaves them, all are scaled.
    """

    where, mergeable = "k v down", True
    peft = petune.PeftTwin(
        "IA3",
        arguments={},
        tensors={"scale": "ia3_l"},
        layouts={"scale": "row or column"},
        roles={"feedforward_modules": "before"},
    )

    def __init__(self, site: petune.Site, *, before: str = "down") -> None:
        super().__init__()
        self.before = site.role in before.split()
        self.scale = nn.Parameter(
            torch.ones(site.in_features if self.before else site.out_features)
        )

    def forward(self, inner: petune.Inner, x: Tensor) -> Tensor:
        return inner(x * self.scale) if self.before else inner(x) * self.scale
