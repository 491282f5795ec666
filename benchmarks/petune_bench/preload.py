"""Imported once by the fork server, so that a cell starts in a moment: imports only, nothing that starts a thread."""

from petune.core.registry.plugins import registry

registry()  # plugins quieten the libraries that they need, before these are imported

import bitsandbytes  # noqa: E402, F401
import datasets  # noqa: E402, F401
import peft  # noqa: E402, F401
import sklearn.metrics  # noqa: E402, F401
import torch  # noqa: E402, F401
import transformers.models.auto.modeling_auto  # noqa: E402, F401
