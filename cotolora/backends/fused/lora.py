"""LoRA by the fused kernels, one backend for each of their forms."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cotolora.backends.addmm import lora as addmm
from cotolora.backends.addmm.products import cast, flat, shaped_like
from cotolora.backends.fused.common import Fused, drawn_seed, mask_of_x, repeatable
from cotolora.backends.fused.stacked import STACKED
from cotolora.backends.types import (
    Call,
    Gradients,
    Kept,
    Launch,
    Launches,
    Needs,
    Operands,
    Options,
    Sizes,
    Stacked,
    kept_by_lora,
)

# up to this many rows, one_pass consists of two kernels that put W on the 64-row side of the matrix units
SWAPPED_ROWS = 64


class SavedFusedLora(NamedTuple):
    """The tensors for the backward, None for those that it does not read.

    x, weight, a, b: the operands.
    h: ``δ · scale · dropout(x) Aᵀ``, ``[rows, rank]``, in the dtype of x.
    seed: int64 ``[]``, from which the kernels draw the same dropout mask again.
    """

    x: Tensor | None
    weight: Tensor | None
    a: Tensor | None
    b: Tensor | None
    h: Tensor | None
    seed: Tensor | None


def kept_by_fused(operands: Operands, needs: Needs) -> Kept:
    """As `kept_by_lora`, but always with A and B, because their gradients are written in their dtypes."""
    kept = kept_by_lora(operands, needs)
    return kept._replace(a=operands.a, b=operands.b) if needs.a or needs.b or any(needs.extra) else kept


@repeatable
def launch_forward(
    ops: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gate: Tensor | None,
    seed: Tensor | None, scale: float, dropout: float, form: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns y and h of `form`; with pre_expand, y does not contain ``x Wᵀ``."""
    if form == "one_pass":
        y, h, _ = ops.one_pass(x, weight, bias, a, b, gate, seed, scale, dropout)
    elif form == "low_rank_gemm":
        h = ops.shrink(x, a, gate, seed, scale, dropout)
        y, _ = ops.low_rank_gemm(x, weight, bias, h, b, gate, None, 0.0)
    else:
        y, h = ops.pre_expand(x, bias, a, b, gate, seed, scale, dropout)
    return y, h


@repeatable
def launch_backward(
    ops: Any, dy: Tensor, x: Tensor | None, weight: Tensor | None, a: Tensor | None, b: Tensor | None, h: Tensor | None,
    gate: Tensor | None, seed: Tensor | None, scale: float, dropout: float, dtype_a: torch.dtype, dtype_b: torch.dtype,
    form: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns dx, dA and dB; each is None if an operand that it needs is None.

    With pre_expand and expand, dx does not contain ``dy W``.
    """
    p, da, db, _ = ops.adapter_grads(dy, x, h, b, gate, seed, scale, dropout, dtype_a, dtype_b)
    dx = None
    if a is not None and form in ("pre_expand", "expand"):
        dx = ops.expand(p, a, None, gate, seed, dropout)
    elif a is not None:
        dx, _ = ops.low_rank_gemm(dy, weight.T, None, p, a.T, gate, seed, dropout)  # type: ignore[union-attr]
    return dx, da if x is not None else None, db if h is not None else None


def backward_of_factors(
    backend: Fused, form: str, dy: Tensor, saved: SavedFusedLora, options: Options, needs: Needs, with_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `launch_backward`, for the required gradients; `with_x`: whether dx can be computed."""
    x, weight, a, b, h, seed = saved
    scale, dropout, gate = options
    if not (needs.x or needs.a or needs.b):
        return None, None, None
    dtype = dy.dtype
    return launch_backward(
        backend.only_prepared,
        flat(dy),
        flat(x) if needs.a and x is not None else None,
        weight,
        cast(a, dtype) if a is not None and needs.x and with_x and b is not None else None,
        cast(b, dtype) if b is not None and (needs.a or needs.x) else None,
        h if needs.b else None,
        gate, seed, scale, dropout, dtype if a is None else a.dtype, dtype if b is None else b.dtype, form,
    )  # fmt: skip


class FusedLora(Fused):
    """``y = x Wᵀ + bias + h Bᵀ`` with ``h = δ · scale · dropout(x) Aᵀ``."""

    def __init__(self, form: str) -> None:
        self.form = form

    def forward(self, operands: Operands, options: Options, needs: Needs) -> tuple[Tensor, SavedFusedLora]:
        """one_pass: one kernel. low_rank_gemm: h, then y. pre_expand: ``h Bᵀ + bias``, then a vendor GEMM adds x Wᵀ."""
        x, weight, bias, a, b, *_ = operands
        scale, dropout, gate = options
        assert weight is not None
        rows, seed, a, b = flat(x), drawn_seed(x.device, dropout), cast(a, x.dtype), cast(b, x.dtype)
        y, h = launch_forward(
            self.only_prepared, rows, weight, bias, a, b, gate, seed, scale, dropout, self.form
        )  # fmt: skip
        if self.form == "pre_expand":
            y = addmm.add_product(y, rows, weight.T)
        saved = SavedFusedLora(*kept_by_fused(operands, needs), h if needs.b else None, seed)
        return shaped_like(y, x), saved

    def backward(self, dy: Tensor, saved: SavedFusedLora, options: Options, needs: Needs) -> Gradients:
        r"""The gradients, from the h that the forward saved.

        With ``p = δ · scale · dy B`` and D the dropout mask times ``1 / (1 - dropout)``:

        dx = dy W + D ∘ (p A)      dA = pᵀ (D ∘ x)      dB = dyᵀ h      dW = dyᵀ x      dbias = Σ_rows dy
        """
        x, weight = saved.x, saved.weight
        rows = flat(dy)
        dw = rows.T @ flat(x) if needs.weight and x is not None else None
        dx, da, db = backward_of_factors(self, self.form, dy, saved, options, needs, weight is not None)
        if dx is not None:
            if self.form == "pre_expand":
                dx = addmm.add_product(dx, rows, weight)  # type: ignore[arg-type]
            dx = shaped_like(dx, dy)
        return Gradients(dx, dw, rows.sum(0) if needs.bias else None, da, db)

    def launches(self, call: Call) -> Launches:
        """The launches of the form; omits the casts of A, B and their gradients with a bfloat16 x."""
        sizes = call.sizes
        assert sizes is not None
        bytes_of, products = sizes.bytes, sizes.products
        saved_bytes = bytes_of("h") + (8 if call.dropout else 0)
        for_factors = launches_of_factors(sizes)
        dx = Launch("low_rank_gemm", bytes_of("dy", "w", "dx", "p", "a"), products, "gemm")
        if self.form == "one_pass":
            # h is computed again for each tile of 128 columns of y
            ranks = 2 * sizes.m * sizes.k * max(16, sizes.rank) * math.ceil(sizes.n / 128)
            moved = bytes_of("x", "w", "y", "a", "b", "h")
            if sizes.m <= SWAPPED_ROWS:
                forward = (Launch("stacked", moved, products), Launch("finish", bytes_of("y", "h", "b")))
                return Launches(forward, (*for_factors, dx), saved_bytes)
            one = Launch("one_pass", moved, products + ranks, "masking_gemm" if call.dropout else "pointer_gemm")
            return Launches((one,), (*for_factors, dx), saved_bytes)
        if self.form == "low_rank_gemm":
            gemm = Launch("low_rank_gemm", bytes_of("x", "w", "y", "h", "b"), products, "gemm")
            return Launches((Launch("shrink", bytes_of("x", "a", "h")), gemm), (*for_factors, dx), saved_bytes)
        return Launches(
            (
                Launch("pre_expand", bytes_of("x", "a", "h", "b", "y")),
                Launch("addmm_", bytes_of("x", "w", "y", "y"), products),
            ),
            (
                *for_factors,
                Launch("pre_expand", bytes_of("p", "a", "dx")),
                Launch("addmm_", bytes_of("dy", "w", "dx", "dx"), products),
            ),
            saved_bytes,
        )

    def stacked(self, call: Call) -> Stacked | None:
        """Without dropout. one_pass computes h in its GEMM, where nothing can be shared: it gives way to another."""
        if call.dropout:
            return None
        return STACKED["low_rank_gemm" if self.form == "one_pass" else self.form, self.only_prepared]

    def saved_elsewhere(self, saved: SavedFusedLora, dy: Tensor, options: Options) -> addmm.SavedLora:
        """See `saved_by_addmm`."""
        return saved_by_addmm(saved, dy, options)


@repeatable
def launch_addition(
    ops: Any, x: Tensor, a: Tensor, b: Tensor, base: Tensor, gate: Tensor | None, seed: Tensor | None, scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns y and h."""
    h = ops.shrink(x, a, gate, seed, scale, dropout)
    return ops.expand(h, b.T, base, gate, None, 0.0), h


class FusedAdding(Fused):
    """``y = base + h Bᵀ`` for the output of a base module, which must have the dtype of x."""

    def forward(self, operands: Operands, options: Options, needs: Needs) -> tuple[Tensor, SavedFusedLora]:
        """Launches two kernels: one for h, one for the sum."""
        x, _, _, a, b, _, base = operands
        scale, dropout, gate = options
        assert base is not None
        seed, a, b = drawn_seed(x.device, dropout), cast(a, x.dtype), cast(b, x.dtype)
        y, h = launch_addition(self.only_prepared, flat(x), a, b, flat(base), gate, seed, scale, dropout)
        return shaped_like(y, x), SavedFusedLora(*kept_by_fused(operands, needs), h if needs.b else None, seed)

    def backward(self, dy: Tensor, saved: SavedFusedLora, options: Options, needs: Needs) -> Gradients:
        """As `FusedLora.backward`, with ``dx = D ∘ (p A)``."""
        dx, da, db = backward_of_factors(self, "expand", dy, saved, options, needs, True)
        return Gradients(None if dx is None else shaped_like(dx, dy), None, None, da, db)

    def launches(self, call: Call) -> Launches:
        """The launches: two forward and five backward."""
        sizes = call.sizes
        assert sizes is not None
        bytes_of = sizes.bytes
        return Launches(
            (Launch("shrink", bytes_of("x", "a", "h")), Launch("pre_expand", bytes_of("h", "b", "y", "y"))),
            (*launches_of_factors(sizes), Launch("pre_expand", bytes_of("p", "a", "dx"))),
            bytes_of("h") + (8 if call.dropout else 0),
        )

    def saved_elsewhere(self, saved: SavedFusedLora, dy: Tensor, options: Options) -> addmm.SavedLora:
        """See `saved_by_addmm`."""
        return saved_by_addmm(saved, dy, options)


def launches_of_factors(sizes: Sizes) -> tuple[Launch, ...]:
    """The launches for the gradients of A and B, and for p."""
    return (
        Launch("project", sizes.bytes("dy", "h", "b", "p", "b")),
        Launch("sum_partials", sizes.bytes("p", "p")),
        Launch("gram", sizes.bytes("x", "p", "a")),
        Launch("sum_partials", sizes.bytes("a", "b")),
    )


def saved_by_addmm(saved: SavedFusedLora, dy: Tensor, options: Options) -> addmm.SavedLora:
    """As the addmm backend saves it: with the mask that the kernels draw, and in float32 h divided by the scale."""
    x, weight, a, b, h, seed = saved
    if h is not None and h.dtype is torch.float32 and options.scale:
        h = h / options.scale
    return addmm.SavedLora(x, weight, a, b, h, mask_of_x(seed, dy, a, options.dropout))


BACKENDS = {form: FusedLora(form) for form in ("one_pass", "low_rank_gemm", "pre_expand")}
ADDITION_FORMS = {"expand": FusedAdding()}
