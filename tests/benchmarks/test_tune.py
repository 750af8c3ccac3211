"""The tuner on a CPU: the contenders that it measures and refuses, and the table that it writes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import report, shapes, show, sweep, tune
from cotolora.backends import choice, measured
from cotolora.backends.addmm import lora as addmm
from cotolora.backends.fused.common import has_triton
from cotolora.backends.types import Sizes
from cotolora.variants import VARIANTS
from tests.support.repository import ROOT

needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")
TINY = ("--dry-run", "--shapes", "4,8,6", "--rounds", "1", "--rank", "2")


LORA = VARIANTS["lora"]
FORMS = {"addmm", *LORA.fused}


class Faulty(addmm.LoraByAddmm):
    """The addmm backend under the name of a fused one, with a fault in one result."""

    def __init__(self, fault):
        self.fault = fault

    def forward(self, *args):
        if self.fault == "raises":
            raise RuntimeError("out of\nshared memory")
        y, saved = super().forward(*args)
        return (y + 1e-3 if self.fault == "y" else y), saved

    def always_on(self, call):
        return None

    def backward(self, *args):
        gradients = super().backward(*args)
        if self.fault in ("dx", "dA", "dB"):
            wrong = {"dx": gradients.x, "dA": gradients.a, "dB": gradients.b}[self.fault]
            wrong[-1, -1] += float("nan") if self.fault == "dB" else 1e-3
        return gradients


class Backends(dict):
    """The backends of LoRA, with fused ones replaced by `Faulty` as `by_form` says."""

    def __init__(self, by_form):
        super().__init__(LORA.backends)
        self.by_form = by_form

    def get(self, name, default=None):
        fused = name.startswith("triton:")
        return Faulty(self.by_form.get(name.removeprefix("triton:"))) if fused else super().get(name, default)


@pytest.fixture
def faults(monkeypatch):
    """The faults by fused backend. The others use addmm, so that the tests need not wait for the interpreter."""
    by_form = {}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(LORA, "backends", Backends(by_form))
    monkeypatch.setattr(choice, "plans", {})
    return by_form


def row(**changes):
    sizes = {"m": 4, "n": 6, "k": 8, "rank": 2, "element_size": 4, "captured": False}
    return sizes | {"seconds": {"addmm": 2.0, "pre_expand": 1.0}} | changes


MACHINE = {"device": "a GPU", "torch": "2", "triton": "3", "cotolora": "0"}


@pytest.mark.slow
@needs_triton
def test_dry_run_writes_a_table_that_choose_form_follows(tmp_path):
    out = tmp_path / "new" / "table.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "benchmarks", "tune", "--dry-run", "--out", str(out)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "not measured" not in process.stdout
    assert "shape" not in process.stderr, "there must be no progress bar without a terminal"
    assert f"torch {torch.__version__}" in process.stdout.splitlines()[0]
    table = measured.load_table(out, FORMS)
    assert [(r["m"], r["k"], r["n"], r["rank"]) for r in table] == [(16, 32, 48, 16), (80, 48, 32, 16)]
    for found in table:
        assert set(found["seconds"]) == FORMS
        sizes = Sizes(*(found[name] for name in ("m", "n", "k", "rank", "element_size")))
        name, reason = choice.fastest(sizes.call(LORA), "sm_90", captured=False, table=table)
        assert name.removeprefix("triton:") == min(found["seconds"], key=found["seconds"].get)
        assert "measured" in reason
    assert not (tmp_path / "cache").exists()
    assert [path.name for path in out.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize("fastest", sorted(FORMS))
def test_the_fastest_of_a_saved_row_is_chosen(fastest, tmp_path):
    seconds = {name: 1.0 if name == fastest else 2.0 for name in FORMS}
    tune.save(tmp_path / "t.json", MACHINE, [row(seconds=seconds, captured=True)])
    table = measured.load_table(tmp_path / "t.json", FORMS)
    name, _ = choice.fastest(Sizes(4, 6, 8, 2, 4).call(LORA), "sm_90", captured=True, table=table)
    assert name.removeprefix("triton:") == fastest


def test_merging_replaces_a_key_and_keeps_the_others(tmp_path):
    path, again = tmp_path / "t.json", row(seconds={"addmm": 9.0})
    others = [row(captured=True), row(rank=4), row(m=5), row(element_size=2)]
    tune.save(path, MACHINE, [row(), *others])
    tune.save(path, MACHINE | {"torch": "3"}, [again, row(n=7)])
    assert list(measured.load_table(path, FORMS)) == [again, *others, row(n=7)]
    assert {name: json.loads(path.read_text())[name] for name in MACHINE} == MACHINE | {"torch": "3"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_table(error, tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    tune.save(path, MACHINE, [row()])
    before = path.read_bytes()

    def fails(*_):
        raise error

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(error):
        tune.save(path, MACHINE, [row(m=5)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@needs_triton
@pytest.mark.parametrize("fault", ["y", "dx", "dA", "dB", "raises"])
def test_a_wrong_contender_is_refused_with_the_reason(fault, faults, tmp_path, capsys):
    faults["pre_expand"] = fault
    assert tune.main([*TINY, "--out", str(tmp_path / "t.json")]) == 0
    (row_,) = measured.load_table(tmp_path / "t.json", FORMS)
    assert set(row_["seconds"]) == {"addmm", "one_pass", "low_rank_gemm"}
    why = "RuntimeError: out of shared memory" if fault == "raises" else f"{fault} is off by"
    assert f"ours triton:pre_expand (8 → 6, 4 rows, rank 2, eager): {why}" in capsys.readouterr().out


@needs_triton
def test_peers_are_timed_on_request_and_never_chosen(faults, tmp_path, capsys):
    out, written = tmp_path / "t.json", tmp_path / "r.json"
    assert tune.main([*TINY, "--out", str(out), "--peers", "torchtune", "--json", str(written)]) == 0
    printed = capsys.readouterr().out
    (row_,) = measured.load_table(out, FORMS)
    assert set(row_["seconds"]) == FORMS
    (found,) = report.read(written)
    assert {row["contender"] for row in found.rows} >= {"frozen", "ours addmm", "torchtune's order"}
    assert show.main([str(written)]) == 0
    (again,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("4 × 8 → 6, rank 2, eager"))
    assert again in printed
    assert "torchtune's order" in again


@needs_triton
def test_no_table_is_written_if_all_contenders_are_wrong(faults, tmp_path, monkeypatch):
    faults |= dict.fromkeys(FORMS, "raises")
    for name in ("forward", "always_on"):
        monkeypatch.setattr(LORA.backends["addmm"], name, getattr(Faulty("raises"), name))
    assert tune.main([*TINY, "--out", str(tmp_path / "t.json")]) == 1
    assert not list(tmp_path.iterdir())


@needs_triton
def test_minutes_stop_new_shapes_and_keep_what_was_measured(faults, tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(sweep.time, "monotonic", lambda: next(clock))
    out = tmp_path / "t.json"
    # the run begins at 0 s; the shapes would start at 40, 80 and 120 s
    assert tune.main([*TINY, "--shapes", "5,8,6", "6,8,6", "--minutes", "1", "--out", str(out)]) == 0
    assert [r["m"] for r in measured.load_table(out, FORMS)] == [4]
    assert "stopped before 8 → 6, 5 rows, rank 2: 1 minutes are over" in capsys.readouterr().out


@pytest.mark.slow
@needs_triton
def test_rows_and_ranks_multiply_a_models_shapes_once(faults, tmp_path, monkeypatch):
    monkeypatch.setitem(
        shapes.BLOCKS,
        "vit-b",
        (shapes.Linear("a", 8, 6, "x"), shapes.Linear("b", 6, 8, "y"), shapes.Linear("c", 8, 6, "z")),
    )
    out = tmp_path / "t.json"
    arguments = ["--shapes", "vit-b", "--shapes", "2,8,6", "--rows", "2", "3", "--rank", "1", "--rank", "2"]
    assert tune.main(["--dry-run", "--rounds", "1", *arguments, "--dtype", "float16", "--out", str(out)]) == 0
    keys = [(r["m"], r["k"], r["n"], r["rank"], r["element_size"]) for r in measured.load_table(out, FORMS)]
    assert keys == [(m, k, n, r, 2) for k, n in ((8, 6), (6, 8)) for m in (2, 3) for r in (1, 2)]


@pytest.mark.parametrize(
    ("arguments", "named", "says"),
    [
        pytest.param(["--rows", "0"], "--rows", "positive integer; got '0'", id="no-rows"),
        pytest.param(["--rank", "four"], "--rank", "positive integer; got 'four'", id="no-number"),
        pytest.param(["--rounds", "-1"], "--rounds", "positive integer; got '-1'", id="negative"),
        pytest.param(["--minutes", "nan"], "--minutes", "positive number; got 'nan'", id="nan"),
        pytest.param(["--shapes", "gpt"], "--shapes", "llama3-8b, llama2-7b, qwen2.5-7b", id="no-such-model"),
        pytest.param(["--shapes", "1,2"], "--shapes", "got '1,2'", id="two-sizes"),
        pytest.param(["--shapes", "1,2,0"], "--shapes", "got '1,2,0'", id="empty-shape"),
        pytest.param(["--dtype", "float64"], "--dtype", "bfloat16", id="dtype"),
        pytest.param(["--device", "abacus"], "--device", "cuda:N; got 'abacus'", id="no-such-device"),
        pytest.param(["--device", "cpu"], "--device", "--dry-run", id="cpu"),
        pytest.param(["--dry-run", "--device", "cuda"], "--device", "got 'cuda'", id="dry-run-on-a-gpu"),
        pytest.param(["--dry-run"], "--dry-run", "--out", id="dry-run-into-the-cache"),
    ],
)
def test_bad_arguments_are_named(arguments, named, says, capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert named in message
    assert says in message


@needs_triton
@pytest.mark.parametrize(
    "content", ["notes", json.dumps({**MACHINE, "rows": [row()]})], ids=["no-table", "another-gpu"]
)
def test_a_file_that_is_not_a_table_of_this_device_is_not_overwritten(content, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(SystemExit):
        tune.main([*TINY, "--out", str(tmp_path / "t.json")])
    assert "argument --out" in capsys.readouterr().err
    assert (tmp_path / "t.json").read_text() == content


def test_the_dry_run_never_writes_where_cotolora_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        tune.main([*TINY, "--out", str(measured.cache_path("a GPU"))])
    assert "--out" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_named(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    message = capsys.readouterr().err
    assert "argument --device: must be a GPU" in message
    assert torch.__version__ in message


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs a CUDA device, and TRITON_INTERPRET unset",
)
def test_on_a_gpu_eager_and_graph_are_measured(tmp_path):
    out = tmp_path / "t.json"
    assert tune.main(["--shapes", "64,256,128", "--rounds", "2", "--out", str(out)]) == 0
    rows = measured.load_table(out, FORMS)
    assert [r["captured"] for r in rows] == [False, True]
    assert all(set(r["seconds"]) == FORMS for r in rows)
