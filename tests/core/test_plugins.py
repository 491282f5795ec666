"""Plugins: isolation, collisions, single files, and that ours have no privileges."""

import subprocess
import sys
from pathlib import Path

import pytest

import petune
from petune.core.registry import hookspecs
from petune.core.registry.plugins import Registry

HOOKS = [name for name in vars(hookspecs) if name.startswith("petune_")]

METHOD = """
import petune, torch
class Shift(petune.Adapter):
    where, mergeable = "q v", True
    def __init__(self, site, *, start: float = 0.0):
        super().__init__()
        self.delta = torch.nn.Parameter(torch.full((site.out_features,), start))
    def forward(self, inner, x):
        return inner(x) + self.delta
@petune.hookimpl
def petune_methods():
    return {NAME: Shift}
"""


@pytest.fixture
def plugin(tmp_path):
    def write(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def installed(tmp_path):
    """Run code in an environment where further packages are installed: folders on the path with entry points."""

    def run(code, **packages):
        for name, text in packages.items():
            (tmp_path / f"{name}.py").write_text(text)
            info = tmp_path / f"{name}-1.2.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n"
            )
            (info / "entry_points.txt").write_text(f"[petune]\n{name} = {name}\n")
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path.append({str(tmp_path)!r})\n" + code,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_our_own_plugins_are_found_like_anyones():
    assert {
        "lora",
        "ia3",
        "bitfit",
        "houlsby",
        "prompt-tuning",
        "prefix-tuning",
        "last-layers",
        "full",
    } <= set(petune.methods())


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_and_in_use(hook):
    assert f"`{hook}`" in (Path(__file__).parents[2] / "docs/plugins.md").read_text()
    assert Registry().all(hook)


def test_a_single_file(plugin):
    registry = Registry()
    registry.add_file(plugin("shift", METHOD.replace("NAME", "'shift'")))
    assert registry.all("petune_methods")["shift"].__name__ == "Shift"
    assert registry.plugins["shift"].version == "file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_like_this", "ModuleNotFoundError"),
        ("x = 1", "no hook in it"),
        ("def broken(:", "SyntaxError"),
        (
            "import petune\n@petune.hookimpl\ndef petune_method():\n    return {}",
            "petune_method",
        ),
    ],
)
def test_a_file_that_does_not_load_says_why(plugin, text, message):
    registry = Registry()
    path = plugin("bad", text)
    with pytest.raises(petune.PetuneError, match=message) as error:
        registry.add_file(path)
    assert str(path) in str(error.value)
    assert "lora" in registry.all("petune_methods")
    with pytest.raises(petune.PetuneError, match="no such file"):
        registry.add_file("nowhere.py")


def test_a_file_that_claims_a_taken_name_is_named_and_the_rest_goes_on(plugin):
    registry = Registry()
    registry.add_file(plugin("mine", METHOD.replace("NAME", "'lora'")))
    assert registry.all("petune_methods")["lora"].__name__ == "LoRA"
    assert (
        "'lora' is claimed by both lowrank (petune) and mine"
        in registry.plugins["mine"].error
    )


SHOW = """
from petune.core.registry.plugins import registry
print(sorted(registry().all('petune_methods')))
print({p.name: p.error for p in registry().plugins.values() if p.error})
"""


def test_an_installed_package_is_found_and_a_broken_one_is_named(installed):
    out = installed(
        SHOW,
        shifty=METHOD.replace("NAME", "'shift'"),
        broken="raise RuntimeError('not today')",
    )
    assert "'shift'" in out
    assert "'lora'" in out
    assert "{'broken': 'RuntimeError: not today'}" in out


def test_two_packages_that_claim_a_name_are_both_named(installed):
    out = installed(
        SHOW,
        one=METHOD.replace("NAME", "'shift'"),
        two=METHOD.replace("NAME", "'shift'"),
    )
    assert "'shift' is claimed by both one (one) and two (two)" in out


def test_a_broken_plugin_is_named_where_its_name_is_missed(installed):
    code = "import petune\ntry: petune.attach(None, 'shift')\nexcept petune.PetuneError as e: print(e)"
    assert "failed to load: broken (RuntimeError: not today)" in installed(
        code, broken="raise RuntimeError('not today')"
    )


def test_import_is_light():
    code = """
import sys
from petune.core.registry.plugins import registry
registry()
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
