"""K-means in plain PyTorch: Lloyd's iterations from k-means++ seeds. Deterministic, every cluster inhabited."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 100  # at most; they end when no point changes its cluster


def kmeans(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Sorts `points` into clusters of small squared distance to their means.

    Args:
        points: ``[n, features]``.
        clusters: from 1 to n; with n, each point is its own.
        generator: on the CPU; draws the seeds, each with a probability in proportion to its squared
            distance from the seeds before it.

    Returns:
        the cluster of each point, int64 ``[n]``; every cluster from 0 to ``clusters - 1`` occurs.

    Source: Lloyd 1982; seeds: Arthur and Vassilvitskii 2007, "k-means++", section 2.2.

    >>> points = torch.tensor([[0.0], [5.0], [0.1], [5.1]])
    >>> labels = kmeans(points, 2, torch.Generator().manual_seed(0))
    >>> bool(labels[0] == labels[2] != labels[1] == labels[3])
    True
    """
    if clusters >= len(points):
        return torch.arange(len(points))
    centres = points[_seeds(points, clusters, generator)]
    labels = None
    for _ in range(ITERATIONS):
        distances = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
        before, labels = labels, _inhabited(distances, distances.argmin(1))
        if before is not None and torch.equal(before, labels):
            break
        centres = means(points, labels, clusters)
    assert labels is not None
    return labels


def means(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """The mean of each cluster's points, ``[clusters, features]``."""
    total = points.new_zeros(clusters, points.shape[1]).index_add_(0, labels, points)
    return total / torch.bincount(labels, minlength=clusters).unsqueeze(1)


def _seeds(points: Tensor, clusters: int, generator: torch.Generator) -> list[int]:
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    nearest = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < clusters:
        weights = nearest.clone()
        weights[chosen] = 0  # also where rounding leaves a distance
        if not weights.any():  # the rest coincide with seeds
            weights = torch.ones_like(nearest)
            weights[chosen] = 0
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return chosen


def _inhabited(distances: Tensor, labels: Tensor) -> Tensor:
    """Gives each empty cluster the point that lies farthest from its centre, of those that share one."""
    counts = torch.bincount(labels, minlength=distances.shape[1])
    for empty in (counts == 0).nonzero().flatten().tolist():
        own = distances.gather(1, labels.unsqueeze(1)).squeeze(1)
        farthest = int(torch.where(counts[labels] > 1, own, -1).argmax())
        counts[labels[farthest]] -= 1
        labels[farthest], counts[empty] = empty, 1
    return labels
