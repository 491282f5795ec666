"""What PEFT calls the low-rank methods, for its folder format."""

from dataclasses import replace

import petune

VARIANTS = {
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
}
"""Options by which PEFT's LoRA computes something else."""
LORA = petune.PeftTwin(
    "LORA",
    arguments={
        "r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "use_rslora": "rslora",
    },
    tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
    neutral={
        "use_dora": (False,),
        "bias": ("none",),
        "init_lora_weights": (
            True,
            False,
            "gaussian",
            "orthogonal",
            "eva",
        ),  # others change the base's weights
        "lora_bias": (False,),
        "layer_replication": (None,),
        "target_parameters": (None, []),
        "trainable_token_indices": (None,),
        "alora_invocation_tokens": (None,),
        **VARIANTS,
    },
    ranked="A",
    unsaid=("init", "lr_ratio"),
    reasons={
        "init_lora_weights": "this start changes the base's weights, which the folder does not keep; in PEFT "
        "save_pretrained(…, path_initial_model_for_weight_conversion=…) writes a LoRA of the plain base",
    },
)
DORA = replace(
    LORA,
    tensors={"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
    neutral={**LORA.neutral, "use_dora": (True,)},
)
ADALORA = petune.PeftTwin(
    "ADALORA",
    arguments={
        "init_r": "rank",
        "target_r": "target",
        "lora_alpha": "alpha",
        "deltaT": "every",
        "orth_reg_weight": "orthogonality",
    },
    tensors={"Q": "lora_A", "e": "lora_E", "P": "lora_B"},
    neutral={
        "bias": ("none",),
        "layer_replication": (None,),
        "target_parameters": (None, []),
        "trainable_token_indices": (None,),
    },
    layouts={"e": "column"},
    cut={"Q": 0, "e": 0, "P": 1},
    unsaid=("warmup", "cooldown", "betas"),
    training={"total_step": 1},
)
VERA = petune.PeftTwin(
    "VERA",
    arguments={"r": "rank", "projection_prng_key": "seed", "d_initial": "d_initial"},
    tensors={"d": "vera_lambda_d", "b": "vera_lambda_b"},
    neutral={"save_projection": (False, True), "bias": ("none",)},
    drawn={"A": "vera_A", "B": "vera_B"},
)
LOHA = petune.PeftTwin(
    "LOHA",
    arguments={"r": "rank", "alpha": "alpha"},
    tensors={
        "B1": "hada_w1_a",
        "A1": "hada_w1_b",
        "B2": "hada_w2_a",
        "A2": "hada_w2_b",
    },
    neutral={"rank_pattern": ({}, None), "alpha_pattern": ({}, None)},
)
LOKR = petune.PeftTwin(
    "LOKR",
    arguments={"r": "rank", "alpha": "alpha", "decompose_factor": "factor"},
    tensors={"C": "lokr_w1", "B": "lokr_w2_a", "A": "lokr_w2_b", "BA": "lokr_w2"},
    neutral={
        "decompose_both": (False,),
        "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None),
    },
)
