"""What changes while the forward of a parent runs, and what other forwards than the first show."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cotolora import adapter_parameters
from tests.support.stacks import (
    Block,
    assert_equal_to_rounding,
    count,
    inputs,
    nodes_of,
    pair,
    reads_another,
    step,
    writes_between,
)

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


@pytest.mark.parametrize(
    "other", [lambda x: x.detach() * 2, lambda x: x.detach()[:1], lambda x: x.detach().mT.clone().mT]
)
def test_an_x_that_was_given_other_memory_is_another(other, monkeypatch):
    def forward(block, x):
        q = block.q(x)
        x.data = other(x)
        return q[:1, ..., :8] + block.k(x)[:1] + block.v(x)[:1]

    model, single = pair()
    monkeypatch.setattr(Block, "forward", forward)
    with torch.no_grad():
        torch.testing.assert_close(model[0](inputs(grad=False)), single[0](inputs(grad=False)))


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "bias"])
def test_a_layer_that_was_given_other_memory_is_computed_anew(name, monkeypatch):
    def forward(block, x):
        gate, parameter = block.gate(x), getattr(block.up, name)
        parameter.data = parameter.detach() * 2
        return gate + block.up(x)

    model, single = pair()
    monkeypatch.setattr(Block, "forward", forward)
    with torch.no_grad():
        torch.testing.assert_close(model[0](inputs(grad=False)), single[0](inputs(grad=False)))


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
