"""DoRA and HiRA by the fused kernels: numbers, gates, gradients, and which calls they take."""

import logging

import pytest
import torch

pytest.importorskip("triton")

from cotolora import CoToLoRALinear, explain, set_backend
from cotolora.backends import choice as dispatch
from cotolora.backends import cost
from cotolora.backends.addmm import dora as addmm_dora
from cotolora.backends.types import Sizes
from cotolora.functional import coto_lora_linear
from cotolora.variants import VARIANTS
from tests.backends.test_ops import Counter, assert_same_step, train_step
from tests.support.tolerance import assert_as_accurate_as_torch
from tests.test_functional import SCALE, dy_for, operands
from tests.variants.test_variants import NAMES, apply, double, draw, run

pytestmark = pytest.mark.usefixtures("poison_empty")
invalid_values = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

FUSED = [(variant, f"triton:{form}") for variant in ("dora", "hira") for form in VARIANTS[variant].fused]
fused = pytest.mark.parametrize(("variant", "backend"), FUSED)
GATES = [
    pytest.param(True, id="host"),
    pytest.param(torch.tensor(1), id="device-on"),
    pytest.param(torch.tensor(0), id="device-off"),
    pytest.param(torch.tensor([1, 0, 1]), id="rows"),
]
RANKS = [pytest.param(rank, id=f"rank-{rank}") for rank in (1, 3, 8, 16, 64)]


def dy_of(named):
    shape, out, rank = named["x"].shape, *named["lora_b"].shape
    return dy_for(operands(shape, out, rank, dtype=named["x"].dtype))


@fused
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 8), (torch.float16, 8), (torch.float32, 40)], ids=str)
def test_as_accurate_as_the_reference(dtype, rank, gate, variant, backend):
    named = draw(variant, (3, 7, 21), 37, rank, dtype)
    dy = dy_of(named)
    ours = run(variant, named, dy, set(named), gate=gate, backend=backend)
    torchs = run(variant, named, dy, set(named), gate=gate, backend="reference")
    exact = run(variant, double(variant, named), dy.double(), set(named), gate=gate, backend="reference")
    for name in ours:
        assert_as_accurate_as_torch(ours[name], torchs[name], exact[name])


@fused
@pytest.mark.parametrize("rank", RANKS)
def test_every_rank(rank, variant, backend):
    named = draw(variant, (2, 20, 19), 36, rank, torch.float32)
    dy = dy_of(named)
    ours = run(variant, named, dy, set(named), backend=backend)
    exact = run(variant, double(variant, named), dy.double(), set(named), backend="reference")
    torchs = run(variant, named, dy, set(named), backend="reference")
    for name in ours:
        assert_as_accurate_as_torch(ours[name], torchs[name], exact[name])


@invalid_values
@fused
@pytest.mark.parametrize("gate", [torch.tensor(0), torch.tensor([0, 0, 0])], ids=["device", "rows"])
@pytest.mark.parametrize("poison", [float("inf"), float("nan")], ids=str)
def test_off_is_the_base_whatever_the_adapter_holds(poison, gate, variant, backend):
    named = draw(variant, (3, 2, 9), 7, 3, torch.float32)
    dy = dy_of(named)
    clean = run(variant, named, dy, set(named), gate=gate, backend=backend)
    for name in named.keys() - {"x", "weight", "bias"}:
        named[name] = torch.full_like(named[name], poison)
    spoiled = run(variant, named, dy, set(named), gate=gate, backend=backend)
    for name, t in spoiled.items():
        assert torch.equal(t, clean[name]), name
        if name in ("lora_a", "lora_b", "magnitude"):
            assert not t.any()


@fused
@pytest.mark.parametrize("gate", [True, torch.tensor([1, 0, 1])], ids=["host", "rows"])
def test_each_gradient_alone_is_the_one_among_all(gate, variant, backend):
    named = draw(variant, (3, 2, 9), 7, 3, torch.float32)
    dy = dy_of(named)
    together = run(variant, named, dy, set(NAMES[variant]), gate=gate, backend=backend)
    for name in NAMES[variant]:
        alone = run(variant, named, dy, {name}, gate=gate, backend=backend)
        assert torch.equal(alone[name], together[name]), name


@fused
def test_strides_do_not_matter(variant, backend):
    named = draw(variant, (3, 4, 9), 7, 3, torch.float32)
    dy = dy_of(named)
    expected = run(variant, named, dy, set(named), backend=backend)
    for name, t in named.items():
        apart = torch.full((*t.shape, 2), float("nan"))[..., 0].copy_(t)
        views = {**named, name: apart if t.dim() < 2 else apart.mT.contiguous().mT}
        x, *others = (views[n] for n in NAMES[variant][:5])
        magnitude = {"magnitude": views["magnitude"]} if variant == "dora" else {}
        y = coto_lora_linear(x, *others, scale=SCALE, variant=variant, backend=backend, **magnitude)
        assert torch.equal(y, expected["y"]), name


@pytest.mark.parametrize("gate", [True, torch.tensor([1, 0, 1])], ids=["host", "rows"])
def test_dropout_of_hira_is_one_mask_forward_and_backward(gate):
    named = draw("hira", (3, 4, 24), 7, 3, torch.float32)
    dy, leaves = dy_of(named), ("x", "lora_a", "lora_b")

    def drawn(**changed):
        torch.manual_seed(3)
        values = {**named, **changed}
        return run("hira", values, dy, set(leaves), gate=gate, dropout=0.4, backend="triton:hira")

    made = drawn()
    for name in leaves:
        # y is affine in each: where nothing of it is left, what it contributed is gone, and no more
        gone = drawn(**{name: torch.zeros_like(named[name])})["y"]
        torch.testing.assert_close(
            ((made["y"] - gone) * dy).sum(), (named[name] * made[name]).sum(), rtol=1e-4, atol=1e-3
        )


def test_a_norm_that_is_given_is_used():
    named = draw("dora", (3, 2, 9), 7, 3, torch.float32)
    factors = [named[k] for k in ("weight", "lora_a", "lora_b")]
    for form in ("one_pass", "low_rank_gemm"):
        norm = VARIANTS["dora"].fused[form].row_norms(*factors, SCALE)
        torch.testing.assert_close(norm, addmm_dora.row_norms(*factors, SCALE))
        y = apply("dora", named, backend=f"triton:{form}")
        assert torch.equal(apply("dora", named, norm, backend=f"triton:{form}"), y)
        doubled = apply("dora", named, 2 * norm, backend=f"triton:{form}") - named["bias"]
        torch.testing.assert_close(2 * doubled, y - named["bias"])


def test_a_row_of_zeros_has_no_direction():
    named = draw("dora", (3, 2, 9), 7, 3, torch.float32)
    named["weight"][2], named["lora_b"][2] = 0, 0
    made = run("dora", named, dy_of(named), {"magnitude", "lora_b"}, backend="triton:one_pass")
    assert torch.equal(made["y"][..., 2], named["bias"][2].expand(3, 2))
    assert made["magnitude"][2] == 0
    assert made["magnitude"].count_nonzero() == 6
    # its c is 1
    expected = run("dora", named, dy_of(named), {"lora_b"}, backend="reference")
    assert expected["lora_b"][2].all()
    torch.testing.assert_close(made["lora_b"], expected["lora_b"])


def test_what_the_fused_forms_refuse():
    named = draw("dora", (3, 2, 9), 7, 3, torch.float32)
    for backend in ("triton", "triton:one_pass"):
        with pytest.raises(RuntimeError, match="DoRA with dropout takes a second product"):
            coto_lora_linear(**named, scale=SCALE, variant="dora", dropout=0.1, backend=backend)
    with pytest.raises(RuntimeError, match=r"variant 'dora' are one_pass, low_rank_gemm; got 'pre_expand'"):
        coto_lora_linear(**named, scale=SCALE, variant="dora", backend="triton:pre_expand")
    del named["magnitude"]
    with pytest.raises(RuntimeError, match=r"variant 'lora' are .*; got 'hira'"):
        coto_lora_linear(**named, scale=SCALE, backend="triton:hira")


@fused
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_vendor_gemms_take_over_from_a_kernel_that_cannot_run(where, variant, backend, monkeypatch, caplog):
    named = draw(variant, (3, 2, 9), 7, 3, torch.float32)
    dy, gate = dy_of(named), torch.tensor([1, 0, 1])
    expected = run(variant, named, dy, set(named), gate=gate, backend=backend)
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "plans", {})
    monkeypatch.setattr(dispatch, "_environment", None)
    monkeypatch.setattr(dispatch, "auto", lambda call: (backend, "a model says so"))

    def broken(*args, **kwargs):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(type(VARIANTS[variant].backends[backend]), where, broken)
    with caplog.at_level(logging.WARNING, logger="cotolora"):
        found = run(variant, named, dy, set(named), gate=gate)
    assert "out of resource: shared memory" in caplog.text
    for name, t in found.items():
        torch.testing.assert_close(t, expected[name], msg=name)


def layer_of(variant, gate):
    torch.manual_seed(0)
    layer = CoToLoRALinear(6, 5, rank=2, variant=variant)
    layer.gate = gate
    with torch.no_grad():
        for parameter in layer.adapter_parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@fused
@pytest.mark.parametrize("gate", [True, torch.tensor(0), torch.tensor([1, 0, 1, 1])], ids=["host", "off", "rows"])
def test_a_layer_trains_as_by_the_reference(gate, variant, backend):
    """Several steps, which change what the norm is of; then eval() without gradients, which keeps it."""
    ends = []
    for name in ("reference", backend):
        layer, x = layer_of(variant, gate), torch.linspace(-1, 1, 4 * 3 * 6).view(4, 3, 6)
        optimizer = torch.optim.SGD(layer.adapter_parameters, lr=0.1)
        with set_backend(name):
            made = []
            for _ in range(3):
                made.append(layer(x))
                made[-1].square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            layer.eval()
            with torch.no_grad():
                made += [layer(x) for _ in range(2)]
        ends.append([*layer.adapter_parameters, *made])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs)


@fused
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_layer_compiles_to_one_graph(variant, backend):
    layer, x, counter = layer_of(variant, torch.tensor(1, dtype=torch.int32)), torch.randn(4, 6), Counter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with set_backend(backend):
        for value in (True, False, True):
            layer.gate = value
            assert_same_step(compiled, layer, x)
            y, grads = train_step(compiled, x)
            with set_backend("reference"):
                wanted_y, wanted = train_step(layer, x)
            torch.testing.assert_close(y, wanted_y)
            torch.testing.assert_close([g for g in grads if g is not None], [g for g in wanted if g is not None])
            assert all(g.any() == value for g in grads if g is not None)
    assert counter.graphs == 1


def test_the_model_of_the_variants():
    sizes = Sizes(8192, 4096, 4096, 16)
    for variant in VARIANTS.values():
        call = sizes.call(variant)
        for captured in (True, False):
            time = dispatch.modelled(call, "sm_90", captured)
            assert time["addmm"] == cost.seconds(
                variant.addmm.launches(call), 2, cost.MACHINES["sm_90"], captured=captured
            )
            best = min(time.keys() - {"addmm"}, key=time.get)
            name, _ = dispatch.fastest(call, "sm_90", captured=captured)
            assert name == (best if time["addmm"] >= 1.1 * time[best] else "addmm")
    dora, lora = (VARIANTS[name] for name in ("dora", "lora"))
    forward, backward, _ = dora.fused["low_rank_gemm"].launches(sizes.call(dora))
    assert [launch.kernel for launch in forward] == ["row_norm", "shrink", "low_rank_gemm"]
    plain_forward, plain_backward, _ = lora.fused["low_rank_gemm"].launches(sizes.call(lora))
    moved = [sum(launch.bytes for launch in of) for of in (forward, plain_forward, backward, plain_backward)]
    # W once more for its norm, and u once in each direction
    assert moved[0] - moved[1] == sizes.bytes("w", "a", "b", "u")
    assert moved[2] - moved[3] == sizes.bytes("u")


def test_explain_tells_the_variants_apart():
    options = {"backend": "triton", "variant": "dora"}
    plan = explain((8192, 64, 64, 8), **options)
    assert plan.form in VARIANTS["dora"].fused
    assert plan.forward[0].kernel == "row_norm"
    assert plan.saved_bytes == 4 * 8192 * (8 + 64) + 8 * 64
    assert "DoRA with dropout" in explain((8192, 64, 64, 8), dropout=0.1, **options).reason
    assert explain((8192, 64, 64, 8), backend="triton", variant="hira").saved_bytes == 0
    with pytest.raises(ValueError, match=r"variant must be one of .* got 'nola'"):
        explain((8192, 64, 64, 8), variant="nola")
