"""torch.library registrations over the Triton launchers, and the backend of plain LoRA built on them.

Imported only when the Triton backend runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cotolora.backends.addmm.lora import Needs, Saved, flat
from cotolora.backends.cost import ADDING, FORMS
from cotolora.kernels import adapter_grads as grads
from cotolora.kernels import hira as hiras
from cotolora.kernels import hira_grads as hira_gradients
from cotolora.kernels import low_rank_gemm as gemm
from cotolora.kernels import one_pass, one_pass_swapped
from cotolora.kernels import pre_expand as expands
from cotolora.kernels import row_norm as norms
from cotolora.kernels import shrink as shrinks
from cotolora.kernels.dropout import drawn_mask
from cotolora.reference import Gate

__all__ = ["FUSED", "Fused", "drawn_mask", "drawn_seed"]

# define and impl rather than custom_op: half the eager cost of a call
_library = torch.library.Library("cotolora", "DEF")
FORWARD = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? gate, Tensor? seed, float scale, float dropout"
)
# of DoRA: what the columns of y are multiplied by, and whether what is multiplied comes too
SCALED = "Tensor? column_scale=None, bool keep_u=False"
SCHEMAS = {
    "one_pass": f"({FORWARD}, {SCALED}) -> (Tensor, Tensor, Tensor)",
    "pre_expand": f"({FORWARD.replace('Tensor weight, ', '')}) -> (Tensor, Tensor)",
    "shrink": "(Tensor x, Tensor a, Tensor? gate, Tensor? seed, float scale, float dropout) -> Tensor",
    "low_rank_gemm": "(Tensor x, Tensor weight, Tensor? bias, Tensor h, Tensor b, Tensor? gate, Tensor? seed, "
    f"float dropout, Tensor? x_scale=None, {SCALED}) -> (Tensor, Tensor)",
    "expand": "(Tensor p, Tensor a, Tensor? add, Tensor? gate, Tensor? seed, float dropout) -> Tensor",
    "adapter_grads": "(Tensor dy, Tensor? x, Tensor? h, Tensor? b, Tensor? gate, Tensor? seed, float scale, "
    "float dropout, ScalarType dtype_a, ScalarType dtype_b, Tensor? column_scale=None, Tensor? norm=None, "
    "Tensor? u=None, ScalarType? dtype_m=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "row_norm": "(Tensor weight, Tensor a, Tensor b, float scale, Tensor? norm, Tensor? magnitude, Tensor? gate) "
    "-> (Tensor, Tensor)",
    "hira": f"({FORWARD}, bool drops_input) -> Tensor",
    "hira_grads": "(Tensor dy, Tensor x, Tensor weight, Tensor a, Tensor b, Tensor? gate, Tensor? seed, float scale, "
    "float dropout, ScalarType dtype_a, ScalarType dtype_b) -> (Tensor, Tensor)",
}
SWAPPED_MAX_M = 64


def _one_pass(x, weight, bias, a, b, gate, seed, scale, dropout, column_scale=None, keep_u=False):  # type: ignore[no-untyped-def]
    module = one_pass_swapped.one_pass_swapped if x.shape[0] <= SWAPPED_MAX_M else one_pass.one_pass
    u = x.new_empty(x.shape[0], weight.shape[0]) if keep_u else None
    made = module(x, weight, bias, a, b, gate, scale, seed=seed, dropout=dropout, column_scale=column_scale, u=u)
    return *made, x.new_empty(0) if u is None else u


def _pre_expand(x, bias, a, b, gate, seed, scale, dropout):  # type: ignore[no-untyped-def]
    return expands.pre_expand(x, bias, a, b, gate, scale, seed=seed, dropout=dropout)


def _shrink(x, a, gate, seed, scale, dropout):  # type: ignore[no-untyped-def]
    return shrinks.shrink(x, a, gate, scale, seed=seed, dropout=dropout)


def _low_rank_gemm(x, weight, bias, h, b, gate, seed, dropout, x_scale=None, column_scale=None, keep_u=False):  # type: ignore[no-untyped-def]
    u = x.new_empty(x.shape[0], weight.shape[0]) if keep_u else None
    scales = {"x_scale": x_scale, "column_scale": column_scale, "u": u}
    y = gemm.low_rank_gemm(x, weight, bias, h, b, gate, seed=seed, dropout=dropout, **scales)
    return y, x.new_empty(0) if u is None else u


def _expand(p, a, add, gate, seed, dropout):  # type: ignore[no-untyped-def]
    return expands.expand(p, a, gate, add=add, seed=seed, dropout=dropout)


def _adapter_grads(  # type: ignore[no-untyped-def]
    dy, x, h, b, gate, seed, scale, dropout, dtype_a, dtype_b, column_scale=None, norm=None, u=None, dtype_m=None
):
    dora = None if column_scale is None else grads.Dora(column_scale, norm, u, dtype_m or dy.dtype)
    made = grads.adapter_grads(dy, x, h, b, gate, scale, dtype_a, dtype_b, seed=seed, dropout=dropout, dora=dora)
    # an operator returns tensors: an empty one where nothing was asked for
    return tuple(dy.new_empty(0) if t is None else t for t in made)


def _hira(x, weight, bias, a, b, gate, seed, scale, dropout, drops_input):  # type: ignore[no-untyped-def]
    return hiras.hira(x, weight, bias, a, b, gate, scale, seed=seed, dropout=dropout, drops_input=drops_input)


def _hira_grads(dy, x, weight, a, b, gate, seed, scale, dropout, dtype_a, dtype_b):  # type: ignore[no-untyped-def]
    return hira_gradients.hira_grads(dy, x, weight, a, b, gate, scale, dtype_a, dtype_b, seed=seed, dropout=dropout)


def _linear_shapes(x, weight, bias, a, b, gate, seed, scale, dropout, column_scale=None, keep_u=False):  # type: ignore[no-untyped-def]
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, x.new_empty(x.shape[0], a.shape[0]), torch.empty_like(y) if keep_u else x.new_empty(0)


def _low_rank_gemm_shapes(x, weight, bias, h, b, gate, seed, dropout, x_scale=None, column_scale=None, keep_u=False):  # type: ignore[no-untyped-def]
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if keep_u else x.new_empty(0)


def _pre_expand_shapes(x, bias, a, b, gate, seed, scale, dropout):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


def _adapter_grads_shapes(  # type: ignore[no-untyped-def]
    dy, x, h, b, gate, seed, scale, dropout, dtype_a, dtype_b, column_scale=None, norm=None, u=None, dtype_m=None
):
    return (
        dy.new_empty(0) if b is None else dy.new_empty(dy.shape[0], b.shape[1]),
        dy.new_empty(0) if b is None or x is None else dy.new_empty(b.shape[1], x.shape[1], dtype=dtype_a),
        dy.new_empty(0) if h is None else dy.new_empty(dy.shape[1], h.shape[1], dtype=dtype_b),
        dy.new_empty(0) if h is None or u is None else dy.new_empty(dy.shape[1], dtype=dtype_m or dy.dtype),
    )


def _norm_shapes(weight, a, b, scale, norm, magnitude, gate):  # type: ignore[no-untyped-def]
    return tuple(weight.new_empty(weight.shape[0], dtype=torch.float32) for _ in range(2))


def _factor_shapes(dy, x, weight, a, b, gate, seed, scale, dropout, dtype_a, dtype_b):  # type: ignore[no-untyped-def]
    return torch.empty(a.shape, dtype=dtype_a, device=a.device), torch.empty(b.shape, dtype=dtype_b, device=b.device)


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "one_pass": (_one_pass, _linear_shapes),
    "pre_expand": (_pre_expand, _pre_expand_shapes),
    "shrink": (_shrink, lambda x, a, gate, seed, scale, dropout: x.new_empty(x.shape[0], a.shape[0])),
    "low_rank_gemm": (_low_rank_gemm, _low_rank_gemm_shapes),
    "expand": (_expand, lambda p, a, add, gate, seed, dropout: p.new_empty(p.shape[0], a.shape[1])),
    "adapter_grads": (_adapter_grads, _adapter_grads_shapes),
    "row_norm": (norms.row_norm, _norm_shapes),
    "hira": (_hira, lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0])),
    "hira_grads": (_hira_grads, _factor_shapes),
}
for _name, (_launch, _shapes) in _IMPLEMENTATIONS.items():
    _library.define(_name + SCHEMAS[_name])
    # on a CPU only Triton's interpreter can run it; dispatch sees to that
    _library.impl(_name, _launch, "CPU")
    _library.impl(_name, _launch, "CUDA")
    torch.library.register_fake(f"cotolora::{_name}", _shapes, lib=_library)


def drawn_seed(device: torch.device, dropout: float) -> Tensor | None:
    """The seed of a call's dropout mask, an int64 ``[]``; None where nothing is dropped."""
    # drawn on the device, from torch's generator: no sync, and a CUDA graph draws anew in every replay
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device) if dropout else None


@dataclass(frozen=True)
class Fused:
    """The Triton backend by one of the forms of `cotolora.backends.cost`; `forward` and `backward` as in `addmm`."""

    form: str

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        *,
        scale: float,
        gate: Gate,
        dropout: float,
        base: Tensor | None = None,
    ) -> tuple[Tensor, Saved]:
        """``y = x Wᵀ + bias + h Bᵀ``, or ``base + h Bᵀ``, with ``h = δ · scale · dropout(x) Aᵀ``."""
        lora_a, lora_b, rows = lora_a.to(x.dtype), lora_b.to(x.dtype), flat(x)
        device_gate = gate if isinstance(gate, Tensor) else None
        seed = drawn_seed(x.device, dropout)
        ops = torch.ops.cotolora
        if weight is None:
            assert base is not None
            h = ops.shrink(rows, lora_a, device_gate, seed, scale, dropout)
            y = ops.expand(h, lora_b.T, flat(base), device_gate, None, 0.0)
        elif self.form == "one_pass":
            y, h, _ = ops.one_pass(rows, weight, bias, lora_a, lora_b, device_gate, seed, scale, dropout)
        elif self.form == "low_rank_gemm":
            h = ops.shrink(rows, lora_a, device_gate, seed, scale, dropout)
            y, _ = ops.low_rank_gemm(rows, weight, bias, h, lora_b, device_gate, None, 0.0)
        else:
            y, h = ops.pre_expand(rows, bias, lora_a, lora_b, device_gate, seed, scale, dropout)
            y.addmm_(rows, weight.T)
        return y.view(*x.shape[:-1], lora_b.shape[0]), Saved(h, seed)

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
        r"""Gradients of x, weight, bias, A and B given ``dy [..., out]``, A's and B's in their own dtype.

        With ``p = δ · scale · dy B``, h as the forward saved it and D the dropout mask with its factor:

            dx = dy W + D ∘ (p A)      dA = pᵀ (D ∘ x)      dB = dyᵀ h      dW = dyᵀ x      dbias = Σ_rows dy
        """
        dx = dw = dbias = da = db = p = None
        rows, ops = flat(dy), torch.ops.cotolora
        device_gate = gate if isinstance(gate, Tensor) else None
        if needs.weight and x is not None:
            dw = rows.T @ flat(x)
        if needs.bias:
            dbias = rows.sum(0)
        if needs.lora_a or needs.lora_b or needs.x:
            p, da, db, _ = ops.adapter_grads(
                rows,
                flat(x) if needs.lora_a and x is not None else None,
                saved.h if needs.lora_b else None,
                lora_b.to(dy.dtype) if lora_b is not None and (needs.lora_a or needs.x) else None,
                device_gate, saved.keep, scale, dropout, needs.lora_a or dy.dtype, needs.lora_b or dy.dtype,
            )  # fmt: skip
        if needs.x and p is not None and lora_a is not None:
            lora_a = lora_a.to(dy.dtype)
            if weight is None:
                dx = ops.expand(p, lora_a, None, device_gate, saved.keep, dropout)
            elif self.form == "pre_expand":
                dx = ops.expand(p, lora_a, None, device_gate, saved.keep, dropout).addmm_(rows, weight)
            else:
                dx, _ = ops.low_rank_gemm(rows, weight.T, None, p, lora_a.T, device_gate, saved.keep, dropout)
            dx = dx.view(*dy.shape[:-1], lora_a.shape[1])
        return dx, dw, dbias, da if needs.lora_a else None, db if needs.lora_b else None


FUSED = {form: Fused(form) for form in (*FORMS, *ADDING)}
