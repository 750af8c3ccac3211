"""What cannot be computed together is computed by single layers, exactly."""

import copy

import pytest
import torch
from torch import nn

import cotolora
from cotolora import adapter_parameters, adapters, eject
from tests.support.stacks import (
    RANK,
    WIDTH,
    Block,
    assert_equal_to_rounding,
    assert_same,
    count,
    inputs,
    nodes_of,
    pair,
    step,
)


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


def test_backends_dropout_and_transforms_are_computed_as_before():
    model, single = pair(dropout=0.5)
    x = inputs()
    results = []
    for one in (model, single):
        torch.manual_seed(3)
        results.append(step(one, x))
    assert_same(*results)  # each layer draws a mask of its own
    assert count(model.eval(), x) == 4, "nothing drops"
    model, single = pair()
    with cotolora.set_backend("reference"):
        assert count(model, x) == 0
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
