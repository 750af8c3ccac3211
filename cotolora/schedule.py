"""When adapters are switched on. Pure functions of the step; no modules, no global state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

SHAPES = ("linear", "exponential", "sine", "constant")


def activation_probability(
    step: int, total_steps: int, *, initial_p: float = 0.1, ramp: float = 0.75, shape: str = "linear"
) -> float:
    r"""Probability that an adapter is active at `step`.

    Rises from `initial_p` at step 0 to exactly 1 at step ``ramp * total_steps`` and stays there:

        p(t) = initial_p + (1 - initial_p) · f(u),   u = min(1, t / (ramp · T))

    with f(u) = u (linear), (eᵘ - 1) / (e - 1) (exponential) or sin(πu / 2) (sine). The shape "constant"
    is `initial_p` at every step: stochastic depth, the paper's baseline.

    Args:
        step: optimizer steps done, t ≥ 0.
        total_steps: optimizer steps of the whole run, T ≥ 1.
        initial_p: probability at step 0, in [0, 1].
        ramp: share of the run after which every adapter is on, in (0, 1].
        shape: "linear", "exponential", "sine" or "constant".

    Raises:
        ValueError: an argument is out of its range.

    Source: Zhuang et al. 2025, section 3.1 (arXiv:2506.05713), where initial_p = 0 and ramp = 3/4; the
    authors' code starts at 0.1.

    >>> [activation_probability(t, 100) for t in (0, 75, 100)]
    [0.1, 1.0, 1.0]
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer of at least 0; got {step!r}")
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps must be a positive integer; got {total_steps!r}")
    if isinstance(initial_p, bool) or not isinstance(initial_p, (int, float)) or not 0 <= initial_p <= 1:
        raise ValueError(f"initial_p must be a probability in [0, 1]; got {initial_p!r}")
    if isinstance(ramp, bool) or not isinstance(ramp, (int, float)) or not 0 < ramp <= 1:
        raise ValueError(f"ramp must be in (0, 1]; got {ramp!r}")
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {SHAPES}; got {shape!r}")
    if shape == "constant":
        return float(initial_p)
    # in this order, so that u is exactly 1 where ramp is the decimal of step / total_steps: 55 / (0.55 * 100) < 1
    u = min(step, total_steps) / total_steps / ramp
    if u >= 1:
        return 1.0
    f = {"linear": u, "exponential": math.expm1(u) / math.expm1(1), "sine": math.sin(math.pi * u / 2)}[shape]
    return initial_p + (1 - initial_p) * f


def sample_mask(
    n: int, p: float | Sequence[float], *, seed: int, step: int, at_least_one: bool = True
) -> torch.BoolTensor:
    r"""Draws which of `n` groups are active at `step`: independent Bernoulli(p_i), given that at least one is.

    The condition is drawn exactly and without a loop: the first active group is i with probability

        p_i · Π_{k<i} (1 - p_k) / (1 - Π_k (1 - p_k))

    and the groups after it are drawn independently. Where every p_i is 0 this is its limit: one
    group, each with the same probability.

    A pure function of its arguments (numpy's Philox counter generator keyed by seed and step), so every
    rank and every resumed run draws the same mask; no random state is read or changed.

    Args:
        n: number of groups, at least 0.
        p: probability in [0, 1] of each, or one for all.
        seed, step: integers in [0, 2⁶⁴).
        at_least_one: False draws plain independent Bernoullis.

    Returns:
        bool ``[n]`` on the CPU.

    Raises:
        ValueError: an argument is out of its range, or p has not n entries.

    Source: activation indicators of Zhuang et al. 2025, section 3.1 (arXiv:2506.05713). Their code redraws until
    one is on: the same law, but it does not end at p = 0.

    >>> sample_mask(4, 1.0, seed=0, step=0)
    tensor([True, True, True, True])
    """
    for name, value, limit in (("n", n, 2**32), ("seed", seed, 2**64), ("step", step, 2**64)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
            raise ValueError(f"{name} must be an integer in [0, {limit}); got {value!r}")
    try:
        probabilities = np.asarray(p, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"p must be a float or {n} of them, one for each group; got {p!r}") from None
    if probabilities.ndim == 0:
        probabilities = np.full(n, probabilities)
    if probabilities.shape != (n,):
        raise ValueError(f"p must be a float or {n} of them, one for each group; got shape {probabilities.shape}")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(f"p must be in [0, 1]; got {p!r}")

    drawn = uniforms(n + 1, seed=seed, step=step)
    active = drawn[1:] < probabilities
    if at_least_one and n > 0:
        weights = probabilities * np.cumprod(np.concatenate(([1.0], 1 - probabilities[:-1])))
        if not weights.any():
            weights = np.ones(n)
        cumulative = np.cumsum(weights)
        # divided, and not u times the total, which rounds up to the total and coarsely where p is subnormal
        first = int(np.searchsorted(cumulative / cumulative[-1], drawn[0], side="right"))
        active[:first], active[first] = False, True
    return torch.from_numpy(active)  # type: ignore[return-value]


def uniforms(n: int, *, seed: int, step: int) -> np.ndarray:
    """`n` random float64 in [0, 1): a pure function of its arguments, in numpy's Philox keyed by (seed, step)."""
    # raw 64-bit words and not Generator methods, whose streams may change between numpy versions
    words = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(n)
    return (words >> np.uint64(11)) * 2.0**-53
