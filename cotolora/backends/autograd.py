"""The autograd Function that joins a backend's forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cotolora.backends import choice as dispatch
from cotolora.backends.addmm.lora import Needs, Saved
from cotolora.reference import Gate


class LowRankLinear(torch.autograd.Function):
    """Joins a backend's forward and backward, of any variant, of a base given by its weight or by its output `base`.

    DoRA's take `magnitude`, `norm` and `needs` beside the operands of the others, and give one gradient more.

    Old style (the context comes with the forward): half the eager cost of a setup_context Function.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor | None,
        base: Tensor | None,
        norm: Tensor | None,
        scale: float,
        gate: Gate,
        dropout: float,
        variant: str,
        backend: str,
        fall_back: bool,
    ) -> Tensor:
        """Runs the backend and saves what the gradients asked for will need."""
        for_x, for_weight, for_bias, for_a, for_b, for_magnitude, ctx.for_base = ctx.needs_input_grad[:7]
        needs = Needs(
            x.dtype if for_x else None,
            weight.dtype if for_weight and weight is not None else None,
            bias.dtype if for_bias and bias is not None else None,
            lora_a.dtype if for_a else None,
            lora_b.dtype if for_b else None,
            magnitude.dtype if for_magnitude and magnitude is not None else None,
        )
        operands: tuple[Any, ...] = (x, weight, bias, lora_a, lora_b)
        if variant == "dora":
            operands += (magnitude, norm, needs)
        options: dict[str, Any] = {"scale": scale, "gate": gate, "dropout": dropout}
        if base is not None:
            options["base"] = base
        try:
            y, saved = dispatch.kernels(backend, variant).forward(*operands, **options)
        except Exception as error:
            if not fall_back:
                raise
            dispatch.note_failure(backend, error)
            backend, fall_back = "addmm", False
            y, saved = dispatch.kernels("addmm", variant).forward(*operands, **options)
        if backend.startswith("triton") and not torch.compiler.is_compiling():
            dispatch.note_run(backend, x.dtype, lora_a.shape[0], variant)
        ctx.needs, ctx.scale, ctx.dropout, ctx.backend, ctx.fall_back = needs, scale, dropout, backend, fall_back
        ctx.variant, ctx.x_shape = variant, x.shape
        ctx.gate = gate if isinstance(gate, bool) else None
        # HiRA's gradients of A and B are taken from that of W ∘ B A, which is of x, W and the other factor
        product = variant == "hira"
        ctx.save_for_backward(
            x if needs.lora_a or needs.weight or (product and needs.lora_b) else None,
            weight if needs.x or (product and (needs.lora_a or needs.lora_b)) else None,
            # B's gradient has h for it, but a second differentiation is noticed by A's presence
            lora_a if needs.x or needs.lora_b or (product and (needs.weight or needs.lora_a)) else None,
            lora_b
            if needs.x or needs.lora_a or needs.magnitude or (product and (needs.weight or needs.lora_b))
            else None,
            magnitude,
            None if isinstance(gate, bool) else gate,
            saved.h if needs.lora_b or needs.magnitude else None,
            saved.keep if needs.lora_a or needs.x or variant != "lora" else None,
            *saved[2:],
        )
        # autograd forbids writing in place to a view made in here, as that of a y of three dimensions
        return y if torch.compiler.is_compiling() or not y._is_view() else y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients, which raise if they are differentiated."""
        rest = (dy if ctx.for_base else None, *_NO_MORE)
        if not (recorded := torch.is_grad_enabled()) and not autocasts(dy.device):
            return *LowRankLinear.gradients(ctx, dy), *rest
        # backward may be called inside an autocast region, which must not recast what forward settled
        with torch.no_grad(), without_autocast(dy.device):
            gradients = LowRankLinear.gradients(ctx, dy)
        if not recorded:
            return *gradients, *rest
        # requires_grad marks them as depending on the inputs, which no_grad hid from autograd; the inputs go
        # along because autograd.grad visits only what leads to the tensors it is asked about
        marked = (None if g is None else g.detach().requires_grad_() for g in gradients)
        return *_OnlyOnce.apply(ctx.backend, *marked, dy, *ctx.saved_tensors[:5]), *rest

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Those asked for, of x, weight, bias, A, B and magnitude; grad mode and autocast are off."""
        x, weight, lora_a, lora_b, _, gate, *saved = ctx.saved_tensors
        gate = ctx.gate if gate is None else gate
        options: dict[str, Any] = {"scale": ctx.scale, "gate": gate, "dropout": ctx.dropout}
        operands = (dy, x, weight, lora_a, lora_b)
        try:
            gradients = dispatch.kernels(ctx.backend, ctx.variant).backward(
                *operands, Saved(*saved), ctx.needs, **options
            )
        except Exception as error:
            if not ctx.fall_back:
                raise
            dispatch.note_failure(ctx.backend, error)
            if saved[1] is not None:
                saved[1] = dispatch.drawn_mask(saved[1], ctx.x_shape, ctx.dropout)
            if ctx.variant == "dora" and ctx.needs.magnitude:
                # the fused forms keep u, in which h Bᵀ is
                saved[4] = torch.addmm(saved[4], saved[0], lora_b.to(dy.dtype).T, alpha=-1)
            gradients = dispatch.kernels("addmm", ctx.variant).backward(*operands, Saved(*saved), ctx.needs, **options)
        return gradients if ctx.variant == "dora" else (*gradients, None)


# of norm, scale, gate, dropout, variant, backend and fall_back
_NO_MORE = (None,) * 7


class _OnlyOnce(torch.autograd.Function):
    """Hands six gradients on unchanged and raises if someone differentiates them, towards whatever they came from."""

    @staticmethod
    def forward(ctx: Any, backend: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.backend = backend
        return tensors[:6]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        backend = ctx.backend.partition(":")[0]
        raise RuntimeError(
            f"backend={backend!r} has no double backward; call coto_lora_linear or the layer with "
            "backend='reference' (or set_backend('reference')) to differentiate twice"
        )


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for `device`."""
    # in a tenth of the time, but not of every device
    if device.type in ("cpu", "cuda") and not torch._C._is_any_autocast_enabled():
        return False
    # asking about meta, which has no autocast, raises
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which autocast casts nothing on `device`."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
