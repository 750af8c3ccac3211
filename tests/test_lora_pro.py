"""LoRA-Pro's gradients against their definition, and together with CoTo in an optimizer."""

import pytest
import torch
from torch import nn

import cotolora
from cotolora import CoTo
from cotolora.lora_pro import adjusted, attach
from cotolora.training.stepping import register_before_step

SCALE = 0.7


def problem(out_features=9, rank=3, in_features=7, seed=0):
    """Factors, the gradient of the full matrix, and the resulting gradients of A and B."""
    draw = torch.Generator().manual_seed(seed)
    sizes = ((rank, in_features), (out_features, rank), (out_features, in_features))
    a, b, full = (torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes)
    return a, b, full, SCALE * b.T @ full, SCALE * full @ a.T


def moved(a, b, g_a, g_b):
    return SCALE * (g_b @ a + b @ g_a)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_moves_the_product_as_close_to_the_full_gradient_as_possible(rank):
    a, b, full, grad_a, grad_b = problem(rank=rank)
    g_a, g_b = adjusted(a, b, grad_a, grad_b, SCALE)
    # the reachable updates are the matrices whose columns lie in B's span plus those whose rows lie in A's
    off_b = torch.eye(9, dtype=torch.float64) - b @ torch.linalg.pinv(b)
    off_a = torch.eye(7, dtype=torch.float64) - torch.linalg.pinv(a) @ a
    torch.testing.assert_close(moved(a, b, g_a, g_b), full - off_b @ full @ off_a)


def test_is_the_closest_such_step_to_the_plain_gradients():
    a, b, _, grad_a, grad_b = problem()
    g_a, g_b = adjusted(a, b, grad_a, grad_b, SCALE)
    # the product does not change along X, so the distance must be stationary there
    for direction in torch.eye(9, dtype=torch.float64).view(9, 3, 3):
        along_a, along_b = direction @ a, -b @ direction
        torch.testing.assert_close(moved(a, b, along_a, along_b), torch.zeros(9, 7, dtype=torch.float64))
        slope = ((g_a - grad_a) * along_a).sum() + ((g_b - grad_b) * along_b).sum()
        torch.testing.assert_close(slope, torch.zeros((), dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("zeroed", ["b", "one column of b", "a"])
def test_factors_without_full_rank(zeroed):
    a, b, full, *_ = problem()
    if zeroed == "a":
        a.zero_()
    else:
        (b if zeroed == "b" else b[:, 1]).zero_()
    g_a, g_b = adjusted(a, b, SCALE * b.T @ full, SCALE * full @ a.T, SCALE)
    off_b = torch.eye(9, dtype=torch.float64) - b @ torch.linalg.pinv(b)
    off_a = torch.eye(7, dtype=torch.float64) - torch.linalg.pinv(a) @ a
    torch.testing.assert_close(moved(a, b, g_a, g_b), full - off_b @ full @ off_a)


def test_results_have_the_dtypes_of_the_gradients():
    tensors = [t.to(torch.bfloat16) for t in problem()]
    a, b, _, grad_a, grad_b = tensors
    assert [g.dtype for g in adjusted(a, b, grad_a, grad_b, SCALE)] == [torch.bfloat16] * 2


def prepared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    for layer in cotolora.inject(model, rank=2).values():
        nn.init.normal_(layer.lora_b)
    return model


@pytest.mark.parametrize("closure", [False, True])
def test_an_optimizer_steps_along_adjusted_gradients_until_the_handle_is_removed(closure):
    model, x = prepared(), torch.randn(5, 6)
    optimizer = torch.optim.SGD(cotolora.adapter_parameters(model), lr=0.1)
    handle = attach(model, optimizer)

    def backward():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for expect_adjusted in (True, False):
        backward()
        layers = list(cotolora.adapters(model).values())
        before = [(w.lora_a.detach().clone(), w.lora_b.detach().clone()) for w in layers]
        gradients = [(w.lora_a.grad.clone(), w.lora_b.grad.clone()) for w in layers]
        optimizer.step(backward) if closure else optimizer.step()
        for layer, (a, b), (grad_a, grad_b) in zip(layers, before, gradients, strict=True):
            g_a, g_b = adjusted(a, b, grad_a, grad_b, layer.scale) if expect_adjusted else (grad_a, grad_b)
            torch.testing.assert_close(layer.lora_a, a - 0.1 * g_a)
            torch.testing.assert_close(layer.lora_b, b - 0.1 * g_b)
        handle.remove()


@pytest.mark.parametrize("coto_first", [True, False])
@pytest.mark.parametrize("gates", ["host", "device"])
def test_adapters_that_are_off_are_unchanged(gates, coto_first):
    model = prepared()
    coto = CoTo(model, 100, gates=gates)
    optimizer = torch.optim.AdamW(cotolora.adapter_parameters(model), lr=0.1)
    for attached in (coto.attach, lambda o: attach(model, o))[:: 1 if coto_first else -1]:
        attached(optimizer)
    seen = set()
    for _ in range(10):
        on = coto.mask.tolist()
        before = [layer.lora_b.detach().clone() for layer in cotolora.adapters(model).values()]
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        now = [layer.lora_b for layer in cotolora.adapters(model).values()]
        assert [not torch.equal(*pair) for pair in zip(before, now, strict=True)] == on
        seen |= set(on)
        coto.step()
    assert seen == {True, False}


def test_acts_once_per_step_or_after_each_closure_call():
    optimizer, acts = torch.optim.SGD([nn.Parameter(torch.ones(1))]), []
    register_before_step(optimizer, lambda: acts.append("action"))
    optimizer.step()
    optimizer.step(lambda: acts.append("closure"))
    optimizer.step(closure=lambda: acts.append("closure"))
    assert acts == ["action", *["closure", "action"] * 2]


def test_an_adapter_with_one_frozen_factor_is_skipped():
    model = prepared()
    layer = model[0].requires_grad_(False)
    layer.lora_a.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)
    model(torch.randn(5, 6)).square().mean().backward()
    before = layer.lora_a.detach().clone()
    plain = layer.lora_a.grad.clone()
    optimizer.step()
    torch.testing.assert_close(layer.lora_a, before - 0.1 * plain)


def test_an_adapter_with_alpha_zero_is_skipped():
    model = prepared()
    model[0].alpha = 0
    optimizer = torch.optim.SGD(cotolora.adapter_parameters(model), lr=0.1)
    attach(model, optimizer)
    before = [parameter.detach().clone() for parameter in model[0].adapter_parameters]
    model(torch.randn(5, 6)).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model[0].adapter_parameters, before, strict=True))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scale": 0}, "scale must be a finite number whose square is not 0; got 0"),
        ({"scale": 1e-200}, "scale must be"),
        ({"b": torch.ones(9, 4)}, r"b must be \[out_features, 3\] to fit a; got shape \(9, 4\)"),
        ({"grad_b": torch.ones(3, 9)}, r"grad_b must be of shape \(9, 3\); got shape \(3, 9\)"),
    ],
    ids=["no-scale", "tiny-scale", "rank", "transposed-gradient"],
)
def test_mismatched_arguments_are_named(change, match):
    a, b, _, grad_a, grad_b = problem()
    with pytest.raises(ValueError, match=match):
        adjusted(**{"a": a, "b": b, "grad_a": grad_a, "grad_b": grad_b, "scale": SCALE, **change})


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="model must have adapters; Linear has none"):
        attach(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer; got str"):
        attach(prepared(), "sgd")
