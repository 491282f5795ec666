"""Settings for all tests: one thread a worker (xdist runs one worker a core), and no progress bars."""

import os

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import setuptools  # noqa: F401  (it takes distutils' place, and fails where compiled code has imported that before)
import torch
import transformers

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

from samples import (  # noqa: E402, F401
    decoder,
    defaults,
    encoder,
    file,
    generation,
    recipe,
    single_files,
    suite,
)
