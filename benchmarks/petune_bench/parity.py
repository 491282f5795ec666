"""The same adapter in PEFT and in petune, and how far apart they are: `python -m petune_bench.parity --out FILE`."""

from __future__ import annotations

import ast
import inspect
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import petune
from petune.core.method.twin import PeftTwin
from petune.files import write_text
from petune.formats.names import PREFIX
from petune.testing.models import tiny_batch, tiny_model
from petune_bench.options import Parser
from petune_bench.peers import configure

FAMILIES = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "t5": "SEQ_2_SEQ_LM",
}
# where the defaults say too little, or more than PEFT can without a CUDA compiler (a second factor)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adalora": {
        "orthogonality": 0.0
    },  # which PEFT adds to the loss, petune to the gradients
    "boft": {"factors": 1},
    "oft": {"block": 8},
    "prefix-tuning": {"length": 4},
    "prompt-tuning": {"length": 4},
    "trainable-tokens": {"ids": [81, 10, 59, 20]},
    "vera": {"rank": 16},
}
FLAT = {
    "column",
    "row or column",
    "ranks",
    "ranks last",
}  # layouts that are the same when flattened
HEAD = """# Parity with PEFT

Each adapter below was made by PEFT {version}, moved off its start, saved in PEFT's format and loaded by petune, on
tiny random models at fp32 (`python -m petune_bench.parity --out docs/parity.md` makes this page). The figures are the
largest differences of the logits, and of the adapter's gradients where both keep a tensor in one layout, over the
largest value; rounding of fp32 is about 1e-6. *–* is what PEFT or the format can't do; the reasons stand below. The
other way round, from petune to PEFT, is in `tests/core/test_peft_format.py`.

*Trained* counts parameters on Llama. *Lines* are those of the method's file, docstring included, + those of the files
that it shares with its family; PEFT's are those of the method's package in `peft/tuners`.

| method | {families} | gradients | trained, petune | trained, PEFT | lines, petune | lines, PEFT |
| --- | {rule} | --- | --- | --- | --- | --- |
"""
TAIL = """## What has another form

- adalora: PEFT leaves out the ranks that training has cut, which are zeros here, and divides alpha by 1e-5 more than
  the rank. It adds the regularization to the loss, petune to the gradients; its weight is zero above. When cutting
  begins and ends, in steps there and in shares of the training here, is not carried over.
- p-tuning saves in PEFT's format, which keeps the prompt without its encoder: such a folder loads as prompt-tuning.
- prefix-tuning: PEFT counts the tokens' positions from the end of the prefix, petune from 0. Where positions are
  rotations the keys are turned by the length of the prefix on the way; elsewhere the folder is refused.
- oft: PEFT's default replaces the inverse of the Cayley transform by five terms of its series (`neumann=True` here);
  the inverse, as in the paper, is petune's default and PEFT's `use_cayley_neumann=False`.
- boft: PEFT trains both halves of a skew-symmetric matrix. Its third butterfly factor joins blocks that the second has
  joined, so that more than two are refused; without its CUDA kernel it silently makes one of any number.
- vera: the projections are drawn from the seed on both sides; a folder whose saved ones differ is refused.
- llama-adapter: PEFT's ADAPTION_PROMPT trains tokens that the layer's projections turn into keys and values, under one
  linear gate a layer; petune trains the keys and values, under a tanh gate a head. Neither folder says the other's.
- What the other lacks: PEFT has no bottlenecks, BitFit, LoReFT or ladder side tuning; what only PEFT has goes by
  `peft:<NAME>`.
"""


@dataclass(frozen=True)
class Cell:
    """One method on one family: relative differences and parameter counts, or why there are none."""

    method: str
    family: str
    logits: float = 0.0
    gradients: float | None = None
    ours: int = 0
    theirs: int = 0
    refused: str | None = None


def twins() -> dict[str, PeftTwin]:
    """The methods whose folders load from PEFT."""
    found = {name: vars(cls).get("peft") for name, cls in petune.methods().items()}
    return {
        name: twin
        for name, twin in sorted(found.items())
        if isinstance(twin, PeftTwin) and twin.kind and twin.tensors
    }


def compare(method: str, family: str) -> Cell:
    """Make an adapter in PEFT, load its folder here and compare."""
    twin, ours = twins()[method], tiny_model(family)
    try:
        theirs = _made_in_peft(method, family)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            tuning = petune.load(ours, folder)
    except Exception as refusal:  # PEFT raises whatever it comes upon
        who = "the format" if isinstance(refusal, petune.PetuneError) else "PEFT"
        why = " ".join(str(refusal).split())
        return Cell(method, family, refused=f"{who}: {why}")
    batch = tiny_batch(family)
    one, other = (_outputs(model, batch) for model in (ours, theirs))
    heads = _head_parameters(tuning)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    return Cell(
        method,
        family,
        logits=_apart(one, other),
        gradients=_gradients_apart(twin, tuning, theirs),
        ours=_size(tuning.parameters()) - heads,
        theirs=_size(trained) - heads,
    )


def _made_in_peft(method: str, family: str) -> Any:
    """PEFT's adapter on a tiny model, moved off its start."""
    import peft

    torch.manual_seed(0)
    given = ARGUMENTS.get(method, {})
    config = configure(tiny_model(family), method, None, given)
    config.task_type = FAMILIES[family]
    made = peft.get_peft_model(tiny_model(family), config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def _head_parameters(tuning: petune.Tuning) -> int:
    """How many parameters the heads have that are trained along."""
    heads = [link.adapter for link in tuning.links if link.site.kind == "module"]
    return sum(_size(head.parameters()) for head in heads)


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _outputs(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits at the tokens that are not padding; PEFT leaves those of a prompt in. Gradients are left behind."""
    out = model(**batch)
    out.loss.backward()
    found: Tensor = out.logits.detach()
    if found.dim() != 3 or model.config.is_encoder_decoder:
        return found
    mask = batch["attention_mask"].bool()
    tokens = found[:, -mask.shape[1] :]
    return tokens[mask]


def _gradients_apart(
    twin: PeftTwin, tuning: petune.Tuning, theirs: nn.Module
) -> float | None:
    """The largest difference of the gradients; None where PEFT keeps a tensor in another layout than petune."""
    if twin.whole:
        return None
    pairs = _gradients(twin, tuning, theirs)
    return max((_apart(one, other) for one, other in pairs), default=None)


def _gradients(
    twin: PeftTwin, tuning: petune.Tuning, theirs: nn.Module
) -> list[tuple[Tensor, Tensor]]:
    """Ours beside PEFT's, of the tensors of one name."""
    named = {
        n.replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.grad is not None
    }
    names = twin.tensors or {}
    found = []
    for link in tuning.links:
        for name, p in link.adapter.named_parameters():
            if twin.layouts.get(name, "column") not in FLAT:
                continue
            other = named.get(f"{PREFIX}{link.site.name}.{names.get(name)}")
            if p.grad is not None and other is not None:
                found.append((p.grad.flatten(), other.flatten()))
    return found


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def lines(method: str) -> tuple[int, int, int]:
    """(of the method's file, of what it imports from its family, of PEFT's package)."""
    import peft

    file = Path(inspect.getsourcefile(petune.methods()[method]) or "")
    shared = sum(_count(f) for f in _imported(file, {file}) - {file})
    tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(twins()[method].kind)]
    package = Path(inspect.getsourcefile(tuner) or "").parent
    return _count(file), shared, sum(_count(f) for f in package.rglob("*.py"))


def _count(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def _imported(file: Path, known: set[Path]) -> set[Path]:
    """Those known, with the files beside this one that it imports, and those that they import."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [a.name for a in node.names]
            for name in names:
                found = file.with_name(f"{name}.py")
                if found not in known:
                    known.add(found)
                    _imported(found, known)
    return known


def row(method: str, cells: list[Cell]) -> str:
    """The method's line of the table."""
    held = [cell for cell in cells if cell.refused is None]
    first = held[0] if held else cells[0]
    gradients = [cell.gradients for cell in held if cell.gradients is not None]
    own, shared, peft = lines(method)
    columns = [
        method,
        *("–" if cell.refused else _rounded(cell.logits) for cell in cells),
        _rounded(max(gradients)) if gradients else "–",
        f"{first.ours:,}",
        f"{first.theirs:,}",
        f"{own} + {shared}" if shared else f"{own}",
        f"{peft:,}",
    ]
    return f"| {' | '.join(columns)} |"


def _rounded(difference: float) -> str:
    """`3e-07`; a plain 0 where there is none."""
    return f"{difference:.0e}" if difference else "0"


def page(methods: list[str]) -> str:
    """The page for these methods."""
    import peft

    head = HEAD.format(
        version=peft.__version__,
        families=" | ".join(FAMILIES),
        rule=" | ".join("---" for _ in FAMILIES),
    )
    table, reasons = [], []
    for method in methods:
        cells = [compare(method, family) for family in FAMILIES]
        table.append(row(method, cells))
        for cell in cells:
            if cell.refused is not None:
                reasons.append(f"- {method} on {cell.family}: {cell.refused}")
    return "\n".join(
        [head + "\n".join(table), "", "## What is not there", "", *reasons, "", TAIL]
    )


def main() -> None:
    """Print the page, or write it."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="the page to write; printed by default"
    )
    parser.add_argument(
        "--method", action="append", help="one method; all that both have by default"
    )
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    text = page(given.method or list(twins()))
    if given.out is None:
        print(text)
    else:
        write_text(given.out, text)


if __name__ == "__main__":
    main()
