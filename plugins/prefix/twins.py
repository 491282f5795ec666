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
    reasons={
        "num_transformer_submodules": "in an encoder-decoder PEFT's prefix takes the decoder's first positions, which "
        "its learned positions or relative biases see; tune it anew here",
    },
    whole="prefix",
    unsaid=("hidden",),
)
