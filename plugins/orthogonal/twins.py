"""What PEFT calls the methods that rotate, for its folder format."""

import petune

OFT = petune.PeftTwin(
    "OFT",
    arguments={
        "oft_block_size": "block",
        "use_cayley_neumann": "neumann",
        "num_cayley_neumann_terms": "terms",
    },
    tensors={"free": "oft_R.weight"},
    neutral={
        "r": (0,),
        "coft": (False,),
        "block_share": (False,),
        "bias": ("none",),
        # of 1 and 3 terms PEFT makes something else
        "num_cayley_neumann_terms": (2, *range(4, 33)),
    },
)
BOFT = petune.PeftTwin(
    "BOFT",
    arguments={"boft_block_size": "block", "boft_n_butterfly_factor": "factors"},
    tensors={"free": "boft_R", "scale": "boft_s"},
    layouts={"free": "skew", "scale": "column"},
    same=("block",),
    # Without its CUDA kernel PEFT makes one factor of any number, and says so nowhere: such a folder does not fit.
    # PEFT's third factor joins blocks that its second has joined; the paper's, those twice as far apart
    neutral={
        "boft_n_butterfly_factor": (1, 2),
        "boft_block_num": (0,),
        "bias": ("none",),
    },
)
