"""Stacked layers compute what single ones do, to rounding."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cotolora
from cotolora import adapter_parameters, adapters
from tests.support.stacks import (
    WIDTH,
    assert_equal_to_rounding,
    assert_same,
    count,
    inputs,
    nodes_of,
    pair,
    reads_another,
    step,
)


@pytest.mark.parametrize("rows", [(7,), (2, 5), (2, 3, 4), (), (0, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_results_are_those_of_single_layers_to_rounding(dtype, rows, grad):
    model, single = pair(dtype)
    x = inputs(dtype, rows, grad)
    exact = step(copy.deepcopy(single).double(), x.double())
    assert count(model, x) == 4
    assert_equal_to_rounding(step(model, x), step(single, x), exact)


@pytest.mark.parametrize("rank", [1, 16, 40])
def test_at_other_ranks_and_scales(rank):
    model, single = pair(rank=rank, alpha=0.5, use_rslora=True, rank_pattern={"k": rank, "v": rank + 3})
    x = inputs(rows=(70,))
    assert_equal_to_rounding(step(model, x), step(single, x), step(copy.deepcopy(single).double(), x.double()))
    # v is of another scale, so that it is computed by itself
    assert [node.ranks for node in nodes_of(model(x)) if len(node.ranks) == 2] == [[rank] * 2] * 4


def test_the_products_are_one_for_all_layers():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in ("mm", "addmm", "addmm_", "linear", "add", "add_"):
                self.found.append(name)
            return func(*args, **(kwargs or {}))

    class Attention(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(3))

        def forward(self, x):
            return torch.cat([self.q(x), self.k(x), self.v(x)])

    counts = []
    for model in pair(make=Attention, groups=[["q", "k", "v"]]):
        mode = Products()
        mode.found = []
        with mode:
            model[0](inputs(rows=(5,))).sum().backward()
        counts.append(len(mode.found))
    # forward: 3 of W, 3 of B and 1 instead of 3 of A. Backward: 3 p, 3 dB, 3 of W that add up, 1 dA and 1 p A; of
    # single layers 3 of each, and the two additions of autograd
    assert counts == [7 + 11, 9 + 17]


def test_without_gradients():
    model, single = pair()
    with torch.no_grad():
        x = inputs(grad=False)
        torch.testing.assert_close(model(x), single(x))
        torch.testing.assert_close(model.eval()(x), single.eval()(x))
    assert model[0].q._stack._call is None


def test_inference_tensors_which_do_not_count_writes_are_read_by_each_layer():
    def write(layer, args, y):
        args[0].add_(1)

    found = []
    for one in pair():
        for block in one:
            block.q.register_forward_hook(write)
        with torch.inference_mode():
            found.append(one(inputs(grad=False).clone()))
    assert torch.equal(*found)


def test_under_autocast():
    model, single = pair()
    x = inputs()

    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert count(model, x, run) == 4
    exact = step(copy.deepcopy(single).double(), x.double())
    assert_equal_to_rounding(step(model, x, run), step(single, x, run), exact)


def test_float64_is_left_to_the_reference_unless_asked_for():
    model, single = pair(torch.float64)
    x = inputs(torch.float64)
    assert_same(step(model, x), step(single, x))
    with cotolora.set_backend("addmm"):
        assert count(model, x) == 4
        for one, other in zip(step(model, x), step(single, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        model[0].requires_grad_(False)
        for name, p in model[0].named_parameters():
            p.requires_grad_("lora_" in name)
        assert torch.autograd.gradcheck(model[0], x, fast_mode=False)


def test_a_layer_whose_output_is_not_read_has_no_gradient():
    model, single = pair()
    for one in (model, single):
        for block in one:
            block.k.register_forward_hook(lambda layer, args, y: y.detach())
    x = inputs()
    found = step(model, x)
    assert_equal_to_rounding(found, step(single, x), step(copy.deepcopy(single).double(), x.double()))
    assert sum(one is None for one in found) == 4
    for one in (model, single):
        with torch.no_grad():
            one[0].k.lora_a.fill_(torch.inf)
        one[0].k.register_forward_hook(lambda layer, args, y: torch.ones_like(y))
    assert all(one is None or one.isfinite().all() for one in step(model, x)[1:])
    model(x).detach_().requires_grad_().sum().backward()  # no gradient comes through at all


def test_outputs_may_be_written_in_place():
    model, single = pair()
    for one in (model, single):
        for layer in adapters(one).values():
            layer.register_forward_hook(lambda layer, args, y: y.mul_(0.5).add_(1))
    for rows in ((5,), (2, 5)):
        x = inputs(rows=rows)
        assert_equal_to_rounding(step(model, x), step(single, x), step(copy.deepcopy(single).double(), x.double()))


def test_second_derivatives_are_refused_and_first_ones_with_a_graph_right():
    model, single = pair()
    for parameter in ("x", "lora_b"):
        grads = []
        for one in (model, single):
            x = inputs()
            wrt = x if parameter == "x" else one[0].k.lora_b
            (grad,) = torch.autograd.grad(one[0](x).square().sum(), wrt, create_graph=True)
            grads.append(grad.detach())
            with pytest.raises(RuntimeError, match="has no double backward"):
                torch.autograd.grad(grad.sum(), x)
        torch.testing.assert_close(*grads)


def test_graphs_may_be_kept_and_parts_of_them_asked_for():
    model, single = pair()
    found = []
    for one in (model, single):
        x = inputs()
        y = one(x)
        first = torch.autograd.grad(y.sum(), [one[0].v.lora_b], retain_graph=True)
        second = torch.autograd.grad(y.sum(), [x, one[1].q.lora_a], retain_graph=True)
        y.sum().backward()
        found.append([*first, *second, *[p.grad for p in adapter_parameters(one)]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_graph_is_freed_without_the_garbage_collector():
    model, _ = pair()
    gc.disable()
    try:
        for backward in (True, False):
            x = inputs()
            hidden = x * 2
            seen = weakref.ref(hidden)
            y = model(hidden)
            if backward:
                y.sum().backward()
            del y, hidden
            assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("memory", [None, reads_another])
def test_checkpointed_blocks_recompute_what_they_computed(reentrant, memory):
    model, single = pair()
    for one in (model, single) if memory else ():
        memory(one)
    x = inputs()

    def run(one, x):
        for block in one:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.0)
    exact = step(copy.deepcopy(single).double(), x.double())
    for _ in range(3):
        assert_equal_to_rounding(step(model, x, run), step(single, x), exact)
        optimizer.step()
    if not reentrant:
        assert model[0].q._stack._together[True][weakref.ref(model[0].k)] == [
            weakref.ref(layer)
            for layer in ((model[0].k, model[0].v) if memory else (model[0].q, model[0].k, model[0].v))
        ]


def test_what_comes_before_a_step_is_recomputed_as_it_was():
    """A forward that leaves layers out, while the recomputation of an earlier one is still to come."""
    model, single = pair()
    x = inputs()
    for one in (model, single):
        reads_another(one)
        first = checkpoint(one[0], x, use_reentrant=False)
        second = checkpoint(one[0], x + 1, use_reentrant=False)
        (first + second).sum().backward()
    for p, q in zip(adapter_parameters(model), adapter_parameters(single), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_threads_do_not_meet():
    model, single = pair()
    xs = [inputs(grad=False) + i for i in range(4)]
    expected, found = [single(x).detach() for x in xs], [None] * 4

    def work(i):
        for _ in range(30):
            y = model(xs[i])
            y.sum().backward(inputs=[model[0].q.lora_a])
            found[i] = y.detach()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
