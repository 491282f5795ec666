"""Imported once by the fork server, so that a cell starts in a moment: imports only, nothing that starts a thread."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel that it can do without

import bitsandbytes  # noqa: E402, F401
import datasets  # noqa: E402, F401
import peft  # noqa: E402, F401
import sklearn.metrics  # noqa: E402, F401
import torch  # noqa: E402, F401
import transformers.models.auto.modeling_auto  # noqa: E402, F401
