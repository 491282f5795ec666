"""What PEFT calls the methods that rotate, for its folder format."""

import petune

OFT = petune.PeftTwin(
    "OFT",
    arguments={
        "oft_block_size": "block",
        "use_cayley_neumann": "neumann",
        "num_cayley_neumann_terms": "terms",
        "block_share": "share",
        "coft": "bounded",
        "eps": "eps",
    },
    tensors={"free": "oft_R.weight"},
    neutral={
        "bias": ("none",),
        # of 1 and 3 terms PEFT makes something else
        "num_cayley_neumann_terms": (2, *range(4, 33)),
    },
    defaults={"use_cayley_neumann": True},
    blocks={"free": "r"},
    reasons={
        "num_cayley_neumann_terms": "PEFT makes of 3 terms what 4 are, so that 4 says the same, and of 1 the base "
        "itself",
    },
)
BOFT = petune.PeftTwin(
    "BOFT",
    arguments={"boft_block_size": "block", "boft_n_butterfly_factor": "factors"},
    tensors={"free": "boft_R", "scale": "boft_s"},
    layouts={"free": "skew", "scale": "column"},
    # Without its CUDA kernel PEFT makes one factor of any number, and says so nowhere but in the tensors' shapes
    blocks={"free": "boft_block_num"},
    neutral={"boft_n_butterfly_factor": (1, 2), "bias": ("none",)},
    cautions={
        "boft_n_butterfly_factor": (
            2,
            "PEFT reads it only where it can compile for CUDA, and one factor elsewhere; factors=1 is read everywhere",
        )
    },
    reasons={
        "boft_n_butterfly_factor": "PEFT's third factor joins blocks that its second has joined, the paper's those "
        "twice as far apart; merge it in PEFT (merge_and_unload) and load that model",
    },
)
