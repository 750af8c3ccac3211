"""K-means in plain PyTorch: Lloyd's iterations from k-means++ seeds. Deterministic and without empty clusters."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 100  # at most; stops earlier when no point changes its cluster


def kmeans(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Divides `points` into clusters with small squared distances to the cluster means.

    Args:
        points: ``[n, features]``.
        clusters: number of clusters, from 1 to n; with n, each point is its own cluster.
        generator: a CPU generator; draws the seeds, each with a probability proportional to its squared
            distance from the nearest earlier seed.

    Returns:
        the cluster of each point, int64 ``[n]``; every number from 0 to ``clusters - 1`` occurs.

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
        before, labels = labels, _fill_empty(distances, distances.argmin(1))
        if before is not None and torch.equal(before, labels):
            break
        centres = means(points, labels, clusters)
    assert labels is not None
    return labels


def means(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """The mean of the points of each cluster, ``[clusters, features]``."""
    total = points.new_zeros(clusters, points.shape[1]).index_add_(0, labels, points)
    return total / torch.bincount(labels, minlength=clusters).unsqueeze(1)


def _seeds(points: Tensor, clusters: int, generator: torch.Generator) -> list[int]:
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    nearest = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < clusters:
        weights = nearest.clone()
        weights[chosen] = 0  # also if rounding left a distance above 0
        if not weights.any():  # all other points coincide with seeds
            weights = torch.ones_like(nearest)
            weights[chosen] = 0
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return chosen


def _fill_empty(distances: Tensor, labels: Tensor) -> Tensor:
    """Moves to each empty cluster the point farthest from its own centre, among clusters with more than one point."""
    counts = torch.bincount(labels, minlength=distances.shape[1])
    for empty in (counts == 0).nonzero().flatten().tolist():
        own = distances.gather(1, labels.unsqueeze(1)).squeeze(1)
        farthest = int(torch.where(counts[labels] > 1, own, -1).argmax())
        counts[labels[farthest]] -= 1
        labels[farthest], counts[empty] = empty, 1
    return labels
