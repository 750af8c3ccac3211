"""Scores of a model along the line between two trained adapters, and with some of its adapters dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cotolora import checks
from cotolora.checks import function, integer, module, one_of, size
from cotolora.groups import Unit, group_names, modules_of, unmerged_adapters
from cotolora.masks import adapter_mask
from cotolora.merging import fuse, mix
from cotolora.merging.combining import StateLike, named_state
from cotolora.merging.states import AdapterState

_MUST_SCORE = "a callable of the model"

Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class InterpolationCurve:
    """Scores along the line from one adapter state to another.

    Attributes:
        lambdas: weights of `state_a`, from 0 (only `state_b`) to 1.
        scores: one for each weight; larger is better.
    """

    lambdas: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def barrier(self) -> float:
        r"""The largest drop of the curve below the straight line between its ends, in the units of the score.

            max_λ  λ score(1) + (1-λ) score(0) - score(λ)

        Never negative, because the drop is 0 at the ends; 0 means that no sampled point is below the line.

        Source: the error barrier of Frankle et al. 2020, section 2 (arXiv:1912.05671), for a score instead of an
        error, and relative to the line between the ends instead of their mean.

        >>> InterpolationCurve((0.0, 0.5, 1.0), (0.75, 0.5, 0.25)).barrier
        0.0
        >>> InterpolationCurve((0.0, 0.5, 1.0), (0.75, 0.125, 0.75)).barrier
        0.625
        """
        first, last = self.scores[0], self.scores[-1]
        drops = (
            weight * last + (1 - weight) * first - score
            for weight, score in zip(self.lambdas[1:-1], self.scores[1:-1], strict=True)
        )
        return max([0.0, *drops])


def interpolation_curve(
    model: nn.Module,
    state_a: StateLike | Mapping[str, Tensor],
    state_b: StateLike | Mapping[str, Tensor],
    score: Score,
    points: int = 11,
    *,
    of: str = "factors",
) -> InterpolationCurve:
    """Scores `model` with adapters at evenly spaced points between `state_a` and `state_b`, ends included.

    The model is scored in `eval()` and without gradients. Afterwards, also if `score` raises, it is restored:
    parameters (the same objects), buffers, train or eval mode, merged layers and switches.

    Args:
        model: a model with adapters on the same modules; their rank and values do not matter.
        state_a, state_b: as in `fuse`; or a mapping of tensors as in `AdapterState.from_tensors`, for which the model's
            scale is used.
        score: a callable of the model that returns a finite number, larger is better.
        points: number of points, at least 2.
        of: "factors" scores ``fuse([a, b], [λ, 1-λ])``, linear mode connectivity as the paper measures it;
            "products" scores ``mix([a, b], [λ, 1-λ])``.

    Raises:
        ValueError: as `fuse` and `AdapterState.applied_to`; `points` or `of` is out of its range; a score is
            not finite.

    Source: Zhuang et al. 2025, linear mode connectivity (arXiv:2506.05713).

    >>> from cotolora import inject
    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> _ = inject(model, rank=1, alpha=1.0)
    >>> state = {"0.lora_A.weight": torch.ones(1, 2), "0.lora_B.weight": torch.ones(1, 1)}
    >>> other = {key: -value for key, value in state.items()}  # the same product, of other factors
    >>> curve = interpolation_curve(model, state, other, lambda m: m[0].delta_weight().sum().item(), points=3)
    >>> curve
    InterpolationCurve(lambdas=(0.0, 0.5, 1.0), scores=(2.0, 0.0, 2.0))
    >>> curve.barrier
    2.0
    """
    points = size("points", points, 2)
    one_of("of", of, ("factors", "products"))
    function("score", score, _MUST_SCORE)
    module("model", model)
    states = [_state(model, "state_a", state_a), _state(model, "state_b", state_b)]
    lambdas = [i / (points - 1) for i in range(points)]
    scores = []
    with _restored_afterwards(model):
        for weight in tqdm(lambdas, disable=None, delay=3, desc="interpolation"):
            between = (fuse if of == "factors" else mix)(states, [weight, 1 - weight])
            with between.applied_to(model):
                scores.append(_scored(model, score, f"λ = {weight:g}"))
    return InterpolationCurve(tuple(lambdas), tuple(scores))


@dataclass(frozen=True)
class DropoutStability:
    """Scores by the number of dropped groups of adapters, from none to all.

    Attributes:
        dropped: numbers of dropped groups, 0, 1, …, n.
        scores: for each of these numbers, one score per subset of groups.
    """

    dropped: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]

    @property
    def exact(self) -> tuple[bool, ...]:
        """For each number of dropped groups, whether all subsets of that size were scored."""
        return tuple(
            len(scores) == self._subsets(count) for count, scores in zip(self.dropped, self.scores, strict=True)
        )

    @property
    def means(self) -> tuple[float, ...]:
        """The mean score for each number of dropped groups."""
        return tuple(fmean(scores) for scores in self.scores)

    @property
    def errors(self) -> tuple[float, ...]:
        """Standard errors of the means.

        ``sd / √m · √(1 - m / all)`` for m subsets drawn without repetition; 0 if all subsets were scored.
        """
        return tuple(
            0.0 if exact else stdev(scores) / math.sqrt(len(scores)) * math.sqrt(1 - len(scores) / self._subsets(count))
            for count, scores, exact in zip(self.dropped, self.scores, self.exact, strict=True)
        )

    def _subsets(self, count: int) -> int:
        return math.comb(self.dropped[-1], count)


def dropout_stability(
    model: nn.Module, score: Score, *, unit: Unit = "layer", samples: int = 8, seed: int = 0
) -> DropoutStability:
    """Scores `model` with random subsets of its adapters dropped, for each subset size.

    CoTo's objective bounds layer-wise dropout stability, from which linear mode connectivity follows. The
    model is scored in `eval()` and without gradients, and restored afterwards. Disabled adapters stay disabled
    and do not count.

    Args:
        model: a model with adapters.
        score: a callable of the model that returns a finite number, larger is better.
        unit: which adapters are dropped together: "layer", "module" or a callable, as in `CoTo`.
        samples: number of subsets of each size, at least 2, drawn without repetition; all subsets if there are fewer.
        seed: seed of the draws (numpy's Philox, keyed by the seed and the size); no global random state is touched.

    Raises:
        TypeError: `model` is not a module, `score` is not a callable, or a score is not a number.
        ValueError: the model has no enabled adapters, has merged ones, or has ones whose `enabled` is a row mask;
            `samples` or `seed` is out of its range; a score is not finite.

    Source: Zhuang et al. 2025, theorem 3.1 (arXiv:2506.05713), with exactly j adapters active.

    >>> from cotolora import inject
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    >>> layers = inject(model, rank=1)
    >>> dropout_stability(model, lambda m: sum(la.enabled for la in layers.values()), samples=3).means
    (3.0, 2.0, 1.0, 0.0)
    """
    samples, seed = integer("samples", samples, 2), integer("seed", seed, 0, 2**64)
    function("score", score, _MUST_SCORE)
    layers = unmerged_adapters(model)
    for name, layer in layers.items():
        if isinstance(layer.enabled, Tensor) and layer.enabled.dim() > 0:
            raise ValueError(f"enabled of {name} must be a bool or a 0-dim tensor; got a row mask")
    named = group_names(layers, unit, modules_of(model)).values()
    enabled = ([name for name in names if layers[name].enabled] for names in named)
    groups = [names for names in enabled if names]
    if not groups:
        raise ValueError(f"model must have enabled adapters; {type(model).__name__} has none")
    subsets = [subset for count in range(len(groups) + 1) for subset in _subsets(len(groups), count, samples, seed)]
    scores: list[list[float]] = [[] for _ in range(len(groups) + 1)]
    with _restored_afterwards(model):
        for subset in tqdm(subsets, disable=None, delay=3, desc="dropout stability"):
            on = {name for i, names in enumerate(groups) if i not in subset for name in names}
            with adapter_mask(model, [name in on for name in layers]):
                scores[len(subset)].append(_scored(model, score, f"groups {subset} dropped"))
    return DropoutStability(tuple(range(len(groups) + 1)), tuple(map(tuple, scores)))


def _subsets(n: int, count: int, samples: int, seed: int) -> list[tuple[int, ...]]:
    """`samples` different subsets of ``range(n)`` of `count` members, or all of them, in order."""
    if math.comb(n, count) <= samples:
        return list(combinations(range(n), count))
    # raw 64-bit words instead of Generator methods, whose streams may change between numpy versions
    words = np.random.Philox(key=np.array([seed, count], dtype=np.uint64))
    drawn: set[tuple[int, ...]] = set()
    while len(drawn) < samples:
        order = np.argsort(words.random_raw(n), kind="stable")
        drawn.add(tuple(sorted(order[:count].tolist())))
    return sorted(drawn)


def _state(model: nn.Module, argument: str, state: StateLike | Mapping[str, Tensor]) -> AdapterState:
    if not isinstance(state, Mapping):
        return named_state(argument, state)
    try:
        return AdapterState.from_tensors(state, like=model)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument}: {error}") from None


def _scored(model: nn.Module, score: Score, where: str) -> float:
    with torch.no_grad():
        value = checks.score(score(model.eval()))
    if not math.isfinite(value):
        raise ValueError(f"score must be finite; got {value} at {where}")
    return value


@contextmanager
def _restored_afterwards(model: nn.Module) -> Iterator[None]:
    """Restores the modes (train or eval) and all buffers of `model` when the block ends."""
    modes = {module: module.training for module in model.modules()}
    buffers = {
        (module, name): (buffer, buffer.clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for (module, name), (buffer, value) in buffers.items():
            buffer.copy_(value)
            module._buffers[name] = buffer
