"""What a layer launches, moves and saves, as `python -m benchmarks launches` counts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cotolora.kernels.forms import FORMS, Sizes, launches

pytest.importorskip("triton")
pytest.importorskip("peft")
ROOT = Path(__file__).parent.parent


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "launches", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """By rows of x, what every contender does at the default sizes."""
    counted = {}
    for rows in (16, 8192):
        path = tmp_path_factory.mktemp("launches") / "counts.json"
        process = run("--rows", str(rows), "--json", str(path))
        assert process.returncode == 0, process.stderr
        counted[rows] = json.loads(path.read_text())["counts"]
    return counted


def moved(count):
    return sum(kernel["bytes"] for kernel in count["forward"] + count["backward"])


def test_frozen_and_off_are_one_product_each_way(counts):
    frozen, off = counts[8192]["frozen"], counts[8192]["ours off"]
    assert len(frozen["forward"]) == len(frozen["backward"]) == 1
    # x, W, bias and y; dy, W and dx
    assert frozen["forward"][0]["bytes"] == 2 * (2 * 8192 * 4096 + 4096**2 + 4096)
    assert frozen["backward"][0]["bytes"] == 2 * (2 * 8192 * 4096 + 4096**2)
    assert off == frozen
    assert off["saved_bytes"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_fused_forms_launch_and_move_less_than_peft(form, counts):
    ours = counts[8192][f"ours triton:{form}"]
    for name in ("PEFT as shipped", "PEFT, bf16 A and B", "Unsloth's order"):
        theirs = counts[8192][name]
        assert len(ours["forward"]) <= len(theirs["forward"])
        assert len(ours["backward"]) <= len(theirs["backward"])
        assert moved(ours) < moved(theirs)
    assert ours["saved_bytes"] == 2 * 8192 * 16  # h
    assert ours["x_saved_as"] is None
    assert counts[8192]["PEFT as shipped"]["x_saved_as"] == "float32"


def test_one_pass_is_one_launch_or_split_two(counts):
    def names(rows):
        return [kernel["name"] for kernel in counts[rows]["ours triton:one_pass"]["forward"]]

    assert names(8192) == ["one_pass"]
    assert names(16) == ["stacked", "finish"]


@pytest.mark.parametrize("form", ["addmm", *FORMS])
def test_the_model_launches_what_is_launched(form, counts):
    modelled = launches(form, Sizes(8192, 4096, 4096, 16))
    counted = counts[8192]["ours addmm" if form == "addmm" else f"ours triton:{form}"]
    for model, kernels in zip(modelled, (counted["forward"], counted["backward"]), strict=True):
        assert len(model) == len(kernels)
        # the model leaves out what splits write and read again, and counts what a product in place reads as well
        big = [(m.bytes, k["bytes"]) for m, k in zip(model, kernels, strict=True) if k["bytes"] > 50e6]
        assert all(0.7 < ours / theirs < 1.02 for ours, theirs in big), big


def test_sizes_that_cannot_be_are_refused():
    for arguments, message in (
        (["--rank", "300"], "--rank must be at most 256"),
        (["--rows", "0"], "--rows: must be a positive"),
    ):
        process = run(*arguments)
        assert process.returncode == 2
        assert message in process.stderr
