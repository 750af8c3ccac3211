"""The benchmark runner: its clock, its judge, its tables and files, and what it says when ours loses."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import clock, compare, contenders, gates, linear, report, show, sweep
from benchmarks.__main__ import COMMANDS
from benchmarks.compare import Comparison
from benchmarks.report import Result
from benchmarks.shapes import BLOCKS, Linear, distinct
from benchmarks.workload import Judge, RefusedError, Workload

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
ONE = (Linear("linear", 24, 16, "x", bias=True),)
MACHINE = {"device": "a CPU", "torch": "2", "triton": "3", "cotolora": "0 abc"}


def workload(**changes):
    return Workload(**{"linears": ONE, "rows": 8, "rank": 4, "dtype": torch.float32, "device": CPU} | changes)


# the clock


def test_sleeps_are_timed_as_long_as_they_are():
    clocks = {ms: clock.eager([partial(time.sleep, ms / 1e3)], CPU) for ms in (2, 6)}
    medians = {ms: clock.median(seconds).median for ms, seconds in clock.take_turns(clocks, 5).items()}
    for ms, took in medians.items():
        assert ms / 1e3 <= took < 1.5 * ms / 1e3
    assert 2 < medians[6] / medians[2] < 4


def test_a_short_call_is_repeated_and_its_copies_take_turns():
    seen = []
    took = clock.eager([partial(seen.append, copy) for copy in range(3)], CPU)()
    assert 100 < len(seen) <= 1002  # two to find out how long one takes
    assert seen[:6] == [0, 1, 2, 0, 1, 2]
    assert 0 < took < 1e-4


def test_everyone_has_a_turn_in_every_round_and_nobody_is_always_first():
    order = []

    def clock_of(name):
        return lambda: order.append(name) or 1.0

    seconds = clock.take_turns({name: clock_of(name) for name in "abc"}, 6)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 6)
    rounds = ["".join(order[i : i + 3]) for i in range(3, len(order), 3)]  # the first warms up
    assert rounds == ["abc", "bca", "cab"] * 2


def test_the_collector_runs_again_even_if_a_contender_raises():
    import gc

    with pytest.raises(ZeroDivisionError):
        clock.take_turns({"a": lambda: 1 / 0}, 1)
    assert gc.isenabled()


def test_median_and_percentiles():
    assert clock.median([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert clock.median([7.0]) == (7.0, 7.0, 7.0)


def test_ratios_are_of_the_same_round():
    # the machine slows down tenfold halfway: medians of each would say 1, the pairs say 2
    slow = Comparison("eager", {"frozen": {"both": [1, 1, 10, 10]}, "ours": {"both": [2, 2, 20, 20]}})
    assert slow.ratio("ours") == 2
    assert math.isnan(Comparison("eager", {"frozen": {"both": [-1.0]}, "ours": {"both": [1.0]}}).ratio("ours"))


# the judge


def right(base, adapter):
    return contenders.torchtune_order(base, adapter)


class Wrong(nn.Module):
    def __init__(self, base, adapter, fault):
        super().__init__()
        if fault == "scale":
            adapter = replace(adapter, scale=1.1 * adapter.scale)
        self.layer, self.fault = right(base, adapter), fault

    def forward(self, x):
        if self.fault == "raises":
            raise RuntimeError("out of\n  shared memory")
        if self.fault == "no dA":
            self.layer.lora_a.requires_grad_(False)
        y = self.layer(x.detach() if self.fault == "no dx" else x)
        return y * float("nan") if self.fault == "NaN" else y


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("scale", "y is off by"),
        ("NaN", "y is off by nan"),
        ("no dx", "gives no dx"),
        ("no dA", "trains 1 tensors, must be A and B"),
        ("raises", "RuntimeError: out of shared memory"),
    ],
)
def test_a_wrong_contender_is_refused_before_the_clock(fault, says, monkeypatch):
    wrong = contenders.Contender("wrong", lambda base, adapter: Wrong(base, adapter, fault))
    (found,) = compare.compare(workload(), [contenders.FROZEN, wrong, contenders.AUTO], ["eager"], 1)
    assert set(found.seconds) == {"frozen", "ours"}
    assert says in found.refused["wrong"]


@pytest.mark.parametrize("adapter", [True, False])
def test_one_that_ignores_the_gate_is_refused(adapter):
    ignores = contenders.Contender("ignores", partial(contenders.ours, gate=not adapter), adapter=adapter)
    with pytest.raises(RefusedError, match=r"is off by|gives no"):
        Judge(load := workload()).check(load.runner(ignores))


def test_what_cannot_be_made_is_refused_with_the_reason():
    def build(base, adapter):
        raise ImportError("No module named 'lorafusion'")

    with pytest.raises(RefusedError, match="ImportError: No module named 'lorafusion'"):
        workload().runner(contenders.Contender("absent", build))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_peer_and_every_gate_of_ours_is_right(dtype):
    pytest.importorskip("peft")
    right = [c for c in (*contenders.PEERS, contenders.PEFT_OFF) if c.peer not in ("lorafusion", "compile")]
    ours = [contenders.AUTO, contenders.NARROW, contenders.OFF_BY_HOST, contenders.ON_BY_DEVICE]
    load = workload(linears=BLOCKS["three-64"], dtype=dtype)
    judge = Judge(load)
    for contender in (contenders.FROZEN, *ours, *contenders.NAMED[:2], *contenders.OFF_BY_DEVICE[:3], *right):
        assert judge.check(load.runner(contender)) < 4, contender.name


def test_float32_factors_and_rounded_ones_are_equal():
    for adapter in workload(dtype=torch.bfloat16).copies[0].adapters:
        assert torch.equal(adapter.lora_a, adapter.lora_a.bfloat16().float())


def test_inputs_that_linears_share_are_shared():
    load = workload(linears=BLOCKS["vit-b"][:4])
    assert set(load.copies[0].inputs) == {"normed", "attended"}
    assert len(load.copies[0].bases) == 4
    assert load.copies[0].bases[0].weight is not load.copies[1].bases[0].weight


def test_a_chain_is_computed_as_one():
    load = workload(linears=BLOCKS["three-64"])
    copy = load.copies[0]
    assert set(copy.inputs) == {"x"}
    chain = nn.Sequential(*copy.bases)
    x = copy.inputs["x"].detach().clone().requires_grad_()
    y = chain(x)
    y.backward(*copy.dys)
    found = load.runner(contenders.FROZEN).results()
    assert len(found["y"]) == 3
    torch.testing.assert_close(found["y"][-1], y)
    torch.testing.assert_close(found["dx"], [x.grad])


# what is printed and written


def result(**changes):
    row = {
        "shape": "24 → 16", "rows": 8, "rank": 4, "mode": "eager", "contender": "frozen", "part": "both",
        "median_s": 1e-3, "p20_s": 9e-4, "p80_s": 2e-3, "over_frozen": 1.0, "error": 1.0,
    }  # fmt: skip
    rows = [row | {"part": part} for part in compare.PARTS]
    made = {"command": "linear", "machine": MACHINE, "settings": {"rank": [4]}, "rows": rows}
    return Result(**made | changes)


def test_the_first_line_is_the_machine_and_the_ratio_the_first_column():
    lines = sweep.text(result()).splitlines()
    assert lines[0] == "a CPU · torch 2 · triton 3 · cotolora 0 abc"
    assert lines[2] == "`python -m benchmarks linear`: rank 4"
    assert "### 24 → 16, 8 rows, rank 4, eager" in lines
    head, _, frozen = (line for line in lines if line.startswith("|"))
    assert [cell.strip() for cell in head.split("|")[1:5]] == ["over frozen", "forward", "backward", "both"]
    assert [cell.strip() for cell in frozen.split("|")[1:6]] == ["frozen", "1.00", "1.00", "1.00", "900 us–2 ms"]


def test_columns_line_up():
    lines = report.markdown(["name", "n"], [["a", "1.00"], ["longer", "12.00"]]).splitlines()
    assert lines == ["| name   |     n |", "|--------|------:|", "| a      |  1.00 |", "| longer | 12.00 |"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 us"), (math.nan, "-")]
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


def test_a_file_keeps_other_results_and_replaces_the_same(tmp_path):
    path = tmp_path / "r.json"
    report.write(path, result())
    report.write(path, result(settings={"rank": [8]}))
    report.write(path, result(notes=["again"]))
    report.write(path, result(command="block"))
    found = report.read(path)
    assert [(r.command, r.settings["rank"], r.notes) for r in found] == [
        ("linear", [8], []), ("linear", [4], ["again"]), ("block", [4], []),
    ]  # fmt: skip
    assert sweep.text(found[1]) == sweep.text(result(notes=["again"]))
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_not_measured_is_null_and_printed_as_a_dash(tmp_path):
    rows = [row | {"over_frozen": math.nan} for row in result().rows]
    report.write(tmp_path / "r.json", result(rows=rows))
    assert json.loads((tmp_path / "r.json").read_text())["results"][0]["rows"][0]["over_frozen"] is None
    (found,) = report.read(tmp_path / "r.json")
    assert "| frozen      |       - |" in sweep.text(found)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"command": 3}, "command must be a str; got 3"),
        ({"machine": {}}, "machine must name its device"),
        ({"rows": [{"a": [1]}]}, r"rows: a must be a text, a number, a boolean or null; got \[1\]"),
        ({"rows": [7]}, "rows must hold objects; got 7"),
        ({"refused": [{"contender": "x"}]}, "refused must name a contender and a reason"),
        ({"rows": []}, "rows and refused are both empty"),
    ],
)
def test_a_result_of_another_schema_is_refused(changes, says, tmp_path):
    content = {"schema": 1, "results": [vars(result()) | changes]}
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says):
        report.read(tmp_path / "r.json")


@pytest.mark.parametrize("content", ["[1]", "nonsense", '{"schema": 2, "results": []}'])
def test_a_file_of_something_else_stays(content, tmp_path, capsys):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(SystemExit):
        linear.main(["--shapes", "4,8,6", "--json", str(tmp_path / "r.json")])
    assert "argument --json" in capsys.readouterr().err
    assert (tmp_path / "r.json").read_text() == content


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    report.write(tmp_path / "r.json", result())
    before = (tmp_path / "r.json").read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        report.write(tmp_path / "r.json", result(command="block"))
    assert (tmp_path / "r.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


# where ours loses


def times(**both):
    return Comparison("eager", {name.replace("_", " "): {"both": [t] * 10} for name, t in both.items()})


def test_a_loss_is_printed_and_a_bad_choice_fails():
    lost = times(frozen=1.0, ours=2.0, ours_addmm=1.9, ours_reference=1.99, **{"Unsloth's order": 1.5})
    (chose, loses) = sweep.losses(lost, "here")
    assert chose == "here: ours chose worse than ours addmm: 1.05 of its time, forward and backward"
    assert loses == "here: ours loses to Unsloth's order: 1.33 of its time, forward and backward"
    options = type("Options", (), {"json": None, "plot": None})
    assert sweep.finish(result(notes=[chose]), options, print) == 1
    assert sweep.finish(result(notes=[loses]), options, print) == 0


def test_what_wins_is_not_printed():
    assert not sweep.losses(times(frozen=1.0, ours=1.02, ours_addmm=1.0, **{"Unsloth's order": 1.5}), "here")


def test_a_busy_machine_is_named():
    assert not sweep.noise(Comparison("eager", {"frozen": {"both": [1.0, 1.1, 1.0, 1.1]}}), "here")
    (line,) = sweep.noise(Comparison("eager", {"frozen": {"both": [1.0, 2.0, 1.0, 2.0]}}), "here")
    assert line.startswith("here: not to be relied on, the machine was busy")


# the commands


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command", [("linear", "--shapes", "8,24,16"), ("block", "--shapes", "three-64", "--rows", "4")], ids=lambda c: c[0]
)
def test_a_run_prints_writes_draws_and_shows_again(command, tmp_path):
    path, picture = tmp_path / "r.json", tmp_path / "p.png"
    done = run(
        *command, "--peers", "torchtune", "lorafusion", "--rounds", "2", "--json", str(path), "--plot", str(picture)
    )
    assert done.returncode == 0, done.stderr
    (found,) = report.read(path)
    assert found.command == command[0]
    names = {row["contender"] for row in found.rows}
    assert {"frozen", "ours", "ours addmm", "ours off by host gate", "torchtune's order"} <= names
    assert {r["contender"] for r in found.refused} >= {"LoRAFusion"}
    assert all(row["p20_s"] <= row["median_s"] <= row["p80_s"] for row in found.rows)
    assert f"torch {torch.__version__}" in done.stdout.splitlines()[0]
    assert "LoRAFusion" in done.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
    again = run("show", str(path))
    assert again.returncode == 0, again.stderr
    assert [line for line in again.stdout.splitlines() if line] == [line for line in done.stdout.splitlines() if line]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graphs_of_changing_gates():
    counted = {what: gates.graphs(what) for what in gates.COMPILED}
    assert counted["the model, device gates"] == 1
    assert counted["every block, host gates"] <= 4
    assert counted["the model, host gates"] == 8  # torch's limit, after which it stays eager


def test_every_command_can_be_called():
    usage = run().stdout
    for name in COMMANDS:
        assert f"  {name} " in usage
        assert callable(__import__(f"benchmarks.{name}", fromlist=["main"]).main)
    assert run("nonsense").returncode == 2


def test_minutes_stop_new_shapes_and_say_so(monkeypatch, capsys):
    ticks = iter(range(0, 10000, 40))
    monkeypatch.setattr(sweep.time, "monotonic", lambda: next(ticks))
    linear.main(["--shapes", "2,8,6", "3,8,6", "4,8,6", "--rounds", "1", "--peers", "none", "--minutes", "1"])
    out = capsys.readouterr().out
    assert "### 8 → 6, 2 rows" in out
    assert "### 8 → 6, 4 rows" not in out
    assert "stopped before 8 → 6, 3 rows, rank 8: 1 minutes are over" in out


def test_a_killed_run_keeps_what_it_had(tmp_path, monkeypatch):
    made = sweep.compare

    def killed(load, *rest):
        if load.rows == 3:
            raise KeyboardInterrupt
        return made(load, *rest)

    monkeypatch.setattr(sweep, "compare", killed)
    with pytest.raises(KeyboardInterrupt):
        linear.main(
            ["--shapes", "2,8,6", "3,8,6", "--rounds", "1", "--peers", "none", "--json", str(tmp_path / "r.json")]
        )
    (found,) = report.read(tmp_path / "r.json")
    assert {row["rows"] for row in found.rows} == {2}


def test_running_out_of_memory_leaves_a_shape_out(monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(sweep, "compare", full)
    assert linear.main(["--shapes", "2,8,6", "--peers", "none"]) == 1
    assert "not measured: all (8 → 6, 2 rows, rank 8): OutOfMemoryError: no more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named", "says"),
    [
        (["--device", "abacus"], "--device", "must be cpu, cuda or cuda:N; got 'abacus'"),
        (["--mode", "graph", "--device", "cpu"], "--mode", "a CPU has no CUDA graphs"),
        (["--peers", "none", "peft"], "--peers", "none goes with no other; got none peft"),
        (["--peers", "nobody"], "--peers", "'nobody'"),
        (["--rank", "0"], "--rank", "positive integer; got '0'"),
        (["--shapes", "1,2"], "--shapes", "got '1,2'"),
        (["--json", "no/such/folder.json"], "--json", "no/such is no folder"),
        (["--plot", "no/such/folder.png"], "--plot", "no/such is no folder"),
    ],
)
def test_bad_arguments_are_named(arguments, named, says, capsys):
    with pytest.raises(SystemExit) as stop:
        linear.main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert named in message
    assert says in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(capsys):
    with pytest.raises(SystemExit):
        linear.main(["--device", "cuda"])
    assert "finds 0 GPUs" in capsys.readouterr().err


def test_show_names_a_file_that_is_none(tmp_path, capsys):
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(SystemExit):
        show.main([str(tmp_path / "r.json")])
    assert "holds no results" in capsys.readouterr().err
    report.write(tmp_path / "o.json", result(command="dance"))
    with pytest.raises(SystemExit):
        show.main([str(tmp_path / "o.json")])
    assert "no command makes results of 'dance'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--minutes", "soon"), ("--only", "lunch"), ("--fast",)], ids=" ".join)
def test_the_gpu_script_names_bad_arguments(arguments, tmp_path):
    script = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), str(tmp_path / "out"), *arguments]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert not (tmp_path / "out").exists()


def test_blocks_have_the_published_parameters():
    # of the linears of one block, from the models' configurations
    counts = {name: sum(x.in_features * x.out_features for x in block) for name, block in BLOCKS.items()}
    assert counts["llama3-8b"] == 218_103_808
    assert counts["llama2-7b"] == 202_375_168
    assert counts["qwen2.5-7b"] == 233_046_016
    assert counts["vit-b"] == 12 * 768 * 768
    assert distinct("llama3-8b") == ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
