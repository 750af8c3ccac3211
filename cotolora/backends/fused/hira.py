"""HiRA by the fused kernels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cotolora.backends.addmm import hira as addmm
from cotolora.backends.addmm.products import cast, flat, shaped_like
from cotolora.backends.fused.common import Fused, drawn_seed, mask_of_x, repeatable
from cotolora.backends.types import Call, Gradients, Launch, Launches, Needs, Operands, Options


class SavedFusedHira(NamedTuple):
    """The tensors for the backward, or None: operands, and the seed of the dropout mask."""

    x: Tensor | None
    weight: Tensor | None
    a: Tensor | None
    b: Tensor | None
    seed: Tensor | None


@repeatable
def launch_forward(
    ops: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gate: Tensor | None,
    seed: Tensor | None, scale: float, dropout: float,
) -> Tensor:  # fmt: skip
    """Returns y."""
    return ops.hira(x, weight, bias, a, b, gate, seed, scale, dropout, True)  # type: ignore[no-any-return]


@repeatable
def launch_backward(
    ops: Any, dy: Tensor, x: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, gate: Tensor | None,
    seed: Tensor | None, scale: float, dropout: float, dtype_a: torch.dtype, dtype_b: torch.dtype, for_x: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns dx, dA and dB; the last two are None without x."""
    dx = da = db = None
    if x is not None:
        da, db = ops.hira_grads(dy, x, weight, a, b, gate, seed, scale, dropout, dtype_a, dtype_b)
    if for_x:
        dx = ops.hira(dy, weight.T, None, b.T, a.T, gate, seed, scale, dropout, False)
    return dx, da, db


class FusedHira(Fused):
    """``y = x Wᵀ + bias + δ · (D x) (W ∘ scale · B A)ᵀ`` in one kernel."""

    def forward(self, operands: Operands, options: Options, needs: Needs) -> tuple[Tensor, SavedFusedHira]:
        """Launches one kernel, which computes ``B A`` tile by tile and does not store it."""
        x, weight, bias, a, b, *_ = operands
        scale, dropout, gate = options
        assert weight is not None
        seed, a, b = drawn_seed(x.device, dropout), cast(a, x.dtype), cast(b, x.dtype)
        y = launch_forward(self.only_prepared, flat(x), weight, bias, a, b, gate, seed, scale, dropout)
        return shaped_like(y, x), SavedFusedHira(*addmm.kept_by_hira(operands, needs), seed)

    def backward(self, dy: Tensor, saved: SavedFusedHira, options: Options, needs: Needs) -> Gradients:
        r"""The gradients, without storing t, the gradient of ``B A``.

        With ``t = scale · W ∘ dyᵀ (D x)`` over active rows:

        dx = dy W + D ∘ (dy (W ∘ scale · B A))      dA = Bᵀ t      dB = t Aᵀ
        """
        x, weight, a, b, seed = saved
        scale, dropout, gate = options
        dx = dw = da = db = None
        rows, dtype = flat(dy), dy.dtype
        if needs.weight:
            only = Needs(weight=True)
            dw = addmm.BACKEND.backward(dy, self.saved_elsewhere(saved, dy, options), options, only).weight
        if a is not None and b is not None and weight is not None:
            dx, da, db = launch_backward(
                self.only_prepared,
                rows,
                flat(x) if (needs.a or needs.b) and x is not None else None,
                weight, cast(a, dtype), cast(b, dtype), gate, seed, scale, dropout, a.dtype, b.dtype, needs.x,
            )  # fmt: skip
            dx = None if dx is None else shaped_like(dx, dy)
        return Gradients(
            dx, dw, rows.sum(0) if needs.bias else None, da if needs.a else None, db if needs.b else None
        )  # fmt: skip

    def launches(self, call: Call) -> Launches:
        """The launches; ``B A`` is computed again for each 128 rows of x and of dy."""
        sizes = call.sizes
        assert sizes is not None
        bytes_of, products = sizes.bytes, sizes.products
        ranks = 2 * sizes.n * sizes.k * max(16, sizes.rank)
        again = math.ceil(sizes.m / 128) * ranks
        parts = 4 * sizes.rank * (math.ceil(sizes.n / 128) * sizes.k + math.ceil(sizes.k / 128) * sizes.n)
        moved = bytes_of("x", "w", "y", "a", "b")
        return Launches(
            (Launch("hira", moved, 2 * products + again, "pointer_gemm"),),
            (
                Launch("hira_grads", moved + parts, products + 2 * ranks, "pointer_gemm"),
                Launch("sum_partials", parts + bytes_of("a", "b")),
                Launch("hira", moved, 2 * products + again, "pointer_gemm"),
            ),
            8 if call.dropout else 0,
        )

    def saved_elsewhere(self, saved: SavedFusedHira, dy: Tensor, options: Options) -> addmm.SavedHira:
        """As the addmm backend saves it: with the mask that the kernels draw from the seed."""
        x, weight, a, b, seed = saved
        return addmm.SavedHira(x, weight, a, b, mask_of_x(seed, dy, a, options.dropout))


BACKENDS = {"hira": FusedHira()}
