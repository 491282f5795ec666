"""What other programs read and write: PEFT's folders, and the form of them that serving engines take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from petune.core.registry.hookspecs import hookimpl

if TYPE_CHECKING:
    from petune.core.attached.folder import Format


@hookimpl
def petune_formats() -> Mapping[str, Format]:
    """Both under PEFT's names, so that a folder for serving loads as PEFT's."""
    from petune.core.attached.folder import Format
    from petune.formats import peft, serving

    return {
        "peft": Format(peft.export, peft.WEIGHTS, peft.CONFIG, peft.load),
        "serving": Format(serving.export, peft.WEIGHTS, peft.CONFIG),
    }
