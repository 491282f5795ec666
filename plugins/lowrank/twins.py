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
        "lora_bias": "bias",
    },
    tensors={"A": "lora_A.weight", "B": "lora_B.weight", "b": "lora_B.bias"},
    embedding={"A": "lora_embedding_A", "B": "lora_embedding_B"},
    neutral={
        "use_dora": (False,),
        "bias": ("none",),
        "init_lora_weights": (
            True,
            False,
            "gaussian",
            "orthogonal",
            "eva",
            "mica",
            "pissa",
            "olora",
        ),  # others change the base's weights
        "layer_replication": (None,),
        "trainable_token_indices": (None,),
        "alora_invocation_tokens": (None,),
        **VARIANTS,
    },
    defaults={"lora_alpha": 8},
    starts={"pissa": "exact-pissa", "olora": "olora"},
    ranked="A",
    layouts={"A": "ranks", "B": "ranks last"},
    stacked="target_parameters",
    unsaid=("init", "lr_ratio"),
    reasons={
        "layer_replication": "PEFT tunes another model, of copies of the base's layers; merge it there "
        "(merge_and_unload) and load that model",
        "alora_invocation_tokens": "it acts behind its invocation tokens alone, and no method here does; run it in "
        "PEFT",
        "init_lora_weights": "this start changes the base's weights, which the folder does not keep; in PEFT "
        "save_pretrained(…, path_initial_model_for_weight_conversion=…) writes a LoRA of the plain base",
    },
)
DORA = replace(
    LORA,
    arguments={k: v for k, v in LORA.arguments.items() if v != "bias"},
    tensors={"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
    embedding={**LORA.embedding, "m": "lora_magnitude_vector"},
    neutral={
        **LORA.neutral,
        "use_dora": (True,),
        "lora_bias": (False,),
        "target_parameters": (None, []),
    },
    layouts={},
    stacked="",
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
    defaults={"lora_alpha": 8},
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
    defaults={"alpha": 8},
    ranked="A1",
)
LOKR = petune.PeftTwin(
    "LOKR",
    arguments={
        "r": "rank",
        "alpha": "alpha",
        "decompose_factor": "factor",
        "decompose_both": "both",
    },
    tensors={
        "C": "lokr_w1",
        "C1": "lokr_w1_a",
        "C2": "lokr_w1_b",
        "B": "lokr_w2_a",
        "A": "lokr_w2_b",
        "BA": "lokr_w2",
    },
    defaults={"alpha": 8, "decompose_factor": -1},
    ranked="A",
)
