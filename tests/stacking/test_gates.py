"""Gates that are tensors, one for all rows or one per sample, under which layers are still computed together."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cotolora
from cotolora import CoTo, adapter_mask, adapter_parameters, adapters, stack
from cotolora.backends import autograd
from cotolora.backends.fused.common import has_triton
from tests.support import captured
from tests.support.stacks import (
    GATES,
    WIDTH,
    Block,
    assert_equal_to_rounding,
    assert_same,
    count,
    gated,
    heads,
    inputs,
    nodes_of,
    of,
    one,
    pair,
    step,
)


@pytest.fixture(params=["addmm", "triton:low_rank_gemm", "triton:pre_expand"])
def backend(request):
    """By each backend that stacks, the fused ones under Triton's interpreter."""
    if request.param != "addmm" and not (has_triton() and os.environ.get("TRITON_INTERPRET") == "1"):
        pytest.skip("needs triton and TRITON_INTERPRET=1")
    with cotolora.set_backend(request.param):
        yield request.param


@pytest.fixture
def on_device(monkeypatch):
    """Gates on a CPU count as those of a GPU, which the host cannot read without waiting."""
    monkeypatch.setattr(autograd, "readable", lambda gate: False)
    monkeypatch.setattr(cotolora.stacked_layers, "readable", lambda gate: False)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("how", GATES)
@pytest.mark.parametrize("switch", ["gate", "enabled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(2, 50), (2, 3, 4), (2,)], ids=str)
def test_results_are_those_of_single_layers_to_rounding(how, switch, dtype, rows):
    model, single = pair(dtype)
    for each in (model, single):
        gated(each, how, switch)
    x = inputs(dtype, rows)
    exact = step(copy.deepcopy(single).double(), x.double())
    found = step(model, x)
    assert count(model, x) == (2 if how == "one-is-off-at-once" else 4)
    assert_equal_to_rounding(found, step(single, x), exact)
    with torch.no_grad():
        assert_equal_to_rounding([model(x)], [single(x)], [copy.deepcopy(single).double()(x.double())])


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("how", ["rows", "rows-beside-others"])
def test_gates_of_an_empty_batch(how):
    model, single = pair()
    for each in (model, single):
        gated(each, how)
        for layer in adapters(each).values():
            if isinstance(layer.gate, torch.Tensor) and layer.gate.dim():
                layer.gate = layer.gate[:0]
    x = inputs(rows=(0, 5))
    assert count(model, x) == 4
    assert_same(step(model, x), step(single, x))


def test_a_gate_that_the_host_can_read_leaves_out_a_layer_that_is_off():
    model, single = pair()
    for each in (model, single):
        gated(each, "mixed")
    x = inputs()
    assert [len(node.ranks) for node in nodes_of(model(x))] == [2, 2], "q and v; gate is off, and up alone"
    assert_equal_to_rounding(step(model, x), step(single, x), step(copy.deepcopy(single).double(), x.double()))


@pytest.mark.parametrize("gate", [of(1, 1, 1), of(1)])
def test_a_gate_that_does_not_fit_is_refused_as_by_a_single_layer(gate):
    model, single = pair()
    errors = []
    for each in (model, single):
        each[0].q.gate = gate
        with pytest.raises(ValueError, match=r"a row gate \[batch\] needs x") as error:
            each(inputs())
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    for each in (model, single):
        each[0].q.gate, each[0].k.gate = True, gate
        with pytest.raises(ValueError, match="a row gate"):
            each(inputs())


NAN = float("nan")
# NumPy's, in the products of Triton's interpreter
interpreted_infinities = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def base(layer, x, backend):
    """``x Wᵀ + bias`` as the backend computes it: low_rank_gemm, which is a GEMM itself, by its own product."""
    if backend != "triton:low_rank_gemm":
        return F.linear(x, layer.weight, layer.bias)
    a, b = torch.zeros_like(layer.lora_a), torch.zeros_like(layer.lora_b)
    return cotolora.coto_lora_linear(x, layer.weight, layer.bias, a, b, scale=1.0, gate=one(0))


@interpreted_infinities
@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("poison", [NAN, torch.inf])
@pytest.mark.parametrize("which", ["lora_a", "lora_b", "dy"])
def test_off_is_the_base_bit_for_bit_and_adds_zeros_whatever_a_b_and_dy_hold(dtype, poison, which, backend):
    if backend != "addmm" and dtype is torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    model = heads(dtype, (one(1), one(0)))
    with torch.no_grad():
        if which != "dy":
            getattr(model.k, which).fill_(poison)
    x = inputs(dtype)
    q, k = model(x)
    assert nodes_of(q)[0] is nodes_of(k)[0]
    assert torch.equal(k, base(model.k, x, backend))
    assert q.isfinite().all()
    dk = torch.full_like(k, poison if which == "dy" else 1.0)
    torch.autograd.backward((q, k), (torch.ones_like(q), dk))
    for parameter in (model.k.lora_a, model.k.lora_b):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    for parameter in (model.q.lora_a, model.q.lora_b):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()
    assert which == "dy" or x.grad.isfinite().all()


@pytest.mark.usefixtures("on_device")
def test_with_all_off_dx_is_that_of_the_bases_whatever_x_and_the_factors_hold(backend):
    model = heads(torch.float32, (one(0), one(0)))
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.fill_(NAN)
    x = inputs()
    ys = model(x)
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    expected = torch.ones_like(ys[0]) @ model.q.weight + torch.ones_like(ys[1]) @ model.k.weight
    torch.testing.assert_close(x.grad, expected)
    x = torch.full_like(x, NAN, requires_grad=True)
    model.zero_grad()
    ys = model(x)
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in adapter_parameters(model))


@pytest.mark.usefixtures("on_device")
def test_a_layer_that_is_off_gets_zeros_where_x_is_not_finite_and_another_is_on(backend):
    model = heads(torch.float32, (one(1), one(0)))
    x = torch.full((2, 5, WIDTH), NAN)
    torch.autograd.backward(model(x), (torch.ones(2, 5, 8), torch.ones(2, 5, 6)))
    assert model.q.lora_a.grad.isnan().all()
    for parameter in (model.k.lora_a, model.k.lora_b):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@interpreted_infinities
@pytest.mark.parametrize("poisoned", ["x", "dy", "lora_a", "lora_b"])
@pytest.mark.parametrize("poison", [NAN, torch.inf])
def test_rows_that_are_off_are_the_base_bit_for_bit_and_add_zeros(poisoned, poison, backend):
    """Of q the first sample is off, of k the second."""
    clean, model = (heads(torch.float32, (of(0, 1), of(1, 0))) for _ in range(2))
    found = []
    for each in (clean, model):
        x = inputs().detach()
        dq, dk = torch.ones(2, 5, 8), torch.ones(2, 5, 6)
        if each is model and poisoned == "x":
            x[0] = poison
        elif each is model and poisoned == "dy":
            dq[0] = poison
        elif each is model:
            with torch.no_grad():
                getattr(each.q, poisoned).fill_(poison)
        q, k = each(x.requires_grad_())
        torch.autograd.backward((q, k), (dq, dk))
        found.append([q, k, x.grad, *(p.grad for p in adapter_parameters(each))])
    (q, k, dx, *clean_grads), (bad_q, bad_k, bad_dx, *grads) = found
    bases = [base(layer, x, backend) for layer in (model.q, model.k)]
    assert torch.equal(bad_q[0], bases[0][0]) or poisoned == "x"
    assert torch.equal(bad_k[1], bases[1][1])
    # the second sample reads only q's factors, the first only k's
    same = {"x": [0, 1], "dy": [0, 1, 2, 3], "lora_a": [2, 3], "lora_b": [2, 3]}[poisoned]
    for i in same:
        torch.testing.assert_close(grads[i], clean_grads[i])
    if poisoned != "x":
        torch.testing.assert_close(bad_k, k)
    if poisoned in ("lora_a", "lora_b"):
        torch.testing.assert_close(bad_dx[0], dx[0])
    else:
        torch.testing.assert_close(bad_dx[1], dx[1])
        torch.testing.assert_close(bad_q[1], q[1])


def test_nothing_waits_for_a_gate_on_a_device():
    """On meta, a value that is asked for raises."""
    model, _ = pair()
    for how in ("mixed", "rows"):
        gated(model, how)
        meta = copy.deepcopy(model).to("meta")
        stack(meta, [["q", "k", "v"], ["gate", "up"]])
        x = torch.empty(2, 5, WIDTH, device="meta", requires_grad=True)
        y = meta(x)
        assert len(nodes_of(y)) == 4
        y.sum().backward()
        assert x.grad.shape == x.shape


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Pairs(nn.Module):
    """Two linears of one x, as a model of `captured`."""

    def __init__(self, layers):
        super().__init__()
        self.left, self.right = layers

    def forward(self, x):
        return self.left(x).relu() + self.right(x)


def stacked_model():
    model = captured.model_of("cpu")
    blocks = nn.Sequential(Pairs(model[:2]), Pairs(model[2:]))
    stack(blocks, [["left", "right"]])
    return blocks


@pytest.mark.usefixtures("on_device")
def test_a_captured_step_does_the_same_under_every_mask_and_trains_as_a_plain_loop():
    seen = []

    def noted(compute):
        def run():
            with Operators() as operators:
                results = compute()
            seen.append(operators.names)
            return results

        return captured.without_a_graph(run)

    weights, masks = captured.train_captured(stacked_model(), noted)
    assert len(set(masks)) > 1
    _, first, *others = seen
    assert all(names == first for names in others)
    for found, expected in zip(weights, captured.train_eagerly(stacked_model()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unit", ["layer", "module"])
@pytest.mark.parametrize("readable", [True, False])
def test_training_under_device_gates_is_that_of_single_layers(unit, readable, request):
    if not readable:
        request.getfixturevalue("on_device")
    runs = []
    for each in pair(torch.float64):
        optimizer = torch.optim.AdamW(adapter_parameters(each), lr=0.01)
        coto = CoTo(each, 30, unit=unit, seed=1, gates="device")
        coto.attach(optimizer)
        for i in range(30):
            with cotolora.set_backend("addmm"):
                each(inputs(torch.float64) + i).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            coto.step()
        coto.finish()
        runs.append([p.detach() for p in adapter_parameters(each)])
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_masks_per_sample_are_those_of_single_layers():
    model, single = pair()
    x = inputs()
    mask = [[1] * 13 + [0], [0, 1] * 7]
    exact = copy.deepcopy(single).double()
    with adapter_mask(model, mask), adapter_mask(single, mask), adapter_mask(exact, mask):
        assert count(model, x) == 4
        assert_equal_to_rounding(step(model, x), step(single, x), step(exact, x.double()))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("how", ["mixed", "rows"])
def test_checkpointed_blocks_under_tensor_gates(how):
    model, single = pair()
    for each in (model, single):
        gated(each, how)

    def run(each, x):
        for block in each:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    x = inputs()
    exact = step(copy.deepcopy(single).double(), x.double())
    assert_equal_to_rounding(step(model, x, run), step(single, x), exact)


def write(block):
    block.k.gate.fill_(0)


def replace(block):
    block.k.gate = torch.zeros_like(block.k.gate)


def disable(block):
    block.k.enabled = torch.zeros((), dtype=torch.bool)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("change", [write, replace, disable])
def test_a_layer_whose_gate_has_changed_since_is_computed_anew(change, monkeypatch):
    def forward(block, x):
        q = block.q(x)
        change(block)
        return torch.cat([q, block.k(x), block.v(x)], -1)

    model, single = pair()
    monkeypatch.setattr(Block, "forward", forward)
    for each in (model, single):
        gated(each, "on")
    with torch.no_grad():
        torch.testing.assert_close(model[0](inputs()), single[0](inputs()))


@pytest.mark.usefixtures("on_device")
def test_a_gate_that_is_written_to_before_the_backward_is_noticed():
    for each in pair():
        gated(each, "on")
        y = each(inputs())
        each[0].k.gate.fill_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
