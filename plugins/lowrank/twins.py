"""What PEFT calls LoRA and DoRA, for its folder format."""

from dataclasses import replace

import petune

LORA = petune.PeftTwin(
    "LORA",
    arguments={"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"},
    tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
    neutral={
        "use_dora": (False,),
        "bias": ("none",),
        "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None),
        "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # others change the base's weights
        "layer_replication": (None,),
    },
)
DORA = replace(
    LORA,
    tensors={**LORA.tensors, "m": "lora_magnitude_vector"},
    neutral={**LORA.neutral, "use_dora": (True,)},
)
