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
    from petune.formats import export, load, serving
    from petune.formats.names import CONFIG, WEIGHTS

    return {
        "peft": Format(export.export, WEIGHTS, CONFIG, load.load),
        "serving": Format(serving.export, WEIGHTS, CONFIG),
    }
