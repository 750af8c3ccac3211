"""DoRA, which learns the norm of each row of W separately."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cotolora import reference
from cotolora.backends.addmm import dora as by_addmm
from cotolora.backends.fused import dora as by_kernels
from cotolora.backends.types import Backend
from cotolora.variants.base import Part, PeftMethod, Variant, lora_a, lora_b

if TYPE_CHECKING:
    from cotolora.linear import CoToLoRALinear


class Dora(Variant):
    """``y = c ∘ (x Wᵀ + scale · (x Aᵀ) Bᵀ) + bias`` with ``c = m / ‖W + scale · B A‖`` per row."""

    name = "dora"
    definition = staticmethod(reference.dora_linear)
    addmm = by_addmm.BACKEND
    fused = by_kernels.BACKENDS
    parts = (lora_a(), lora_b(), Part("lora_magnitude", ("out_features",), "lora_magnitude_vector", "magnitude"))
    trained = ("lora_a", "lora_b", "lora_magnitude")
    low_rank = "s B A (the rows of W + s B A then get the lengths m)"
    peft = PeftMethod("LORA", flags={"use_dora": True}, fields={"bias": "none"})

    def constants(
        self, backend: Backend | None, weight: Tensor, a: Tensor, b: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        """The row norms from W before the cast, so that a new layer has c = 1."""
        row_norms = reference.row_norms if backend is None else backend.row_norms  # type: ignore[attr-defined]
        with torch.no_grad():
            return (row_norms(weight, a, b, scale),)

    def start(self, layer: CoToLoRALinear, weight: Tensor | None) -> None:
        """Sets m to the row norms of W, since the update is zero initially."""
        assert weight is not None
        assert layer.lora_magnitude is not None
        if not weight.is_meta:
            zero = torch.zeros_like(layer.lora_b)
            layer.lora_magnitude.copy_(by_addmm.row_norms(weight, layer.lora_a, zero, layer.scale))

    def delta(self, weight: Tensor | None, a: Tensor, b: Tensor, extra: Sequence[Tensor], scale: float) -> Tensor:
        """``c ∘ (W + scale · B A) − W``."""
        assert weight is not None
        weight, (magnitude,) = weight.detach().to(a.dtype), extra
        c = reference.column_scale(magnitude, reference.row_norms(weight, a, b, scale))
        return c[:, None] * (weight + scale * (b @ a)) - weight
