"""LoRA*: finds a basis for an adapter's factors in which fusing them with those of another adapter loses less."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# weight of a penalty that keeps P from drifting where the misfit is flat; orthogonal P minimise the penalty
_RIDGE = 1e-6
# a fit is exact in float64 if its squared misfit, relative to that of no change, is at most this
_EXACT = 1e-24


class Misfit:
    r"""The distance between fusing factors and mixing products, as a function of the basis P of the second adapter.

        F(P) = ‖(B₁ - B₂ P) (A₁ - P⁻¹ A₂)‖²

    because for any weight λ, ``λ B₁A₁ + (1-λ) B₂A₂`` minus the product of the fused factors is
    ``λ (1-λ) (B₁ - B₂ P) (A₁ - P⁻¹ A₂)``. Only the triangular factors of ``[B₁ B₂]`` and ``[A₁; A₂]ᵀ`` are
    kept, at most ``[2r, 2r]``, in float64 on the CPU.
    """

    def __init__(self, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> None:
        rank = a1.shape[0]
        left = torch.linalg.qr(torch.cat([b1, b2], dim=1).cpu().double(), mode="r").R
        right = torch.linalg.qr(torch.cat([a1, a2]).T.cpu().double(), mode="r").R.T
        self.b1, self.b2 = left[:, :rank], left[:, rank:]
        self.a1, self.a2 = right[:rank], right[rank:]

    def __call__(self, p: Tensor) -> float:
        """F at ``p [r, r]``."""
        return ((self.b1 - self.b2 @ p) @ (self.a1 - torch.linalg.solve(p, self.a2))).square().sum().item()

    def gradient(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """F and ``dF/dP = 2 (U P⁻¹)ᵀ E (P⁻¹A₂)ᵀ - 2 B₂ᵀ E Vᵀ``, where ``E = U V = (B₁ - B₂P) (A₁ - P⁻¹A₂)``."""
        inverse = torch.linalg.inv(p)
        turned = inverse @ self.a2
        u, v = self.b1 - self.b2 @ p, self.a1 - turned
        e = u @ v
        return e.square().sum(), 2 * ((u @ inverse).T @ e @ turned.T - self.b2.T @ e @ v.T)

    def starts(self) -> Iterator[Tensor]:
        """Initial values of P: no change; least squares on each factor; a rotation that fits both."""
        yield torch.eye(len(self.a1), dtype=torch.float64)
        yield torch.linalg.pinv(self.b2) @ self.b1
        yield torch.linalg.pinv(self.a1 @ torch.linalg.pinv(self.a2))
        both = _unit(self.b2.T @ self.b1) + _unit(self.a2 @ self.a1.T)
        u, _, vh = torch.linalg.svd(both)
        yield u @ vh


def best_basis(misfit: Misfit, iterations: int, max_condition: float) -> Tensor:
    """The P of least misfit that L-BFGS finds from the two best starts; never worse than no change.

    Args:
        misfit: the misfit of the two adapters.
        iterations: iterations of L-BFGS for each start.
        max_condition: upper bound of ``‖P‖ ‖P⁻¹‖`` in the spectral norm.
    """
    candidates = [_conditioned(p, max_condition) for p in misfit.starts()]
    untouched = misfit(candidates[0])
    candidates.sort(key=misfit)  # stable: among equal ones, no change comes first
    if misfit(candidates[0]) <= _EXACT * untouched:
        return candidates[0]
    found = [_conditioned(_refined(misfit, p, untouched, iterations), max_condition) for p in candidates[:2]]
    return min([*candidates, *found], key=misfit)


def _refined(misfit: Misfit, start: Tensor, unit: float, iterations: int) -> Tensor:
    p = start.clone()
    optimizer = torch.optim.LBFGS(
        [p], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-15
    )

    def closure() -> Tensor:
        inverse = torch.linalg.inv(p)
        value, gradient = misfit.gradient(p)
        ridge = p.square().sum() + inverse.square().sum() - 2 * len(p)
        p.grad = gradient / unit + 2 * _RIDGE / len(p) * (p - inverse.T @ inverse @ inverse.T)
        return value / unit + _RIDGE / len(p) * ridge

    try:
        optimizer.step(closure)  # type: ignore[arg-type]
    except torch.linalg.LinAlgError:  # a trial step met a singular P
        return start
    return p if p.isfinite().all() else start


def _conditioned(p: Tensor, max_condition: float) -> Tensor:
    """`p` with small singular values raised, so that its condition is at most `max_condition`; the identity for 0."""
    u, s, vh = torch.linalg.svd(p)
    if s[0] == 0:
        return torch.eye(len(p), dtype=p.dtype)
    return p if s[-1] * max_condition >= s[0] else (u * s.clamp(min=s[0] / max_condition)) @ vh


def _unit(matrix: Tensor) -> Tensor:
    norm = matrix.norm()
    return matrix / norm if norm > 0 else matrix
