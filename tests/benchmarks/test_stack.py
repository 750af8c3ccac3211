"""`python -m benchmarks stack`: a table of whole blocks, and the launches and bytes of groups."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")
from benchmarks import stack
from benchmarks.show import main as show
from benchmarks.workload import RefusedError
from cotolora.backends.addmm import lora, stacked
from tests.support.repository import ROOT


def test_a_group_launches_and_moves_less_when_it_is_stacked():
    for name, layers in (("q, k and v", 3), ("gate and up", 2)):
        frozen, single, together, *others = stack.counted(name)
        # two GEMMs per layer, and an addition to the gradient of x for each layer but the first
        assert frozen["launches"] == 3 * layers - 1
        assert single["launches"] == 9 * layers - 1
        # 6 for each layer, two products for all, of which a third is dx's, and two concatenations
        assert together["launches"] == 5 * layers + 5
        assert frozen["bytes"] < together["bytes"] < single["bytes"]
        single, together = others[:2]
        assert together["bytes"] < single["bytes"], "under gates on a device"
        assert together["launches"] < single["launches"]


@pytest.mark.slow
def test_the_fused_kernels_read_x_once_for_a_group():
    code = "import json; from benchmarks import stack; print(json.dumps(stack.counted('q, k and v')))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = {row["contender"]: row for row in json.loads(process.stdout)}
    single, together = (rows[f"low_rank_gemm, {who}"] for who in (stack.SINGLE, stack.STACKED))
    # of each layer its product, and p and dB with their sum; dA of all with its sum, h, dx, two concatenations
    assert together["launches"] == 3 * 3 + 2 * 1 + 1 + 3 + 2
    # h and dA read x once, not three times; autograd's two sums read two dx and write a third, and of the vendor's two
    # products that add in their place each reads and writes dx, which a product must write in any case
    x = 2 * 8192 * 4096
    assert single["bytes"] - together["bytes"] == pytest.approx(8 * x, rel=0.02)
    for way in ("low_rank_gemm, device gates", "pre_expand"):
        single, together = (rows[f"{way}, {who}"]["bytes"] for who in (stack.SINGLE, stack.STACKED))
        assert together < single - 7 * x


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
