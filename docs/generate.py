"""Writes docs/methods.md from what is installed: `python docs/generate.py`. A test holds that the page is current."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import petune
from petune.core.method.arguments import arguments, type_name
from petune.core.registry.plugins import registry

PAGE = Path(__file__).parent / "methods.md"
HEAD = """# Methods

Equations, papers, hook points and arguments, from the methods' own docstrings and signatures (`python docs/generate.py`
writes this page, `petune methods` prints its short form). *Lines* is the length of the method's file.
"""
TAIL = """## peft:NAME

Every method of the installed peft package goes by `peft:` and its name there: `peft:hra`, `peft:miss`, `peft:vblora`, …
PEFT's own layers stand around petune's sites, so that they train on any base, switch, route, save and merge like those
above. Their arguments are the fields of PEFT's configuration (`petune methods --all` lists them; `where` and `train`
take the place of `target_modules` and `modules_to_save`). What acts on the whole model (prompts), asks for more than a
layer's input, mixes the rows of a batch (Lily) or wants an nn.Linear and nothing else (GLoRA) is refused with the
reason. `peft:adalora` trains without its rank schedule, which PEFT leaves to the training loop. PEFT's folders save and
load, but for frod and unilora, whose layers read tensors that none of them holds. Not traced by
`torch.compile(fullgraph=True)`: frod, shira, waveft.

[How near petune's own are to PEFT's](parity.md), with the number of lines of both.
"""


def page() -> str:
    """The page as it should be."""
    sections = [_section(name, cls) for name, cls in sorted(_own_methods().items())]
    return "\n".join([HEAD, *sections, TAIL])


def _own_methods() -> dict[str, type]:
    """The methods of petune's own plugins; those of other packages have pages of their own."""
    found = {}
    for name, cls in petune.methods().items():
        plugin = registry().plugins[registry().owner("petune_methods", name)]
        if ":" not in name and plugin.package == "petune":
            found[name] = cls
    return found


def _section(name: str, cls: Any) -> str:
    file = Path(inspect.getsourcefile(cls) or "")
    lines = len(file.read_text().splitlines())
    mergeable = "mergeable" if cls.mergeable else "not mergeable"
    facts = f"acts on `{cls.where}`; {mergeable}; {lines} lines"
    given = [_argument(key, p) for key, p in arguments(cls).items()]
    listed = ", ".join(given) or "none"
    return f"## {name}\n\n{inspect.getdoc(cls)}\n\n{facts}. Arguments: {listed}.\n"


def _argument(name: str, parameter: inspect.Parameter) -> str:
    required = parameter.default is parameter.empty
    default = "" if required else f" = {parameter.default!r}"
    return f"`{name}: {type_name(parameter.annotation)}{default}`"


if __name__ == "__main__":
    PAGE.write_text(page())
