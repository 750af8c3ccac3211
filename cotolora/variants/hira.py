"""HiRA, a high-rank update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cotolora import reference
from cotolora.backends.addmm import hira as by_addmm
from cotolora.backends.fused import hira as by_kernels
from cotolora.variants.base import PeftMethod, Variant, lora_a, lora_b, without_scale


class Hira(Variant):
    """``y = x (W ∘ (1 + scale · B A))ᵀ + bias``."""

    name = "hira"
    definition = staticmethod(reference.hira_linear)
    addmm = by_addmm.BACKEND
    fused = by_kernels.BACKENDS
    parts = (lora_a("hira_A"), lora_b("hira_B"))
    low_rank = "s B A (W is then multiplied by it entry by entry)"
    inits = ("kaiming", "gaussian")  # the others initialise B A as a part of W, but the update here is W ∘ B A
    # PEFT (as of 0.21) writes a rank_pattern for HiRA, but does not apply it
    peft = PeftMethod(
        "HIRA", dropout="hira_dropout", init="init_weights", default_rank=32, scaled=False, patterned=False
    )

    def delta(self, weight: Tensor | None, a: Tensor, b: Tensor, extra: Sequence[Tensor], scale: float) -> Tensor:
        """``W ∘ scale · B A``."""
        assert weight is not None
        return weight.detach().to(a.dtype) * (scale * (b @ a))

    def saved(self, tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        """Multiplies the scale, which PEFT does not have, into B."""
        b = tensors["lora_b"]
        return tensors | {"lora_b": b.to(torch.promote_types(b.dtype, torch.float32)) * scale}

    def loaded(self, tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        """Divides B by the scale of the layer."""
        return tensors | {"lora_b": without_scale(tensors["lora_b"], scale)}
