"""What PEFT calls the prefix methods, for its folder format."""

import petune

PREFIX_TUNING = petune.PeftTwin(
    "PREFIX_TUNING",
    arguments={"num_virtual_tokens": "length"},
    tensors={"keys": "prompt_embeddings", "values": "prompt_embeddings"},
    neutral={
        "prefix_projection": (False, True),
        "num_transformer_submodules": (1, None),
    },
    whole="prefix",
    unsaid=("hidden",),
)
