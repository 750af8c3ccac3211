"""The benchmark runner: timers, checks of results, tables, files, and the remarks when ours is slower."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import clock, compare, contenders, gates, linear, report, show, sweep
from benchmarks.__main__ import COMMANDS, main
from benchmarks.compare import Comparison
from benchmarks.report import Result
from benchmarks.shapes import BLOCKS, Linear, distinct, title
from benchmarks.workload import MAX_COPIES, Judge, RefusedError, Workload, cache_bytes
from tests.support.repository import ROOT

CPU = torch.device("cpu")
ONE = (Linear("linear", 24, 16, "x", bias=True),)
MACHINE = {"device": "a CPU", "torch": "2", "triton": "3", "cotolora": "0 abc"}


def workload(**changes):
    return Workload(**{"linears": ONE, "rows": 8, "rank": 4, "dtype": torch.float32, "device": CPU} | changes)


# timers


def test_the_timer_measures_sleeps():
    clocks = {ms: clock.eager([partial(time.sleep, ms / 1e3)], CPU) for ms in (20, 60)}
    medians = {ms: clock.median(seconds).median for ms, seconds in clock.take_turns(clocks, 3).items()}
    for ms, took in medians.items():
        assert ms / 1e3 <= took < 1.5 * ms / 1e3
    assert 2 < medians[60] / medians[20] < 4


def test_a_short_call_is_repeated_over_all_copies():
    seen = []
    took = clock.eager([partial(seen.append, copy) for copy in range(3)], CPU)()
    assert 100 < len(seen) <= 1002  # including two calls to estimate the time of one
    assert seen[:6] == [0, 1, 2, 0, 1, 2]
    assert 0 < took < 1e-4


def test_clocks_that_share_turns_never_reuse_each_others_copy():
    seen, turns = [], itertools.cycle(range(3))
    calls = [partial(seen.append, copy) for copy in range(3)]
    for clock_of in [clock.eager(calls, CPU, turns) for _ in range(2)]:
        clock_of()
        clock_of()
    assert seen == [i % 3 for i in range(len(seen))]


@pytest.mark.parametrize(
    ("sizes", "holds"), [(["32K", "1024K", "8M"], 8 << 20), (["big"], 32 << 20), ([], 32 << 20)], ids=str
)
def test_copies_fill_the_largest_cache_three_times(sizes, holds, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.workload.CACHES", tmp_path)
    for i, size in enumerate(sizes):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(f"{size}\n")
    assert cache_bytes(CPU) == holds
    load = workload(linears=(Linear("wide", 1024, 1024, "x"),), rows=1)
    assert 3 * holds <= load.bytes() * len(load.copies) < 3 * holds + load.bytes()
    assert len(workload().copies) == MAX_COPIES


def test_every_contender_runs_once_per_round_in_varying_order():
    order = []

    def clock_of(name):
        return lambda: order.append(name) or 1.0

    seconds = clock.take_turns({name: clock_of(name) for name in "abc"}, 12)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 12)
    rounds = ["".join(order[i : i + 3]) for i in range(3, len(order), 3)]  # without the first, a warm-up
    assert [sorted(r) for r in rounds] == [["a", "b", "c"]] * 12
    assert len({r[r.index("b") - 1 : r.index("b")] for r in rounds}) == 3  # after a, after c, first


def test_the_collector_runs_again_even_if_a_contender_raises():
    import gc

    with pytest.raises(ZeroDivisionError):
        clock.take_turns({"a": lambda: 1 / 0}, 1)
    assert gc.isenabled()


def test_median_and_percentiles():
    assert clock.median([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert clock.median([7.0]) == (7.0, 7.0, 7.0)


def test_ratios_are_of_the_same_round():
    # the machine slows down tenfold halfway through: the ratio of the medians would be 1, the paired ratio is 2
    slow = Comparison("eager", {"frozen": {"both": [1, 1, 10, 10]}, "ours": {"both": [2, 2, 20, 20]}})
    assert slow.ratio("ours") == 2
    assert math.isnan(Comparison("eager", {"frozen": {"both": [-1.0]}, "ours": {"both": [1.0]}}).ratio("ours"))


# checks of results


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
def test_a_wrong_contender_is_refused_before_timing(fault, says, monkeypatch):
    wrong = contenders.Contender("wrong", lambda base, adapter: Wrong(base, adapter, fault))
    (found,) = compare.compare(workload(), [contenders.FROZEN, wrong, contenders.AUTO], ["eager"], 1)
    assert set(found.seconds) == {"frozen", "ours"}
    assert says in found.refused["wrong"]


@pytest.mark.parametrize("adapter", [True, False])
def test_a_contender_that_ignores_the_gate_is_refused(adapter):
    ignores = contenders.Contender("ignores", partial(contenders.ours, gate=not adapter), adapter=adapter)
    with pytest.raises(RefusedError, match=r"is off by|gives no"):
        Judge(load := workload()).check(load.runner(ignores))


def test_a_contender_that_cannot_be_built_is_refused_with_the_reason():
    def build(base, adapter):
        raise ImportError("No module named 'lorafusion'")

    with pytest.raises(RefusedError, match="ImportError: No module named 'lorafusion'"):
        workload().runner(contenders.Contender("absent", build))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", sweep.COMPARED)
def test_every_peer_and_every_gate_of_ours_is_correct(variant, dtype):
    pytest.importorskip("peft")
    peers = contenders.chosen(["peft", "unsloth", "torchtune"], str(dtype)[6:], variant)
    ours = [contenders.AUTO, contenders.NARROW, contenders.OUR_LORA, contenders.OFF_BY_HOST, contenders.ON_BY_DEVICE]
    ours += [*contenders.named(variant)[:2], *contenders.off_by_device(variant)[:3]]
    load = workload(linears=BLOCKS["three-64"], dtype=dtype, variant=variant)
    judge = Judge(load)
    for contender in (contenders.FROZEN, contenders.PEFT_OFF, *ours, *peers):
        assert judge.check(load.runner(contender)) < 4, contender.name
    assert {c.peer for c in peers} == ({"peft", "unsloth", "torchtune"} if variant == "lora" else {"peft"})


@pytest.mark.parametrize(("variant", "pretends"), [("dora", "lora"), ("hira", "lora"), ("dora", "frozen length")])
def test_another_variant_is_refused(variant, pretends):
    def build(base, adapter):
        if pretends == "lora":
            return contenders.our_lora(base, adapter)
        return contenders.ours(base, replace(adapter, magnitude=base.weight.norm(dim=1)))

    load = workload(variant=variant)
    with pytest.raises(RefusedError, match=r"is off by|trains 2 tensors, must be A and B and m"):
        Judge(load).check(load.runner(contenders.Contender("pretends", build)))


def test_float32_factors_and_rounded_ones_are_equal():
    for adapter in workload(dtype=torch.bfloat16).copies[0].adapters:
        assert torch.equal(adapter.lora_a, adapter.lora_a.bfloat16().float())


def test_inputs_that_linears_share_are_shared():
    load = workload(linears=BLOCKS["vit-b"][:4])
    assert set(load.copies[0].inputs) == {"normed", "attended"}
    assert len(load.copies[0].bases) == 4
    assert load.copies[0].bases[0].weight is not load.copies[1].bases[0].weight


def test_chained_linears_match_a_sequential_model():
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


# printed and written results


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


def test_missing_values_are_null_and_printed_as_a_dash(tmp_path):
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
        ({"rows": [{"a": [1]}]}, r"rows: a must be a string, a number, a boolean or null; got \[1\]"),
        ({"rows": [7]}, "rows must hold objects; got 7"),
        ({"refused": [{"contender": "x"}]}, "refused must name a contender and a reason"),
        ({"rows": []}, "rows or refused must not be empty; both are"),
    ],
)
def test_a_result_of_another_schema_is_refused(changes, says, tmp_path):
    content = {"schema": 1, "results": [vars(result()) | changes]}
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says):
        report.read(tmp_path / "r.json")


@pytest.mark.parametrize("content", ["[1]", "nonsense", '{"schema": 2, "results": []}'])
def test_a_file_that_holds_no_results_is_not_overwritten(content, tmp_path, capsys):
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


# remarks when ours is slower


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


def test_a_win_is_not_printed():
    assert not sweep.losses(times(frozen=1.0, ours=1.02, ours_addmm=1.0, **{"Unsloth's order": 1.5}), "here")


def test_a_busy_machine_is_named():
    assert not sweep.noise(Comparison("eager", {"frozen": {"both": [1.0, 1.1, 1.0, 1.1]}}), "here")
    (line,) = sweep.noise(Comparison("eager", {"frozen": {"both": [1.0, 2.0, 1.0, 2.0]}}), "here")
    assert line.startswith("here: unreliable, the machine was busy")


# the commands


@pytest.mark.parametrize(
    "command", [("linear", "--shapes", "8,24,16"), ("block", "--shapes", "three-64", "--rows", "4")], ids=lambda c: c[0]
)
def test_a_run_prints_writes_draws_and_shows_again(command, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path, picture = tmp_path / "r.json", tmp_path / "p.png"
    peers = ["--peers", "torchtune", "lorafusion"]
    assert main([*command, *peers, "--rounds", "2", "--json", str(path), "--plot", str(picture)]) == 0
    done = capsys.readouterr().out
    (found,) = report.read(path)
    assert found.command == command[0]
    names = {row["contender"] for row in found.rows}
    assert {"frozen", "ours", "ours addmm", "ours off by host gate", "torchtune's order"} <= names
    assert {r["contender"] for r in found.refused} >= {"LoRAFusion"}
    assert all(row["p20_s"] <= row["median_s"] <= row["p80_s"] for row in found.rows)
    assert f"torch {torch.__version__}" in done.splitlines()[0]
    assert "LoRAFusion" in done
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main(["show", str(path)]) == 0
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if line] == [line for line in done.splitlines() if line]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graphs_of_changing_gates():
    counted = {what: gates.graphs(what) for what in gates.COMPILED}
    assert counted["the model, device gates"] == 1
    assert counted["every block, host gates"] <= 4
    assert counted["the model, host gates"] == 8  # torch's recompile limit, after which it runs eagerly


def test_every_command_can_be_called():
    command = [sys.executable, "-m", "benchmarks"]
    usage = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in COMMANDS:
        assert f"  {name} " in usage
        assert callable(__import__(f"benchmarks.{name}", fromlist=["main"]).main)
    assert main(["nonsense"]) == 2


def test_minutes_stop_new_shapes_and_say_so(monkeypatch, capsys):
    ticks = iter(range(0, 10000, 40))
    monkeypatch.setattr(sweep.time, "monotonic", lambda: next(ticks))
    linear.main(["--shapes", "2,8,6", "3,8,6", "4,8,6", "--rounds", "1", "--peers", "none", "--minutes", "1"])
    out = capsys.readouterr().out
    assert "### 8 → 6, 2 rows" in out
    assert "### 8 → 6, 4 rows" not in out
    assert "stopped before 8 → 6, 3 rows, rank 8: 1 minutes are over" in out


def test_a_killed_run_keeps_its_results(tmp_path, monkeypatch):
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


def test_running_out_of_memory_skips_a_shape(monkeypatch, capsys):
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
        (["--peers", "none", "peft"], "--peers", "none excludes all others; got none peft"),
        (["--peers", "nobody"], "--peers", "'nobody'"),
        (["--rank", "0"], "--rank", "positive integer; got '0'"),
        (["--shapes", "1,2"], "--shapes", "got '1,2'"),
        (["--json", "no/such/folder.json"], "--json", "no/such is not a folder"),
        (["--plot", "no/such/folder.png"], "--plot", "no/such is not a folder"),
        (["--plot", "p.nope"], "--plot", "must be a file that ends in .png, .pdf, .svg; got 'p.nope'"),
        (["--plot", "tests"], "--plot", "must be a file that ends in .png, .pdf, .svg; got 'tests'"),
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
    assert "finds 0 usable GPUs" in capsys.readouterr().err


def test_contenders_of_ours_are_chosen_by_name(capsys):
    asked = ["--shapes", "2,8,6", "--rounds", "1", "--peers", "none"]
    off = "ours addmm off by device gate"
    assert linear.main([*asked, "--contenders", "ours addmm", off]) == 0
    lines = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[2:] == ["frozen", "ours addmm", off]
    with pytest.raises(SystemExit):
        linear.main([*asked, "--contenders", "ours", "theirs"])
    message = capsys.readouterr().err
    assert "argument --contenders: must be among frozen, ours, ours reference" in message
    assert message.rstrip().endswith("got theirs")


def test_a_plot_without_matplotlib_is_refused_before_timing(monkeypatch, capsys):
    monkeypatch.setattr(report, "version_of", lambda module: "absent")
    for command, arguments in ((linear, ["--plot", "p.png"]), (show, ["f.json", "--plot", str(ROOT)])):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert "argument --plot: matplotlib is not installed" in capsys.readouterr().err


def test_gates_compare_only_with_peers_that_can_switch_off(capsys):
    with pytest.raises(SystemExit):
        gates.main(["--peers", "unsloth"])
    assert "argument --peers: invalid choice: 'unsloth'" in capsys.readouterr().err


@pytest.mark.slow
def test_every_committed_result_is_shown_in_brief_and_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = ROOT / "benchmarks" / "results" / "cpu.json"
    assert show.main([str(path), "--brief", "--plot", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    found = report.read(path)
    for result in found:
        assert result.command in out
        assert all(f"  - {note}" in out for note in result.notes)
    (block,) = (r for r in found if r.command == "block")
    main = {r["contender"]: r["over_frozen"] for r in block.rows if (r["shape"], r["part"]) == ("three-768", "both")}
    where = "  three-768 (768 → 768 → 3072 → 768), 394 rows, rank 8, eager: "
    assert where + " · ".join(f"{name} {ratio:.2f}" for name, ratio in main.items()) in out
    drawn = {picture.name for picture in tmp_path.iterdir()}
    commands = [r.command for r in found if r.rows and hasattr(show.made_by(r), "plot")]
    assert {"linear_cpu.png", "linear_cpu2.png", "block_cpu.png"} <= drawn
    assert len(drawn) == len(commands)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in tmp_path.iterdir())


def test_a_picture_of_ranks_has_ranks_on_its_axis(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    made, figure = [], report.figure
    monkeypatch.setattr(report, "figure", lambda *given, **named: made.append(figure(*given, **named)) or made[-1])
    rows = [row | {"rank": rank} for rank in (2, 8) for row in result().rows]
    linear.plot(result(rows=rows), tmp_path / "p.png")
    ((_, (axis,)),) = made
    assert (axis.get_xlabel(), axis.get_title()) == ("rank", "24 → 16, 8 rows, eager")
    assert list(axis.lines[0].get_xdata()) == [2, 8]


@pytest.mark.parametrize(("panels", "columns"), [(1, 1), (3, 3), (4, 2), (6, 3), (7, 3)])
def test_no_picture_is_wider_than_a_page(panels, columns):
    pytest.importorskip("matplotlib")
    made, axes = report.figure(panels)
    assert len(axes) == panels
    assert made.get_size_inches()[0] == 4 * columns <= report.WIDEST
    import matplotlib.pyplot as plt

    plt.close(made)


def test_titles_of_blocks():
    assert title("three-64") == "three-64 (64 → 64 → 256 → 64)"
    assert title("llama3-8b") == "llama3-8b (7 linears)"
    assert title("256 → 64") == "256 → 64"


def test_show_names_a_file_without_results(tmp_path, capsys):
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(SystemExit):
        show.main([str(tmp_path / "r.json")])
    assert "holds no results" in capsys.readouterr().err
    report.write(tmp_path / "o.json", result(command="dance"))
    with pytest.raises(SystemExit):
        show.main([str(tmp_path / "o.json")])
    assert "command must be one of aot, block, gates" in (err := capsys.readouterr().err)
    assert "got 'dance'" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--minutes", "soon"), "--minutes must be a positive number; got 'soon'"),
        (("--minutes",), "--minutes must be a positive number; got ''"),
        (("--only", "lunch"), "--only must be one of correctness tuning benchmarks gemm tests tune"),
        (("--fast",), "unknown option --fast"),
        (("again",), "at most one OUT is allowed; got"),
        pytest.param(
            (),
            "torch finds no GPU; --dry-run tests the script",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason=""),
        ),
    ],
)
def test_the_gpu_script_names_bad_arguments(arguments, says, tmp_path):
    script = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), str(tmp_path / "out"), *arguments]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_blocks_have_the_published_parameters():
    # parameters of the linears of one block, from the models' configurations
    counts = {name: sum(x.in_features * x.out_features for x in block) for name, block in BLOCKS.items()}
    assert counts["llama3-8b"] == 218_103_808
    assert counts["llama2-7b"] == 202_375_168
    assert counts["qwen2.5-7b"] == 233_046_016
    assert counts["vit-b"] == 12 * 768 * 768
    assert distinct("llama3-8b") == ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))


# a fake python3 that lacks the packages in ABSENT, fails at the part in FAILS and logs its other arguments to ASKED
PRETENDER = """#!/bin/bash
case "$*" in
    -c*find_spec*) for name in $ABSENT; do [[ "$*" != *"'$name'"* ]] || exit 1; done; exit 0 ;;
    -c*) echo 'a GPU'; exit 0 ;;
    *show*) echo 'in brief'; exit 0 ;;
esac
echo "$*" >> "$ASKED"
all="$*" json="${all##*--json }"
[[ "$all" != *--json* ]] || echo '{}' > "${json%% *}"
[[ "$*" != *" $FAILS "* ]] || { echo "it broke"; exit 3; }
[[ "$*" != *" tune "* ]] || echo "written: ${ASKED%/*}/table.json"
echo "last line of $*"
"""


@pytest.fixture
def on_gpu(tmp_path):
    """Runs the script with the fake python3; returns its output lines, its exit status and the logged arguments."""
    (python := tmp_path / "bin" / "python3").parent.mkdir()
    python.write_text(PRETENDER)
    python.chmod(0o755)
    (tmp_path / "table.json").write_text("measured")

    def run_it(*arguments, absent="", fails="-"):
        (asked := tmp_path / "asked").write_text("")
        given = {"PATH": f"{python.parent}:{os.environ['PATH']}", "ABSENT": absent, "FAILS": fails, "ASKED": str(asked)}
        command = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), str(tmp_path / "out"), *arguments]
        done = subprocess.run(command, env=os.environ | given, cwd=tmp_path, capture_output=True, text=True)
        return done.stdout.splitlines(), done.returncode, asked.read_text().splitlines()

    return run_it


PARTS = ("gemm", "tests", "tune", "linear", "block", "stack", "gates", "memory", "roofline", "train")


@pytest.mark.parametrize("dry", [True, False], ids=["dry", "on a GPU"])
def test_the_gpu_script_continues_after_a_part_fails(dry, on_gpu, tmp_path):
    lines, status, asked = on_gpu(*(["--dry-run"] if dry else []), fails="block")
    assert status == 1
    expected = list(PARTS) if dry else [*PARTS, "compiled"]
    assert len(asked) == len(expected)
    tail = lines[-len(expected) :]
    assert {line.partition(":")[0] for line in tail} == set(expected)
    failed = {line.partition(":")[0] for line in tail if not re.match(r"\w+: exit 0 after \d+s: last line of", line)}
    assert failed == ({"block"} if dry else {"block", "compiled"})
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert summary == lines[-len(summary) :]
    assert "in brief" in summary
    assert len(list((tmp_path / "out").iterdir())) <= 4  # and four pictures: the eight files of a run


@pytest.mark.parametrize("arguments", [(), ("--only", "tune")])
def test_the_gpu_script_keeps_the_table_of_tune(arguments, on_gpu, tmp_path):
    on_gpu(*arguments)
    assert (tmp_path / "out" / "tune.json").read_text() == "measured"


@pytest.mark.parametrize(
    ("group", "parts"),
    [
        ("correctness", ["gemm", "tests"]),
        ("tuning", ["tune"]),
        ("benchmarks", ["block", "linear", "stack", "gates", "roofline", "memory"]),
    ],
)
def test_the_gpu_script_runs_a_group_of_parts(group, parts, on_gpu):
    lines, status, _ = on_gpu("--only", group)
    run = [line.split(":")[0] for line in lines if re.match(r"\w+: exit 0", line)]
    assert status == 0
    assert run == (parts if group != "benchmarks" else [*parts, "train", "compiled"])
    limits = [int(found[1]) for line in lines if (found := re.match(r"=== \w+ \(at most (\d+)s\)", line))]
    assert limits[-1] > 500, "the last part must get all of the remaining time"


@pytest.mark.slow
def test_the_gpu_script_interrupts_a_part_that_times_out(tmp_path):
    # stands for pytest, which reports its failures when interrupted
    (python := tmp_path / "bin" / "python3").parent.mkdir()
    python.write_text("#!/bin/bash\n[[ $1 != -m ]] || { trap 'echo what has failed; exit 2' INT; sleep 60 & wait; }\n")
    python.chmod(0o755)
    script = (ROOT / "benchmarks" / "on_gpu.sh").read_text()
    assert "left=$((60 * minutes))" in script
    hurried = script.replace("left=$((60 * minutes))", "left=21").replace('cd "$(dirname "$0")/.."', f"cd {ROOT}")
    command = ["bash", "-c", hurried, "on_gpu.sh", str(tmp_path / "out"), "--only", "tests"]
    given = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert done.returncode == 1
    assert "tests: exit 124" in done.stdout
    assert "what has failed" in done.stdout


@pytest.mark.parametrize("part", PARTS)
def test_the_gpu_script_runs_one_part(part, on_gpu):
    lines, status, asked = on_gpu("--only", part, "--minutes", "4")
    assert (status, len(asked)) == (0, 1)
    assert lines[-1].startswith(f"{part}: exit 0")
    if part in ("linear", "block", "roofline", "train"):
        assert f"/out/{part}.png" in asked[0]


def test_the_gpu_script_first_compares_our_gemm_with_cublas(on_gpu):
    _, _, (first, *others) = on_gpu()
    plain, fused = "ours triton:low_rank_gemm off by device gate", "ours triton:low_rank_gemm"
    assert first.startswith("-m benchmarks linear ")
    assert f"--contenders {fused} {plain} --" in first
    known = [*contenders.ours_in_full("lora", "bfloat16"), *contenders.off_by_device("lora")]
    assert {plain, fused} <= {c.name for c in known}
    assert len([linear.checked(text) for text in first.partition("--shapes ")[2].split()]) == 6
    assert not any("--contenders" in line for line in others)


def test_the_gpu_script_needs_neither_matplotlib_nor_xdist(on_gpu):
    lines, status, asked = on_gpu(absent="matplotlib xdist")
    assert status == 0
    assert "no pictures: matplotlib is not installed" in lines
    assert not any("--plot" in line or " -n " in line for line in asked)
    assert any(" -n " in line for line in on_gpu()[2])


@pytest.mark.slow
def test_variants_are_timed_beside_pefts(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft", reason="compares with PEFT")
    from benchmarks import variants

    threads = torch.get_num_threads()
    monkeypatch.setattr(variants, "SIZES", ((16, 8),))
    path = tmp_path / "r.json"
    asked = ["--rounds", "1", "--threads", str(threads), "--clock", "process", "--json", str(path)]
    assert variants.main(asked) == 0
    text = capsys.readouterr().out
    for words in ("frozen", "ours lora", "PEFT dora", "ours dora", "PEFT hira", "ours hira", "64 → 16, 8 rows"):
        assert words in text
    assert show.main([str(path)]) == 0
    assert capsys.readouterr().out == text
    assert show.main([str(path), "--brief"]) == 0
    assert "hira, 16 → 16 → 64 → 16, 8 rows, rank 8: frozen 1.00 · ours lora " in capsys.readouterr().out

    # a contender with wrong results is not timed
    right = variants.ours

    def wrong(width, variant):
        model = right(width, variant)
        model[0].alpha *= 2
        return model

    monkeypatch.setattr(variants, "ours", wrong)
    with pytest.raises(AssertionError, match="not close"):
        variants.runners(16, 8, "dora")
