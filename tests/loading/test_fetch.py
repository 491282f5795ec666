"""Fetching from a package index of our own: a folder of small wheels that pip is pointed at."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from petune import Package, PetuneError, Source
from petune.loading import fetch as fetching
from petune.loading.fetch import cache_folder, fetch


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def straight(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel as it lies there, without the half second that pip takes."""
    monkeypatch.setattr(
        fetching, "_pip_download", lambda requirement, folder: next(index.glob("*.whl"))
    )


def tarball(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def wheel(
    index: Path, files: dict[str, bytes], *members: str, name: str = "tiny_data"
) -> Package:
    """A wheel in the index that holds `files`, and the package that names `members` of it."""
    path = index / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    own = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Python: <3\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for inside, content in {**own, **files}.items():
            archive.writestr(inside, content)
    return Package(
        name, "1.0", sha256(path.read_bytes()).hexdigest(), members or tuple(files)
    )


def files_under(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_package_is_fetched_once_and_read_from_the_cache_ever_after(index, capsys):
    source = Source(
        (
            wheel(
                index,
                {"pkg/a.txt": b"one", "pkg/deep/b.txt": b"two", "pkg/c.txt": b"no"},
                "pkg/a.txt",
                "pkg/deep/b.txt",
            ),
        )
    )
    folder = fetch(source)
    assert (folder / "a.txt").read_bytes() == b"one"
    assert files_under(cache_folder()) == ["a.txt", "b.txt"]
    assert capsys.readouterr().err == "petune: fetching package tiny_data 1.0\n"
    for path in index.iterdir():
        path.unlink()
    assert fetch(source) == folder
    assert fetch(Source(source.places, "b.txt")).read_bytes() == b"two"
    assert capsys.readouterr().err == ""


def test_a_wrong_checksum_leaves_nothing_behind(index):
    package = wheel(index, {"a.txt": b"one"})
    wrong = Package(package.name, package.version, "0" * 64, package.members)
    with pytest.raises(
        PetuneError,
        match=r"tried package tiny_data 1\.0 \(the index has no file with the expected sha",
    ):
        fetch(Source((wrong,)))
    assert files_under(cache_folder()) == []


def test_the_checksum_is_also_ours(index, monkeypatch):
    package = wheel(index, {"a.txt": b"one"})
    tampered = index / "other.whl"
    tampered.write_bytes(b"not what was promised")
    monkeypatch.setattr(fetching, "_pip_download", lambda requirement, folder: tampered)
    with pytest.raises(PetuneError, match=r"has sha256 [0-9a-f]+, not "):
        fetch(Source((package,)))
    assert files_under(cache_folder()) == []


def test_places_are_tried_in_order_and_the_first_that_answers_is_taken(index):
    missing = Package("absent_data", "1.0", "0" * 64, ("a.txt",))
    there = wheel(index, {"a.txt": b"one"})
    assert fetch(Source((missing, there), "a.txt")).read_bytes() == b"one"


def test_an_error_names_every_place_and_its_reason_in_one_line(index):
    places = tuple(
        Package(name, "1.0", "0" * 64, ("a.txt",))
        for name in ("absent_data", "other_data")
    )
    with pytest.raises(PetuneError) as caught:
        fetch(Source(places))
    said = str(caught.value)
    assert (
        "package absent_data 1.0 (No matching distribution found for absent_data==1.0"
        in said
    )
    assert "package other_data 1.0 (" in said
    assert "\n" not in said


def test_a_dead_index_is_called_unreachable(monkeypatch):
    for name, value in {
        "NO_INDEX": "",
        "FIND_LINKS": "",
        "INDEX_URL": "http://127.0.0.1:9/simple",
        "RETRIES": "1",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(PetuneError, match="the package index can't be reached"):
        fetch(Source((Package("tiny_data", "1.0", "0" * 64, ("a.txt",)),)))


def test_a_hanging_index_is_given_up(index, monkeypatch):
    package = wheel(index, {"a.txt": b"one"})
    monkeypatch.setattr(fetching, "LIMIT", 0.01)
    with pytest.raises(PetuneError, match="no answer from the package index"):
        fetch(Source((package,)))


def test_without_pip_the_remedy_is_said(index, monkeypatch):
    package = wheel(index, {"a.txt": b"one"})
    monkeypatch.setattr(fetching, "find_spec", lambda name: None)
    with pytest.raises(
        PetuneError,
        match="has no pip: run `python -m ensurepip` or `uv pip install pip`",
    ):
        fetch(Source((package,)))


@pytest.mark.usefixtures("straight")
def test_paths_in_an_archive_are_not_followed(index, tmp_path):
    evil = {"../../../evil.txt": b"out", "/etc/evil.txt": b"out", "a.txt": b"one"}
    folder = fetch(Source((wheel(index, evil, "../../../evil.txt", "a.txt"),)))
    assert files_under(folder) == ["a.txt", "evil.txt"]
    assert [path for path in tmp_path.rglob("evil.txt") if path.parent != folder] == []


@pytest.mark.usefixtures("straight")
def test_a_member_may_be_in_an_archive_inside(index):
    inner = tarball({"set/movies.txt": b"fine film"})
    outer = zipped({"inner.tar.gz": inner})
    package = wheel(
        index,
        {"x/data.tar.gz": inner, "y.zip": outer},
        "x/data.tar.gz!set/movies.txt",
        "y.zip!inner.tar.gz!set/movies.txt",
    )
    assert (fetch(Source((package,))) / "movies.txt").read_bytes() == b"fine film"


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.usefixtures("straight")
@pytest.mark.parametrize(
    "member", ["b.txt", "x/data.tar.gz!nope.txt", "x/data.tar.gz!set", "a.txt!b.txt"]
)
def test_a_missing_member_is_named(index, member):
    inner = tarball({"set/movies.txt": b"fine film"})
    package = wheel(index, {"a.txt": b"one", "x/data.tar.gz": inner}, member)
    with pytest.raises(
        PetuneError, match=f"tiny_data-1.0-py3-none-any.whl does not hold {member}"
    ):
        fetch(Source((package,)))
    assert files_under(cache_folder()) == []


def test_two_processes_at_once_get_the_same_whole_folder(index):
    package = wheel(index, {f"{i}.bin": bytes([i]) * 100_000 for i in range(20)})
    code = f"from petune.loading.fetch import Package, Source, fetch; print(fetch(Source(({package!r},))))"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(answers) == 1
    assert len(files_under(cache_folder())) == 20
    assert [path.name for path in (cache_folder() / "fetched").iterdir()] == [
        Path(answers.pop()).name
    ]


@pytest.mark.usefixtures("straight")
def test_a_cache_that_cannot_be_written_is_named(index, tmp_path, monkeypatch):
    package = wheel(index, {"a.txt": b"one"})
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        PetuneError,
        match=r"cache folder .*file.*: Not a directory; make room .* PETUNE_CACHE",
    ):
        fetch(Source((package,)))


def test_the_cache_folder_follows_the_environment(monkeypatch):
    assert cache_folder().name == "cache"
    monkeypatch.delenv("PETUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/petune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "petune"
