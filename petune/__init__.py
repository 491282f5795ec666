"""Parameter-efficient tuning of transformers: a small core, methods as plugins.

Names are loaded on first use, so that `petune --help` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from petune.errors import PetuneError, UnmergeableError, UnsupportedError
from petune.hookspecs import hookimpl

if TYPE_CHECKING:
    from petune import testing
    from petune.adapter import Adapter, Inner, Positive, Unfreeze
    from petune.attention import attend
    from petune.batch import Batch
    from petune.discovery import discover
    from petune.discovery import find_sites as sites
    from petune.formats.twin import PeftTwin
    from petune.loading.fetch import Package, Source
    from petune.loading.models import Quantizer, from_pretrained, load_tokenizer
    from petune.ops import lowrank_update, recompute
    from petune.routing import route
    from petune.site import ALL_LINEAR, Site
    from petune.storage import Format, load
    from petune.tuning import Tuning, attach, methods, tunings

__version__ = "0.1.0"

__all__ = [
    "ALL_LINEAR",
    "Adapter",
    "Batch",
    "Format",
    "Inner",
    "Package",
    "PeftTwin",
    "PetuneError",
    "Positive",
    "Quantizer",
    "Site",
    "Source",
    "Tuning",
    "Unfreeze",
    "UnmergeableError",
    "UnsupportedError",
    "attach",
    "attend",
    "discover",
    "from_pretrained",
    "hookimpl",
    "load",
    "load_tokenizer",
    "lowrank_update",
    "methods",
    "recompute",
    "route",
    "sites",
    "testing",
    "tunings",
]

_HOMES = {
    "petune.adapter": ("Adapter", "Inner", "Positive", "Unfreeze"),
    "petune.attention": ("attend",),
    "petune.batch": ("Batch",),
    "petune.discovery": ("discover",),
    "petune.formats.twin": ("PeftTwin",),
    "petune.loading.fetch": ("Package", "Source"),
    "petune.loading.models": ("Quantizer", "from_pretrained", "load_tokenizer"),
    "petune.ops": ("lowrank_update", "recompute"),
    "petune.routing": ("route",),
    "petune.site": ("ALL_LINEAR", "Site"),
    "petune.storage": ("Format", "load"),
    "petune.tuning": ("Tuning", "attach", "methods", "tunings"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "sites":
        found = importlib.import_module("petune.discovery").find_sites
    elif name == "testing":
        found = importlib.import_module("petune.testing")
    elif name in _HOME:
        found = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'petune' has no attribute {name!r}")
    globals()[name] = found
    return found
