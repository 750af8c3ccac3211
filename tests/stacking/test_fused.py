"""Stacks by the fused kernels, under Triton's interpreter, and the choice between them and vendor GEMMs."""

import copy
import os

import pytest
import torch

import cotolora
from cotolora import adapter_mask, adapter_parameters, adapters
from cotolora.backends import choice, stacked
from cotolora.backends.fused import stacked as fused
from cotolora.backends.fused.common import has_triton
from cotolora.backends.types import NotPreparedError, Options, Sizes
from cotolora.variants import VARIANTS
from tests.support.stacks import (
    GATES,
    assert_equal_to_rounding,
    assert_same,
    count,
    gated,
    heads,
    inputs,
    nodes_of,
    of,
    pair,
    step,
)

interpreter = pytest.mark.skipif(
    not (has_triton() and os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs triton and TRITON_INTERPRET=1 (set where there is no GPU)",
)
FORMS = ["triton:low_rank_gemm", "triton:pre_expand"]


def names_of(y):
    return {node.plan.stacked.name for node in nodes_of(y)}


@interpreter
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (torch.float32, (7,)),
        (torch.float32, (2, 5)),
        (torch.float32, ()),
        (torch.float16, (2, 20)),
        (torch.float16, (0, 5)),
    ],
    ids=str,
)
def test_results_are_those_of_single_layers_to_rounding(form, dtype, rows):
    model, single = pair(dtype)
    x = inputs(dtype, rows)
    exact = step(copy.deepcopy(single).double(), x.double())
    with cotolora.set_backend(form):
        assert names_of(model(x)) == {form}
        assert count(model, x) == 4
        assert_equal_to_rounding(step(model, x), step(single, x), exact)
        with torch.no_grad():
            assert_equal_to_rounding([model(x)], [single(x)], exact[:1])


@interpreter
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", GATES)
def test_gates_are_read_by_the_kernels(form, how):
    model, single = pair()
    for each in (model, single):
        gated(each, how)
    x = inputs()
    exact = step(copy.deepcopy(single).double(), x.double())
    with cotolora.set_backend(form):
        assert count(model, x) == (2 if how == "one-is-off-at-once" else 4)
        assert_equal_to_rounding(step(model, x), step(single, x), exact)


@interpreter
@pytest.mark.parametrize("form", FORMS)
def test_masks_per_sample_ranks_and_frozen_inputs(form):
    model, single = pair(alpha=3.0, rank_pattern={"k": 5, "up": 17}, alpha_pattern={"k": 5.0, "up": 17.0})
    x = inputs(rows=(2, 20), grad=False)
    exact = copy.deepcopy(single).double()
    mask = [[1] * 13 + [0], [0, 1] * 7]
    with adapter_mask(model, mask), adapter_mask(single, mask), adapter_mask(exact, mask):
        truth = step(exact, x.double())
        with cotolora.set_backend(form):
            assert sorted(len(node.ranks) for node in nodes_of(model(x))) == [2, 2, 3, 3]
            assert_equal_to_rounding(step(model, x), step(single, x), truth)


@interpreter
def test_gradients_of_factors_are_in_their_dtype_and_contiguous():
    model, single = pair(torch.float16)
    for each in (model, single):
        for layer in adapters(each).values():
            layer.float() if layer.lora_a.dtype is not torch.float32 else None
            layer.weight.data = layer.weight.data.half()
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.half()
    assert model[0].q.lora_a.dtype is torch.float32
    x = inputs(torch.float16)
    with cotolora.set_backend("triton:low_rank_gemm"):
        found = torch.autograd.grad(model[0](x).float().sum(), [*adapter_parameters(model[0])])
    for gradient, parameter in zip(found, adapter_parameters(model[0]), strict=True):
        assert gradient.dtype is parameter.dtype
        assert gradient.is_contiguous()
        assert not torch.equal(gradient, gradient.half().float()), "never rounded to the dtype of x"


@interpreter
def test_a_layer_that_a_loss_does_not_depend_on_is_left_out():
    model, single = pair()
    for each in (model, single):
        for block in each:
            block.k.register_forward_hook(lambda layer, args, y: y.detach())
    x = inputs()
    exact = step(copy.deepcopy(single).double(), x.double())
    with cotolora.set_backend("triton:low_rank_gemm"):
        assert_equal_to_rounding(step(model, x), step(single, x), exact)


@interpreter
@pytest.mark.parametrize(
    ("name", "options"),
    [("triton:one_pass", {}), ("triton", {"dropout": 0.5}), ("triton", {"rank": 90})],
)
def test_what_has_no_stacked_form_is_computed_by_single_layers_exactly(name, options):
    """one_pass asked for by name, dropout, and more ranks than the kernels are made for."""
    model, single = pair(groups=[["q", "k", "v"]], **options)
    x = inputs()
    results = []
    with cotolora.set_backend(name):
        assert count(model, x) == 0
        for each in (model, single):
            torch.manual_seed(3)
            results.append(step(each, x))
    assert_same(*results)


# kernels that cannot run


@pytest.fixture
def auto_takes(monkeypatch):
    """Auto on a CPU as on a GPU whose kernels are taken."""
    monkeypatch.setattr(choice, "_failed", {})
    monkeypatch.setattr(choice, "_unprepared", set())
    monkeypatch.setattr(choice, "plans", {})

    def take(names):
        def auto(call, *, captured=False):
            if call.dtype is torch.float64:
                return "reference", "float64 is for checking"
            name = names[call.out_features]
            failed = choice._failed.get(choice._kind(name, call))
            return ("addmm" if failed else name), "the test says so"

        monkeypatch.setattr(choice, "auto", auto)

    return take


EACH = {12: "triton:low_rank_gemm", 8: "triton:one_pass", 16: "triton:low_rank_gemm"}


@interpreter
@pytest.mark.parametrize("what", ["shrink", "gram"])
def test_a_kernel_that_cannot_run_is_replaced_by_vendor_gemms_for_the_whole_group(
    what, auto_takes, monkeypatch, caplog
):
    auto_takes(EACH)
    model, single = pair()
    for each in (model, single):
        gated(each, "mixed")
    x = inputs()
    exact = step(copy.deepcopy(single).double(), x.double())
    with cotolora.set_backend("addmm"):
        expected = step(single, x)

    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fused, what, broken)
    assert_equal_to_rounding(step(model, x), expected, exact)
    assert any(
        "cannot run here, so vendor GEMMs run instead: RuntimeError: no such kernel" in r.getMessage()
        for r in caplog.records
    )
    nodes = nodes_of(model(x))
    assert {node.plan.stacked.name for node in nodes} == {"addmm"}
    assert sorted(len(node.ranks) for node in nodes) == [3, 3], "q, k and v, though auto takes one_pass for k and v"


@interpreter
def test_vendor_gemms_that_go_on_read_nothing_of_a_layer_that_is_off(auto_takes, monkeypatch):
    auto_takes({8: "triton:low_rank_gemm", 6: "triton:low_rank_gemm"})
    model = heads(torch.float32, (of(0, 0), of(1, 0)))
    with torch.no_grad():
        model.q.lora_a.fill_(torch.nan)

    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fused, "gram", broken)
    q, k = model(inputs())
    assert names_of(q) == {"triton:low_rank_gemm"}
    (q.sum() + k.sum()).backward()
    for parameter in (model.q.lora_a, model.q.lora_b):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert model.k.lora_b.grad.any()


@interpreter
def test_an_error_of_memory_or_of_a_form_asked_for_by_name_is_raised(auto_takes, monkeypatch):
    model, _ = pair()
    for error, name in ((torch.OutOfMemoryError("full"), "auto"), (RuntimeError("broken"), "triton:low_rank_gemm")):
        auto_takes(EACH)
        choice.plans.clear()

        def broken(*_, error=error):
            raise error

        monkeypatch.setattr(fused, "shrink", broken)
        with cotolora.set_backend(name), pytest.raises(type(error), match=str(error)):
            model(inputs())


@interpreter
def test_what_a_capture_has_not_seen_launched_is_left_to_single_layers(auto_takes, monkeypatch):
    auto_takes(EACH)
    monkeypatch.setattr(choice, "capturing", lambda call: True)
    model, _ = pair()

    def unprepared(only_prepared, *_):
        assert only_prepared
        raise NotPreparedError("new")

    for name in ("shrink", "launch_forward"):
        module = fused if name == "shrink" else cotolora.backends.fused.lora
        monkeypatch.setattr(module, name, unprepared)
    x = inputs()
    assert count(model, x) == 0
    with cotolora.set_backend("addmm"):
        assert count(model, x) == 4


# the choice for a group


def plans_of(sizes, names, rank=16, rows=8192):
    found = []
    for n, name in zip(sizes, names, strict=True):
        call = Sizes(rows, n, 4096, rank).call(VARIANTS["lora"])
        backend = call.variant.backends_for(call)[name]
        found.append(choice.Plan(name, backend, Options(2.0), call, stacked=backend.stacked(call)))
    return found


def chosen(plans, arch, monkeypatch, name="auto"):
    monkeypatch.setattr(stacked, "architecture", lambda device: arch)
    monkeypatch.setattr(stacked, "capturing", lambda call: False)
    with cotolora.set_backend(name):
        return stacked.stacked_plan(plans)


def test_layers_of_one_way_keep_it(monkeypatch):
    for name in ("addmm", "triton:low_rank_gemm", "triton:pre_expand"):
        plans = plans_of((4096, 1024, 1024), [name] * 3)
        assert chosen(plans, "sm_90", monkeypatch) is plans[0]
    plans = plans_of((4096, 1024), ["triton:low_rank_gemm", "triton:one_pass"])
    assert chosen(plans, "sm_90", monkeypatch) is plans[0]


def test_layers_of_several_ways_take_the_fastest_for_all(monkeypatch):
    plans = plans_of((4096, 1024, 1024), ["addmm", "triton:low_rank_gemm", "triton:low_rank_gemm"])
    found = chosen(plans, "sm_90", monkeypatch)
    expected = stacked._fastest_stacked(tuple(plan.call for plan in plans), "sm_90", False)
    assert found.stacked.name == found.name == expected
    assert (found.instead is not None) is (expected != "addmm")
    assert chosen(plans, "generic", monkeypatch).name == "addmm"
    assert chosen(plans, "sm_90", monkeypatch, "triton") is None


def test_more_ranks_than_the_kernels_are_made_for_are_left_to_vendor_gemms(monkeypatch):
    plans = plans_of((4096, 4096, 4096), ["triton:low_rank_gemm"] * 3, rank=128)
    assert chosen(plans, "sm_90", monkeypatch).name == "addmm"
    assert chosen(plans, "sm_90", monkeypatch, "triton:low_rank_gemm") is None


def test_a_form_that_has_failed_is_not_chosen_for_a_group(monkeypatch):
    plans = plans_of((4096, 1024), ["addmm", "triton:low_rank_gemm"])
    monkeypatch.setattr(stacked, "_fastest_stacked", lambda *_: "triton:low_rank_gemm")
    assert chosen(plans, "sm_90", monkeypatch).name == "triton:low_rank_gemm"
    monkeypatch.setattr(choice, "_failed", {choice._kind("triton:low_rank_gemm", plans[0].call): "broken"})
    assert chosen(plans, "sm_90", monkeypatch).name == "addmm"
