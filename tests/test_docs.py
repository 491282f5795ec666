"""What the documentation shows runs as printed."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE
    )


def plugin(folder):
    """The README's plugin, saved under the name that its first line says."""
    text = next(
        b for b in blocks(ROOT / "README.md", "python") if b.startswith("# ssf.py")
    )
    path = folder / "ssf.py"
    path.write_text(text)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem
)
def test_python(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, block in enumerate(blocks(page, "python")):
        path = tmp_path / f"block{i}.py"
        path.write_text(block)
        runpy.run_path(str(path))


def test_the_readme_has_two_bash_blocks():
    assert len(blocks(ROOT / "README.md", "bash")) == 2


def test_the_readme_shows_the_quickstarts_results():
    table = (
        (ROOT / "README.md")
        .read_text()
        .partition("<!-- quickstart -->\n")[2]
        .partition("<!-- end -->")[0]
    )
    assert table.count("\n") > 5
    assert table in (ROOT / "docs/quickstart.md").read_text()


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), (
                f"{page.name}: {target}"
            )


def test_recipes_are_valid():
    from petune.training import load_recipe

    found = sorted((ROOT / "docs/recipes").glob("*.yaml"))
    assert found
    for path in found:
        load_recipe(path)
    for page in PAGES:
        for block in blocks(page, "yaml"):
            load_recipe(yaml.safe_load(block))


def test_commands_exist():
    """Every `petune …` line in a code block names a command, and options that it has."""
    from petune.cli.app import build

    commands = build().commands
    for page in PAGES:
        for line in "".join(blocks(page, "sh") + blocks(page, "bash")).splitlines():
            words = line.partition("#")[0].split()
            if words[:1] != ["petune"]:
                continue
            assert words[1] in commands, line
            known = {o for p in commands[words[1]].params for o in p.opts} | {
                "--plugin",
                "--debug",
            }
            assert {w for w in words if w.startswith("--")} <= known, line


@pytest.mark.usefixtures("single_files")
def test_the_readme_trains_its_plugin(tmp_path, monkeypatch):
    """Its recipe with the overrides of its command, up to where a model would be loaded."""
    from petune.core.registry.plugins import registry
    from petune.training import load_recipe

    line = next(
        t
        for t in (ROOT / "README.md").read_text().splitlines()
        if t.startswith("petune train") and "ssf" in t
    )
    (recipe,) = blocks(ROOT / "README.md", "yaml")
    (tmp_path / "my-data.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    registry().add_file(plugin(tmp_path))
    load_recipe(
        yaml.safe_load(recipe), [word for word in line.split() if "=" in word]
    ).check()


@pytest.mark.usefixtures("single_files")
def test_the_plugin_of_the_readme_is_compared_at_nf4(tmp_path, suite, defaults):
    """Written by the README alone, one file: listed, checked, trained and compared on a 4-bit base."""
    from petune.cli import main

    file, out = plugin(tmp_path), tmp_path / "out"
    defaults["precision"] = "nf4"
    assert (
        main(
            [
                "bench",
                suite({"method": "lora"}),
                "--out",
                str(out),
                "--plugin",
                str(file),
                "--method",
                "ssf",
                "--json",
            ]
        )
        == 0
    )
    rows = [
        yaml.safe_load(line)
        for line in (out / "results.jsonl").read_text().splitlines()
    ]
    assert {(r["method"], r["precision"], r["status"]) for r in rows} == {
        ("lora", "nf4", "ok"),
        ("ssf", "nf4", "ok"),
    }
    assert all(r["score"] is not None and r["trainable_params"] > 0 for r in rows)
    assert "ssf" in (out / "report.html").read_text()


def test_the_plugin_of_the_readme_holds_the_kit(tmp_path):
    from petune.testing import check_method

    cls = runpy.run_path(str(plugin(tmp_path)))["SSF"]
    check_method(cls, families=["bert"], precisions=["nf4"])


def test_the_page_of_methods_is_current():
    generate = runpy.run_path(str(ROOT / "docs/generate.py"))
    assert generate["PAGE"].read_text() == generate["page"](), (
        "run python docs/generate.py"
    )
