"""The host overhead of a layer, measured without a GPU by `python -m benchmarks host`."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton.backends.nvidia", reason="needs Triton with its backend for NVIDIA")
from benchmarks import host, host_model
from cotolora.variants import VARIANTS
from tests.support.repository import ROOT

pytestmark = [
    pytest.mark.skipif(host.compiler() is None, reason="needs a C compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of a GPU cannot be replaced"),
]


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_contender_is_timed_and_launched(tmp_path):
    backends = ("addmm", "triton:one_pass")
    few = ("--kinds", "lora", "--backends", *backends, "--rounds", "1", "--count", "5")
    text = run("-m", "benchmarks", "host", *few, "--json", str(tmp_path / "host.json"))
    rows = {row["name"]: row for row in json.loads((tmp_path / "host.json").read_text())["lora"]}
    ours = [f"ours {backend}, {dtype} A and B" for dtype in ("bf16", "f32") for backend in backends]
    assert list(rows) == ["frozen", host.PEFT, "ours off", *ours]
    assert all(name in text for name in rows)
    assert all(0 < row["forward"] < row["both"] for row in rows.values())
    # forward one_pass; backward project, gram, the sum of partials of each, and low_rank_gemm
    assert [row["launches"] for row in rows.values()] == [0, 0, 0, 0, 6, 0, 6]


def test_the_fit_finds_what_times_are_made_of():
    vendor, triton, fused = 28.0, 29.0, 64.0
    # launches of the vendor and of Triton in the forward, and in both
    launches = {"addmm": (3, 0, 8, 0), "triton:one_pass": (0, 1, 0, 6), "triton:pre_expand": (1, 1, 2, 6)}
    found = {kind: [] for kind in host_model.KINDS}
    for form, (*forward, v, t) in launches.items():
        of_forward, of_both = (n * (form != "addmm") * fused for n in (1, 2))
        times = forward[0] * vendor + forward[1] * triton + of_forward, v * vendor + t * triton + of_both
        found["lora"].append(host.Row(f"ours {form}, f32 A and B", *times, 1.0, t))
    found["lora"].append(host.Row("ours addmm, bf16 A and B", 1.0, 1.0, 1.0, 0))
    found["lora"].append(host.Row("frozen", 1.0, 1.0, 1.0, 0))
    made, ratios = host_model.fit(found)
    assert made == pytest.approx({"vendor_launch": vendor, "triton_launch": triton, "fused_host": fused})
    assert ratios == pytest.approx([1.0] * 6)


def test_every_kind_that_is_fitted_is_timed():
    assert host.KINDS.keys() >= host_model.KINDS
    assert {name for kind in host_model.KINDS for name in VARIANTS[kind].backends} == set(host.BACKENDS)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (("TRITON_INTERPRET", "1"), "unset TRITON_INTERPRET"),
        (("CC", ""), "needs a C compiler"),
    ],
)
def test_missing_requirements_are_named(setting, message, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(*setting)
    monkeypatch.setattr(host.shutil, "which", lambda name: None if setting[0] == "CC" else "cc")
    with pytest.raises(SystemExit) as raised:
        host.main([])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
