"""Whole layers, forward and backward, with this library's own launchers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from cotolora import coto_lora_linear, reference
from cotolora.backends import choice
from cotolora.backends.fused import hira as fused_hira
from cotolora.backends.fused import lora as fused_lora
from cotolora.functional import add_low_rank
from cotolora.kernels import (
    adapter_grads,
    hira,
    hira_grads,
    low_rank_gemm,
    one_pass,
    one_pass_swapped,
    pre_expand,
    row_norm,
    shrink,
)
from cotolora.kernels.dropout import drawn_mask, keep_scale
from tests.ptx import launch

SCALE = 0.75
LAUNCHERS = (adapter_grads, hira, hira_grads, low_rank_gemm, one_pass, one_pass_swapped, pre_expand, row_norm, shrink)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


@contextmanager
def matmul_precision(dtype: str) -> Iterator[None]:
    """Sets torch's matmul precision: TF32 if `dtype` asks for it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def on(emulator, capability: int) -> Iterator[None]:
    """Inside the block, launches run in the emulator with the tiles of this GPU; empty tensors hold NaN."""
    with ExitStack() as stack:
        torch.use_deterministic_algorithms(True, warn_only=True)
        stack.callback(torch.use_deterministic_algorithms, False)
        arch = f"sm_{capability}"
        for module in (*LAUNCHERS, choice):
            stack.enter_context(mock.patch.object(module, "architecture", return_value=arch))
        stack.enter_context(mock.patch.object(choice, "why_not", return_value=[]))
        stack.enter_context(launch.launches(emulator, capability))
        yield


@dataclass(frozen=True)
class Case:
    form: str  # a fused kernel of LoRA; "expand" for add_low_rank; or "dora:" or "hira:" and a kernel
    dtype: str
    gate: str = "none"  # "on" and "off" are device gates; "rows", "rows off"
    m: int = 70
    n: int = 136
    k: int = 72
    rank: int = 5
    dropout: float = 0.0
    bias: bool = True
    layout: str = "plain"  # or "strided": all tensors are non-contiguous
    batch: int = 0  # batch size of x, with m // batch rows each; 0: no batch
    poison: bool = False  # whether A and B hold infinities and NaN

    def __str__(self) -> str:
        extra = f" dropout {self.dropout}" * bool(self.dropout) + " no bias" * (not self.bias)
        extra += f" {self.layout}" * (self.layout != "plain") + f" batch {self.batch}" * bool(self.batch)
        extra += " A, B not finite" * self.poison
        return f"{self.form} {self.dtype} gate {self.gate} {self.m}x{self.n}x{self.k} r{self.rank}{extra}"


@dataclass
class Outcome:
    """Per tensor: largest error, largest error of plain PyTorch in this dtype, and allowed error."""

    errors: dict[str, tuple[float, float, float]]

    @property
    def wrong(self) -> list[str]:
        return [
            f"{k} error {e:.2e}, PyTorch's {t:.2e}" for k, (e, t, allowed) in self.errors.items() if not e <= allowed
        ]

    @property
    def units(self) -> str:
        return " ".join(f"{k} {e / t if t else e:.2f}" for k, (e, t, _) in self.errors.items())


def operands(case: Case):
    torch.manual_seed(case.m + case.n + case.k + case.rank)
    dtype, m, n, k, r = DTYPES[case.dtype], case.m, case.n, case.k, case.rank

    def made(*size, scale=1.0):
        t = (torch.randn(*size) * scale).to(dtype)
        if case.layout == "strided" and len(size) == 2:  # a view of a larger tensor, with contiguous columns or not
            outer = torch.full((size[1] + 3, size[0] + 5), float("nan"), dtype=dtype)
            view = outer[1 : 1 + size[1], 2 : 2 + size[0]].t()
            view.copy_(t)
            return view
        return t

    x, weight, bias = made(m, k), made(n, k, scale=k**-0.5), made(n)
    a, b, dy = made(r, k, scale=k**-0.5), made(n, r, scale=r**-0.5), made(m, n)
    if case.poison:
        a[0, 0], b[0, 0], a[-1, -1], b[-1, -1] = float("inf"), float("nan"), float("nan"), float("-inf")
    magnitude = (torch.rand(n) + 0.5).to(dtype)
    gate = {
        "none": True,
        "on": torch.tensor(1, dtype=torch.int32),
        "off": torch.tensor(0, dtype=torch.int32),
        "rows": torch.arange(case.batch or m) % 3 != 1,
        "rows off": torch.zeros(case.batch or m, dtype=torch.bool),
    }[case.gate]
    if case.batch:
        x, dy = x.view(case.batch, -1, k), dy.view(case.batch, -1, n)
    return x, weight, bias if case.bias else None, a, b, magnitude, gate, dy


def step(case: Case, tensors, backend: str, mask=None, dtype=None):
    """y and every gradient; `mask` replaces the random dropout mask."""
    x, weight, bias, a, b, magnitude, gate, dy = tensors
    variant, _, form = case.form.rpartition(":")
    variant = variant or "lora"
    if dtype:
        x, weight, a, b, magnitude, dy = (t.to(dtype) for t in (x, weight, a, b, magnitude, dy))
        bias = None if bias is None else bias.to(dtype)
    names = ["x", "a", "b"] + ["m"] * (variant == "dora")
    leaves = {"x": x, "a": a, "b": b, "m": magnitude}
    leaves = {name: leaves[name].detach().requires_grad_() for name in names}
    options = {"scale": SCALE, "gate": gate, "dropout": case.dropout, "backend": backend}
    dropped = lambda t, p=0.0: t if mask is None else t * mask.view(t.shape) * keep_scale(p)  # noqa: E731
    with mock.patch.object(reference.F, "dropout", dropped) if mask is not None else ExitStack():
        if form == "expand":
            base = torch.nn.functional.linear(leaves["x"].detach(), weight, bias)
            y = add_low_rank(base, leaves["x"], leaves["a"], leaves["b"], **options)
        else:
            more = {"variant": variant} | ({"magnitude": leaves["m"]} if variant == "dora" else {})
            y = coto_lora_linear(leaves["x"], weight, bias, leaves["a"], leaves["b"], **options, **more)
        gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(names, gradients, strict=True)}


def run(case: Case, emulator, capability: int = 80) -> Outcome:
    """Runs one case and compares it with float64 on the same rounded operands."""
    tensors = operands(case)
    seeds = []

    def drawn_seed(device, dropout):
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64) if dropout else None
        seeds.append(seed)
        return seed

    form = "" if case.form == "expand" else ":" + case.form.rpartition(":")[2]
    with (
        matmul_precision(case.dtype),
        on(emulator, capability),
        mock.patch.object(fused_lora, "drawn_seed", drawn_seed),
        mock.patch.object(fused_hira, "drawn_seed", drawn_seed),
    ):
        got = step(case, tensors, "triton" + form)
    mask = None
    if case.dropout:
        mask = drawn_mask(seeds[0], case.m, case.k, case.dropout)
    exact = step(case, tensors, "reference", mask, torch.float64)
    plain = step(case, tensors, "reference", mask)
    # the sums of absolute values, which bound the float32 error of cancelling sums
    sizes = step(
        case,
        [t.abs() if getattr(t, "is_floating_point", bool)() else t for t in tensors],
        "reference",
        mask,
        torch.float64,
    )
    errors = {}
    for name, true in exact.items():
        finite = true.isfinite() & sizes[name].isfinite()  # all entries, unless A or B is not finite
        largest = lambda t: t[finite].abs().max().item() if finite.any() else 0.0  # noqa: B023, E731
        ours, torchs = (largest(t[name].double() - true) for t in (got, plain))
        eps = 2.0**-10 if case.dtype == "tf32" else torch.finfo(got[name].dtype).eps
        floor = eps * largest(true)
        if case.dtype == "tf32":  # operands are rounded to 10 bits, sums are not
            torchs = floor
        lost = (2.0**-11 if case.dtype == "tf32" else 2.0**-24) * largest(sizes[name])
        errors[name] = ours, torchs, 2 * torchs + floor + lost
        if not torch.equal(got[name].isfinite(), true.isfinite()):
            errors[name] = float("inf"), torchs, 0.0
    return Outcome(errors)
