"""What PEFT calls the prompt methods, for its folder format."""

import petune

PROMPT_TUNING = petune.PeftTwin(
    "PROMPT_TUNING",
    arguments={"num_virtual_tokens": "length"},
    tensors={"rows": "prompt_embeddings"},
    neutral={"num_transformer_submodules": (1, None, 2)},
    whole="prompt",
    also=("P_TUNING",),
    unsaid=("init",),
)
P_TUNING = petune.PeftTwin(
    "P_TUNING",
    arguments={"num_virtual_tokens": "length"},
    tensors={},  # PEFT keeps the rows alone: they load as prompt-tuning
    neutral={"num_transformer_submodules": (1,)},
    whole="prompt",
    unsaid=("hidden", "encoder"),
)
