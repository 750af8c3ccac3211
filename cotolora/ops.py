"""torch.library registrations over the Triton launchers, and the backend built on them.

Imported only when the Triton backend runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cotolora import addmm
from cotolora.addmm import Saved, flat
from cotolora.kernels.one_pass import one_pass
from cotolora.reference import Gate

# define and impl rather than custom_op: half the eager cost of a call
_library = torch.library.Library("cotolora", "DEF")
_library.define(
    "one_pass(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? gate, float scale)"
    " -> (Tensor, Tensor)"
)


def _one_pass(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return one_pass(x, weight, bias, lora_a, lora_b, gate, scale)


def _one_pass_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, gate: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


# on a CPU only Triton's interpreter can run it; dispatch sees to that
_library.impl("one_pass", _one_pass, "CPU")
_library.impl("one_pass", _one_pass, "CUDA")
torch.library.register_fake("cotolora::one_pass", _one_pass_shapes, lib=_library)

# vendor GEMMs, from the h that the forward saved
backward = addmm.backward


def forward(
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
    """``y = x Wᵀ + bias + h Bᵀ`` with ``h = δ · scale · x Aᵀ`` in one launch; as `cotolora.addmm.forward`."""
    assert dropout == 0, "dispatch refuses dropout for the fused kernel"
    lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    device_gate = gate if isinstance(gate, Tensor) else None
    y, h = torch.ops.cotolora.one_pass(flat(x), weight, bias, lora_a, lora_b, device_gate, scale)
    return y.view(*x.shape[:-1], weight.shape[0]), Saved(h, None)
