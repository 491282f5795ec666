"""docs/core.md names what there is, and its picture shows the imports as they are."""

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "petune/core"
TEXT = (ROOT / "docs/core.md").read_text()
FILE = r"(?:\w+/\w+|ops)\.py"
NAMED = re.findall(rf"`({FILE}): ([\w.]+)`", TEXT)
"""`graft/board.py: Board.begin`: a file and a name in it."""
FLOORS = dict(re.findall(r"^\| `([\w.]+?)/?` \|.*\| ([^|]*) \|$", TEXT, re.MULTILINE))
"""The table of floors: the files of each, by the folder."""
DRAW = runpy.run_path(str(ROOT / "docs/draw_core.py"))


def names_in(body, before=""):
    """What is defined in a module, and in its classes as `Class.name`."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield before + node.name
            yield from names_in(node.body, f"{before}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield before + node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (before + t.id for t in targets if isinstance(t, ast.Name))


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_names_are_in_their_files(file, name):
    assert name in set(names_in(ast.parse((CORE / file).read_text()).body))


def test_files_are_there():
    named = re.findall(rf"`({FILE})(?:: [\w.]+)?`", TEXT)
    assert [file for file in named if not (CORE / file).is_file()] == []


def test_every_colon_is_read():
    """No reference is written in another way than this test reads it."""
    assert len(re.findall(r"\.py:", TEXT)) == len(NAMED)


def test_the_table_lists_every_file():
    shown = DRAW["core"]()
    assert list(FLOORS) == [
        folder if (CORE / folder).is_dir() else f"{folder}.py"
        for floor in shown.floors
        for folder in floor
    ]
    for folder, files in FLOORS.items():
        listed = re.findall(r"`(\w+\.py)`", files)
        assert sorted(listed) == shown.files[folder.removesuffix(".py")], folder


def test_the_page_explains_the_core_s_own_words():
    words = "Site Link Graft Board ForwardPass Computation Plan Generation Layout Target Settings Seam"
    for word in words.split():
        bold, first = f"**{word}**", re.search(rf"(?<!/)\b{word}\b", TEXT)
        assert bold in TEXT
        assert TEXT.index(bold) <= first.start() + 2, f"{word} is used before"


def test_the_picture_is_current():
    shown = DRAW["core"]()
    assert DRAW["written"]() == shown, "run python docs/draw_core.py"
    assert DRAW["PICTURE"].read_text() == DRAW["drawn"](shown)


def test_the_picture_has_every_arrow_and_only_downwards():
    shown = DRAW["core"]()
    depth = {f: i for i, floor in enumerate(shown.floors) for f in floor}
    picture = DRAW["PICTURE"].read_text()
    between = [arrow.split(" -> ") for arrow in shown.imports]
    down = [(one, other) for one, other in between if one != other]
    assert picture.count("l 9 -4 v 8 z") == len(down)
    assert all(depth[one] < depth[other] for one, other in down)
