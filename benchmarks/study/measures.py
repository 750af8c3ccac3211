"""Measures of trained adapters: for one run, for two seeds, for several tasks. All yield (measure, at, value)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch

from benchmarks.study.runs import Run, Trained
from benchmarks.study.tasks import Domain, Setting
from cotolora import connectivity, merging, pruning, shapley
from cotolora.merging import AdapterState

Value = tuple[str, "str | float | None", float]

LAMBDAS = 11
SPARSITIES = (0.3, 0.5, 0.7, 0.9)
KEPT = ("every-other", "low", "middle", "high")
HALF = 0.5
SAMPLES = 8  # random subsets of layers to drop, for each number of dropped layers


def is_product(run: Trained) -> bool:
    """Whether the update is a product of two factors, as merging requires."""
    return run.method.variant == "lora"


def of_one(setting: Setting, domain: Domain, run: Run) -> Iterator[Value]:
    """Measures of one trained model: its score, its cost, and its score with parts of the adapters removed."""
    yield "score", None, setting.score(run.model, domain.test)
    yield "skipped", None, 100 * run.skipped / run.multiplied
    yield from of_layers(setting, domain, run)
    yield from of_entries(setting, domain, run, SPARSITIES)


def of_layers(setting: Setting, domain: Domain, run: Trained, samples: int = SAMPLES) -> Iterator[Value]:
    """Scores with the adapters of some layers removed."""

    def score(model: torch.nn.Module) -> float:
        return setting.score(model, domain.test)

    for kept in KEPT:
        with pruning.prune(run.model, keep=kept):
            yield "kept", kept, score(run.model)
    stability = connectivity.dropout_stability(run.model, score, samples=samples, seed=run.seed)
    for count, value in zip(stability.dropped, stability.means, strict=True):
        yield "dropped", count, value
    yield "dropped, mean", None, statistics.fmean(stability.means[1:-1])
    yield "dropped, half", None, stability.means[len(stability.means) // 2]


def of_entries(setting: Setting, domain: Domain, run: Trained, sparsities: Iterable[float]) -> Iterator[Value]:
    """Scores with the smallest entries of A and B zeroed."""
    for sparsity in sparsities:
        with pruning.magnitude(run.model, sparsity):
            yield "sparsity", sparsity, setting.score(run.model, domain.test)


def contributions(setting: Setting, domain: Domain, run: Trained) -> Iterator[Value]:
    """Exact Shapley values of the layers, and their imbalance."""
    values = shapley.shapley_values(run.model, lambda model: setting.score(model, domain.test), method="exact").values
    for layer, value in enumerate(values.tolist()):
        yield "shapley", layer, value
    yield "imbalance", None, (values.std(correction=0) / values.mean().abs()).item()


def of_pair(
    setting: Setting, domain: Domain, run: Trained, other: Trained, points: int = LAMBDAS, aligned: bool = True
) -> Iterator[Value]:
    """Measures of two seeds of one task: scores along the line between them, and with `aligned` also after aligning.

    Aligning is slow.
    """

    def score(model: torch.nn.Module) -> float:
        return setting.score(model, domain.test)

    one, two = AdapterState.from_model(run.model), AdapterState.from_model(other.model)
    curve = connectivity.interpolation_curve(run.model, one, two, score, points)
    for weight, value in zip(curve.lambdas, curve.scores, strict=True):
        yield "fused", weight, value
    yield "barrier", None, curve.barrier
    with merging.mix([one, two]).applied_to(run.model):
        yield "mixed", HALF, score(run.model)
    if aligned:
        with merging.fuse([one, merging.align(two, onto=one)]).applied_to(run.model):
            yield "aligned", HALF, score(run.model)


def of_several(setting: Setting, domain: Domain, runs: Sequence[Trained]) -> Iterator[Value]:
    """The score of three or more seeds of one task, fused by their factors with equal weights."""
    fused = merging.fuse([AdapterState.from_model(run.model) for run in runs])
    with fused.applied_to(runs[0].model):
        yield "fused, seeds", len(runs), setting.score(runs[0].model, domain.test)


def of_tasks(setting: Setting, runs: Mapping[str, Trained], aligned: bool = True) -> Iterator[Value]:
    """The mean score over the tasks of one seed's adapters, merged with each operator."""
    states = [AdapterState.from_model(run.model) for run in runs.values()]
    rank = next(iter(states[0].factors.values())).rank
    model = next(iter(runs.values())).model
    operators = {
        "fuse": lambda: merging.fuse(states),
        "align, fuse": lambda: merging.fuse([states[0], *(merging.align(s, onto=states[0]) for s in states[1:])]),
        "mix": lambda: merging.mix(states),
        "mix, cut to the rank": lambda: merging.mix(states, rank=rank),
        "lego": lambda: merging.lego(states, rank),
        "lego, rank doubled": lambda: merging.lego(states, 2 * rank),
        "ties": lambda: merging.ties(states, of="products", density=0.5, rank=rank),
        "dare": lambda: merging.dare(states, of="products", drop=0.5, rank=rank),
    }
    if not aligned:
        del operators["align, fuse"]
    for name, merge in operators.items():
        with merge().applied_to(model):
            yield "merged", name, mean_over(setting, model)
    together = merging.ensemble([run.model for run in runs.values()])
    yield "merged", "ensemble", mean_over(setting, together)


def mean_over(setting: Setting, model: torch.nn.Module) -> float:
    """The mean test score over all tasks."""
    return statistics.fmean(setting.score(model, domain.test) for domain in setting.domains.values())


def times(runs: list[Run], over: str) -> Iterator[tuple[Run, float]]:
    """The seconds of each run relative to those of the method `over`; the runs took turns in every step."""
    (reference,) = (sum(run.seconds) for run in runs if run.method.name == over)
    for run in runs:
        yield run, sum(run.seconds) / reference


def pairs(runs: list[Run]) -> list[tuple[Run, Run]]:
    """Each run paired with the next seed's, and the last with the first."""
    return list(pairwise([*runs, runs[0]])) if len(runs) > 2 else [(runs[0], runs[1])]
