"""Launches, bytes moved and bytes saved of a layer, counted by `python -m benchmarks launches`."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.contenders import COMPARED
from cotolora.backends.types import Sizes
from cotolora.variants import VARIANTS

pytest.importorskip("triton")
pytest.importorskip("peft")
from tests.support.repository import ROOT

pytestmark = pytest.mark.slow

SIZES = Sizes(8192, 4096, 4096, 16)
FUSED = [(variant, form) for variant in VARIANTS for form in VARIANTS[variant].fused]
fused = pytest.mark.parametrize(("variant", "form"), FUSED)


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """The counts of every contender at the default sizes, by variant and rows of x."""
    folder = tmp_path_factory.mktemp("launches")
    paths = {(v, rows): folder / f"{v}-{rows}.json" for v, rows in (("lora", 16), *((v, 8192) for v in COMPARED))}
    # one process for all, which imports everything only once
    every = [["--variant", v, "--rows", str(rows), "--json", str(path)] for (v, rows), path in paths.items()]
    process = run("-c", f"from benchmarks.launches import main\nfor arguments in {every}: assert main(arguments) == 0")
    assert process.returncode == 0, process.stderr
    return {case: json.loads(path.read_text())["counts"] for case, path in paths.items()}


def moved(count):
    return sum(kernel["bytes"] for kernel in count["forward"] + count["backward"])


@pytest.mark.parametrize("variant", COMPARED)
def test_frozen_and_off_launch_one_gemm_per_pass(variant, counts):
    frozen, off = counts[variant, 8192]["frozen"], counts[variant, 8192]["ours off"]
    assert len(frozen["forward"]) == len(frozen["backward"]) == 1
    # x, W, bias and y; dy, W and dx
    assert frozen["forward"][0]["bytes"] == 2 * (2 * 8192 * 4096 + 4096**2 + 4096)
    assert frozen["backward"][0]["bytes"] == 2 * (2 * 8192 * 4096 + 4096**2)
    assert off == frozen
    assert off["saved_bytes"] == 0


@fused
def test_fused_forms_launch_and_move_less_than_peft(variant, form, counts):
    found = counts[variant, 8192]
    ours = found[f"ours triton:{form}"]
    for name in ("PEFT as shipped", "PEFT, bf16 A and B", *(["Unsloth's order"] if variant == "lora" else [])):
        theirs = found[name]
        assert len(ours["forward"]) <= len(theirs["forward"])
        assert len(ours["backward"]) <= len(theirs["backward"])
        assert moved(ours) < moved(theirs)
    h, u = 2 * 8192 * 16, 2 * 8192 * 4096
    # DoRA also saves c and the norm, in float32
    assert ours["saved_bytes"] == {"lora": h, "dora": h + u + 2 * 4 * 4096, "hira": 0}[variant]
    assert ours["x_saved_as"] is None
    assert found["PEFT as shipped"]["x_saved_as"] == "float32"


def test_one_pass_is_one_launch_or_split_two(counts):
    def names(rows):
        return [kernel["name"] for kernel in counts["lora", rows]["ours triton:one_pass"]["forward"]]

    assert names(8192) == ["one_pass"]
    assert names(16) == ["stacked", "finish"]


@pytest.mark.parametrize(("variant", "form"), [("lora", "addmm"), *FUSED])
def test_the_cost_model_has_the_counted_launches(variant, form, counts):
    name = form if form == "addmm" else f"triton:{form}"
    modelled = VARIANTS[variant].backends[name].launches(SIZES.call(VARIANTS[variant]))[:2]
    counted = counts[variant, 8192][f"ours {name}"]
    for model, kernels in zip(modelled, (counted["forward"], counted["backward"]), strict=True):
        assert len(model) == len(kernels)
        # the cost model omits the partial sums of splits, and counts the operand that an in-place product also reads
        big = [(m.bytes, k["bytes"]) for m, k in zip(model, kernels, strict=True) if k["bytes"] > 50e6]
        assert all(0.7 < ours / theirs < 1.02 for ours, theirs in big), big


@pytest.mark.parametrize("variant", ["dora", "hira"])
def test_the_cost_model_of_addmm_has_the_counted_bytes(variant, counts):
    """The cost model omits launches that move few bytes and counts the launches over blocks of W as one."""
    modelled = VARIANTS[variant].addmm.launches(SIZES.call(VARIANTS[variant]))
    counted = counts[variant, 8192]["ours addmm"]
    for model, kernels in zip(modelled[:2], (counted["forward"], counted["backward"]), strict=True):
        assert 0.9 < sum(m.bytes for m in model) / sum(k["bytes"] for k in kernels) < 1.02


def test_impossible_sizes_are_refused(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from benchmarks.__main__ import main

    for arguments, message in (
        (["--rank", "300"], "--rank must be at most 256"),
        (["--rows", "0"], "--rows: must be a positive"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(["launches", *arguments])
        assert raised.value.code == 2
        assert message in capsys.readouterr().err
