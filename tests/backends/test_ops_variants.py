"""DoRA and HiRA with the fused kernels: results, gates, gradients, and the calls that they support."""

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
from tests.test_functional import SCALE, dy_for, operands
from tests.variants.test_variants import apply, draw, run

pytestmark = pytest.mark.usefixtures("poison_empty")
invalid_values = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

FUSED = [(variant, f"triton:{form}") for variant in ("dora", "hira") for form in VARIANTS[variant].fused]
fused = pytest.mark.parametrize(("variant", "backend"), FUSED)


def dy_of(named):
    shape, out, rank = named["x"].shape, *named["lora_b"].shape
    return dy_for(operands(shape, out, rank, dtype=named["x"].dtype))


def test_a_given_norm_is_used():
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
    # where the norm is zero, c is 1
    expected = run("dora", named, dy_of(named), {"lora_b"}, backend="reference")
    assert expected["lora_b"][2].all()
    torch.testing.assert_close(made["lora_b"], expected["lora_b"])


def test_calls_that_the_fused_kernels_refuse():
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
def test_addmm_replaces_a_kernel_that_cannot_run(where, variant, backend, monkeypatch, caplog):
    named = draw(variant, (3, 2, 9), 7, 3, torch.float32)
    dy, gate = dy_of(named), torch.tensor([1, 0, 1])
    expected = run(variant, named, dy, set(named), gate=gate, backend=backend)
    monkeypatch.setattr(dispatch, "_failed", {})
    monkeypatch.setattr(dispatch, "plans", {})
    monkeypatch.setattr(dispatch, "_environment", None)
    monkeypatch.setattr(dispatch, "auto", lambda call, **_: (backend, "a model says so"))

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


def test_the_cost_model_of_the_variants():
    sizes = Sizes(8192, 4096, 4096, 16)
    for variant in VARIANTS.values():
        call = sizes.call(variant)
        for captured in (True, False):
            time = dispatch.modelled(call, "sm_90", captured)
            assert time["addmm"] == cost.seconds(
                variant.addmm.launches(call), 2, cost.MACHINES["sm_90"], captured=captured
            )
            assert time.keys() == {"addmm", *(f"triton:{form}" for form in variant.fused)}
            # a variant without fused kernels has only addmm
            best = min(time.keys() - {"addmm"}, key=time.get, default="addmm")
            name, _ = dispatch.fastest(call, "sm_90", captured=captured)
            assert name == (best if time["addmm"] >= 1.1 * time[best] else "addmm")
    dora, lora = (VARIANTS[name] for name in ("dora", "lora"))
    forward, backward, _ = dora.fused["low_rank_gemm"].launches(sizes.call(dora))
    assert [launch.kernel for launch in forward] == ["row_norm", "shrink", "low_rank_gemm"]
    plain_forward, plain_backward, _ = lora.fused["low_rank_gemm"].launches(sizes.call(lora))
    moved = [sum(launch.bytes for launch in of) for of in (forward, plain_forward, backward, plain_backward)]
    # W is read once more for its norm; u is written once and read once
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
