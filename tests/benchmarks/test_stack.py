"""`python -m benchmarks stack`: a table of whole blocks, and what groups launch and move."""

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")
from benchmarks import stack
from benchmarks.show import main as show
from benchmarks.workload import RefusedError
from cotolora.backends.addmm import lora, stacked


def test_a_group_launches_and_moves_less_when_it_is_stacked():
    for name, layers in (("q, k and v", 3), ("gate and up", 2)):
        frozen, single, together = stack.counted(name)
        # a sum of the gradients of x for each layer but the first
        assert frozen["launches"] == 3 * layers - 1
        assert single["launches"] == 9 * layers - 1
        # 6 for each layer, two products for all, of which a third is dx's, and two concatenations
        assert together["launches"] == 5 * layers + 5
        assert frozen["bytes"] < together["bytes"] < single["bytes"]


def test_blocks_are_timed_and_shown_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lora, "_WIDE", 0)
    file = tmp_path / "stack.json"
    assert stack.main(["--widths", "64", "--rows", "16", "--rounds", "1", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "| llama |    64 |" in printed
    assert "| bert  |    64 |" in printed
    show([str(file)])
    assert capsys.readouterr().out.strip() == printed.strip()


def test_wrong_results_are_not_timed(monkeypatch):
    monkeypatch.setattr(lora, "_WIDE", 0)
    wrong = stacked.STACKED._replace(forward=lambda *args: stacked.STACKED.forward(*args[:-1], 2 * args[-1]))
    monkeypatch.setattr(lora, "STACKED", wrong)
    with pytest.raises(RefusedError, match="the error of llama, width 96, is"):
        stack.main(["--widths", "96", "--rows", "16", "--rounds", "1"])
