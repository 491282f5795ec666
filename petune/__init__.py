"""Parameter-efficient tuning of transformers: a small core, methods as plugins.

Names are loaded on first use, so that `petune --help` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from petune.core.registry.hookspecs import hookimpl
from petune.errors import PetuneError, UnmergeableError, UnsupportedError

if TYPE_CHECKING:
    from petune import testing
    from petune.core.attached.attach import attach
    from petune.core.attached.folder import Format
    from petune.core.attached.load import load
    from petune.core.attached.route import route
    from petune.core.attached.tuning import Tuning, tunings
    from petune.core.forward.computation import once
    from petune.core.frozen.discovery import discover
    from petune.core.frozen.site import ALL_LINEAR, Site
    from petune.core.graft.attend import attend
    from petune.core.method.adapter import Adapter, Inner, Positive, Unfreeze
    from petune.core.method.batch import Batch
    from petune.core.method.derived import derived
    from petune.core.method.twin import PeftTwin
    from petune.core.ops import bottleneck_update, lowrank_update, recompute
    from petune.core.registry.methods import methods
    from petune.core.registry.quantizer import Quantizer
    from petune.core.registry.sites import find_sites as sites
    from petune.loading.fetch import Package, Source
    from petune.loading.models import from_pretrained, load_tokenizer
    from petune.training.lean import lean, lean_trainer

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
    "bottleneck_update",
    "derived",
    "discover",
    "from_pretrained",
    "hookimpl",
    "lean",
    "lean_trainer",
    "load",
    "load_tokenizer",
    "lowrank_update",
    "methods",
    "once",
    "recompute",
    "route",
    "sites",
    "testing",
    "tunings",
]

_HOMES = {
    "petune.core.attached.attach": ("attach",),
    "petune.core.attached.folder": ("Format",),
    "petune.core.attached.load": ("load",),
    "petune.core.attached.route": ("route",),
    "petune.core.attached.tuning": ("Tuning", "tunings"),
    "petune.core.forward.computation": ("once",),
    "petune.core.frozen.discovery": ("discover",),
    "petune.core.frozen.site": ("ALL_LINEAR", "Site"),
    "petune.core.graft.attend": ("attend",),
    "petune.core.method.adapter": ("Adapter", "Inner", "Positive", "Unfreeze"),
    "petune.core.method.batch": ("Batch",),
    "petune.core.method.derived": ("derived",),
    "petune.core.method.twin": ("PeftTwin",),
    "petune.core.ops": ("bottleneck_update", "lowrank_update", "recompute"),
    "petune.core.registry.methods": ("methods",),
    "petune.core.registry.quantizer": ("Quantizer",),
    "petune.loading.fetch": ("Package", "Source"),
    "petune.loading.models": ("from_pretrained", "load_tokenizer"),
    "petune.training.lean": ("lean", "lean_trainer"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "sites":
        found = importlib.import_module("petune.core.registry.sites").find_sites
    elif name == "testing":
        found = importlib.import_module("petune.testing")
    elif name in _HOME:
        found = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'petune' has no attribute {name!r}")
    globals()[name] = found
    return found
