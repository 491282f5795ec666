"""Every seam of loading holds, and a change planted in it ends in the error that names it."""

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging as chatter

from petune import from_pretrained
from petune.core.host.seam import Seam, raise_first
from petune.errors import MovedError
from petune.loading.host import SEAMS, dense_gguf, hidden_bars

Patch = pytest.MonkeyPatch


def test_every_seam_holds() -> None:
    assert [seam.trouble() for seam in SEAMS.all if seam.trouble()] == []


def models_are_built_otherwise(patch: Patch) -> None:
    patch.delattr(PreTrainedModel, "_from_config")


def models_are_built_from_more(patch: Patch) -> None:
    patch.setattr(
        PreTrainedModel, "_from_config", classmethod(lambda cls, config, dtype: None)
    )


def the_hook_has_another_name(patch: Patch) -> None:
    patch.delattr(chatter, "set_tqdm_hook")


def the_hook_gets_something_else(patch: Patch) -> None:
    class Bars:
        def __call__(self, *args: Any, **options: Any) -> Any:
            return chatter._tqdm_hook(options)

    patch.setattr(chatter, "tqdm", Bars())


def gguf_has_another_configuration(patch: Patch) -> None:
    patch.setattr(transformers, "GgufConfig", None, raising=False)


def gguf_files_are_dequantized_otherwise(patch: Patch) -> None:
    patch.setattr(transformers, "GgufConfig", lambda dense: None)


HAS_GGUF = hasattr(transformers, "GgufConfig")
PLANTED: list[tuple[str, Callable[[Patch], None]]] = [
    ("PreTrainedModel._from_config", models_are_built_otherwise),
    ("PreTrainedModel._from_config", models_are_built_from_more),
    ("set_tqdm_hook", the_hook_has_another_name),
    ("set_tqdm_hook", the_hook_gets_something_else),
]
if HAS_GGUF:  # since transformers 5.17
    PLANTED += [
        ("GgufConfig", gguf_has_another_configuration),
        ("GgufConfig", gguf_files_are_dequantized_otherwise),
    ]


def seam_of(name: str) -> Seam:
    (found,) = (seam for seam in SEAMS.all if name in seam.name)
    return found


@pytest.mark.parametrize(
    ("name", "plant"), PLANTED, ids=[p.__name__ for _, p in PLANTED]
)
def test_a_planted_change_is_named(
    monkeypatch: Patch, name: str, plant: Callable[[Patch], None]
) -> None:
    seam = seam_of(name)
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(
            MovedError, match=f"^transformers .*{name}.*install a newer petune"
        ):
            raise_first([seam])
    assert seam.trouble() is None, "the change was taken back"


def test_a_change_is_planted_in_every_seam() -> None:
    planted = {seam_of(name).name for name, _ in PLANTED}
    left = {seam.name for seam in SEAMS.all} - planted
    assert left == (set() if HAS_GGUF else {seam_of("GgufConfig").name})


def test_nothing_is_loaded_on_what_has_moved(saved: Any, monkeypatch: Patch) -> None:
    monkeypatch.setattr(SEAMS, "checked", False)
    models_are_built_otherwise(monkeypatch)
    with pytest.raises(MovedError, match="_from_config"):
        from_pretrained(saved.llama)


def test_before_there_was_a_hook_bars_are_shown(monkeypatch: Patch) -> None:
    monkeypatch.delattr(chatter, "set_tqdm_hook", raising=False)
    monkeypatch.delattr(chatter, "_tqdm_hook", raising=False)
    assert seam_of("set_tqdm_hook").trouble() is None
    with hidden_bars():
        pass


def test_before_there_was_a_configuration_gguf_files_were_read_dense(
    monkeypatch: Patch,
) -> None:
    monkeypatch.setattr(transformers, "GgufConfig", None, raising=False)
    monkeypatch.setattr("petune.loading.host._has_gguf_quantizer", lambda: False)
    assert seam_of("GgufConfig").trouble() is None
    assert dense_gguf() == {}
