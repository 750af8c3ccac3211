"""DoRA by the fused kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cotolora.backends.addmm import dora as addmm
from cotolora.backends.addmm.products import cast, flat, shaped_like, switch
from cotolora.backends.fused import lora
from cotolora.backends.fused.common import Fused, repeatable
from cotolora.backends.types import Call, Gradients, Launch, Launches, Needs, Operands, Options


class SavedFusedDora(NamedTuple):
    """The tensors for the backward, None for those that it does not read.

    x, weight, a, b: the operands.
    h: ``δ · scale · x Aᵀ``, ``[rows, rank]``, in the dtype of x.
    column_scale: c, ``[out_features]``; 1 if the adapter is inactive in all rows.
    norm: the row norms ``‖W + scale · B A‖``, ``[out_features]``.
    u: ``x Wᵀ + h Bᵀ``, ``[rows, out_features]``, which c multiplies.
    """

    x: Tensor | None
    weight: Tensor | None
    a: Tensor | None
    b: Tensor | None
    h: Tensor | None
    column_scale: Tensor
    norm: Tensor | None
    u: Tensor | None


@repeatable
def launch_forward(
    ops: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gate: Tensor | None, scale: float,
    known_norm: Tensor | None, magnitude: Tensor, keep_u: bool, form: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns y, h, the column scale, the row norms and u; the last two are None unless `keep_u`."""
    norm, column_scale = ops.row_norm(weight, a, b, scale, known_norm, magnitude, gate)
    if form == "one_pass":
        y, h, u = ops.one_pass(x, weight, bias, a, b, gate, None, scale, 0.0, column_scale, keep_u)
    else:
        h = ops.shrink(x, a, gate, None, scale, 0.0)
        y, u = ops.low_rank_gemm(x, weight, bias, h, b, gate, None, 0.0, None, column_scale, keep_u)
    return y, h, column_scale, *((norm, u) if keep_u else (None, None))


@repeatable
def launch_backward(
    ops: Any, dy: Tensor, x: Tensor | None, weight: Tensor | None, a: Tensor | None, b: Tensor | None, h: Tensor | None,
    gate: Tensor | None, scale: float, column_scale: Tensor, norm: Tensor | None, u: Tensor | None,
    dtype_a: torch.dtype, dtype_b: torch.dtype,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns dx, dA, dB and dm; each is None if an operand that it needs is None."""
    dtype_m = None if u is None else torch.float32
    p, da, db, dm = ops.adapter_grads(
        dy, x, h, b, gate, None, scale, 0.0, dtype_a, dtype_b, column_scale, norm, u, dtype_m
    )
    dx = None
    if a is not None:
        dx, _ = ops.low_rank_gemm(dy, weight.T, None, p, a.T, gate, None, 0.0, column_scale)  # type: ignore[union-attr]
    return dx, da if x is not None else None, db if h is not None else None, dm if u is not None else None


@repeatable
def launch_row_norms(ops: Any, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns the row norms ``‖W + scale · B A‖``, ``[out_features]``."""
    return ops.row_norm(weight, a, b, scale, None, None, None)[0]  # type: ignore[no-any-return]


class FusedDora(Fused):
    """``y = c ∘ u + bias`` with ``u = x Wᵀ + h Bᵀ`` and ``h = δ · scale · x Aᵀ``. Does not support dropout.

    Our own GEMMs scale the columns of their result. A vendor GEMM would need another pass over y for that, so there is
    no form pre_expand.
    """

    def __init__(self, form: str) -> None:
        self.form = form

    def why_not(self, call: Call) -> list[str]:
        """Every limit of the kernels that the call exceeds, and dropout."""
        dropout = "DoRA with dropout takes a second product with W, which no fused form supports"
        return super().why_not(call) + ([dropout] if call.dropout else [])

    def row_norms(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """The row norms ``‖W + scale · B A‖``, ``[out_features]``."""
        return launch_row_norms(False, weight, cast(a, weight.dtype), cast(b, weight.dtype), scale)  # type: ignore[no-any-return]

    def forward(self, operands: Operands, options: Options, needs: Needs) -> tuple[Tensor, SavedFusedDora]:
        """Launches one kernel more than LoRA, which computes c."""
        x, weight, bias, a, b, (magnitude, *known_norm), _ = operands
        scale, _, gate = options
        assert weight is not None
        for_magnitude = bool(needs.extra) and needs.extra[0]
        y, h, column_scale, norm, u = launch_forward(
            self.only_prepared, flat(x), weight, bias, cast(a, x.dtype), cast(b, x.dtype), gate, scale,
            known_norm[0] if known_norm else None, magnitude, for_magnitude, self.form,
        )  # fmt: skip
        kept = lora.kept_by_fused(operands, needs)
        return shaped_like(y, x), SavedFusedDora(
            *kept, h if needs.b or for_magnitude else None, column_scale, norm, u
        )  # fmt: skip

    def backward(self, dy: Tensor, saved: SavedFusedDora, options: Options, needs: Needs) -> Gradients:
        r"""The gradients of LoRA with ``c ∘ dy`` in place of dy, and that of m.

        With ``p = δ · scale · dy (c ∘ B)``:

        dx = (c ∘ dy) W + p A      dA = pᵀ x      dB = c ∘ dyᵀ h      dm = Σ_rows dy ∘ u / norm
        """
        x, weight, a, b, h, column_scale, norm, u = saved
        scale, _, gate = options
        for_magnitude, for_p = bool(needs.extra) and needs.extra[0], needs.x or needs.a
        dx = dw = da = db = dm = None
        rows, dtype = flat(dy), dy.dtype
        if needs.weight and x is not None:
            dw = addmm.weight_gradient(dy, x, x, column_scale, switch(gate, dy))
        if for_p or needs.b or for_magnitude:
            dx, da, db, dm = launch_backward(
                self.only_prepared,
                rows,
                flat(x) if needs.a and x is not None else None,
                weight,
                cast(a, dtype) if needs.x and a is not None else None,
                cast(b, dtype) if for_p and b is not None else None,
                h, gate, scale, column_scale, norm, u, dtype if a is None else a.dtype, dtype if b is None else b.dtype,
            )  # fmt: skip
        return Gradients(
            None if dx is None else shaped_like(dx, dy),
            dw,
            rows.sum(0) if needs.bias else None,
            da,
            db if needs.b else None,
            (dm, None),
        )

    def launches(self, call: Call) -> Launches:
        """The launches of LoRA and one more kernel; u is written in addition to y."""
        sizes = call.sizes
        assert sizes is not None
        bytes_of = sizes.bytes
        (*before, last), (first, *rest), _ = lora.BACKENDS[self.form].launches(call)
        return Launches(
            (
                Launch("row_norm", bytes_of("w", "a", "b")),
                *before,
                last._replace(bytes=last.bytes + bytes_of("u")),
            ),
            (first._replace(bytes=first.bytes + bytes_of("u")), *rest),
            bytes_of("h", "u") + 8 * sizes.n,
        )

    def saved_elsewhere(self, saved: SavedFusedDora, dy: Tensor, options: Options) -> addmm.SavedDora:
        """As the addmm backend saves it: with ``x Wᵀ`` instead of u, which contains ``h Bᵀ`` too."""
        x, weight, a, b, h, column_scale, norm, u = saved
        product = None
        if u is not None:
            assert h is not None
            assert b is not None
            product = torch.addmm(u, h, b.to(u.dtype).T, alpha=-1)
        return addmm.SavedDora(x, weight, a, b, h, None, column_scale, norm, product, None)


BACKENDS = {form: FusedDora(form) for form in ("one_pass", "low_rank_gemm")}
