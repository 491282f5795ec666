"""The page that sets petune's methods beside PEFT's."""

from pathlib import Path

import pytest

from petune_bench import parity

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_method_in_both_is_the_same() -> None:
    for family in parity.FAMILIES:
        cell = parity.compare("lora", family)
        assert cell.refused is None
        assert cell.logits < 1e-5
        assert cell.gradients is not None
        assert cell.gradients < 1e-5
        assert cell.ours == cell.theirs > 0


def test_an_adapter_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import petune

    load = petune.load

    def spoilt(*args: object) -> petune.Tuning:
        tuning = load(*args)
        tuning.parameters()[0].data *= 1.1
        return tuning

    monkeypatch.setattr(petune, "load", spoilt)
    assert parity.compare("lora", "llama").logits > 1e-4


def test_the_page() -> None:
    text = parity.page(["oft"])
    row = next(line for line in text.splitlines() if line.startswith("| oft "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == "–"  # GPT-2's Conv1D
    assert all(float(cells[i]) < 1e-5 for i in (1, 3, 4, 5))
    assert cells[6] == cells[7]
    assert int(cells[9].replace(",", "")) > 5 * sum(map(int, cells[8].split(" + ")))
    assert "- oft on gpt2: PEFT: Target module Conv1D" in text


def test_the_published_page_has_every_method() -> None:
    text = (Path(__file__).parents[2] / "docs/parity.md").read_text()
    assert not [method for method in parity.twins() if f"\n| {method} |" not in text]
