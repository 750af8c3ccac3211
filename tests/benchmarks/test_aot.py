"""Every kernel compiles within its budget for every GPU that has tiles. Needs no GPU.

The tests run `python -m benchmarks aot --quick`. It compiles each row of each table in bfloat16 and in float32 with
each precision: every kind of case for sm_90, and for other targets only the kind that usually takes the most registers.
CI has two versions of Triton. It compiles for sm_90 with the older one, which machines with that GPU have, and for the
other targets with the newer one. After a change to kernels or tiles, run it without --quick under each version; that
compiles three times as many cases.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from cotolora.kernels.tiles import TABLES, TMA_ARCHITECTURES, Tile
from tests.support.repository import ROOT

VERSION = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(VERSION is None, reason="triton is not installed"),
]

# the versions for which the tables were tuned; CI has both
FITTED = ("3.6.", "3.9.")
TARGETS = ("sm_90",) if (VERSION or "").startswith("3.6.") else ("sm_80", "sm_100", "gfx942")
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


def run(*arguments):
    """Runs a Python that compiles kernels, even if this one interprets them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def aot(tmp_path_factory):
    """The finished process and the JSON that it wrote."""
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    targets = (f"--target={target}" for target in TARGETS)
    process = run("-m", "benchmarks", "aot", "--quick", *targets, "--json", str(path))
    assert path.exists(), process.stderr
    return process, json.loads(path.read_text())


@pytest.fixture
def fitted():
    if not VERSION.startswith(FITTED):
        pytest.skip(f"the tables were tuned for Triton {FITTED}; {VERSION} may spill a few bytes or serialise wgmma")


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


@pytest.fixture
def results(aot, target):
    return [result for result in aot[1]["results"] if result["target"] == target]


def test_no_kernel_exceeds_its_budget(aot, fitted):
    process, written = aot
    assert [result for result in written["results"] if result["broken"]] == []
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[0] == f"triton {written['triton']}"


def test_everything_compiles_and_multiplies(aot):
    slow = ("spills", "serialized")
    broken = [(result, reason) for result in aot[1]["results"] for reason in result["broken"]]
    assert [one for one in broken if not any(word in one[1] for word in slow)] == []


KERNELS = {"one_pass_swapped": ("stacked", "finish"), "gram": ("gram", "sum_partials")}


def test_every_row_is_compiled(results, target):
    compiled = {(result["kernel"], result["tile"]) for result in results if result["rows"] == target}
    for family, table in TABLES.items():
        for t in (tile for row in table[target] for tile in row.tiles):
            sizes = (t.block_m, t.block_n, t.block_k) if isinstance(t, Tile) else (t.rows, t.columns)
            for kernel in KERNELS.get(family, (family,))[:1]:
                assert (kernel, f"{'x'.join(map(str, sizes))} w{t.num_warps} s{t.num_stages}") in compiled
    assert {name for name, _ in compiled} >= {kernel for kernels in KERNELS.values() for kernel in kernels}
    assert {result["dtype"] for result in results} >= {"bfloat16", "float32 ieee", "float32 tf32"}
    assert {result["dropout"] for result in results} == {result["scaled"] for result in results} == {True, False}
    if target == "sm_90":
        assert "float16" in {result["dtype"] for result in results}
        assert {result["gate"] for result in results} == {"none", "device", "rows"}
    assert {result["layout"] for result in results} == {"aligned", "odd", "ones"} | (
        {"aligned tma"} if target in TMA_ARCHITECTURES else set()
    )


def test_no_spills(results, fitted):
    assert [result for result in results if result["spill_bytes"] > 0] == []


def test_shared_memory_fits(results, target):
    assert 0 < max(result["shared_bytes"] for result in results) <= SHARED_LIMITS[target]


def test_tensor_cores(results, target):
    instruction = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}[target]
    # finish has 16 rows and the narrow tiles of sm_100 have few too, which only mma supports
    gemms = ("one_pass", "low_rank_gemm", "stacked")
    halves = [r for r in results if r["dtype"] in ("bfloat16", "float16") and r["kernel"] in gemms]
    assert [result for result in halves if not result["instructions"][instruction]] == []


def test_wgmmas_overlap(results, fitted):
    halves = [
        r for r in results if r["dtype"] in ("bfloat16", "float16") and r["kernel"] in ("one_pass", "low_rank_gemm")
    ]
    assert not any(result["serialized"] for result in halves)


@pytest.mark.skipif("sm_90" not in TARGETS, reason="CI compiles for sm_90 with Triton 3.6")
def test_a_gate_that_is_off_multiplies_only_by_the_weight(aot):
    """On sm_90 one wgmma covers 16 values of K, so the loop for a gate that is off must have exactly BLOCK_K / 16."""
    results = [r for r in aot[1]["results"] if r["target"] == "sm_90" and r["dtype"] == "bfloat16"]
    results = [r for r in results if r["kernel"] == "one_pass" and not r["dropout"] and not r["scaled"]]
    counts = {(r["rows"], r["tile"], r["rank"], r["layout"], r["gate"]): r["instructions"]["wgmma"] for r in results}
    always_on = [key for key in counts if key[-1] == "none"]
    assert always_on
    for key in always_on:
        block_k = int(key[1].split()[0].split("x")[2])
        assert counts[(*key[:-1], "device")] - counts[key] == block_k // 16


BROKEN = {
    "shared-memory": ("Tile(256, 256, 64, num_warps=8, num_stages=4)", "bytes of shared memory"),
    "spills": ("Tile(256, 256, 32, num_warps=4, num_stages=2)", "bytes of spills"),
    "no-wgmma": ("Tile(32, 64, 64)", "no wgmma"),
    "no-power-of-two": ("Tile(96, 64, 64)", "does not compile"),
}


def test_broken_budgets_are_reported():
    code = (
        "import json\n"
        "from benchmarks.aot import *\n"
        "operands = Operands(8192, 4096, 16, torch.bfloat16, 'device', 'aligned', False)\n"
        f"tiles = [{', '.join(tile for tile, _ in BROKEN.values())}]\n"
        "cases = [Case('one_pass', 'sm_90', 'sm_90', tile, 'bfloat16', operands, False) for tile in tiles]\n"
        "print(json.dumps([measure(case)[0].broken for case in cases]))"
    )
    process = run("-c", code)
    assert process.returncode == 0, process.stderr
    reported = dict(zip(BROKEN, json.loads(process.stdout.splitlines()[-1]), strict=True))
    for what, (_, reason) in BROKEN.items():
        assert any(reason in line for line in reported[what]), (what, reported[what])


def test_interpreting_is_refused(monkeypatch, capsys):
    from benchmarks.__main__ import main

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as raised:
        main(["aot"])
    assert raised.value.code == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
