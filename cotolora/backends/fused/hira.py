"""HiRA by the fused kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from cotolora.backends.addmm import hira as addmm
from cotolora.backends.addmm.products import flat, shaped_like
from cotolora.backends.fused.common import drawn_seed, mask_of_x, operators, why_not_fused
from cotolora.backends.types import Call, Gradients, Launch, Launches, Needs, Operands, Options


class SavedFusedHira(NamedTuple):
    """What the backward reads, None where it will not: of the operands, and the seed of the dropout mask."""

    x: Tensor | None
    weight: Tensor | None
    a: Tensor | None
    b: Tensor | None
    seed: Tensor | None


class FusedHira:
    """``y = x Wᵀ + bias + δ · (D x) (W ∘ scale · B A)ᵀ`` in one kernel."""

    def why_not(self, call: Call) -> list[str]:
        """The limits of the kernels."""
        return why_not_fused(call)

    def forward(self, operands: Operands, options: Options, needs: Needs) -> tuple[Tensor, SavedFusedHira]:
        """``B A`` is made tile by tile and never stored."""
        x, weight, bias, a, b, *_ = operands
        scale, dropout, gate = options
        assert weight is not None
        seed = drawn_seed(x.device, dropout)
        y = operators().hira(
            flat(x), weight, bias, a.to(x.dtype), b.to(x.dtype), gate, seed, scale, dropout, True
        )  # fmt: skip
        return y.view(*x.shape[:-1], weight.shape[0]), SavedFusedHira(*addmm.kept_by_hira(operands, needs), seed)

    def backward(self, dy: Tensor, saved: SavedFusedHira, options: Options, needs: Needs) -> Gradients:
        r"""t, the gradient of ``W ∘ B A``, is never stored.

        With ``t = scale · W ∘ dyᵀ (D x)`` of gated rows:

        dx = dy W + D ∘ (dy (W ∘ scale · B A))      dA = Bᵀ t      dB = t Aᵀ
        """
        x, weight, a, b, seed = saved
        scale, dropout, gate = options
        dx = dw = da = db = None
        rows, ops = flat(dy), operators()
        if needs.weight:
            only = Needs(weight=True)
            dw = addmm.BACKEND.backward(dy, self.saved_elsewhere(saved, dy, options), options, only).weight
        if a is not None and b is not None and weight is not None:
            a_cast, b_cast = a.to(dy.dtype), b.to(dy.dtype)
            if (needs.a or needs.b) and x is not None:
                da, db = ops.hira_grads(
                    rows, flat(x), weight, a_cast, b_cast, gate, seed, scale, dropout, a.dtype, b.dtype
                )  # fmt: skip
            if needs.x:
                dx = shaped_like(
                    ops.hira(rows, weight.T, None, b_cast.T, a_cast.T, gate, seed, scale, dropout, False), dy
                )
        return Gradients(
            dx, dw, rows.sum(0) if needs.bias else None, da if needs.a else None, db if needs.b else None
        )  # fmt: skip

    def launches(self, call: Call) -> Launches:
        """``B A`` is made anew for each 128 rows of x, and of dy."""
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
        """With the mask that the kernels drew."""
        x, weight, a, b, seed = saved
        return addmm.SavedHira(x, weight, a, b, mask_of_x(seed, dy, a, options.dropout))


BACKENDS = {"hira": FusedHira()}
