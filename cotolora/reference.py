"""Reference implementations of every operation of this library, in plain PyTorch with autograd.

They define the results that all backends are tested against, and are not optimised.
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

    An inactive adapter is left out by selection, never by multiplying with zero: where δ is 0 the result
    is exactly the base output and A and B receive no gradient, even if they hold infinities.

    Args:
        x: inputs, ``[..., in_features]``.
        weight: base weight, ``[out_features, in_features]``.
        bias: base bias, ``[out_features]``, or None.
        lora_a: down-projection A, ``[rank, in_features]``; cast to the dtype of `x`.
        lora_b: up-projection B, ``[out_features, rank]``; cast to the dtype of `x`.
        scale: ``alpha / rank``, or ``alpha / √rank`` for rsLoRA.
        gate: δ. A bool, a 0-dim tensor, or a tensor ``[batch]`` with one gate per ``x[i]``.
        dropout: probability of zeroing an entry of the adapter's input; the others are scaled by ``1 / (1 - dropout)``.

    Returns:
        ``[..., out_features]``, in the dtype of `x`.

    Source: LoRA, Hu et al. 2021, eq. 3 (arXiv:2106.09685); δ is the activation indicator of CoTo,
    Zhuang et al. 2025, section 3 (arXiv:2506.05713).
    """
    return add_low_rank(F.linear(x, weight, bias), x, lora_a, lora_b, scale=scale, gate=gate, dropout=dropout)


def add_low_rank(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float, gate: Gate = True, dropout: float = 0.0
) -> Tensor:
    r"""Adds the low-rank update to the output `y` of a base layer: ``y + δ · scale · (dropout(x) Aᵀ) Bᵀ``.

    ``h = dropout(x) Aᵀ`` is computed in the dtype of `x`; h and B are then cast to the dtype of `y`, which is also the
    dtype of the result. `y` is ``[..., out_features]``; the other arguments are as in `lora_linear`. Where δ is 0 the
    result is `y`.
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


def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The row norms ``‖W + scale · B A‖``, ``[out_features]``, without gradients.

    Computed in float32, or in float64 if `weight` is float64. A and B are first cast to the dtype of `weight`, the
    dtype in which they are multiplied with x; PEFT does not cast them. Under autocast `weight` is W before the cast,
    here and in PEFT.

    Source: DoRA, Liu et al. 2024, eq. 5 and section 4.3, "treating ‖V + ΔV‖ as a constant" (arXiv:2402.09353).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    lora_a, lora_b = (factor.detach().to(weight.dtype).to(dtype) for factor in (lora_a, lora_b))
    weight = weight.detach().to(dtype)
    return torch.linalg.vector_norm(weight + scale * (lora_b @ lora_a), dim=1)


def column_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``c = m / norm``, ``[out_features]``, in the dtype of `norm`; 1 where the norm is 0 (a row without direction)."""
    return torch.where(norm == 0, 1, magnitude.to(norm.dtype) / torch.where(norm == 0, 1, norm))


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    norm: Tensor | None = None,
    *,
    scale: float,
    gate: Gate = True,
    dropout: float = 0.0,
) -> Tensor:
    r"""Gated DoRA, which learns the norm of each row of W separately: ``y = c ∘ (x Wᵀ + scale · (x Aᵀ) Bᵀ) + bias``.

    ``c = m / ‖W + scale · B A‖`` with the norm of each row, which gets no gradient. With dropout D, as in PEFT,

        y = x Wᵀ + bias + δ · [(c − 1) ∘ (D x) Wᵀ + c ∘ scale · (D x Aᵀ) Bᵀ]

    This equals the first formula if nothing is dropped, and the base output if c = 1 and B = 0. Without dropout
    ``x Wᵀ`` is taken as the base output minus the bias.
    c and the products with it are float32 (float64 if x is), and their sum is rounded once, to the dtype of x.

    The paper has no dropout. PEFT differs in two points: it divides by row norms of 0 (here c is 1 and m gets no
    gradient), and it computes in the dtype of A and B instead of the dtype of x.

    Args:
        x, weight, bias, lora_a, lora_b, scale, gate, dropout: as in `lora_linear`; m has no effect where δ is 0.
        magnitude: m, ``[out_features]``.
        norm: ``row_norms(weight, lora_a, lora_b, scale)`` if the caller has it; None computes it.

    Returns:
        ``[..., out_features]``, in the dtype of `x`.

    Source: DoRA, Liu et al. 2024, eq. 5 and 11 with section 4.3 (arXiv:2402.09353); PEFT 0.21.2, `DoraLinearLayer`.
    """
    base = F.linear(x, weight, bias)
    if gate is False:
        return base
    if norm is None:
        norm = row_norms(weight, lora_a, lora_b, scale)
    lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    dropped = F.dropout(x, dropout)
    product = dropped @ weight.T if dropout else base if bias is None else base - bias
    if gate is True:
        c = column_scale(magnitude, norm)
        update = (c - 1) * product + c * (scale * ((dropped @ lora_a.T) @ lora_b.T))
        return (base + update).to(x.dtype)

    on = rows_on(gate, x)
    # as in add_low_rank: selecting on both sides of each product keeps 0 · inf out of the gradients as well
    lora_b, magnitude, norm = (torch.where(on.any(), t, 1) for t in (lora_b, magnitude, norm))
    c = torch.where(on, column_scale(magnitude, norm), 1)
    h = torch.where(on, torch.where(on, dropped, 0) @ lora_a.T, 0)
    update = (c - 1) * torch.where(on, product, 0) + c * (scale * (h @ lora_b.T))
    return torch.where(on, base + update, base).to(x.dtype)


def hira_linear(
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
    r"""Gated HiRA, a high-rank update: ``y = x (W ∘ (1 + scale · B A))ᵀ + bias``.

    With dropout D, as in PEFT, ``y = x Wᵀ + bias + δ · (D x) (W ∘ scale · B A)ᵀ``. The sum
    ``1 + scale · B A`` is never computed: in bfloat16 it would round away updates below 1/256.

    The paper and PEFT have no scale; ``alpha = rank`` gives the same result.

    Args:
        x, weight, bias, lora_a, lora_b, scale, gate, dropout: as in `lora_linear`.

    Returns:
        ``[..., out_features]``, in the dtype of `x`.

    Source: HiRA, Huang et al., ICLR 2025, section 3 (openreview.net/forum?id=TwJrTz9cRS); PEFT 0.21.2, `HiraLayer`.
    """
    base = F.linear(x, weight, bias)
    if gate is False:
        return base
    lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    dropped = F.dropout(x, dropout)
    if gate is True:
        return base + dropped @ (weight * (scale * (lora_b @ lora_a))).T

    on = rows_on(gate, x)
    lora_a, lora_b = torch.where(on.any(), lora_a, 0), torch.where(on.any(), lora_b, 0)
    update = torch.where(on, dropped, 0) @ (weight * (scale * (lora_b @ lora_a))).T
    return torch.where(on, base + update, base)


def vera_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    *,
    scale: float,
    gate: Gate = True,
    dropout: float = 0.0,
) -> Tensor:
    r"""Gated VeRA, which trains two vectors: ``y = x Wᵀ + bias + δ · scale · b ∘ ((d ∘ (D x Aᵀ)) Bᵀ)``, D the dropout.

    A and B are random, frozen and shared by all layers. The paper and PEFT have no scale; ``alpha = rank`` gives the
    same result.

    Args:
        x, weight, bias, lora_a, lora_b, scale, gate, dropout: as in `lora_linear`.
        lambda_d: d, ``[rank]``.
        lambda_b: b, ``[out_features]``.

    Returns:
        ``[..., out_features]``, in the dtype of `x`.

    Source: VeRA, Kopiczko et al. 2023, eq. 2 (arXiv:2310.11454); PEFT 0.21.2, `VeraLayer`.
    """
    options = {"scale": scale, "gate": gate, "dropout": dropout}
    return add_vera(F.linear(x, weight, bias), x, lora_a, lora_b, lambda_d, lambda_b, **options)  # type: ignore[arg-type]


def add_vera(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    *,
    scale: float,
    gate: Gate = True,
    dropout: float = 0.0,
) -> Tensor:
    """Adds VeRA's update to the output `y` of a base layer, as `add_low_rank` does; arguments as in `vera_linear`."""
    if gate is False:
        return y
    lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(y.dtype)
    lambda_d, lambda_b = lambda_d.to(x.dtype), lambda_b.to(y.dtype)
    if gate is True:
        h = (F.dropout(x, dropout) @ lora_a.T) * lambda_d
        return y + scale * ((h.to(y.dtype) @ lora_b.T) * lambda_b)

    on = rows_on(gate, x)
    # selecting before and after each product keeps 0 · inf out of the gradients as well
    lora_b, lambda_d, lambda_b = (torch.where(on.any(), t, 0) for t in (lora_b, lambda_d, lambda_b))
    selected = torch.where(on, F.dropout(x, dropout), 0)
    h = torch.where(on, torch.where(on, selected @ lora_a.T, 0) * lambda_d, 0)
    update = torch.where(on, h.to(y.dtype) @ lora_b.T, 0) * lambda_b
    return torch.where(on, y + scale * update, y)
