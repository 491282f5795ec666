"""What other programs read and write: PEFT's folders, and the form of them that serving engines take."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from petune.formats import peft, serving

if TYPE_CHECKING:
    from torch import Tensor

    from petune.tuning import Tuning

EXPORTS: dict[str, Callable[[Tuning], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "peft": peft.export,
    "serving": serving.export,
}
"""(tensors, configuration) of a tuning by the format's name; both are written under PEFT's names."""
