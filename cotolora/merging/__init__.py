"""Merges trained adapters into one: by their factors, products, rank-one units or outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cotolora.checks import flag, integer, number, one_of, size
from cotolora.merging.alignment import Misfit, best_basis
from cotolora.merging.combining import (
    StateLike,
    Weights,
    as_state,
    by_name,
    check_same_rank,
    check_same_scale,
    checked_states,
    merged,
    named_state,
    weighted_sum,
)
from cotolora.merging.ensembles import ensemble
from cotolora.merging.kmeans import kmeans, means
from cotolora.merging.states import AdapterState, Factors

__all__ = ["AdapterState", "Factors", "align", "as_state", "dare", "ensemble", "fuse", "lego", "mix", "ties"]


def fuse(states: Sequence[StateLike], weights: Weights = None) -> AdapterState:
    r"""Fuses factors: ``A = Σ λᵢ Aᵢ``, ``B = Σ λᵢ Bᵢ``, at the rank and scale of the inputs.

    The product of sums is not the sum of products: the factors of the adapters must also share a basis
    (see `align`). With equal weights, each of n adapters that share no basis is scaled down to 1/n².

    Args:
        states: `AdapterState` objects, directories or models with adapters, with the same modules, ranks and scales.
        weights: λ, one finite number for each state; by default equal ones that sum to 1. Other tensors that were
            trained with the adapters are averaged with these weights, divided by their sum.

    Raises:
        TypeError: `states` is not a sequence of states.
        ValueError: there are no states; `weights` has another number of entries or one that is not finite; modules,
            shapes, ranks or scales differ (the message lists them); an adapter is not plain LoRA.

    Source: linear fusion of Zhuang et al. 2025 (arXiv:2506.05713).

    >>> state = AdapterState.from_tensors({"q.lora_A.weight": torch.eye(2), "q.lora_B.weight": torch.eye(2)}, alpha=2)
    >>> fuse([state, state], [0.5, 1.5]).factors["q"].delta()
    tensor([[4., 0.],
            [0., 4.]])
    """
    states, weights = checked_states(states, weights)
    check_same_scale(states)

    def combine(parts: list[Factors]) -> Factors:
        lora_a = weighted_sum(weights, [part.lora_a for part in parts])
        return dataclasses.replace(
            parts[0], lora_a=lora_a, lora_b=weighted_sum(weights, [part.lora_b for part in parts])
        )

    return merged(states, weights, combine)


def mix(states: Sequence[StateLike], weights: Weights = None, rank: int | None = None) -> AdapterState:
    r"""Mixes products exactly: the update is ``Σ λᵢ sᵢ Bᵢ Aᵢ``. The factors are concatenated, so the ranks add up.

        A = [λ₁ s₁ A₁; λ₂ s₂ A₂; …],   B = [B₁ B₂ …],   alpha = rank

    Args:
        states, weights: as in `fuse`, but ranks and scales may differ.
        rank: largest rank of the result, reached by a truncated SVD: the nearest update of that rank in the Frobenius
            norm. The SVD works on the factors and forms no ``[out, in]`` matrix. None keeps the full rank.

    Raises:
        TypeError, ValueError: as `fuse`, except for ranks and scales; or `rank` is not a positive integer.

    >>> state = AdapterState.from_tensors({"q.lora_A.weight": torch.eye(2), "q.lora_B.weight": torch.eye(2)}, alpha=2)
    >>> mix([state, state], [0.5, 1.5])
    AdapterState(1 adapters, ranks {4})
    >>> mix([state, state], [0.5, 1.5], rank=2).factors["q"].delta().round(decimals=5)
    tensor([[2., 0.],
            [0., 2.]])
    """
    if rank is not None:
        rank = size("rank", rank)
    states, weights = checked_states(states, weights)

    def combine(parts: list[Factors]) -> Factors:
        lora_a = torch.cat([weight * part.scale * part.lora_a for weight, part in zip(weights, parts, strict=True)])
        lora_b = torch.cat([part.lora_b for part in parts], dim=1)
        return _truncated(lora_a, lora_b, rank or len(lora_a))

    return merged(states, weights, combine)


def align(state: StateLike, onto: StateLike, *, iterations: int = 100, max_condition: float = 1e3) -> AdapterState:
    r"""LoRA*: changes the basis of `state` so that fusing it with `onto` is nearest to mixing the two.

    For each adapter an invertible ``P [rank, rank]`` replaces ``(B, A)`` by ``(B P, P⁻¹ A)``, which has the same
    product. P minimises the squared Frobenius distance between the fused and the mixed update, which for every λ is

        ‖λ B₁A₁ + (1-λ) B₂A₂ - (λB₁ + (1-λ)B₂P) (λA₁ + (1-λ)P⁻¹A₂)‖ = λ (1-λ) ‖(B₁ - B₂P) (A₁ - P⁻¹A₂)‖

    with index 1 for `onto` and 2 for `state`. L-BFGS starts from the two best of these: no change, least squares on
    either factor, and a rotation. It runs in float64 on the CPU, on triangular factors of size 2·rank. The misfit is
    not convex; the result is never worse than no change, and exact if the factors agree up to a basis.

    Args:
        state: the state whose basis is changed.
        onto: the state that it will be fused with; same modules, ranks and scales.
        iterations: iterations of L-BFGS from each of two starts.
        max_condition: largest condition number of P, which bounds the rounding of the product.

    Raises:
        TypeError, ValueError: as `fuse`; or `iterations` is not a positive integer, or `max_condition` is below 1.

    Source: LoRA* of Zhuang et al. 2025 (arXiv:2506.05713) for the fit of P; the identity above and the
    search for the minimum are this library's.
    """
    iterations = size("iterations", iterations)
    finite_from_1 = "a finite number of at least 1"
    max_condition = number("max_condition", max_condition, finite_from_1, lambda limit: 1 <= limit < math.inf)
    states, _ = checked_states([named_state("onto", onto), named_state("state", state)], None)
    check_same_scale(states)

    def combine(parts: list[Factors]) -> Factors:
        first, second = parts
        misfit = Misfit(first.lora_a, first.lora_b, second.lora_a, second.lora_b)
        p = best_basis(misfit, iterations, max_condition)
        lora_a = torch.linalg.solve(p, second.lora_a.cpu().double())
        lora_b = second.lora_b.cpu().double() @ p
        return dataclasses.replace(second, lora_a=lora_a.to(second.lora_a), lora_b=lora_b.to(second.lora_b))

    factors = {name: combine(parts) for name, parts in by_name(states)}
    return AdapterState(factors, states[1].other_tensors, states[1].kept)


def lego(states: Sequence[StateLike], rank: int, *, reweight: bool = True, seed: int = 0) -> AdapterState:
    r"""LoRA-LEGO: clusters the rank-one units of all adapters into `rank` clusters, whose centres are the result.

    A unit is a column of B with its row of A, as one vector; each of the two is multiplied by the square root of the
    adapter's scale. The sum over all units is the sum of the adapters and does not depend on the order of the units.

    Args:
        states: as in `fuse`, but ranks and scales may differ. All adapters have the same weight.
        rank: number of clusters, and rank of the result. If a module has at most `rank` units in total, all are kept.
        reweight: the paper's two corrections: each centre is stretched to the mean norm of its units, since
            a mean is shorter; and the update is scaled by ``√(r / rank)`` with r the mean rank of the inputs, since
            the variance of the output grows with the number of units. False leaves plain centres: if
            `rank` is the sum of the ranks, the result is ``mix(states, [1, 1, …])`` with its units in another order.
        seed: seed of the clustering; torch's global generator is not used.

    Raises:
        TypeError, ValueError: as `fuse`, except for ranks and scales; or `rank` is not a positive integer.

    Source: Zhao et al. 2024, "Merging LoRAs like Playing LEGO" (arXiv:2409.16167).
    """
    rank = size("rank", rank)
    flag("reweight", reweight)
    states, weights = checked_states(states, None)
    generator = _generator(seed)

    def combine(parts: list[Factors]) -> Factors:
        # [units, out + in]
        units = torch.cat([torch.cat([b.T, a], dim=1) for a, b in map(_without_scale, parts)])
        clusters = min(rank, len(units))
        labels = kmeans(units.cpu().double(), clusters, generator).to(units.device)
        centres = means(units, labels, clusters)
        scale = 1.0
        if reweight:
            norms = means(units.norm(dim=1, keepdim=True), labels, clusters)
            # if units cancel, their mean is 0 and cannot be stretched
            centres = centres * norms / centres.norm(dim=1, keepdim=True).clamp(min=torch.finfo(units.dtype).tiny)
            scale = math.sqrt(len(units) / len(parts) / clusters)
        out_features = len(parts[0].lora_b)
        return Factors(centres[:, out_features:], centres[:, :out_features].T.contiguous(), scale * clusters)

    return merged(states, weights, combine)


def ties(
    states: Sequence[StateLike],
    weights: Weights = None,
    density: float = 0.2,
    *,
    of: str = "factors",
    rank: int | None = None,
) -> AdapterState:
    r"""TIES: keeps each adapter's largest entries, elects a sign for each entry, and averages the values of that sign.

    With tᵢ the trimmed tensors of the adapters and γ the sign of their sum, an entry of the result is the sum of
    ``λᵢ tᵢ`` over the adapters whose sign is γ, divided by the number of these adapters.

    Args:
        states: as in `fuse`; ranks must agree for ``of="factors"``, scales need not.
        weights: λ; 1 for each by default, because the operator itself averages.
        density: fraction of the entries that are kept, in (0, 1].
        of: "factors" trims A and B, each scaled by ``√|λ s|`` (the sign of λ s goes to A), as PEFT's "ties";
            "products" trims the updates ``s B A``, the paper's task vectors, as PEFT's "ties_svd": it forms one
            ``[out, in]`` matrix for each adapter and computes the SVD of one, which takes seconds at 4096.
        rank: rank of the result for ``of="products"``; by default the largest rank of the inputs.

    Raises:
        TypeError, ValueError: as `fuse`; or `density`, `of` or `rank` is out of its range.

    Source: Yadav et al. 2023, algorithm 1 (arXiv:2306.01708).
    """
    density = number("density", density, "a number in (0, 1]", lambda share: 0 < share <= 1)

    def elected(tensors: list[Tensor], weights: list[float]) -> Tensor:
        trimmed = torch.stack([_largest(tensor, density) for tensor in tensors])
        # zero counts as positive, as in PEFT
        sign = torch.where(trimmed.sum(0) >= 0, 1, -1)
        agree = trimmed.sign() == sign
        return weighted_sum(weights, list(trimmed * agree)) / agree.sum(0).clamp(min=1)

    # weights of 1, because the operator itself divides by the number of adapters
    states, weights = checked_states(states, weights, equal=1.0)
    return _merged_tensors(states, weights, elected, of, rank)


def dare(
    states: Sequence[StateLike],
    weights: Weights = None,
    drop: float = 0.5,
    *,
    seed: int = 0,
    of: str = "factors",
    rank: int | None = None,
) -> AdapterState:
    r"""DARE: drops entries at random, scales the others by ``1 / (1 - drop)``, and adds up: ``Σ λᵢ tᵢ``.

    Args:
        states: as in `fuse`; ranks must agree for ``of="factors"``, scales need not.
        weights: λ; by default equal ones that sum to 1.
        drop: probability that an entry becomes zero, in [0, 1).
        seed: seed of the draws, which are made on the CPU; torch's global generator is not used.
        of, rank: as in `ties`; PEFT's "dare_linear" and "dare_linear_svd", with density ``1 - drop``. With
            ``of="products"`` the expectation of the product is preserved, with "factors" those of A and of B.

    Raises:
        TypeError, ValueError: as `fuse`; or `drop`, `of` or `rank` is out of its range.

    Source: Yu et al. 2023 (arXiv:2311.03099).
    """
    drop = number("drop", drop, "a probability in [0, 1)", lambda p: 0 <= p < 1)
    generator = _generator(seed)

    def rescaled(tensor: Tensor) -> Tensor:
        kept = torch.bernoulli(torch.full(tensor.shape, 1.0 - drop), generator=generator)
        return tensor * kept.to(tensor) / (1 - drop)

    def added(tensors: list[Tensor], weights: list[float]) -> Tensor:
        return weighted_sum(weights, [rescaled(tensor) for tensor in tensors])

    states, weights = checked_states(states, weights)
    return _merged_tensors(states, weights, added, of, rank)


def _generator(seed: int) -> torch.Generator:
    # the range that torch accepts; torch does not accept numpy integers
    return torch.Generator().manual_seed(integer("seed", seed, -(2**63), 2**64))


def _merged_tensors(
    states: list[AdapterState],
    weights: list[float],
    merge: Callable[[list[Tensor], list[float]], Tensor],
    of: str,
    rank: int | None,
) -> AdapterState:
    """Merges the states with `merge`, which combines several tensors into one: all A and all B, or the products."""
    one_of("of", of, ("factors", "products"))
    if rank is not None:
        rank = size("rank", rank)
        if of == "factors":
            raise ValueError(f"rank must be None with of='factors', which keeps the rank of the inputs; got {rank}")
    if of == "factors":
        check_same_rank(states)

    def of_products(parts: list[Factors]) -> Factors:
        u, s, vh = torch.linalg.svd(merge([part.delta() for part in parts], weights), full_matrices=False)
        return _balanced(u, s, vh, rank or max(part.rank for part in parts))

    def of_factors(parts: list[Factors]) -> Factors:
        scaled = [weight * part.scale for weight, part in zip(weights, parts, strict=True)]
        # the sign goes into one factor only; in both it would cancel
        lora_a = merge([p.lora_a for p in parts], [math.copysign(math.sqrt(abs(x)), x) for x in scaled])
        lora_b = merge([p.lora_b for p in parts], [math.sqrt(abs(x)) for x in scaled])
        return Factors(lora_a, lora_b, float(len(lora_a)))

    return merged(states, weights, of_products if of == "products" else of_factors)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """`tensor` with only the fraction `density` of its entries that are largest in magnitude; the others are zero."""
    if density == 1:
        return tensor
    flat = tensor.flatten()
    kept = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(tensor)


def _truncated(lora_a: Tensor, lora_b: Tensor, rank: int) -> Factors:
    """Truncates the product at scale 1 to its `rank` largest singular values, without forming the product."""
    if rank >= len(lora_a):
        return Factors(lora_a, lora_b, float(len(lora_a)))
    left = torch.linalg.qr(lora_b.cpu().double())
    right = torch.linalg.qr(lora_a.T.cpu().double())
    u, s, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    cut = _balanced(left.Q @ u, s, vh @ right.Q.T, rank)
    return dataclasses.replace(cut, lora_a=cut.lora_a.to(lora_a), lora_b=cut.lora_b.to(lora_b))


def _balanced(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> Factors:
    """``U S Vᴴ`` as factors of at most `rank`, each with the square root of the singular values."""
    root = s[:rank].sqrt()
    return Factors(root.unsqueeze(1) * vh[:rank], u[:, :rank] * root, float(len(root)))


def _without_scale(part: Factors) -> tuple[Tensor, Tensor]:
    """A and B, each multiplied by the square root of the scale's magnitude; the sign of the scale goes to B."""
    root = math.sqrt(abs(part.scale))
    return root * part.lora_a, math.copysign(root, part.scale) * part.lora_b
