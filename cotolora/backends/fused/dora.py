"""DoRA by the fused kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cotolora.backends.addmm import dora as addmm
from cotolora.backends.addmm.products import flat, shaped_like, switch
from cotolora.backends.fused import lora
from cotolora.backends.fused.common import operators, why_not_fused
from cotolora.backends.types import Call, Gradients, Launch, Launches, Needs, Operands, Options


class SavedFusedDora(NamedTuple):
    """What the backward reads, None where it will not.

    x, weight, a, b: of the operands.
    h: ``δ · scale · x Aᵀ [rows, rank]``, in the dtype of x.
    column_scale: c ``[out_features]``; 1 where the whole call is off.
    norm: ``‖W + scale · B A‖`` by rows, ``[out_features]``.
    u: what c multiplies, ``x Wᵀ + h Bᵀ [rows, out_features]``.
    """

    x: Tensor | None
    weight: Tensor | None
    a: Tensor | None
    b: Tensor | None
    h: Tensor | None
    column_scale: Tensor
    norm: Tensor | None
    u: Tensor | None


class FusedDora:
    """``y = c ∘ u + bias`` with ``u = x Wᵀ + h Bᵀ`` and ``h = δ · scale · x Aᵀ``. It takes no dropout.

    It scales the columns of what our own GEMMs make, which a vendor's would leave to a pass over y: so there is no form
    pre_expand.
    """

    def __init__(self, form: str) -> None:
        self.form = form

    def why_not(self, call: Call) -> list[str]:
        """The limits of the kernels, and dropout."""
        dropout = "DoRA with dropout takes a second product with W, which no fused form has"
        return why_not_fused(call) + ([dropout] if call.dropout else [])

    def row_norms(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """``‖W + scale · B A‖`` by rows."""
        a, b = a.to(weight.dtype), b.to(weight.dtype)
        return operators().row_norm(weight, a, b, scale, None, None, None)[0]

    def forward(self, operands: Operands, options: Options, needs: Needs) -> tuple[Tensor, SavedFusedDora]:
        """One kernel more than LoRA, for c."""
        x, weight, bias, a, b, (magnitude, *known_norm), _ = operands
        scale, _, gate = options
        assert weight is not None
        rows, a_cast, b_cast, ops = flat(x), a.to(x.dtype), b.to(x.dtype), operators()
        for_magnitude = bool(needs.extra) and needs.extra[0]
        norm, column_scale = ops.row_norm(
            weight, a_cast, b_cast, scale, known_norm[0] if known_norm else None, magnitude, gate
        )
        if self.form == "one_pass":
            y, h, u = ops.one_pass(
                rows, weight, bias, a_cast, b_cast, gate, None, scale, 0.0, column_scale, for_magnitude
            )  # fmt: skip
        else:
            h = ops.shrink(rows, a_cast, gate, None, scale, 0.0)
            y, u = ops.low_rank_gemm(
                rows, weight, bias, h, b_cast, gate, None, 0.0, None, column_scale, for_magnitude
            )  # fmt: skip
        saved = SavedFusedDora(
            *lora.kept_by_fused(operands, needs),
            h if needs.b or for_magnitude else None,
            column_scale,
            *((norm, u) if for_magnitude else (None, None)),
        )
        return y.view(*x.shape[:-1], weight.shape[0]), saved

    def backward(self, dy: Tensor, saved: SavedFusedDora, options: Options, needs: Needs) -> Gradients:
        r"""Those of LoRA with ``c ∘ dy`` in place of dy.

        With ``p = δ · scale · dy (c ∘ B)``:

        dx = (c ∘ dy) W + p A      dA = pᵀ x      dB = c ∘ dyᵀ h      dm = Σ_rows dy ∘ u / norm
        """
        x, weight, a, b, h, column_scale, norm, u = saved
        scale, _, gate = options
        for_magnitude = bool(needs.extra) and needs.extra[0]
        dx = dw = p = da = db = dm = None
        rows, ops = flat(dy), operators()
        if needs.weight and x is not None:
            dw = addmm.weight_gradient(dy, x, x, column_scale, switch(gate, dy))
        if needs.x or needs.a or needs.b or for_magnitude:
            p, da, db, dm = ops.adapter_grads(
                rows,
                flat(x) if needs.a and x is not None else None,
                h,
                b.to(dy.dtype) if b is not None and (needs.a or needs.x) else None,
                gate, None, scale, 0.0,
                dy.dtype if a is None else a.dtype, dy.dtype if b is None else b.dtype,
                column_scale, norm, u, torch.float32 if for_magnitude else None,
            )  # fmt: skip
        if needs.x and p is not None and weight is not None and a is not None:
            dx, _ = ops.low_rank_gemm(rows, weight.T, None, p, a.to(dy.dtype).T, gate, None, 0.0, column_scale)
            dx = shaped_like(dx, dy)
        return Gradients(
            dx,
            dw,
            rows.sum(0) if needs.bias else None,
            da if needs.a else None,
            db if needs.b else None,
            (dm if for_magnitude else None, None),
        )

    def launches(self, call: Call) -> Launches:
        """As LoRA's, with one kernel more, and u beside y."""
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
        """Without ``h Bᵀ`` in what m's gradient is taken from."""
        x, weight, a, b, h, column_scale, norm, u = saved
        product = None
        if u is not None:
            assert h is not None
            assert b is not None
            product = torch.addmm(u, h, b.to(u.dtype).T, alpha=-1)
        return addmm.SavedDora(x, weight, a, b, h, None, column_scale, norm, product, None)


BACKENDS = {form: FusedDora(form) for form in ("one_pass", "low_rank_gemm")}
