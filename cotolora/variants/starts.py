"""Inits that compute the factors from W: their initial values, and the update relative to these."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def start(init: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    r"""The initial A0 ``[rank, in_features]`` and B0 ``[out_features, rank]``, from W ``[out_features, in_features]``.

    pissa: ``W = U S Vᵀ``, ``A0 = √(S_r / scale) V_rᵀ``, ``B0 = U_r √(S_r / scale)``: ``scale · B0 A0`` is the best
    approximation of W with that rank. olora: ``W = Q R``, ``A0 = R_r``, ``B0 = Q_r``, the first rows of R and the first
    columns of Q.

    Raises:
        ValueError: `scale` is so small that pissa's factors are not finite.

    Source: PiSSA, Meng et al. 2024, eq. 2 to 4 (arXiv:2404.02948); OLoRA, Büyükakyüz 2024, algorithm 1
    (arXiv:2406.01775), which scales the product by alpha / rank as PEFT does. Both subtract the product from W; this
    library does not.
    """
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if init == "pissa":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        root = (s[:rank] / scale).sqrt()
        if s.isfinite().all() and not root.isfinite().all():
            raise ValueError(f"alpha must leave A and B finite with init='pissa'; got a scale of {scale!r}")
        return root[:, None] * v[:rank], u[:, :rank] * root
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def since_start(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``[A ; A − A0]`` and ``[B − B0, B0]`` of ``B A − B0 A0``, which is zero before the first step.

    The differences are computed in at least float32: differences of factors cast to bfloat16 would lose small steps.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b, a0, b0 = a.to(dtype), b.to(dtype), a0.to(dtype), b0.to(dtype)
    return torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1)
