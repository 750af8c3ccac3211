"""What every operation of this library means, in plain PyTorch. Autograd does the backward.

Nothing here is fast and everything else is tested against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Gate = bool | Tensor


def rows_on(gate: Tensor, x: Tensor) -> Tensor:
    """The gate as a boolean mask that broadcasts against ``x [..., features]``.

    ``gate []`` gives ``[]``; ``gate [batch]`` gives ``[batch, 1, ..., 1]``, as many dimensions as `x` has.
    """
    on = gate != 0
    return on if on.dim() == 0 else on.view(-1, *[1] * (x.dim() - 1))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    gate: Gate = True,
    dropout: float = 0.0,
) -> Tensor:
    r"""Linear layer plus a gated low-rank update: ``x Wᵀ + bias + δ · scale · (dropout(x) Aᵀ) Bᵀ``.

    Off is a selection, never a product with zero: where δ is 0 the result is the base linear's own
    and no gradient reaches A or B, even if they hold infinities.

    Args:
        x: inputs, ``[..., in_features]``.
        weight: base weight, ``[out_features, in_features]``.
        bias: base bias, ``[out_features]``, or None.
        lora_a: down-projection A, ``[rank, in_features]``; cast to the dtype of `x`.
        lora_b: up-projection B, ``[out_features, rank]``; cast to the dtype of `x`.
        scale: ``alpha / rank``, or ``alpha / √rank`` for rsLoRA.
        gate: δ. A bool, a 0-dim tensor, or a tensor ``[batch]`` with one gate per ``x[i]``.
        dropout: probability of zeroing an entry of the adapter's input, the rest scaled by ``1 / (1 - dropout)``.

    Returns:
        ``[..., out_features]``, in the dtype of `x`.

    Source: LoRA, Hu et al. 2021, eq. 3 (arXiv:2106.09685); δ is the activation indicator of CoTo,
    Zhuang et al. 2025, section 3 (arXiv:2506.05713).
    """
    return add_low_rank(F.linear(x, weight, bias), x, lora_a, lora_b, scale=scale, gate=gate, dropout=dropout)


def add_low_rank(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float, gate: Gate = True, dropout: float = 0.0
) -> Tensor:
    r"""The low-rank update alone, added to what some base has made of x: ``y + δ · scale · (dropout(x) Aᵀ) Bᵀ``.

    ``h = dropout(x) Aᵀ`` is computed in the dtype of `x`; it and B are then cast to that of `y`, which is the result's.
    `y` is ``[..., out_features]``; the other arguments are as in `lora_linear`. Where δ is 0 the result is `y`.
    """
    if gate is False:
        return y
    lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(y.dtype)
    if gate is True:
        h = F.dropout(x, dropout) @ lora_a.T
        return y + scale * (h.to(y.dtype) @ lora_b.T)

    on = rows_on(gate, x)
    # selecting before and after each product keeps 0 · inf out of the gradients as well
    selected = torch.where(on, F.dropout(x, dropout), 0)
    h = torch.where(on, selected @ lora_a.T, 0)
    if on.dim() == 0:
        lora_b = torch.where(on, lora_b, 0)
    return torch.where(on, y + scale * (h.to(y.dtype) @ lora_b.T), y)
