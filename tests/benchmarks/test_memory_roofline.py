"""Saved and peak memory of a layer, and its time relative to the machine's roofline."""

import math
import shutil
import time

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from benchmarks import memory, report, roofline
from benchmarks.compare import Comparison
from benchmarks.contenders import FROZEN, OFF_BY_HOST, Adapted, Contender, named
from benchmarks.roofline import Rates
from benchmarks.shapes import Linear, three_linears
from benchmarks.workload import Workload
from cotolora.backends import cost
from cotolora.backends.cost import Machine
from cotolora.backends.types import Sizes
from cotolora.variants import VARIANTS

CPU, M, RANK = torch.device("cpu"), 24, 4
LINEARS = (*three_linears(16), Linear("again", 16, 16, "x0"))
ADDMM = next(contender for contender in named("lora") if contender.name == "ours addmm")


def measured(*contenders, dtype=torch.float32, linears=LINEARS, rank=RANK):
    found, refused = memory.measured(Workload(linears, M, rank, dtype, CPU), contenders)
    assert not refused
    return found if len(contenders) > 1 else found[contenders[0].name]


class Keeps(torch.autograd.Function):
    """A low-rank linear that also keeps x in float64, in the place that `how` gives."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, how):
        wide = x.double()
        ctx.scale, ctx.wide = scale, wide if how == "attribute" else None
        ctx.save_for_backward(x, weight, a, b, wide if how == "hooks" else None)
        return F.linear(x, weight, bias) + scale * (x @ a.T) @ b.T

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, _ = ctx.saved_tensors
        p = ctx.scale * dy @ b
        return dy @ weight + p @ a, None, None, p.T @ x, ctx.scale * dy.T @ (x @ a.T), None, None


def keeps(how):
    def run(*operands):
        return Keeps.apply(*operands, how)

    return Contender(f"keeps by {how}", lambda base, adapter: Adapted(base, adapter, run))


# memory


@pytest.mark.slow
def test_frozen_and_off_by_host_save_nothing():
    found = measured(FROZEN, OFF_BY_HOST)
    assert found[FROZEN.name] == found[OFF_BY_HOST.name]
    assert (found[FROZEN.name].saved, found[FROZEN.name].unseen, found[FROZEN.name].kinds) == (0, 0, "")


def test_the_peak_of_one_frozen_linear_is_y_and_dx():
    linear = (Linear("one", 32, 48, "x"),)
    assert measured(FROZEN, linears=linear).peak == 4 * M * (48 + 32)


def test_addmm_saves_only_h():
    found = measured(ADDMM)
    assert found.saved == len(LINEARS) * M * RANK * 4
    assert found.unseen == 0
    assert found.kinds == f"{len(LINEARS)} of float32 [{M}, {RANK}]"
    assert found.peak >= measured(FROZEN).peak + found.saved


def test_shared_memory_counts_once_and_views_of_operands_do_not_count():
    class Views(Keeps):
        @staticmethod
        def forward(ctx, x, weight, bias, a, b, scale):
            h = x @ a.T
            ctx.scale = scale
            ctx.save_for_backward(x, weight.T, a[1:], b.T, h[:1], h.T)
            ctx.factors = weight, a, b
            return F.linear(x, weight, bias) + scale * h @ b.T

        @staticmethod
        def backward(ctx, dy):
            (weight, a, b), x = ctx.factors, ctx.saved_tensors[0]
            p = ctx.scale * dy @ b
            return dy @ weight + p @ a, None, None, p.T @ x, ctx.scale * dy.T @ (x @ a.T), None

    views = Contender("views", lambda base, adapter: Adapted(base, adapter, Views.apply))
    found = measured(views)
    assert found.saved == len(LINEARS) * M * RANK * 4
    assert found.kinds == f"{len(LINEARS)} of float32 [{RANK}, {M}]"


def test_a_copy_of_x_in_another_dtype_is_named():
    found = measured(keeps("hooks"), linears=LINEARS[:1])
    assert found.saved == 8 * M * 16
    assert found.kinds == f"1 of x again in float64 [{M}, 16]"


@pytest.mark.slow
def test_peft_as_shipped_saves_a_float32_copy_of_x():
    pytest.importorskip("peft")
    from benchmarks.contenders import PEERS

    found = measured(FROZEN, PEERS[0], dtype=torch.bfloat16)["PEFT as shipped"]
    # two of the linears read the same x, and PEFT casts it once for each
    assert found.kinds.startswith(f"1 of x again in float32 [{M}, 64], 3 of x again in float32 [{M}, 16], ")
    assert found.saved >= 4 * M * (3 * 16 + 64)


def test_factors_in_the_dtype_of_x_are_named_though_transposed():
    reference = next(contender for contender in named("lora") if contender.name == "ours reference")
    found = measured(reference, dtype=torch.bfloat16, linears=(Linear("one", 32, 96, "x"),))
    h, a, b = f"bfloat16 [{M}, {RANK}]", f"A again in bfloat16 [32, {RANK}]", f"B again in bfloat16 [{RANK}, 96]"
    assert found.kinds == f"1 of {b}, 1 of {a}, 1 of {h}"
    assert found.saved == 2 * RANK * (M + 32 + 96)


def test_memory_hidden_from_the_hooks_is_reported():
    linear = (Linear("one", 64, 16, "x"),)
    found = measured(keeps("attribute"), linears=linear)
    assert (found.saved, found.unseen) == (0, 8 * M * 64)
    rows = memory.rows_of({"sly": found}, shape="one", rows=M, rank=RANK)
    assert memory.doubts(rows, "one") == ["one: sly keeps 12.3 kB that autograd's hooks do not see"]
    assert "0 B + 12.3 kB unseen" in memory.table(rows)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_memory_of_compiled_code_is_counted():
    linear = (Linear("one", 64, 32, "x"),)
    compiled = torch.compile(lambda x, w, bias, a, b, scale: F.linear(x, w, bias) + scale * (x @ a.T) @ b.T)
    found = measured(
        FROZEN, Contender("compiled", lambda base, adapter: Adapted(base, adapter, compiled)), linears=linear
    )
    assert found["compiled"].saved + found["compiled"].unseen >= 4 * M * RANK
    assert found["compiled"].unseen < memory.UNSEEN
    assert found["compiled"].peak > found[FROZEN.name].peak


def test_wrong_contenders_are_refused_and_not_measured():
    wrong = Contender(
        "wrong", lambda base, adapter: Adapted(base, adapter, lambda x, w, bias, *_: F.linear(x, w, bias))
    )
    found, refused = memory.measured(Workload(LINEARS, M, RANK, torch.float32, CPU), [FROZEN, wrong])
    assert list(found) == ["frozen"]
    assert "y is off by" in refused["wrong"] or "gives no" in refused["wrong"]


@pytest.mark.slow
def test_saving_memory_when_off_by_host_fails(monkeypatch, capsys):
    off = Contender(OFF_BY_HOST.name, ADDMM.build, context=ADDMM.context)
    arguments = ["--shapes", "three-64", "--rows", "8", "--rank", "2", "--device", "cpu"]
    monkeypatch.setattr(memory, "contenders_of", lambda options: [FROZEN, OFF_BY_HOST])
    assert memory.main(arguments) == 0
    assert "FAILED" not in capsys.readouterr().out
    monkeypatch.setattr(memory, "contenders_of", lambda options: [FROZEN, off])
    assert memory.main(arguments) == 1
    assert "FAILED: ours off by host gate saves 192 bytes more than frozen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (-1500, "-1.50 kB"), (37824, "37.8 kB"), (123456789, "123 MB")]
)
def test_amounts_have_three_digits(count, shown):
    assert memory.amount(count) == shown


# roofline

RATES = Rates(bandwidth=1e9, flops=1e12)


def test_the_floor_reads_and_writes_everything_once():
    sizes = Sizes(m=2, n=3, k=5, rank=1, element_size=2)
    x, w, y, a, b = 10, 15, 6, 5, 3
    # so small that only bytes count
    assert roofline.floor(sizes, RATES) == pytest.approx(
        2 * ((x + w + a + b + y) + (y + w + a + b + x + x + a + b)) / 1e9
    )
    slow = Rates(bandwidth=1e15, flops=1e6)
    # multiply-adds, forward: 30 for x Wᵀ, 10 for h, 6 for h Bᵀ; backward: 30 for dy W, 2 × 10 and 2 × 6 for A and B
    assert roofline.floor(sizes, slow) == pytest.approx(2 * ((30 + 10 + 6) + (30 + 2 * 10 + 2 * 6)) / 1e6)


def test_the_floor_takes_the_slower_of_bytes_and_flops_in_each_pass():
    sizes = Sizes(m=2, n=3, k=5, rank=1, element_size=2)
    even = Rates(bandwidth=78, flops=2 * 46)  # the forward's bytes and its FLOPs take one second each
    backward = max(2 * 57 / even.bandwidth, 2 * 62 / even.flops)
    assert roofline.floor(sizes, even) == pytest.approx(1 + backward)


@pytest.mark.parametrize("name", VARIANTS["lora"].backends)
def test_no_model_goes_below_the_floor(name):
    for dtype in (torch.bfloat16, torch.float32):
        machine = roofline.machine_of(Rates(4e12, 8e14), CPU, dtype)
        for m in (1, 64, 512, 8192):
            for n, k in ((4096, 4096), (768, 3072)):
                sizes = Sizes(m, n, k, 16, dtype.itemsize)
                # the cost model neglects the FLOPs of so small a rank
                launches = roofline.launches_of(f"ours {name}", sizes)
                took = cost.seconds(launches, sizes.element_size, machine, captured=True)
                assert took > 0.95 * roofline.floor(sizes, Rates(4e12, 8e14))


def test_the_model_has_the_rate_of_the_dtype():
    for dtype in (torch.bfloat16, torch.float32):
        machine = roofline.machine_of(Rates(1e30, 1e9), CPU, dtype)
        sizes = Sizes(64, 128, 256, 4, dtype.itemsize)
        took = cost.seconds(cost.frozen(sizes), sizes.element_size, machine, captured=True)
        assert took == pytest.approx(2 * 2 * 64 * 128 * 256 / 1e9, rel=0.01)


def test_rates_are_positive_and_finite_and_count_reads_and_writes():
    rates = roofline.rates(CPU, torch.float32, rounds=3, copied=1 << 24, square=128)
    assert 0 < rates.bandwidth < math.inf
    assert 0 < rates.flops < math.inf
    source, target = torch.ones(1 << 24, dtype=torch.uint8), torch.empty(1 << 24, dtype=torch.uint8)
    took = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        took.append(time.perf_counter() - start)
    # a busy machine may be slower than its best round, but not four times as fast
    assert rates.bandwidth < 4 * 2 * (1 << 24) / min(took)


def test_rows_hold_the_ratios_and_a_wrong_model_is_named():
    sizes, machine = Sizes(16, 64, 32, 4, 4), Machine(1e12, 1e9, gemm=1.0)
    model = cost.seconds(roofline.launches_of("ours addmm", sizes), 4, machine, captured=False)
    seconds = {"both": [3 * model] * 3, "forward": [model] * 3, "backward": [2 * model] * 3}
    (row,) = roofline.rows_of(Comparison("eager", {"ours addmm": seconds}), sizes, RATES, machine, "32 → 64")
    assert row["model_s"] == model
    assert row["floor_s"] == roofline.floor(sizes, RATES)
    assert row["measured_over_model"] == pytest.approx(3)
    assert row["measured_over_floor"] == pytest.approx(3 * model / row["floor_s"])
    assert "ours addmm" in roofline.wrong([row])[0]
    assert "32 → 64, rank 4, eager, 16 rows (3.00 times)" in roofline.wrong([row])[0]
    assert roofline.wrong([row | {"measured_over_model": 1.9}]) == []


# both


@pytest.fixture
def small(monkeypatch):
    """Measures rates on small operands, to keep the test short."""
    monkeypatch.setattr(roofline, "COPIED", {"cpu": 1 << 20})
    monkeypatch.setattr(roofline, "SQUARE", {"cpu": 64})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "told"),
    [
        (
            memory,
            ["--shapes", "three-64", "--peers", "unsloth", "lorafusion"],
            ["Unsloth's order", "not measured: LoRAFusion"],
        ),
        (
            roofline,
            ["--shapes", "8,32,48", "--rounds", "2", "--peers", "torchtune"],
            ["This machine: ", "ours addmm model", "ours addmm measured", "| torchtune's order measured", "32 → 48"],
        ),
    ],
)
def test_a_written_result_is_shown_as_it_was_printed(module, arguments, told, small, tmp_path, capsys, monkeypatch):
    path, drawn = tmp_path / "results.json", tmp_path / "results.png"
    all_of_them = memory.contenders_of
    # without the Triton backends, because the interpreter is slow
    monkeypatch.setattr(memory, "contenders_of", lambda o: [c for c in all_of_them(o) if "triton" not in c.name])
    arguments = [*arguments, "--rows", "8", "--rank", "2", "--device", "cpu", "--json", str(path), "--plot", str(drawn)]
    assert module.main(arguments) == 0
    printed = capsys.readouterr().out
    (result,) = report.read(path)
    assert printed == module.text(result) + "\n"
    assert printed.startswith(result.machine["device"])
    for words in told:
        assert words in printed
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert set(result.settings).isdisjoint({"minutes"} if module is roofline else {"mode", "rounds"})
    for row in result.rows:
        assert row.get("saved_bytes", 0) >= 0
        assert row.get("measured_s", 1) > 0


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (memory, ["--rows", "0"], "argument --rows: must be a positive integer; got '0'"),
        (memory, ["--shapes", "three-65"], "argument --shapes: invalid choice: 'three-65'"),
        (memory, ["--peers", "none", "peft"], "argument --peers: none excludes all others"),
        (memory, ["--mode", "eager"], "unrecognized arguments: --mode eager"),
        (memory, ["--device", "tpu"], "argument --device: must be cpu, cuda or cuda:N; got 'tpu'"),
        (memory, ["--json", "no/such/folder.json"], "argument --json: "),
        (roofline, ["--shapes", "1,2"], "argument --shapes: must be llama3-8b"),
        (roofline, ["--rank", "x"], "argument --rank: must be a positive integer; got 'x'"),
        (roofline, ["--device", "cpu", "--mode", "graph"], "argument --mode: graph needs --device cuda"),
        (roofline, ["--peers", "none", "peft"], "argument --peers: none excludes all others"),
        (roofline, ["--plot", "no/such/folder.png"], "argument --plot: "),
    ],
)
def test_bad_arguments_are_named(module, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
