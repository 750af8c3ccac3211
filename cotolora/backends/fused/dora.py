"""The Triton backends of DoRA and HiRA; imported only when they run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cotolora.backends.addmm import dora as addmm_dora
from cotolora.backends.addmm import hira as addmm_hira
from cotolora.backends.addmm.lora import Needs, Saved, flat
from cotolora.backends.cost import VARIANT_FORMS
from cotolora.backends.fused.ops import drawn_mask, drawn_seed
from cotolora.reference import Gate


@dataclass(frozen=True)
class FusedDora:
    """DoRA by one of the forms; `row_norms`, `forward` and `backward` as in `addmm_dora`. It takes no dropout."""

    form: str

    def row_norms(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
        """``‖W + scale · B A‖`` by rows, of A and B as cast to the dtype of W."""
        lora_a, lora_b = lora_a.to(weight.dtype), lora_b.to(weight.dtype)
        return torch.ops.cotolora.row_norm(weight, lora_a, lora_b, scale, None, None, None)[0]

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor,
        norm: Tensor | None,
        needs: Needs,
        *,
        scale: float,
        gate: Gate,
        dropout: float,
    ) -> tuple[Tensor, Saved]:
        """``y = c ∘ u + bias`` with ``u = x Wᵀ + h Bᵀ``, ``h = δ · scale · x Aᵀ``; a norm of None is computed.

        u is what is saved as `base`, if m needs a gradient: h Bᵀ is in it.
        """
        assert not dropout, "dispatch sends dropout elsewhere"
        lora_a, lora_b, rows = lora_a.to(x.dtype), lora_b.to(x.dtype), flat(x)
        device_gate = gate if isinstance(gate, Tensor) else None
        ops, keep_u = torch.ops.cotolora, needs.magnitude is not None
        norm, column = ops.row_norm(weight, lora_a, lora_b, scale, norm, magnitude, device_gate)
        if self.form == "one_pass":
            y, h, u = ops.one_pass(
                rows, weight, bias, lora_a, lora_b, device_gate, None, scale, 0.0, column, keep_u
            )  # fmt: skip
        else:
            h = ops.shrink(rows, lora_a, device_gate, None, scale, 0.0)
            y, u = ops.low_rank_gemm(rows, weight, bias, h, lora_b, device_gate, None, 0.0, None, column, keep_u)
        y = y.view(*x.shape[:-1], weight.shape[0])
        return y, Saved(h, None, column, *((norm, u) if keep_u else (None, None)))

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        saved: Saved,
        needs: Needs,
        *,
        scale: float,
        gate: Gate,
        dropout: float,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        r"""Gradients of x, weight, bias, A, B and m: those of LoRA with ``c ∘ dy`` in place of dy.

        With ``p = δ · scale · dy (c ∘ B)``:

            dx = (c ∘ dy) W + p A      dA = pᵀ x      dB = c ∘ dyᵀ h      dm = Σ_rows dy ∘ u / norm
        """
        dx = dw = da = db = dm = p = None
        rows, ops = flat(dy), torch.ops.cotolora
        device_gate = gate if isinstance(gate, Tensor) else None
        options: dict[str, Any] = {"scale": scale, "gate": gate, "dropout": dropout}
        if needs.weight:
            only = Needs(None, needs.weight, None, None, None)
            dw = addmm_dora.backward(dy, x, weight, lora_a, lora_b, Saved(None, None, saved.column), only, **options)[1]
        if needs.x or needs.lora_a or needs.lora_b or needs.magnitude:
            p, da, db, dm = ops.adapter_grads(
                rows,
                flat(x) if needs.lora_a and x is not None else None,
                saved.h if needs.lora_b or needs.magnitude else None,
                lora_b.to(dy.dtype) if lora_b is not None and (needs.lora_a or needs.x) else None,
                device_gate, None, scale, 0.0, needs.lora_a or dy.dtype, needs.lora_b or dy.dtype,
                saved.column, saved.norm, saved.base if needs.magnitude else None, needs.magnitude,
            )  # fmt: skip
        if needs.x and p is not None and weight is not None and lora_a is not None:
            across = lora_a.to(dy.dtype).T
            dx, _ = ops.low_rank_gemm(rows, weight.T, None, p, across, device_gate, None, 0.0, saved.column)
            dx = dx.view(*dy.shape[:-1], weight.shape[1])
        return (
            dx, dw, rows.sum(0) if needs.bias else None,
            da if needs.lora_a else None, db if needs.lora_b else None, dm if needs.magnitude else None,
        )  # fmt: skip


class FusedHira:
    """HiRA in one kernel; `forward` and `backward` as in `addmm_hira`."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        *,
        scale: float,
        gate: Gate,
        dropout: float,
    ) -> tuple[Tensor, Saved]:
        """``y = x Wᵀ + bias + δ · (D x) (W ∘ scale · B A)ᵀ``."""
        lora_a, lora_b, rows = lora_a.to(x.dtype), lora_b.to(x.dtype), flat(x)
        device_gate, seed = gate if isinstance(gate, Tensor) else None, drawn_seed(x.device, dropout)
        y = torch.ops.cotolora.hira(rows, weight, bias, lora_a, lora_b, device_gate, seed, scale, dropout, True)
        return y.view(*x.shape[:-1], weight.shape[0]), Saved(None, seed)

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        saved: Saved,
        needs: Needs,
        *,
        scale: float,
        gate: Gate,
        dropout: float,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        r"""Gradients of x, weight, bias, A and B.

        With ``t = scale · W ∘ dyᵀ (D x)`` of gated rows, never stored:

        dx = dy W + D ∘ (dy (W ∘ scale · B A))      dA = Bᵀ t      dB = t Aᵀ
        """
        dx = dw = da = db = None
        rows, seed, ops = flat(dy), saved.keep, torch.ops.cotolora
        device_gate = gate if isinstance(gate, Tensor) else None
        if needs.weight and x is not None:
            keep = None if seed is None else drawn_mask(seed, rows.shape[0], x.shape[-1], dropout).view(x.shape)
            only = Needs(None, needs.weight, None, None, None)
            options: dict[str, Any] = {"scale": scale, "gate": gate, "dropout": dropout}
            dw = addmm_hira.backward(dy, x, weight, lora_a, lora_b, Saved(None, keep), only, **options)[1]
        if lora_a is not None and lora_b is not None and weight is not None:
            lora_a, lora_b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
            if (needs.lora_a or needs.lora_b) and x is not None:
                da, db = ops.hira_grads(
                    rows, flat(x), weight, lora_a, lora_b, device_gate, seed, scale, dropout,
                    needs.lora_a or dy.dtype, needs.lora_b or dy.dtype,
                )  # fmt: skip
            if needs.x:
                dx = ops.hira(
                    rows, weight.T, None, lora_b.T, lora_a.T, device_gate, seed, scale, dropout, False
                ).view(*dy.shape[:-1], weight.shape[1])  # fmt: skip
        return (
            dx, dw, rows.sum(0) if needs.bias else None, da if needs.lora_a else None, db if needs.lora_b else None
        )  # fmt: skip


FUSED = {
    **{("dora", form): FusedDora(form) for form in VARIANT_FORMS["dora"]},
    **{("hira", form): FusedHira() for form in VARIANT_FORMS["hira"]},
}
