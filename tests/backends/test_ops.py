"""The fused kernels as operators of torch: autograd, dropout, torch.compile, and fallback when a kernel fails."""

import json
import logging
import os

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cotolora
from cotolora import CoTo, CoToLoRALinear, coto_lora_linear, set_backend
from cotolora.backends import choice as dispatch
from tests.support.tolerance import assert_as_accurate_as_torch

pytest.importorskip("triton")

from cotolora.backends import cost, measured
from cotolora.backends.fused import lora as fused_lora
from cotolora.backends.fused import ops
from cotolora.backends.fused.lora import SWAPPED_ROWS, FusedLora
from cotolora.backends.types import NotPreparedError, Sizes
from cotolora.kernels.dropout import drawn_mask
from cotolora.variants import VARIANTS

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

LORA = VARIANTS["lora"]
FUSED = [f"triton:{form}" for form in LORA.fused]
SCALE, DROPOUT = 0.75, 0.3


def random(*sizes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(*size, generator=g) / size[-1] ** 0.5).to(dtype) for size in sizes]


def operands(m=20, k=33, n=24, r=5):
    return random((m, k), (n, k), (n,), (r, k), (n, r))


def gradients(y: Tensor, leaves, dy: Tensor):
    return torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("gate", [True, torch.tensor(1), torch.tensor([1, 0, 0, 1])], ids=["host", "device", "rows"])
def test_dropout_is_one_mask_forward_and_backward(gate, backend):
    x, weight, bias, a, b = (t.requires_grad_() for t in operands())
    torch.manual_seed(3)
    batch = x.view(4, 5, 33)
    y = coto_lora_linear(batch, weight, bias, a, b, scale=SCALE, gate=gate, dropout=DROPOUT, backend=backend)
    y = y.view(20, 24)
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    keep = drawn_mask(seed, 20, 33, DROPOUT)
    on = torch.as_tensor(gate).expand(4).repeat_interleave(5)[:, None] != 0 if gate is not True else True

    def exact(x, weight, bias, a, b):
        dropped = torch.where(keep, x, 0) / (1 - DROPOUT)
        return nn.functional.linear(x, weight, bias) + torch.as_tensor(on) * SCALE * (dropped @ a.T @ b.T)

    doubles = [t.detach().double().requires_grad_() for t in (x, weight, bias, a, b)]
    dy = random((20, 24), seed=1)[0]
    truth, same = exact(*doubles), exact(x, weight, bias, a, b)
    ours = (y, *gradients(y, (x, weight, bias, a, b), dy))
    torchs = (same, *gradients(same, (x, weight, bias, a, b), dy))
    for one, plain, true in zip(ours, torchs, (truth, *gradients(truth, doubles, dy.double())), strict=True):
        assert_as_accurate_as_torch(one, plain, true)


@pytest.mark.parametrize("backend", FUSED)
def test_dropout_draws_from_torchs_generator_and_stores_no_mask(backend):
    x, weight, bias, a, b = operands()
    a.requires_grad_()

    def run():
        return coto_lora_linear(x, weight, bias, a, b, scale=SCALE, dropout=DROPOUT, backend=backend)

    torch.manual_seed(0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(run(), first)
    assert max(t.numel() for t in saved if t.dtype in (torch.bool, torch.int64)) == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", FUSED)
def test_checkpointing_draws_the_same_mask_again(backend, use_reentrant):
    layer = CoToLoRALinear(12, 10, rank=3, dropout=0.5)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(7, 12, requires_grad=True)
    found = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        with set_backend(backend):
            call(x).square().sum().backward()
        found.append([t.grad.clone() for t in (x, layer.lora_a, layer.lora_b)])
        for t in (x, layer.lora_a, layer.lora_b):
            t.grad = None
    assert all(map(torch.equal, *found))


# tracing takes most of the time and does not depend on the kind of gate or on dropout, so only some cases trace
AS_REGISTERED = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED = (*AS_REGISTERED, "test_aot_dispatch_dynamic")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "dropout", "checks"),
    [
        pytest.param(None, 0.0, TRACED, id="none"),
        pytest.param(torch.tensor(1), DROPOUT, TRACED, id="device-dropout"),
        pytest.param(torch.tensor([1, 0]), 0.0, AS_REGISTERED, id="rows"),
        pytest.param(torch.tensor([1, 0]), DROPOUT, AS_REGISTERED, id="rows-dropout"),
    ],
)
def test_opcheck(gate, dropout, checks):
    x, weight, bias, a, b = operands(m=4, k=6, n=5, r=2)
    h, dy = random((4, 2), (4, 5))
    seed = torch.tensor(3) if dropout else None
    calls = {
        "one_pass": (x, weight, bias, a, b, gate, seed, SCALE, dropout),
        "pre_expand": (x, None, a, b, gate, seed, SCALE, dropout),
        "shrink": (x, a, gate, seed, SCALE, dropout),
        "low_rank_gemm": (x, weight, bias, h, b, gate, seed, dropout),
        "expand": (h, a, dy @ dy.new_ones(5, 6), gate, seed, dropout),
        "adapter_grads": (dy, x, h, b, gate, seed, SCALE, dropout, torch.float32, torch.float16),
        "gram": (x, h, gate, torch.float16),
        "row_norm": (weight, a, b, SCALE, None, bias, gate),
        "hira": (x, weight, bias, a, b, gate, seed, SCALE, dropout, True),
        "hira_grads": (dy, x, weight, a, b, gate, seed, SCALE, dropout, torch.float32, torch.float16),
    }
    assert set(calls) == set(ops.SCHEMAS)
    every = list(calls.items())
    for x_, h_, b_ in ((None, h, b), (x, None, b), (None, None, b), (None, h, None)):
        every.append(("adapter_grads", (dy, x_, h_, b_, gate, seed, SCALE, dropout, torch.float32, torch.float32)))
    if not dropout:
        every.append(("one_pass", (*calls["one_pass"], bias, True)))
        every.append(("low_rank_gemm", (*calls["low_rank_gemm"], None, bias, True)))
        scaling = (bias, bias.abs() + 1, random((4, 5))[0], torch.float32)
        every.append(("adapter_grads", (*calls["adapter_grads"], *scaling)))
    for name, arguments in every:
        torch.library.opcheck(getattr(torch.ops.cotolora, name).default, arguments, test_utils=checks)


class Counter:
    """A torch.compile backend that counts its graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, _):
        self.graphs += 1
        return module.forward


def blocks(depth: int, width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)))
    for layer in cotolora.inject(model, rank=2).values():
        nn.init.normal_(layer.lora_b, std=0.3)
    return model


def train_step(model, x):
    y = model(x)
    y.square().sum().backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return y.detach(), grads


def assert_same_step(compiled, plain, x):
    (y, grads), (y_plain, grads_plain) = train_step(compiled, x), train_step(plain, x)
    torch.testing.assert_close(y, y_plain)
    for ours, theirs in zip(grads, grads_plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
def test_a_layer_compiles_to_one_graph(backend, dropout):
    layer = CoToLoRALinear(6, 5, rank=2, dropout=dropout)
    nn.init.normal_(layer.lora_b)
    layer.gate = torch.tensor(1, dtype=torch.int32)
    x, counter = torch.randn(4, 6), Counter()
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with set_backend(backend):
        for value in (True, False, True):
            layer.gate = value
            torch.manual_seed(1)
            step = train_step(compiled, x)
            torch.manual_seed(1)
            torch.testing.assert_close(step, train_step(layer, x))
    assert counter.graphs == 1
    torch.compiler.reset()


# many layers only with addmm, because the interpreter takes long for every launch
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "depth"), [("triton", 6), ("addmm", 32)])
def test_layers_under_50_masks_are_one_graph(backend, depth):
    model = blocks(depth)
    coto = CoTo(model, total_steps=50, gates="device", seed=1)
    counter, x = Counter(), torch.randn(3, 6)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    masks = set()
    with set_backend(backend):
        for step in range(50):
            coto.set_step(step)
            masks.add(tuple(coto.mask.tolist()))
            if step % 24 == 0:
                assert_same_step(compiled, model, x)
            else:
                compiled(x)
    assert len(masks) > (30 if depth == 32 else 15)
    assert counter.graphs == 1
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_under_host_gates_are_at_most_4_graphs():
    model = blocks(6)
    coto = CoTo(model, total_steps=30, unit="layer", seed=1)
    counter, x = Counter(), torch.randn(3, 6)
    torch.compiler.reset()
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    with set_backend("triton"):
        for step in range(30):
            coto.set_step(step)
            train_step(model, x)
    assert 1 < counter.graphs <= 4
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_under_ddp_are_at_most_4_graphs(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = blocks(6)
        coto = CoTo(model, total_steps=30, unit="layer", seed=1)
        counter, x = Counter(), torch.randn(3, 6)
        torch.compiler.reset()
        for block in model:
            block.compile(backend=counter, fullgraph=True)
        parallel = nn.parallel.DistributedDataParallel(model)
        with set_backend("triton"):
            for step in range(30):
                coto.set_step(step)
                train_step(parallel, x)
        assert 1 < counter.graphs <= 4
    finally:
        torch.distributed.destroy_process_group()
        torch.compiler.reset()


def test_torch_func_takes_the_reference():
    x, weight, bias, a, b = operands()

    def loss(a):
        return coto_lora_linear(x, weight, bias, a, b, scale=SCALE).sum()

    with pytest.raises(RuntimeError, match=r"torch\.func transforms"), set_backend("triton"):
        torch.func.grad(loss)(a)
    leaf = a.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(a), leaf.grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", FUSED)
def test_gradients_under_vmap(backend):
    """Under vmap, tensors have no memory of their own."""
    x, weight, bias, a, b = operands()
    leaves = [t.requires_grad_() for t in (x, a, b)]
    y = coto_lora_linear(x, weight, bias, a, b, scale=SCALE, backend=backend)
    many = random((3, *y.shape))[0]
    each = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in many]
    at_once = torch.autograd.grad(y, leaves, many, is_grads_batched=True)
    for found, one_by_one in zip(at_once, zip(*each, strict=True), strict=True):
        assert torch.equal(found, torch.stack(one_by_one))


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
@pytest.mark.parametrize("backend", FUSED)
def test_a_trace_is_refused(backend):
    with set_backend(backend), pytest.raises(RuntimeError, match=r"torch\.jit\.trace need the reference"):
        torch.jit.trace(CoToLoRALinear(6, 4, rank=2), (torch.randn(5, 6),))


@pytest.mark.parametrize("backend", FUSED)
def test_a_layer_does_not_read_beyond_its_weight(backend):
    """Launchers take the number of columns from x, so x must be checked against the weight."""
    with set_backend(backend), pytest.raises(ValueError, match=r"x must be \[\.\.\., 6\]"):
        CoToLoRALinear(6, 4, rank=2)(torch.randn(5, 7))


# the choices of auto on a GPU


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes auto choose a fused kernel on a CPU, as the cost model might on a GPU."""
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "_unprepared", set())
    monkeypatch.setattr(dispatch, "plans", {})
    monkeypatch.setattr(dispatch, "_environment", None)
    auto = dispatch.auto
    monkeypatch.setattr(
        dispatch,
        "auto",
        lambda call, **_: auto(call) if dispatch._failed else ("triton:low_rank_gemm", "a model says so"),
    )


@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.usefixtures("on_gpu")
def test_a_kernel_that_cannot_run_is_replaced_and_logged_once(where, dropout, monkeypatch, caplog):
    leaves = [t.requires_grad_() for t in operands()]
    dy = random((20, 24), seed=1)[0]
    torch.manual_seed(2)
    y = coto_lora_linear(*leaves, scale=SCALE, dropout=dropout, backend="triton:low_rank_gemm")
    expected = (y, *gradients(y, leaves, dy))

    def broken(*args, **kwargs):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(FusedLora, where, broken)
    with caplog.at_level(logging.WARNING, logger="cotolora"):
        for _ in range(3):
            torch.manual_seed(2)
            y = coto_lora_linear(*leaves, scale=SCALE, dropout=dropout)
            found = (y, *gradients(y, leaves, dy))
            if where == "backward" or not dropout:  # a forward that fell back to addmm draws another mask
                for one, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(one, other)
            if where == "backward":
                break
    assert len(caplog.records) == 1
    assert "low_rank_gemm cannot run here" in caplog.text
    assert "out of resource: shared memory" in caplog.text
    with pytest.raises(RuntimeError, match="out of resource"):
        gradients(coto_lora_linear(*leaves, scale=SCALE, backend="triton:low_rank_gemm"), leaves, dy)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.usefixtures("on_gpu")
def test_a_capture_falls_back_to_addmm_for_kernels_not_launched_before(where, monkeypatch, caplog):
    leaves = [t.requires_grad_() for t in operands()]
    dy = random((20, 24), seed=1)[0]
    launched, launch = [], getattr(fused_lora, f"launch_{where}")

    def kept(only_prepared, *args):
        if only_prepared and not launched:
            raise NotPreparedError
        launched.append(args)
        return launch(only_prepared, *args)

    def both():
        y = coto_lora_linear(*leaves, scale=SCALE)
        return y, *gradients(y, leaves, dy)

    y = coto_lora_linear(*leaves, scale=SCALE, backend="addmm")
    by_addmm = (y, *gradients(y, leaves, dy))
    monkeypatch.setattr(fused_lora, f"launch_{where}", kept)
    monkeypatch.setattr(dispatch, "capturing", lambda call: True)
    with caplog.at_level(logging.WARNING, logger="cotolora"):
        for _ in range(2):
            for one, other in zip(both(), by_addmm, strict=True):
                torch.testing.assert_close(one, other)
    assert len(caplog.records) == 1
    assert "was not launched before this capture" in caplog.text
    assert not launched
    # kernels launched before, as in a warm-up, are captured; nothing counts as a failure
    monkeypatch.setattr(dispatch, "capturing", lambda call: False)
    dispatch.plans.clear()
    both()
    assert len(launched) == 1
    monkeypatch.setattr(dispatch, "capturing", lambda call: True)
    dispatch.plans.clear()
    both()
    assert len(launched) == 2


def test_auto_captured_makes_the_choice_of_a_capture(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda name, call: [])
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "_measured", lambda device: ())
    monkeypatch.setattr(dispatch, "capturing", lambda call: capturing)
    dispatch._cached_fastest.cache_clear()
    call, capturing = Sizes(16, 768, 768, 16).call(LORA), False
    assert dispatch.choose("auto", call) == "addmm"
    captured = dispatch.choose("auto:captured", call)
    assert captured.startswith("triton:")
    capturing = True
    assert dispatch.choose("auto", call) == captured
    dispatch._cached_fastest.cache_clear()


def test_drawn_mask_equals_the_mask_of_the_kernels():
    seed = torch.tensor(-(2**61) + 12345)
    x = torch.eye(32, 50).repeat(3, 1) + 1
    keep = drawn_mask(seed, 96, 50, DROPOUT)
    h = torch.ops.cotolora.shrink(x, torch.eye(50), None, seed, 1.0, DROPOUT)
    torch.testing.assert_close(h, torch.where(keep, x, 0) / (1 - DROPOUT))
    assert abs(keep.double().mean() - (1 - DROPOUT)) < 4 * (DROPOUT * (1 - DROPOUT) / keep.numel()) ** 0.5


# forms


def test_the_cost_model_chooses_a_fused_kernel_only_for_a_clear_win():
    for captured in (True, False):
        for m in (1, 64, 2048, 8192):
            for n, k in ((4096, 4096), (768, 768), (1024, 4096), (14336, 4096)):
                call, machine = Sizes(m, n, k, 16).call(LORA), cost.MACHINES["sm_90"]
                name, reason = dispatch.fastest(call, "sm_90", captured=captured)
                time = {
                    name: cost.seconds(backend.launches(call), 2, machine, captured=captured)
                    for name, backend in LORA.backends.items()
                }
                best = min(FUSED, key=time.get)
                assert name == (best if time["addmm"] >= 1.1 * time[best] else "addmm")
                assert "modelled, not measured" in reason
    assert fastest(16, 768, 768, 16)[0] == "addmm"
    assert fastest(16, 768, 768, 16, captured=True)[0] != "addmm"
    assert fastest(8192, 768, 768, 16, arch="generic", captured=True)[0] == "addmm"


def test_the_model_of_the_host():
    call, machine = Sizes(1, 64, 64, 16).call(LORA), cost.MACHINES["sm_90"]
    vendor, triton, fused = machine.vendor_launch, machine.triton_launch, machine.fused_host
    # such sizes take the device no time; forward and both
    wanted = {
        "addmm": (3 * vendor, 8 * vendor),
        "triton:low_rank_gemm": (2 * triton + fused, 7 * triton + 2 * fused),
        "triton:pre_expand": (vendor + triton + fused, 2 * vendor + 6 * triton + 2 * fused),
    }
    for name, times in wanted.items():
        launches = LORA.backends[name].launches(call)
        for backward, time in zip((False, True), times, strict=True):
            assert cost.seconds(launches, 2, machine, captured=False, backward=backward) == pytest.approx(time)
            assert cost.seconds(launches, 2, machine, captured=True, backward=backward) < time / 5


def fastest(*sizes, arch="sm_90", captured=False, **options):
    return dispatch.fastest(Sizes(*sizes).call(LORA), arch, captured=captured, **options)


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("m", [1, 16, 64, 512, 8192])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cost_model_fuses_neither_float32_nor_dropout_in_the_main_loop(variant, m, captured):
    sizes = Sizes(m, 4096, 4096, 16)
    float32, dropped = (sizes._replace(element_size=size).call(VARIANTS[variant]) for size in (4, 2))
    assert dispatch.fastest(float32, "sm_90", captured=captured)[0] == "addmm"
    dropped = dropped._replace(dropout=0.1)
    name, _ = dispatch.fastest(dropped, "sm_90", captured=captured)
    refused = any("dropout" in reason for reason in dispatch.why_not("triton", dropped))  # as DoRA's fused forms do
    assert m <= SWAPPED_ROWS or refused or name != "triton:one_pass"


ROW = {"m": 100, "n": 64, "k": 64, "rank": 8, "element_size": 2, "captured": False}


def test_a_measured_row_overrides_the_cost_model():
    table = ({**ROW, "seconds": {"addmm": 2.0, "pre_expand": 1.0}}, {**ROW, "m": 150, "seconds": {"addmm": 1.0}})
    name, reason = fastest(110, 64, 64, 8, table=table)
    assert name == "triton:pre_expand"
    assert "measured fastest" in reason
    assert fastest(140, 64, 64, 8, table=table)[0] == "addmm"
    for far in ((400, 64, 64, 8), (100, 64, 64, 8, 4)):
        assert "modelled" in fastest(*far, table=table)[1]
    assert "modelled" in fastest(100, 64, 64, 8, captured=True, table=table)[1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"rows": 3}',
        '{"rows": [{}]}',
        '{"rows": [null]}',
        json.dumps({"rows": [{**ROW, "m": "1", "seconds": {"addmm": 1.0}}]}),
        json.dumps({"rows": [{**ROW, "seconds": {"other": 1.0}}]}),
        json.dumps({"rows": [{**ROW, "seconds": {"addmm": float("nan")}}]}),
        json.dumps({"rows": [{**ROW, "seconds": {}}]}),
    ],
)
def test_a_damaged_table_is_ignored_with_one_log_line(text, tmp_path, caplog):
    path = tmp_path / "table.json"
    path.write_text(text)
    assert measured.load_table(path, {"addmm", *LORA.fused}) == ()
    assert len(caplog.records) == 1
    assert str(path) in caplog.text


def test_a_missing_table_is_not_logged(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = measured.cache_path("NVIDIA H200/../x")
    assert path.parent == tmp_path / "cotolora"
    assert measured.load_table(path, {"addmm"}) == ()
    assert caplog.records == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [16, 96])
@pytest.mark.parametrize("backend", FUSED)
def test_error_is_close_to_that_of_the_linear_alone(backend, m, dtype):
    """The relative Frobenius error is at most 1.05 times F.linear's, with an update a tenth the size of the base."""
    x, weight, bias = random((m, 64), (96, 64), (96,), dtype=dtype)
    if backend == "triton:pre_expand":
        bias = torch.zeros_like(bias)  # this backend rounds bias plus update before it adds the product
    a, b = random((8, 64), (96, 8), dtype=dtype, seed=1)
    base = nn.functional.linear(x.double(), weight.double(), bias.double())
    update = x.double() @ a.double().T @ b.double().T
    scale = 0.1 * (base.norm() / update.norm()).item()
    y = coto_lora_linear(x, weight, bias, a, b, scale=scale, backend=backend)
    alone = (nn.functional.linear(x, weight, bias).double() - base).norm() / base.norm()
    ours = (y.double() - (base + scale * update)).norm() / (base + scale * update).norm()
    assert ours <= 1.05 * alone
