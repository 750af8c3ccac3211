r"""Contribution of each adapter: Shapley values of a game whose players are groups of adapters.

The worth v(R) of a coalition R is the score of the model with only the adapters in R active (Zhuang et al. 2025,
arXiv:2506.05713). The value of a player is the worth that it adds when it joins, averaged over all orders of joining.
If a larger score is better, a useful adapter has a positive value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cotolora import checks
from cotolora.checks import integer, one_of, size
from cotolora.groups import Unit, group_names, is_enabled, modules_of, unmerged_adapters
from cotolora.linear import CoToLoRALinear
from cotolora.masks import temporarily_enabled
from cotolora.reference import Gate
from cotolora.schedule import uniforms

METHODS = ("permutation", "exact", "multilinear")
MOST_EXACT = 20  # players, which take a million evaluations

Score = Callable[[nn.Module], Any]


@dataclass(frozen=True, eq=False)
class Shapley:
    """Shapley values of n groups of adapters, in the units of the score; positive values mean useful adapters.

    Attributes:
        values: float64 ``[n]``.
        errors: their standard errors, float64 ``[n]``; zeros if the values are exact.
        evaluations: number of different coalitions that were scored.
        groups: adapter names by group, in the order of `values`.
    """

    values: Tensor
    errors: Tensor
    evaluations: int
    groups: dict[Hashable, list[str]]


@dataclass(frozen=True, eq=False)
class PerSample:
    """A score of the model's outputs on fixed inputs, so that one forward can evaluate many coalitions.

    The inputs are repeated for each coalition, and row gates select its adapters. The model must be batch-first at
    every adapter and must treat samples independently.

    Args:
        inputs: the arguments of the model: a tensor, a tuple of arguments or a dict of keywords. Every tensor
            in it is ``[samples, ...]``; anything else is passed on unchanged.
        fn: ``fn(output) -> float``, larger is better. `output` is the model's output for one coalition, as if
            the model had been called on `inputs` alone. Every tensor in the model's output must be ``[samples, ...]``.
        batch: largest number of samples in one forward; limits the memory. Longer inputs are split. More than 256
            gains nothing on a CPU; if the inputs alone fill the device, a larger batch gains nothing.

    Raises:
        TypeError: `inputs` hold no tensor, or a nested one, or `fn` is not callable.
        ValueError: the tensors disagree in length or are empty, or `batch` is not a positive integer.
    """

    inputs: Tensor | tuple[Any, ...] | dict[str, Any]
    fn: Callable[[Any], Any]
    batch: int = 256

    def __post_init__(self) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves(self.inputs) if isinstance(leaf, Tensor)]
        if not isinstance(self.inputs, (Tensor, tuple, dict)) or not tensors:
            raise TypeError(
                f"inputs must be a tensor, or a tuple or dict with tensors; got {type(self.inputs).__name__}"
            )
        if any(t.is_nested for t in tensors):
            raise TypeError("inputs must hold dense tensors; got a nested one, whose samples cannot be repeated")
        lengths = [t.shape[0] if t.dim() else 0 for t in tensors]
        if len(set(lengths)) != 1 or lengths[0] == 0:
            raise ValueError(f"inputs must be [samples, ...], of equal length; got {[tuple(t.shape) for t in tensors]}")
        if not callable(self.fn):
            raise TypeError(f"fn must be a callable of the model's output; got {type(self.fn).__name__}")
        size("batch", self.batch)

    @property
    def samples(self) -> int:
        """The number of samples in the inputs."""
        return next(leaf.shape[0] for leaf in pytree.tree_leaves(self.inputs) if isinstance(leaf, Tensor))


def shapley_values(
    model: nn.Module,
    score: Score | PerSample,
    *,
    method: str = "permutation",
    unit: Unit = "layer",
    samples: int = 64,
    seed: int = 0,
) -> Shapley:
    r"""Shapley values φ of the groups of enabled adapters of `model`.

        φ_i = Σ_R |R|! (n - 1 - |R|)! / n! · (v(R ∪ i) - v(R)) = ∫₀¹ E[v(R_p ∪ i) - v(R_p)] dp

    over the coalitions R without i; R_p contains every other player with probability p. The values add up to
    ``score(all active) - score(none active)``: exactly with the methods "exact" and "permutation" (up to rounding), on
    average with "multilinear". No coalition is scored twice. Disabled (pruned) adapters are not players and stay
    disabled. The model is scored in eval mode and without autograd; modes and switches are restored, also if
    the score raises. The draws are a pure function of the seed and touch no random state.

    Args:
        model: a model with adapters.
        score: a callable of the model that returns a finite float, larger is better, and always the same one for the
            same active adapters; or a `PerSample`.
        method:

            - "permutation": random orders, each followed by its reverse; at most ``samples · (n - 1) + 2`` coalitions.
            - "exact": all ``2ⁿ`` coalitions, for n up to 20.
            - "multilinear": the integral over p, stratified: two independent draws in each of ``samples / 2``
              intervals; at most ``samples · (n + 1)`` coalitions.
        unit: the players: "layer", "module" or a callable, as in `CoTo`.
        samples: number of orders ("permutation") or draws ("multilinear"), even and at least 4. Not used by "exact".
        seed: seed of the draws, an integer in [0, 2⁶⁴).

    Returns:
        values, their standard errors ("permutation": over independent pairs of orders; "multilinear": from the
        differences within intervals), the number of coalitions scored, and the groups. Empty if every adapter is
        disabled.

    Raises:
        TypeError: `model` is not a module, `score` not a callable, or a score not a number.
        ValueError: the model has no adapters, or has adapters that are merged or whose `enabled` is a row mask; a score
            is not finite (the message names the coalition); "exact" with more than 20 players; an argument is out of
            its range.

    Source: Shapley 1953; permutations: Castro, Gómez & Tejada 2009, "Polynomial calculation of the Shapley value based
    on sampling"; multilinear extension: Owen 1972, and Okhrati & Lipani 2020 (arXiv:2010.12082).

    >>> from cotolora import inject
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    >>> _ = inject(model, rank=1)
    >>> def gloves(model):  # players 1 and 2 own a left glove each, player 3 a right one; a pair is worth 1
    ...     left, also_left, right = (layer.enabled for layer in model)
    ...     return float(right and (left or also_left))
    >>> shapley_values(model, gloves, method="exact").values
    tensor([0.1667, 0.1667, 0.6667], dtype=torch.float64)
    """
    layers = _player_layers(model)
    samples, seed = _checked_arguments(score, method, samples, seed)
    groups = group_names(layers, unit, modules_of(model))
    n = len(groups)
    if method == "exact" and n > MOST_EXACT:
        raise ValueError(
            f"method='exact' would take 2^{n} = {2**n} evaluations of the score; for more than {MOST_EXACT} players "
            "use 'permutation' or 'multilinear'"
        )
    game = _Game(model, layers, groups, score)
    if n == 0:
        values = errors = np.zeros(0)
    elif method == "exact":
        values, errors = _exact(game, n)
    elif method == "permutation":
        values, errors = _permutation(game, n, samples, seed)
    else:
        values, errors = _multilinear(game, n, samples, seed)
    return Shapley(torch.from_numpy(values), torch.from_numpy(errors), len(game.worth), groups)


def _exact(game: _Game, n: int) -> tuple[np.ndarray, np.ndarray]:
    worth = game.score(range(2**n))
    coalitions = np.arange(2**n)
    size = np.sum([coalitions >> player & 1 for player in range(n)], axis=0)
    weight = np.array([1 / (n * math.comb(n - 1, k)) for k in range(n)])
    values = np.empty(n)
    for player in range(n):
        without = coalitions[coalitions >> player & 1 == 0]
        values[player] = (weight[size[without]] * (worth[without | 1 << player] - worth[without])).sum()
    return values, np.zeros(n)


def _permutation(game: _Game, n: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    orders = [np.argsort(uniforms(n, seed=seed, step=pair), kind="stable") for pair in range(samples // 2)]
    orders = [order for forth in orders for order in (forth, forth[::-1])]
    # [samples, n + 1]: the coalition after each has joined
    coalitions = [list(itertools.accumulate((1 << int(i) for i in order), int.__or__, initial=0)) for order in orders]
    worth = game.score(itertools.chain.from_iterable(coalitions)).reshape(samples, n + 1)
    gains = np.empty((samples, n))
    for row, order in enumerate(orders):
        gains[row, order] = np.diff(worth[row])
    # an order and its reverse are dependent, but different pairs are independent
    pairs = gains.reshape(samples // 2, 2, n).mean(1)
    return pairs.mean(0), pairs.std(0, ddof=1) / math.sqrt(len(pairs))


def _multilinear(game: _Game, n: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    strata = samples // 2
    coalitions: list[list[int]] = []
    for draw in range(samples):
        where, *others = uniforms(n + 1, seed=seed, step=draw)
        p = (draw // 2 + where) / strata
        inside = sum(1 << player for player, uniform in enumerate(others) if uniform < p)
        coalitions.append([inside, *(inside ^ 1 << player for player in range(n))])
    worth = game.score(itertools.chain.from_iterable(coalitions)).reshape(samples, n + 1)
    joined = np.array([[1 if row[0] >> player & 1 else -1 for player in range(n)] for row in coalitions])
    # v(R ∪ i) - v(R \ i), whichever of the two was drawn
    gains = joined * (worth[:, :1] - worth[:, 1:])
    apart = gains[::2] - gains[1::2]
    return gains.mean(0), np.sqrt((apart**2).sum(0)) / samples


class _Game:
    """The game: scores each coalition once. A coalition is an integer whose bit i says whether player i is in it."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, CoToLoRALinear],
        groups: dict[Hashable, list[str]],
        score: Score | PerSample,
    ) -> None:
        self.model, self.layers, self.groups, self._score = model, layers, groups, score
        self.worth: dict[int, float] = {}

    def score(self, coalitions: Iterable[int]) -> np.ndarray:
        """The worth of each coalition, in their order; scores those that have not been scored yet."""
        from tqdm import tqdm

        coalitions = list(coalitions)
        # sorted by their bits, so that coalitions in one forward agree on most players, whose gates are then bools
        pending = sorted(set(coalitions) - self.worth.keys())
        size = max(1, self._score.batch // self._score.samples) if isinstance(self._score, PerSample) else 1
        with tqdm(total=len(pending), desc="Shapley values", unit="coalition", disable=None, delay=2) as progress:
            for start in range(0, len(pending), size):
                chunk = pending[start : start + size]
                for coalition, value in zip(chunk, self._scored(chunk), strict=True):
                    self.worth[coalition] = self._number(coalition, value)
                progress.update(len(chunk))
        return np.array([self.worth[coalition] for coalition in coalitions])

    def _scored(self, chunk: list[int]) -> list[Any]:
        score, model = self._score, self.model
        if not isinstance(score, PerSample):
            with _evaluating(model), temporarily_enabled(self.layers, self._switches(chunk, 1)):
                return [score(model)]
        rows = score.samples
        pieces = []
        for start in range(0, rows, score.batch):
            here = slice(start, min(start + score.batch, rows))
            inputs = _repeated(_cut(score.inputs, here), len(chunk))
            length = here.stop - here.start
            with _evaluating(model), temporarily_enabled(self.layers, self._switches(chunk, length)):
                pieces.append(_checked_output(_called(model, inputs), len(chunk) * length))
        output = pieces[0] if len(pieces) == 1 else pytree.tree_map(_joined, *pieces)
        with torch.no_grad():
            return [score.fn(_cut(output, slice(i * rows, (i + 1) * rows))) for i in range(len(chunk))]

    def _switches(self, chunk: list[int], rows: int) -> dict[str, Gate]:
        """`enabled` of every adapter for one batch, in which each coalition of the chunk has `rows` rows."""
        switches: dict[str, Gate] = {}
        for player, names in enumerate(self.groups.values()):
            inside = [bool(coalition >> player & 1) for coalition in chunk]
            # a bool if all coalitions agree: then an inactive adapter runs no kernels, an active one no selection
            switch = inside[0] if len(set(inside)) == 1 else torch.tensor(inside, device="cpu").repeat_interleave(rows)
            switches |= dict.fromkeys(names, switch)
        return switches

    def _number(self, coalition: int, value: Any) -> float:
        on = [key for player, key in enumerate(self.groups) if coalition >> player & 1]
        if not math.isfinite(number := checks.score(value)):
            raise ValueError(f"score must be a finite number; got {value!r} with {on} active of {list(self.groups)}")
        return number


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without autograd inside the block; restores the mode of every module after it."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _cut(tree: Any, rows: slice) -> Any:
    return pytree.tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, tree)


def _repeated(tree: Any, times: int) -> Any:
    def repeat(leaf: Any) -> Any:
        return leaf.repeat(times, *[1] * (leaf.dim() - 1)) if isinstance(leaf, Tensor) and times > 1 else leaf

    return pytree.tree_map(repeat, tree)


def _joined(*leaves: Any) -> Any:
    return torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0]


def _checked_output(output: Any, rows: int) -> Any:
    leaves = pytree.tree_leaves(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or any(t.dim() == 0 or t.shape[0] != rows for t in tensors):
        shapes = [tuple(t.shape) for t in tensors]
        raise ValueError(
            f"model must return tensors [samples, ...] to be scored by PerSample; {rows} samples in one forward gave "
            f"{shapes or type(output).__name__} (return only tensors with one row per sample, no loss over the batch)"
        )
    return output


def _player_layers(model: nn.Module) -> dict[str, CoToLoRALinear]:
    layers = unmerged_adapters(model)
    if masked := [name for name, x in layers.items() if isinstance(x.enabled, Tensor) and x.enabled.dim()]:
        raise ValueError(f"model must have no adapter whose enabled is a row mask; got row masks on {masked}")
    return {name: layer for name, layer in layers.items() if is_enabled(layer)}


def _checked_arguments(score: object, method: str, samples: int, seed: int) -> tuple[int, int]:
    """`samples` and `seed` as built-in ints."""
    if not isinstance(score, PerSample):
        checks.function("score", score, "a callable of the model or a PerSample")
    one_of("method", method, METHODS)
    must = "an even number of at least 4, since a standard error needs two pairs"
    if (count := integer("samples", samples, 4, 2**63, must=must)) % 2:
        raise ValueError(f"samples must be {must}; got {samples!r}")
    return count, integer("seed", seed, 0, 2**64)
