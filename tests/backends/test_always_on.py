"""The fast path for calls without a gate: bitwise equal to the general path, and used only when it applies."""

import pytest
import torch

from cotolora import coto_lora_linear, set_backend
from cotolora.backends import autograd
from cotolora.functional import planned
from cotolora.variants import VARIANTS

HAVE = [
    (variant, name)
    for variant, kind in VARIANTS.items()
    for name, b in kind.backends.items()
    if hasattr(b, "always_on")
]
SCALE = 0.7  # not a power of two, so that another order of multiplications changes the result


def operands(shape, rank=4, out_features=24, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(out_features, shape[-1], dtype=dtype)
    a, b = torch.randn(rank, shape[-1]), torch.randn(out_features, rank)
    return x, weight, torch.randn(out_features, dtype=dtype) if bias else None, a.requires_grad_(), b.requires_grad_()


@pytest.fixture
def taken(monkeypatch):
    """The names of the plans that used the fast path."""
    seen = []
    forward = autograd.AlwaysOnLowRankLinear.forward

    def counted(ctx, plan, *args):
        seen.append(plan.name)
        return forward(ctx, plan, *args)

    monkeypatch.setattr(autograd.AlwaysOnLowRankLinear, "forward", staticmethod(counted))
    return seen


@pytest.mark.parametrize(
    "shape", [(1, 16), (63, 16), (64, 16), (394, 16), (2, 3, 16), (4, 25, 16), (0, 16), (16,)], ids=str
)
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("variant", "name"), HAVE)
def test_it_equals_the_general_path_bitwise(variant, name, dtype, shape, rank, bias):
    x, weight, bias, a, b = operands(shape, rank, bias=bias, dtype=dtype)
    plan = planned(VARIANTS[variant], x, rank, shape[-1], weight.shape[0], SCALE, 0.0, name)
    ours = autograd.apply_always_on(plan, x, weight, bias, a, b)
    usual = autograd.apply_directly(plan, x, weight, bias, a, b, None, None)
    dy = torch.randn_like(ours)
    for one, other in zip((ours, *torch.autograd.grad(ours, (x, a, b), dy)),
                          (usual, *torch.autograd.grad(usual, (x, a, b), dy)), strict=True):  # fmt: skip
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def call(x, weight, bias, a, b, **options):
    return coto_lora_linear(x, weight, bias, a, b, scale=SCALE, backend="addmm", **options)


def test_a_plain_call_takes_it(taken):
    call(*operands((3, 16)))
    assert taken == ["addmm"]


@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
def test_a_bfloat16_call_takes_it_with_a_and_b_of_any_dtype(taken, of):
    x, weight, bias, a, b = operands((3, 16), dtype=torch.bfloat16)
    a, b = (t.detach().to(of).requires_grad_() for t in (a, b))
    call(x, weight, bias, a, b).sum().backward()
    assert taken
    assert a.grad.dtype == b.grad.dtype == of


def test_a_call_under_autocast_takes_it_with_the_same_bits(taken):
    x, weight, bias, a, b = operands((3, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(x, weight, bias, a, b)
    assert taken
    by_hand = call(*(t.bfloat16() for t in (x, weight, bias)), a, b)
    for one, other in zip((y, *torch.autograd.grad(y.float().sum(), (x, a, b))),
                          (by_hand, *torch.autograd.grad(by_hand.float().sum(), (x, a, b))), strict=True):  # fmt: skip
        assert torch.equal(one, other)


CASES = {
    "device gate": lambda x, w, bias, a, b: call(x, w, bias, a, b, gate=torch.tensor(True)),
    "row gate": lambda x, w, bias, a, b: call(x, w, bias, a, b, gate=torch.tensor([1, 0, 1])),
    "dropout": lambda x, w, bias, a, b: call(x, w, bias, a, b, dropout=0.5),
    "A frozen": lambda x, w, bias, a, b: call(x, w, bias, a.detach(), b),
    "B frozen": lambda x, w, bias, a, b: call(x, w, bias, a, b.detach()),
    "W trained": lambda x, w, bias, a, b: call(x, w.requires_grad_(), bias, a, b),
    "bias trained": lambda x, w, bias, a, b: call(x, w, bias.requires_grad_(), a, b),
    "A and B in bfloat16": lambda x, w, bias, a, b: call(x, w, bias, a.bfloat16(), b.bfloat16()),
}


@pytest.mark.parametrize("case", CASES)
def test_other_calls_do_not_take_it(case, taken):
    CASES[case](*operands((3, 16))).float().sum().backward()
    with torch.no_grad():
        call(*operands((3, 16)))
    with set_backend("reference"):
        coto_lora_linear(*operands((3, 16)), scale=SCALE)
    assert not taken


def test_without_a_gradient_of_x_the_weight_is_not_saved(taken):
    x, weight, bias, a, b = operands((3, 16))
    y = call(x.detach(), weight, bias, a, b)
    assert taken
    kept = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert all(t.data_ptr() != weight.data_ptr() for t in kept)
    weight.zero_()  # must not raise in backward: the weight is not saved
    y.sum().backward()


def test_a_second_derivative_raises(taken):
    x, weight, bias, a, b = operands((3, 16))
    for of in (x, a, b):
        (first,) = torch.autograd.grad(call(x, weight, bias, a, b).square().sum(), of, create_graph=True)
        for towards in (x, a, b):
            with pytest.raises(RuntimeError, match="has no double backward"):
                torch.autograd.grad(first.square().sum(), towards, retain_graph=True)
    assert taken
