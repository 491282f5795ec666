"""Whether the code is calm: the limits of CONTRIBUTING.md that neither ruff nor radon counts.

`python .ci/calm.py` prints what exceeds a limit and exits with 1 if anything does; `--all` prints every
file of the core with its branches in 100 lines of code.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "petune" / "core"
FUNCTION_LINES, CORE_LINES, FILE_LINES, BRANCHES = 40, 250, 350, 25
MEAN_COMPLEXITY = 3.2

BRANCHING = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler)
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def main() -> int:
    """Print what is over a limit; the number of such lines, at most 1."""
    found = [line for path in sources() for line in complaints(path)]
    if "--all" in sys.argv:
        for path in sorted(CORE.rglob("*.py")):
            print(f"{branches_per_100(path):5.1f}  {path.relative_to(ROOT)}")
    mean = mean_complexity()
    if mean > MEAN_COMPLEXITY:
        found.append(
            f"petune/core: mean complexity {mean:.2f}, at most {MEAN_COMPLEXITY}"
        )
    for line in found:
        print(line)
    if not found:
        print(f"calm: mean complexity of the core {mean:.2f}")
    return min(len(found), 1)


def sources() -> Iterator[Path]:
    """Every Python file that ships."""
    for folder in ("petune", "plugins", "benchmarks"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def complaints(path: Path) -> Iterator[str]:
    """What is too long or too branched in a file, a line each."""
    name, text = path.relative_to(ROOT), path.read_text(encoding="utf-8")
    in_core = CORE in path.parents
    lines, most = text.count("\n"), CORE_LINES if in_core else FILE_LINES
    if lines > most:
        yield f"{name}: {lines} lines, at most {most}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{name}:{node.lineno} {node.name}: {length} lines, at most {FUNCTION_LINES}"
    if in_core and (branches := branches_per_100(path)) > BRANCHES:
        yield f"{name}: {branches:.1f} branches in 100 lines of code, at most {BRANCHES}"


def branches_per_100(path: Path) -> float:
    """Of `if`, `for`, `while`, `except`, `and`, `or` and comprehensions, in a file's lines of code."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, BRANCHING):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
    lines = code_lines(text, tree)
    return 100 * count / lines if lines else 0.0


def code_lines(text: str, tree: ast.Module) -> int:
    """How many lines hold code: no blank line, no comment, no string that is a statement of its own."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and _is_text(node.value):
            found -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(found)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def mean_complexity() -> float:
    """The core's cyclomatic complexity as `radon cc -a` gives it, over functions, methods and classes."""
    from radon.complexity import average_complexity, cc_visit

    blocks = []
    for path in CORE.rglob("*.py"):
        blocks += cc_visit(path.read_text(encoding="utf-8"))
    return float(average_complexity(blocks))


if __name__ == "__main__":
    sys.exit(main())
