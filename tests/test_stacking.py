"""`cotolora.stack`: projections that read one x, computed together, and by themselves wherever they cannot be."""

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import cotolora
from cotolora import CoTo, adapter_mask, adapter_parameters, adapters, eject, inject, load_adapter, save_adapter, stack
from cotolora.backends.addmm import lora as addmm_lora
from cotolora.backends.stacked import StackedLinear
from tests.support.ranks import results_of, serve
from tests.support.training import graph_nodes

WIDTH, RANK, GROUPS = 12, 3, [["q", "k", "v"], ["gate", "up"]]


@pytest.fixture(autouse=True)
def _of_any_width(monkeypatch):
    monkeypatch.setattr(addmm_lora, "_WIDE", 0)
    cotolora.backends.choice.plans.clear()
    yield
    cotolora.backends.choice.plans.clear()


class Block(nn.Module):
    """What a decoder's block does with its seven linears; `memory` is what k and v read if not x."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n, bias=n < WIDTH, dtype=dtype) for n in (WIDTH, 8, 8))
        self.o = nn.Linear(8, WIDTH, dtype=dtype)
        self.gate, self.up = (nn.Linear(WIDTH, 16, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(16, WIDTH, dtype=dtype)
        self.memory = lambda x: x

    def forward(self, x):
        memory = self.memory(x)
        weights = (self.q(x)[..., :8] * self.k(memory)).softmax(-1)
        x = x + self.o(weights * self.v(memory))
        return x + self.down(self.gate(x).relu() * self.up(x))


def pair(dtype=torch.float32, make=Block, groups=GROUPS, **options):
    """Two models of equal weights and adapters, of which the first is stacked."""
    torch.manual_seed(0)
    model = nn.Sequential(make(dtype), make(dtype))
    for layer in inject(model, **{"rank": RANK, "alpha": 2.0, **options}).values():
        nn.init.normal_(layer.lora_b, std=0.3)
    single = copy.deepcopy(model)
    stack(model, groups)
    return model, single


def inputs(dtype=torch.float32, rows=(2, 5), grad=True):
    x = torch.randn(*rows, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).requires_grad_(grad)


def step(model, x, run=lambda model, x: model(x)):
    """y, dx and the gradients of all adapters."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    y = run(model, x)
    y.float().square().mean().backward()
    gradients = [p.grad for p in adapter_parameters(model)]
    model.zero_grad()
    return [y.detach(), x.grad, *gradients]


def nodes_of(y):
    return [node for node in graph_nodes(y) if type(node).__name__ == StackedLinear.__name__ + "Backward"]


def count(model, x, run=lambda model, x: model(x)):
    """How many nodes of several layers a forward makes."""
    return len(nodes_of(run(model, x)))


def assert_same(found, expected):
    """Bit for bit: by single layers."""
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def assert_equal_to_rounding(found, expected, exact):
    """The error against float64 is that of single layers: of each tensor at most four times, on average 1.5 times."""
    errors = [], []
    for results, of_each in zip((found, expected), errors, strict=True):
        for one, true in zip(results, exact, strict=True):
            assert (one is None) == (true is None)
            if one is not None and one.numel():
                norm = true.double().norm().clamp(min=1e-30)
                of_each.append(((one.double() - true.double()).norm() / norm).item() + torch.finfo(one.dtype).eps)
    for one, other in zip(*errors, strict=True):
        assert one <= 4 * other
    assert sum(errors[0]) <= 1.5 * sum(errors[1])


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


# by single layers


def reads_another(model):
    for block in model:
        block.memory = lambda x: x.flip(0)


def writes_between(model):
    for block in model:
        block.memory = lambda x: x.add_(0)
        block.q.register_forward_pre_hook(lambda layer, args: (args[0].clone(),))


def switched_by_a_tensor(model):
    for layer in adapters(model).values():
        layer.gate = torch.ones((), dtype=torch.int32)


def others_off(model):
    for block in model:
        block.k.gate = block.v.gate = block.up.gate = False


def other_scales(model):
    for block in model:
        block.q.alpha, block.k.alpha, block.up.alpha = 1.0, 3.0, 4.0


def trains_weights(model):
    for layer in adapters(model).values():
        layer.weight.requires_grad_(True)


def half_frozen(model):
    for layer in adapters(model).values():
        layer.lora_a.requires_grad_(False)


SINGLE = {
    "off": lambda model: [setattr(layer, "gate", False) for layer in adapters(model).values()],
    "disabled": lambda model: [setattr(layer, "enabled", False) for layer in adapters(model).values()],
    "gated-apart": others_off,
    "switched-by-a-tensor": switched_by_a_tensor,
    "other-scales": lambda model: [
        setattr(b, "alpha", i + 1.0) for x in model for i, b in enumerate((x.q, x.k, x.v, x.up))
    ],
    "merged": lambda model: [layer.merge() for layer in adapters(model).values()],
    "trains-weights": trains_weights,
    "frozen-a": half_frozen,
}


@pytest.mark.parametrize("how", SINGLE)
def test_layers_that_cannot_be_computed_together_are_computed_exactly_as_before(how):
    model, single = pair()
    for one in (model, single):
        SINGLE[how](one)
    x = inputs()
    assert count(model, x) == 0
    assert_same(step(model, x), step(single, x))


@pytest.mark.parametrize("k_on", [True, False])
def test_layers_gated_apart_leave_the_others_together(k_on):
    model, single = pair()
    for one in (model, single):
        one[0].k.gate, one[1].q.gate = k_on, False
    x = inputs()
    assert sorted(len(node.ranks) for node in nodes_of(model(x))) == [2, 2, 2, 3 if k_on else 2]
    found = step(model, x)
    assert_equal_to_rounding(found, step(single, x), step(copy.deepcopy(single).double(), x.double()))
    assert sum(one is None for one in found) == (2 if k_on else 4)


def test_row_masks_backends_dropout_and_transforms_are_computed_as_before():
    model, single = pair(dropout=0.5)
    x = inputs()
    results = []
    for one in (model, single):
        torch.manual_seed(3)
        results.append(step(one, x))
    assert_same(*results)  # each layer draws a mask of its own
    assert count(model.eval(), x) == 4, "nothing drops"
    model, single = pair()
    mask = [[1] * 13 + [0], [0] * 14]
    with adapter_mask(model, mask), adapter_mask(single, mask):
        assert_same(step(model, x), step(single, x))
    with cotolora.set_backend("reference"):
        assert_same(step(model, x), step(single, x))
    parameters = dict(model.named_parameters())
    taken = [
        torch.func.vmap(lambda row, one=one: torch.func.functional_call(one, parameters, (row,)))(x.detach())
        for one in (model, single)
    ]
    assert torch.equal(*taken)
    y, dy = zip(*(torch.func.jvp(one, (x.detach(),), (torch.ones_like(x),)) for one in (model, single)), strict=True)
    assert torch.equal(*y)
    assert torch.equal(*dy)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own reading
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("what", ["model", "blocks", "linears"])
def test_under_compile_layers_are_computed_by_themselves(what):
    model, single = pair()
    x = inputs()
    expected = step(single, x)
    if what == "model":
        compiled = torch.compile(model, backend="aot_eager")
    else:
        compiled = model
        for part in model if what == "blocks" else adapters(model).values():
            part.compile(backend="aot_eager")
    y = compiled(x)
    assert not nodes_of(y)
    torch.testing.assert_close(y, expected[0])
    y.square().mean().backward()
    for p, gradient in zip(adapter_parameters(model), expected[2:], strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-4)


def test_a_layer_called_past_its_parent_is_computed_by_itself():
    """Else it would meet what an earlier call of another has left: here a graph that has been freed, and an old B."""
    model, single = pair()
    x = inputs()
    for one in (model, single):
        with torch.no_grad():
            one[0](x)
    results = [[], []]
    for one, found in zip((model, single), results, strict=True):
        for layer in (one[0].q, one[0].k, one[0].v, one[0].k):
            found += step(one, x, lambda _, x, layer=layer: layer(x))
            with torch.no_grad():
                layer.lora_b.add_(1)
    assert_same(*results)


# what changes between the first call with an x and the others


def between(change, undo=lambda block: None):
    """Blocks in which `change` is called after q and before k, and `undo` at the end."""

    def forward(block, x):
        q = block.q(x)
        change(block)
        y = q[..., :8] + 2 * block.k(x) + 3 * block.v(x)
        undo(block)
        return torch.cat([y, y[..., :4]], -1)

    return forward


def written(block):
    with torch.no_grad():
        block.k.lora_b.add_(1)


def replaced(block):
    block.k.lora_a = nn.Parameter(block.k.lora_a.detach() * 2)


BETWEEN = {
    "written": between(written),
    "replaced": between(replaced),
    "off": between(lambda block: setattr(block.k, "gate", False)),
    "scaled": between(lambda block: setattr(block.k, "alpha", 5.0), lambda block: setattr(block.k, "alpha", 2.0)),
    "merged": between(lambda block: block.k.merge(), lambda block: block.k.unmerge()),
    "other-variant": between(lambda block: setattr(block.k, "variant", "hira")),
}


@pytest.mark.parametrize("how", BETWEEN)
@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_that_has_changed_since_is_computed_anew(how, grad, monkeypatch):
    model, single = pair()
    monkeypatch.setattr(Block, "forward", BETWEEN[how])
    results = []
    for one in (model, single):
        if grad and how not in ("written", "merged"):
            results.append([one[0](x := inputs()), *torch.autograd.grad(one[0](x).sum(), x)])
        else:
            with torch.no_grad():
                results.append([one[0](inputs())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_forward_pre_hook_may_switch_its_layer():
    model, single = pair()
    for one in (model, single):
        one[0].k.register_forward_pre_hook(lambda layer, args: setattr(layer, "gate", False))
    x = inputs()
    for one, other in zip(step(model, x), step(single, x), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["requires_grad_", "detach_"])
def test_an_x_that_enters_or_leaves_the_graph_is_another(how, monkeypatch):
    model, single = pair()
    monkeypatch.setattr(Block, "forward", lambda block, x: block.q(x)[..., :8] + (getattr(x, how)(), block.k(x))[1])
    grads = []
    for one in (model, single):
        x = inputs(grad=how == "detach_")
        one[0](x * 1 if how == "detach_" else x).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_parameters_of_one_call_alone_are_read(monkeypatch):
    def forward(block, x):
        doubled = {"lora_b": 2 * block.k.lora_b}
        return block.q(x)[..., :8] + torch.func.functional_call(block.k, doubled, (x,)) + block.v(x)

    model, single = pair()
    monkeypatch.setattr(Block, "forward", forward)
    torch.testing.assert_close(model[0](inputs()), single[0](inputs()))


@pytest.mark.parametrize("inside", ["q", "k", "q and k"])
def test_a_checkpoint_inside_the_forward_recomputes_what_it_computed(inside, monkeypatch):
    def forward(block, x):
        if inside == "q and k":
            y = checkpoint(lambda x: block.q(x)[..., :8] * block.k(x), x, use_reentrant=False)
        elif inside == "q":
            y = checkpoint(block.q, x, use_reentrant=False)[..., :8] * block.k(x)
        else:
            y = block.q(x)[..., :8] * checkpoint(lambda x: block.k(x).sin(), x, use_reentrant=False)
        y = y + block.v(x)
        return torch.cat([y, y[..., :4]], -1)

    model, single = pair()
    monkeypatch.setattr(Block, "forward", forward)
    x = inputs()
    assert_equal_to_rounding(step(model, x), step(single, x), step(copy.deepcopy(single).double(), x.double()))


def test_steps_of_other_optimizers_change_no_recomputation():
    model, _ = pair()
    reads_another(model)
    other = nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    y = checkpoint(model[0], inputs(), use_reentrant=False)
    torch.optim.SGD([other]).step()
    y.sum().backward()
    assert len(model[0].q._stack._together[True][weakref.ref(model[0].q)]) == 3
    torch.optim.SGD(adapter_parameters(model)).step()
    assert len(model[0].q._stack._together[True][weakref.ref(model[0].q)]) == 1


def test_what_was_not_called_is_noted_once_without_a_step():
    model, _ = pair()
    reads_another(model)
    for _ in range(5):
        model(inputs())
    assert len(model[0].q._stack._left_out) == 3


@pytest.mark.parametrize("what", ["output", "parameter"])
def test_hooks_on_gradients_see_none_where_there_is_none(what):
    model, single = pair()
    results = []
    for one in (model, single):
        for block in one:
            if what == "output":
                block.k.register_forward_hook(lambda layer, args, y: y.register_hook(lambda dy: dy * 2) and None)
            block.k.lora_b.register_hook(lambda gradient: gradient * 2)
            block.k.register_forward_hook(lambda layer, args, y: y.detach())
        results.append(step(one, inputs()))
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_what_was_moved_out_of_the_parameters_is_read_where_it_is():
    class Twice(nn.Module):
        def forward(self, t):
            return 2 * t

    for name in ("bias", "weight", "lora_a", "lora_b"):
        for layer in ("gate", "up"):
            model, single = pair()
            for one in (model, single):
                nn.utils.parametrize.register_parametrization(getattr(one[0], layer), name, Twice())
            torch.testing.assert_close(model(inputs()), single(inputs()))


def test_second_derivatives_by_a_alone_are_refused(monkeypatch):
    model, single = pair()
    monkeypatch.setattr(Block, "forward", lambda block, x: block.gate(x) + block.up(x))
    for one in (model, single):
        x = inputs()
        (dx,) = torch.autograd.grad(one[0](x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="has no double backward"):
            torch.autograd.grad(dx.sum(), one[0].up.lora_a, allow_unused=True)


def wrong(name, *shape, dtype=torch.float32):
    return lambda layer: setattr(layer, name, nn.Parameter(torch.ones(shape, dtype=dtype), "lora" in name))


WRONG = {
    "a": wrong("lora_a", RANK + 1, WIDTH),
    "b": wrong("lora_b", 16, RANK - 1),
    "weight": wrong("weight", 15, WIDTH),
    "bias": wrong("bias", 15),
    "dtype": wrong("bias", 16, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_with_a_layer_it_says_itself_and_only_if_called(how, monkeypatch):
    model, single = pair()
    errors = []
    for one in (model, single):
        WRONG[how](one[0].up)
        with pytest.raises((TypeError, ValueError), match=r"^0\.up: ") as error:
            one(inputs())
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    monkeypatch.setattr(Block, "forward", lambda block, x: block.gate(x))
    assert torch.equal(model[0](inputs()), single[0](inputs()))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_without_a_shape_is_refused_as_by_single_layers():
    model, _ = pair()
    with pytest.raises(TypeError, match=r"^0.q: x must be dense, or nested with layout=torch.jagged"):
        model[0](torch.nested.nested_tensor([torch.ones(2, WIDTH), torch.ones(3, WIDTH)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_leaves_float64_alone(dtype):
    results = []
    for one in pair(dtype):
        try:
            with cotolora.set_backend("addmm"), torch.autocast("cpu", torch.bfloat16):
                results.append(one[0](inputs(torch.float64)))
        except TypeError as error:
            results.append(str(error))
    assert type(results[0]) is type(results[1])
    assert results[0] == results[1] if dtype is torch.float32 else results[0].dtype is results[1].dtype


def test_eject_leaves_nothing_of_a_stack():
    model, _ = pair()
    eject(model)
    for block in model:
        assert "_stacks" not in vars(block)
        assert not block._forward_hooks
        assert not block._forward_pre_hooks


def test_a_module_that_was_given_the_hooks_of_a_parent_runs_without_a_stack():
    model, single = pair()
    for name in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called"):
        setattr(single[0], name, getattr(model[0], name))
    assert count(single[0], inputs()) == 0


# what shows while a stack is used otherwise than it was


@pytest.mark.parametrize("how", [reads_another, writes_between])
def test_layers_with_another_x_are_exact_at_once_and_left_out_after_the_next_step(how, caplog):
    model, single = pair()
    how(model), how(single)
    x = inputs(grad=False)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.0)
    exact = step(copy.deepcopy(single).double(), x.double())
    for n in range(3):
        assert_equal_to_rounding(step(model, x), step(single, x), exact)
        if n == 0 and how is reads_another:
            # q computed k and v in vain, and k then q and v
            assert sorted(len(one.ranks) for one in nodes_of(model(x))) == [2, 2, 3, 3, 3, 3]
        elif n and how is reads_another:
            assert sorted(len(one.ranks) for one in nodes_of(model(x))) == [2, 2, 2, 2], "k and v, gate and up"
        optimizer.step()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "stack: in a forward that called '0.q', ['0.k', '0.v'] were not called with the same tensor" in messages[0]


def test_a_forward_that_raised_is_no_reason_to_leave_a_layer_out(caplog):
    model, single = pair()
    x = inputs()
    handle = model[0].k.register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(x)
    handle.remove()
    assert count(model, x) == 4
    assert not caplog.records
    assert_equal_to_rounding(step(model, x), step(single, x), step(copy.deepcopy(single).double(), x.double()))


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


# what a stack leaves alone


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_not_stacked_and_may_be(how):
    model, single = pair()
    for block in model:
        del block.memory
    Block.memory = staticmethod(lambda x: x)
    try:
        x = inputs()
        copied = how(model)
        assert count(copied, x) == 0
        assert_same(step(copied, x), step(single, x))
        assert count(model, x) == 4
        stack(copied, GROUPS)
        assert count(copied, x) == 4
        layer = how(model[0].q)
        assert torch.equal(layer(x), single[0].q(x))
    finally:
        del Block.memory


def test_files_state_dicts_merges_and_ejects_are_those_of_single_layers(tmp_path):
    model, single = pair()
    x = inputs()
    assert list(model.state_dict()) == list(single.state_dict())
    save_adapter(model, tmp_path)
    other, _ = pair()
    with torch.no_grad():
        for p in adapter_parameters(other):
            p.zero_()
    load_adapter(other, tmp_path)
    assert count(other, x) == 4
    assert torch.equal(other(x), model(x))
    for one in (model, single):
        for layer in adapters(one).values():
            layer.merge()
    assert torch.equal(model(x), single(x))
    for layer in adapters(model).values():
        layer.unmerge()
    assert count(model, x) == 4
    for one in (model, single):
        eject(one)
    assert torch.equal(model(x), single(x))
    inject(model, rank=2)
    assert count(model, x) == 0


def test_training_with_coto_is_that_of_single_layers():
    for unit in ("layer", "module"):
        runs = []
        for one in pair(torch.float64):
            optimizer = torch.optim.AdamW(adapter_parameters(one), lr=0.01)
            coto = CoTo(one, 30, unit=unit, seed=1)
            coto.attach(optimizer)
            for i in range(30):
                with cotolora.set_backend("addmm"):
                    one(inputs(torch.float64) + i).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                coto.step()
            coto.finish()
            runs.append([p.detach() for p in adapter_parameters(one)])
        for p, q in zip(*runs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_a_second_call_replaces_what_the_first_has_stacked():
    model, _ = pair()
    x = inputs()
    assert stack(model, [["k", "v"]]) == [["0.k", "0.v"], ["1.k", "1.v"]]
    assert [len(one.ranks) for one in nodes_of(model(x))] == [2, 2]
    assert stack(model, []) == []
    assert count(model, x) == 0
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_llama_and_bert(tf, dtype):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2))
    bert = tf.BertForMaskedLM(tf.BertConfig(**sizes))
    groups = {llama: [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]], bert: [["query", "key", "value"]]}
    for model, named in groups.items():
        model.to(dtype).eval()
        for layer in inject(model, [name for names in named for name in names], rank=4).values():
            nn.init.normal_(layer.lora_b, std=0.1)
        single = copy.deepcopy(model)
        assert len(stack(model, named)) == 2 * len(named)
        tokens = torch.arange(24).view(2, 12)
        results = []
        for one in (model, single, copy.deepcopy(single).double()):
            loss = one(input_ids=tokens, labels=tokens).loss
            assert len(nodes_of(loss)) == (2 * len(named) if one is model else 0)
            loss.backward()
            results.append([loss.detach(), *[p.grad for p in adapter_parameters(one)]])
        assert_equal_to_rounding(*results)


def test_mistakes_are_refused_by_name():
    model, _ = pair()
    before = model[0].q._stack
    with pytest.raises(ValueError, match=r"model must have adapters; Linear has none \(call inject first\)"):
        stack(nn.Linear(2, 2), GROUPS)
    for groups in ("q", ["q", "k"], [["q", 1]], 3, None, [None], {"a": ["q", "k"]}):
        with pytest.raises(TypeError, match=r"groups(\[0\])? must be a list of (lists of )?names; got "):
            stack(model, groups)
    for groups in ([["q"]], [[]], [["q", "q"]], [["q", ""]]):
        with pytest.raises(ValueError, match=r"groups\[0\] must hold two or more names, each once; got \["):
            stack(model, groups)
    with pytest.raises(ValueError, match=r"groups must hold each name once; got \['k'\] in two of them"):
        stack(model, [["q", "k"], ["k", "v"]])
    with pytest.raises(ValueError, match=r"groups\[1\] must name two or more adapters of one parent; got \['a', 'b'\]"):
        stack(model, [["q", "k"], ["a", "b"]])
    with pytest.raises(ValueError, match=r"those of '0' cannot: in_features differ, \{'0.q': 12, '0.o': 8\}"):
        stack(model, [["q", "o"]])
    listed = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    inject(listed, rank=2)
    with pytest.raises(ValueError, match=r"those of '' cannot, whose ModuleDict has no forward to call them in"):
        stack(listed, [["q", "k"]])
    for name, value in (("variant", "dora"), ("init", "pissa")):
        options, reason = {name: value}, f"{name} '{value}'"
        with pytest.raises(ValueError, match=f"'0.q' has {reason}"):
            pair(**options)
    assert model[0].q._stack is before, "nothing has changed"


# across ranks


def _wrapped(how, rank, world):
    addmm_lora._WIDE = 0
    model, single = pair()
    if how == "ddp":
        model, single = (DistributedDataParallel(one, find_unused_parameters=True) for one in (model, single))
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for one in (model, single):
            for block in one if how == "fsdp-blocks" else ():
                fully_shard(block, mesh=mesh)
            fully_shard(one, mesh=mesh)
    results = []
    for one in (model, single):
        optimizer = torch.optim.AdamW(adapter_parameters(one), lr=0.01)
        coto = CoTo(one, 20, seed=2)
        coto.attach(optimizer)
        nodes = 0
        for i in range(20):
            y = one(inputs() + i + rank)
            nodes += len(nodes_of(y))
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            coto.step()
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in adapter_parameters(one)]
        results.append([nodes, [p.detach().clone() for p in whole]])
    return {"results": results}


RANKED = {2: {how: lambda rank, world, how=how: _wrapped(how, rank, world) for how in ("ddp", "fsdp", "fsdp-blocks")}}


@pytest.mark.slow
def test_wrapped_models_train_as_single_layers_do(tmp_path):
    for (_, how), ranks in results_of(__file__, RANKED, tmp_path).items():
        for result in ranks:
            assert "error" not in result, result["error"]
            (nodes, stacked), (none, single) = result["results"]
            assert none == 0
            assert nodes > 20, how
            for p, q in zip(stacked, single, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    serve(RANKED)
    sys.exit()
