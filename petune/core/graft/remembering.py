"""Gradient checkpointing of an adapted model: a block that runs again in backward does so
as its forward ran it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from petune.core.forward.forward_pass import Remembering
from petune.core.forward.link import Acting
from petune.core.host.checkpointing import checkpoint_with, checkpointed, is_reentrant
from petune.errors import UnsupportedError


def check_checkpointing(model: Any, tunings: Iterable[Acting]) -> None:
    """See that tunings can be checkpointed as the model is.

    Raises:
        UnsupportedError: it is the reentrant kind, and the sites of a method share notes:
            no gradient reaches those.
    """
    functions = dict(checkpointed(model)).values()
    reentrant = any(map(is_reentrant, functions))
    for tuning in tunings:
        if reentrant and tuning.shares_notes:
            what = f"{tuning.method!r} with reentrant gradient checkpointing"
            raise UnsupportedError(f"{what}: use use_reentrant=False.")


def remember(model: Any) -> None:
    """Let blocks that gradient checkpointing runs again do so as their forward ran them."""
    for module, function in checkpointed(model):
        remembering = Remembering.around(function)
        checkpoint_with(module, remembering)


def forget(model: Any) -> None:
    """The counterpart of `remember`."""
    for module, function in checkpointed(model):
        own = getattr(function, "checkpoint", function)
        checkpoint_with(module, own)
