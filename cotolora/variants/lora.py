"""Plain LoRA."""

from __future__ import annotations

from cotolora import reference
from cotolora.backends.addmm import lora as by_addmm
from cotolora.backends.fused import lora as by_kernels
from cotolora.variants.base import PeftMethod, Variant


class Lora(Variant):
    """``y = x Wᵀ + bias + δ · scale · (D x Aᵀ) Bᵀ``."""

    name = "lora"
    definition = staticmethod(reference.lora_linear)
    addition = staticmethod(reference.add_low_rank)
    addmm = by_addmm.BACKEND
    addmm_adding = by_addmm.BACKEND
    fused = by_kernels.BACKENDS
    fused_adding = by_kernels.ADDITION_FORMS
    measured = True
    product = True
    peft = PeftMethod("LORA", flags={"use_dora": False}, fields={"bias": "none"})
