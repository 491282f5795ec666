"""What discovery can't read off a model's structure, a file a family of architectures."""

from __future__ import annotations  # the types would load torch

from collections.abc import Callable, Mapping
from typing import Any

import petune


@petune.hookimpl
def petune_sites() -> Mapping[str, Callable[[Any], list[petune.Site]]]:
    from petune_plugins.architectures import fused, ids, xlnet

    return {**fused.ARCHITECTURES, **ids.ARCHITECTURES, "xlnet": xlnet.sites}
