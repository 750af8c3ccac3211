"""Activation probabilities and masks as pure functions of the step, without modules or global state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cotolora.checks import entries, flag, instance, integer, number, one_of, probability, shown

SHAPES = ("linear", "exponential", "sine", "constant")

# replaces p = 0 if at least one group must be active: so small that a second group is never drawn
_TINY = 1e-30


def activation_probability(
    step: int, total_steps: int, *, initial_p: float = 0.1, ramp: float = 0.75, shape: str = "linear"
) -> float:
    r"""Probability that an adapter is active at `step`.

    Rises from `initial_p` at step 0 to exactly 1 at step ``ramp * total_steps`` and stays there:

        p(t) = initial_p + (1 - initial_p) · f(u),   u = min(1, t / (ramp · T))

    with f(u) = u (linear), (eᵘ - 1) / (e - 1) (exponential) or sin(πu / 2) (sine). The shape "constant"
    keeps p at `initial_p`: stochastic depth, the paper's baseline.

    Args:
        step: number of optimizer steps done, t ≥ 0.
        total_steps: number of optimizer steps of the whole run, T ≥ 1.
        initial_p: probability at step 0, in [0, 1].
        ramp: fraction of the run after which every adapter is active, in (0, 1].
        shape: "linear", "exponential", "sine" or "constant".

    Raises:
        ValueError: an argument is out of its range.

    Source: Zhuang et al. 2025, section 3.1 (arXiv:2506.05713), where initial_p = 0 and ramp = 3/4; the
    authors' code starts at 0.1.

    >>> [activation_probability(t, 100) for t in (0, 75, 100)]
    [0.1, 1.0, 1.0]
    """
    step, total_steps = integer("step", step, 0), integer("total_steps", total_steps)
    initial_p, ramp, shape = probability("initial_p", initial_p), _ramp(ramp), one_of("shape", shape, SHAPES)
    if shape == "constant":
        return initial_p
    # divide in this order, so that u is exactly 1 at step = ramp * total_steps: 55 / (0.55 * 100) is less than 1
    u = min(step, total_steps) / total_steps / ramp
    if u >= 1:
        return 1.0
    f = {"linear": u, "exponential": math.expm1(u) / math.expm1(1), "sine": math.sin(math.pi * u / 2)}[shape]
    return initial_p + (1 - initial_p) * f


def sample_mask(
    n: int, p: float | Sequence[float], *, seed: int, step: int, at_least_one: bool = True
) -> torch.BoolTensor:
    r"""Draws which of `n` groups are active at `step`: independent Bernoulli(p_i), given that at least one is active.

    The conditional distribution is sampled exactly and without rejection: the first active group is i with probability

        p_i · Π_{k<i} (1 - p_k) / (1 - Π_k (1 - p_k))

    and the groups after it are drawn independently. If every p_i is 0, this is the limit: exactly one
    active group, each with the same probability.

    A pure function of its arguments (numpy's Philox counter generator keyed by seed and step), so every
    rank and every resumed run draws the same mask; no random state is read or changed.

    Args:
        n: number of groups, at least 0.
        p: probability in [0, 1] for each group, or one value for all.
        seed, step: integers in [0, 2⁶⁴).
        at_least_one: False draws plain independent Bernoulli variables, which may all be 0.

    Returns:
        bool ``[n]`` on the CPU.

    Raises:
        ValueError: an argument is out of its range, or `p` does not have n entries.

    Source: activation indicators of Zhuang et al. 2025, section 3.1 (arXiv:2506.05713). Their code redraws until
    one group is active: the same distribution, but at p = 0 it never terminates.

    >>> sample_mask(4, 1.0, seed=0, step=0)
    tensor([True, True, True, True])
    """
    n, seed, step = integer("n", n, 0, 2**32), integer("seed", seed, 0, 2**64), integer("step", step, 0, 2**64)
    flag("at_least_one", at_least_one)
    probabilities = _probabilities(p, n)

    drawn = uniforms(n + 1, seed=seed, step=step)
    active = drawn[1:] < probabilities
    if at_least_one and n > 0:
        weights: np.ndarray = probabilities * np.cumprod(np.concatenate(([1.0], 1 - probabilities[:-1])))
        if not weights.any():
            weights = np.ones(n)
        cumulative = np.cumsum(weights)
        # normalise instead of scaling u by the total: the product can round up to the total, and is coarse if p is
        # subnormal
        first = int(np.searchsorted(cumulative / cumulative[-1], drawn[0], side="right"))
        active[:first], active[first] = False, True
    return torch.from_numpy(active)  # type: ignore[return-value]


def _probabilities(p: object, n: int) -> np.ndarray:
    """`p` as float64 ``[n]``."""
    must = f"a float, or {n} floats with one for each group"
    try:
        found = np.asarray(math.nan if p is None else p)
        # numpy would convert some other dtypes to numbers, at most with a warning
        numeric = found.dtype.kind in "fiu"
        found = found.astype(np.float64) if numeric else found
    except (TypeError, ValueError, RuntimeError, OverflowError):
        numeric = False
    if not numeric:
        raise ValueError(f"p must be {must}; got {shown(p)}")
    if found.ndim and found.shape != (n,):
        raise ValueError(f"p must be {must}; got shape {found.shape}, {shown(p)}")
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"p must be in [0, 1]; got {shown(p)}")
    return np.full(n, found)


def uniforms(n: int, *, seed: int, step: int) -> np.ndarray:
    """`n` random float64 in [0, 1), a pure function of its arguments: numpy's Philox keyed by (seed, step)."""
    # raw 64-bit words instead of Generator methods, whose streams may change between numpy versions
    words = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(n)
    return (words >> np.uint64(11)) * 2.0**-53


class _NotGiven:
    def __repr__(self) -> str:
        return "<as in Schedule>"


# the default of keywords that set single fields of a Schedule
NOT_GIVEN: Any = _NotGiven()


@dataclasses.dataclass(frozen=True)
class Schedule:
    r"""Settings of an activation schedule: the probability that a group of adapters is active, and how masks are drawn.

    Args:
        initial_p, ramp, shape: parameters of the probability p, see `activation_probability`.
        tilt: in [-1, 1]; a positive tilt drops later layers more often (the paper's CoTo-H), a negative one earlier
            layers. Group l of L is active with probability ``p · (1 - tilt · (1 - p) · (2l / (L - 1) - 1))``.
        at_least_one: keep at least one available group active; without one, nothing would train.
        seed: seed of the masks, an integer in [0, 2⁶⁴).

    Raises:
        ValueError: a field is out of its range.

    >>> schedule = Schedule(ramp=0.5)
    >>> schedule.probability(25, total_steps=100), schedule.probability(50, total_steps=100)
    (0.55, 1.0)
    >>> schedule.mask(4, 50, total_steps=100)
    tensor([True, True, True, True])
    """

    initial_p: float = 0.1
    ramp: float = 0.75
    shape: str = "linear"
    tilt: float = 0.0
    at_least_one: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        checked = {
            "initial_p": probability("initial_p", self.initial_p),
            "ramp": _ramp(self.ramp),
            "shape": one_of("shape", self.shape, SHAPES),
            "tilt": number("tilt", self.tilt, "in [-1, 1]", lambda tilt: -1 <= tilt <= 1),
            "at_least_one": flag("at_least_one", self.at_least_one),
            "seed": integer("seed", self.seed, 0, 2**64),
        }
        for name, value in checked.items():
            # built-in numbers, which torch.load(weights_only=True) and json can read
            object.__setattr__(self, name, value)

    def probability(self, step: int, total_steps: int) -> float:
        """The activation probability p at `step` of `total_steps`, see `activation_probability`."""
        return activation_probability(step, total_steps, initial_p=self.initial_p, ramp=self.ramp, shape=self.shape)

    def mask(self, n: int, step: int, total_steps: int, available: Sequence[bool] | None = None) -> torch.BoolTensor:
        """Which of `n` groups are active at `step` of `total_steps`: bool ``[n]`` on the CPU, a pure function.

        Args:
            n: number of groups.
            step, total_steps: as in `activation_probability`.
            available: whether each group may be active; default all. `at_least_one` keeps one of these active; the
                others are always inactive.

        Raises:
            ValueError: an argument is out of its range, or `available` does not hold n bools.
            TypeError: `available` is not a list.
        """
        n = integer("n", n, 0, 2**32)
        if available is not None:
            found = entries("available", available, must := f"{n} bools, one for each group")
            if len(found) != n or not all(isinstance(entry, bool) for entry in found):
                raise ValueError(f"available must be {must}; got {shown(available)}")
            available = found
        p = self.probability(step, total_steps)
        indices = [index for index in range(n) if available is None or available[index]]
        # explicitly on the CPU: the user may have set another default device
        mask = torch.zeros(n, dtype=torch.bool, device="cpu")
        mask[indices] = sample_mask(
            len(indices),
            [self._tilted(p, index, n) for index in indices],
            seed=self.seed,
            step=step,
            at_least_one=self.at_least_one,
        )
        return mask  # type: ignore[return-value]

    def _tilted(self, p: float, index: int, n: int) -> float:
        position = 2 * index / (n - 1) - 1 if n > 1 else 0.0
        if self.at_least_one:
            p = max(p, _TINY)
        return min(1.0, p * (1 - self.tilt * (1 - p) * position))


def schedule_of(schedule: Schedule | None, **fields: Any) -> Schedule:
    """`schedule`, or a new one made from the `fields` that are not `NOT_GIVEN`.

    Raises:
        TypeError: `schedule` is neither a Schedule nor None.
        ValueError: both a schedule and a field are given, or a field is out of its range.
    """
    given = {name: value for name, value in fields.items() if value is not NOT_GIVEN}
    if schedule is None:
        return Schedule(**given)
    instance("schedule", schedule, Schedule, "a Schedule")
    if given:
        both = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            f"schedule must not be combined with {', '.join(given)}, which it contains; got {schedule!r} and {both}"
        )
    return schedule


def _ramp(value: object) -> float:
    return number("ramp", value, "in (0, 1]", lambda ramp: 0 < ramp <= 1)
