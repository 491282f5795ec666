"""Writes docs/methods.md from what is installed: `python docs/generate.py`. A test holds that the page is current."""

from __future__ import annotations

import inspect
from pathlib import Path

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
load, but for methods whose layers share tensors. Not traced by `torch.compile(fullgraph=True)`: frod, shira, waveft.

[How near petune's own are to PEFT's](parity.md), with the number of lines of both.
"""


def page() -> str:
    """The page as it should be."""
    parts = [HEAD]
    for name, cls in sorted(petune.methods().items()):
        if (
            ":" in name
            or registry().plugins[registry().owner("petune_methods", name)].package
            != "petune"
        ):
            continue
        known = [
            f"`{key}: {type_name(p.annotation)}"
            + ("" if p.default is p.empty else f" = {p.default!r}")
            + "`"
            for key, p in arguments(cls).items()
        ]
        lines = len(Path(inspect.getsourcefile(cls) or "").read_text().splitlines())
        facts = [
            f"acts on `{cls.where}`",
            "mergeable" if cls.mergeable else "not mergeable",
            f"{lines} lines",
        ]
        parts.append(
            f"## {name}\n\n{inspect.getdoc(cls)}\n\n{'; '.join(facts)}. Arguments: {', '.join(known) or 'none'}.\n"
        )
    return "\n".join([*parts, TAIL])


if __name__ == "__main__":
    PAGE.write_text(page())
