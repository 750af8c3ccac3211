"""Every fused kernel, by name, under torch.compile: its result and gradients equal those of eager mode.

On a CPU the traced graphs run with interpreted kernels; on a GPU, inductor compiles them, except with dropout.
"""

from functools import partial

import pytest
import torch

from cotolora import coto_lora_linear
from cotolora.functional import add_low_rank
from cotolora.variants import VARIANTS

pytest.importorskip("triton")

SCALE = 0.75
FORMS = [(variant, form) for variant in VARIANTS for form in VARIANTS[variant].fused]
GATES = {
    "always on": (None,),
    "one gate": (torch.tensor(1, dtype=torch.int32), torch.tensor(0, dtype=torch.int32)),
    "rows": (torch.tensor([1, 0, 1]), torch.tensor([0, 0, 0])),
}


def operands(variant, m, device):
    """x, weight, bias, A, B and DoRA's m, of the same sizes for every variant."""
    g = torch.Generator().manual_seed(0)
    sizes = {"x": (3, m // 3, 40), "weight": (24, 40), "bias": (24,), "lora_a": (5, 40), "lora_b": (24, 5)}
    made = {name: torch.randn(*size, generator=g) / size[-1] ** 0.5 for name, size in sizes.items()}
    if variant == "dora":
        made["magnitude"] = made["weight"].norm(dim=1) + 0.1
    return {name: t.to(device) for name, t in made.items()}


def grads_of(call, named, gate, leaves):
    """The result of `call` and the gradients of `leaves`, with a fixed seed."""
    given = {name: t.clone().requires_grad_(name in leaves) for name, t in named.items()}
    torch.manual_seed(3)
    out = call(given, gate)
    dy = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    grads = torch.autograd.grad(out, [given[name] for name in leaves], dy)
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


def check(call, named, gates, leaves, backend):
    torch.compiler.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for gate in gates:
        gate = None if gate is None else gate.to(named["x"].device)
        expected, found = (grads_of(one, named, gate, leaves) for one in (call, compiled))
        for name, t in found.items():
            torch.testing.assert_close(t, expected[name], msg=lambda text, name=name: f"{name}: {text}")
        off = gate is not None and not gate.any()
        assert all(found[name].any() != off for name in ("lora_a", "lora_b"))
    torch.compiler.reset()


def compiler(device, dropout):
    # with dropout only aot_eager, because inductor draws the seeds from another generator
    return "inductor" if device.type == "cuda" and not dropout else "aot_eager"


def called(variant, form, dropout):
    """The operation with a backend by name, as a function of its operands and a gate."""

    def call(given, gate):
        return coto_lora_linear(
            **given, scale=SCALE, gate=True if gate is None else gate, dropout=dropout, backend=f"triton:{form}",
            variant=variant,
        )  # fmt: skip

    return call


def added(given, gate, dropout=0.0):
    """The low-rank update added to the output of a base."""
    return add_low_rank(**given, scale=SCALE, gate=gate, dropout=dropout, backend="triton")


def beside(named):
    """The operands of `added`, made from those of a linear."""
    y = torch.nn.functional.linear(named["x"], named["weight"], named["bias"])
    return {"y": y} | {name: named[name] for name in ("x", "lora_a", "lora_b")}


def kinds():
    """Yields (variant, backend, gates, dropout, rows)."""
    for variant, form in FORMS:
        yield variant, form, "one gate", 0.0, 96
        yield variant, form, "rows", 0.0 if variant == "dora" else 0.3, 96  # DoRA's kernels do not support dropout
        if form == "one_pass":  # it uses another kernel for few rows
            yield variant, form, "always on", 0.0, 6


@pytest.mark.parametrize(("variant", "form", "gates", "dropout", "rows"), list(kinds()))
def test_compiling_keeps_the_gradients(variant, form, gates, dropout, rows, device):
    named = operands(variant, rows, device)
    leaves = [name for name in named if name != "weight"]
    check(called(variant, form, dropout), named, GATES[gates], leaves, compiler(device, dropout))


@pytest.mark.parametrize(("gates", "dropout"), [("one gate", 0.0), ("rows", 0.3)])
def test_compiling_an_added_update_keeps_the_gradients(gates, dropout, device):
    named = beside(operands("lora", 96, device))
    check(partial(added, dropout=dropout), named, GATES[gates], list(named), compiler(device, dropout))


@pytest.mark.parametrize(("variant", "form"), [*FORMS, ("lora", "expand")])
def test_no_product_is_written_in_place_while_tracing(variant, form, device, monkeypatch):
    """torch.compile of torch 2.11 computes zero gradients for outputs that are written in place."""

    def forbidden(*_, **__):
        raise AssertionError("written in place")

    named = operands(variant, 96, device)
    named, call = (beside(named), added) if form == "expand" else (named, called(variant, form, 0.0))
    monkeypatch.setattr(torch.Tensor, "addmm_", forbidden)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    grads_of(call, named, torch.tensor(1, device=device), ["x", "lora_a", "lora_b"])
