"""What is installed is all that there is: an editable install would not show a folder that is left out."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_of_code_is_installed():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    homes = told["package-dir"]
    found = {
        ".".join([name, *file.parent.relative_to(ROOT / home).parts])
        for name, home in homes.items()
        for file in (ROOT / home).rglob("__init__.py")
    }
    assert set(told["packages"]) == found
