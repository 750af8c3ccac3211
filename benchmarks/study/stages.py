"""The study of a pretrained model in two stages: a screen chooses how each method is trained, then new seeds confirm.

The screen uses the validation split of one domain and chooses one setting at a time: first each method's learning rate,
then the schedule of the rate, then CoTo's own settings. The confirmation trains the chosen settings with other seeds in
every domain and measures on the test split. Every job is a line of a journal, and trained adapters are saved, so that
an interrupted run can resume.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.study import encoders, journal, measures, runs, subsets
from benchmarks.study.claims import Rows
from benchmarks.study.journal import Journal, Row, named, parts_of
from benchmarks.study.measures import Value
from benchmarks.study.runs import SWEEP_SEED, Method, Trained
from benchmarks.study.tasks import Domain, Setting, Split
from cotolora.merging import AdapterState

LORA, PAPER, CHOSEN, CONSTANT, PEFT = "LoRA", "CoTo", "CoTo, chosen", "LoRA, constant p", "PEFT's LoRA"
METHODS = (LORA, PAPER, CHOSEN, CONSTANT)
# CoTo's arguments by their names in the rows; the defaults are the paper's settings
COTO: dict[str, dict[str, Any] | None] = {
    "none": None,
    "ramp 0.75, p 0.1": {},
    "ramp 0.5, p 0.1": {"ramp": 0.5},
    "ramp 0.75, p 0.5": {"initial_p": 0.5},
    "ramp 0.5, p 0.5": {"ramp": 0.5, "initial_p": 0.5},
    "ramp 0.75, p 0.1, by module": {"unit": "module"},
    "constant p": {"shape": "constant", "initial_p": 0.6625},
}
OF_PAPER = "ramp 0.75, p 0.1"
VARIANTS = tuple(name for name in COTO if name not in ("none", "constant p", OF_PAPER))


@dataclass(frozen=True)
class Recipe:
    """How a method is trained: CoTo's settings (a key of `COTO`), the learning rate and its schedule."""

    coto: str
    rate: float
    schedule: str

    def __str__(self) -> str:
        return f"{self.coto} @ {self.rate:g} @ {self.schedule}"

    @staticmethod
    def of(text: str) -> Recipe:
        """Parses a recipe from its text."""
        coto, rate, schedule = text.split(" @ ")
        return Recipe(coto, float(rate), schedule)

    def method(self, name: str, library: str = "cotolora") -> Method:
        """The `runs.Method` of this recipe."""
        return Method(name, COTO[self.coto], schedule=self.schedule, library=library)


@dataclass(frozen=True)
class Plan:
    """How much to run.

    Attributes:
        shots: training texts per label, drawn again for every pair of seeds; None: all texts.
        layer_seeds, merge_seeds, time_seeds: number of seeds for dropping layers, for merging tasks and for timing.
        probe: number of test texts for scoring dropped layers, fusing and merging; the task is scored on all.
    """

    steps: int
    rates: tuple[float, ...]
    screen_seeds: int
    seeds: int
    layer_seeds: int
    merge_seeds: int
    time_seeds: int
    time_steps: int
    longest: int
    held_out: tuple[int, int]
    probe: int
    shots: int | None = None


@dataclass(frozen=True)
class Course:
    """A plan for one setting and the paths of its files: everything a process needs to run its jobs."""

    name: str
    model: Path
    data: Path
    out: Path
    plan: Plan

    def setting(self) -> Setting:
        """The setting, read from disk."""
        plan = self.plan
        common = {"longest": plan.longest, "held_out": plan.held_out, "exclude": r".*pooler.*"}
        if self.name == "news":
            targets = ["query", "key", "value"]
            return encoders.encoder(
                self.name, self.model, self.data, targets=targets, batch=8, rank=2, alpha=4.0, **common
            )
        return encoders.encoder(
            self.name, self.model, self.data, targets="all-linear", batch=8, rank=8, alpha=16.0, **common
        )


class Bench:
    """Runs the jobs of a course in one process."""

    def __init__(self, course: Course) -> None:
        # a second thread does not speed up matrices this small
        torch.set_num_threads(1)
        self.course, self.plan = course, course.plan
        self.setting = course.setting()
        self.base = self.setting.pretrained(0)

    def do(self, job: str) -> tuple[list[Row], float]:
        """The rows of a job and the CPU seconds it took."""
        began = time.process_time()
        kind, *parts = parts_of(job)
        rows = list(getattr(self, kind)(*parts))
        return rows, time.process_time() - began

    def screen(self, domain: str, recipe: str, seed: str) -> Iterator[Row]:
        """The validation score of a recipe."""
        how = Recipe.of(recipe)
        run = self._train(domain, how.method("screened"), how.rate, int(seed))
        value = self.setting.score(run.model, self.setting.domains[domain].validation)
        yield self._row(domain, recipe, int(seed), ("screen", None, value))

    def base_score(self, domain: str) -> Iterator[Row]:
        """The test score of the base with its untrained head."""
        value = self.setting.score(self.base, self.setting.domains[domain].test)
        yield self._row(domain, "base", 0, ("score", None, value))

    def train(self, domain: str, name: str, recipe: str, seed: str) -> Iterator[Row]:
        """Trains and saves the adapters; yields their test score."""
        how = Recipe.of(recipe)
        run = self._train(domain, how.method(name), how.rate, int(seed))
        AdapterState.from_model(run.model).save(self._kept(domain, name, seed))
        test = self.setting.domains[domain].test
        yield self._row(domain, name, int(seed), ("score", None, self.setting.score(run.model, test)))
        yield self._row(domain, name, int(seed), ("skipped", None, 100 * run.skipped / run.multiplied))

    def layers(self, domain: str, name: str, recipe: str, seed: str) -> Iterator[Row]:
        """Scores after removing the adapters of layers, or the smallest entries."""
        run = self._trained(domain, name, recipe, seed)
        probe = self._probe(domain)
        table = subsets.accuracies(run.model, probe.test)
        known = replace(self.setting, score=subsets.looked_up(table))
        # all subsets, not a sample: the table already has their scores
        yield from self._rows(domain, run, measures.of_layers(known, probe, run, samples=2 ** len(next(iter(table)))))
        yield from self._rows(domain, run, measures.contributions(known, probe, run))
        yield from self._rows(domain, run, measures.of_entries(self.setting, probe, run, [measures.HALF]))

    def pair(self, domain: str, name: str, recipe: str, *seeds: str) -> Iterator[Row]:
        """Scores of two seeds fused."""
        run, other = (self._trained(domain, name, recipe, seed) for seed in seeds)
        found = measures.of_pair(self.setting, self._probe(domain), run, other, points=3, aligned=False)
        yield from self._rows(domain, run, found)

    def several(self, domain: str, name: str, recipe: str, *seeds: str) -> Iterator[Row]:
        """The score of several seeds fused."""
        trained = [self._trained(domain, name, recipe, seed) for seed in seeds]
        yield from self._rows(domain, trained[0], measures.of_several(self.setting, self._probe(domain), trained))

    def merge(self, name: str, recipe: str, seed: str) -> Iterator[Row]:
        """Scores of the merged adapters of all domains."""
        setting = replace(self.setting, domains={domain: self._probe(domain) for domain in self.setting.domains})
        trained = {domain: self._trained(domain, name, recipe, seed) for domain in setting.domains}
        yield from self._rows("all", next(iter(trained.values())), measures.of_tasks(setting, trained, aligned=False))

    def times(self, domain: str, seed: str, *recipes: str) -> Iterator[Row]:
        """Training time of each method relative to LoRA's; they take turns in every step."""
        rates = {}
        for recipe, name in zip(recipes, (LORA, PEFT, PAPER, CHOSEN, CONSTANT), strict=True):
            how = Recipe.of(recipe)
            rates[how.method(name, "peft" if name == PEFT else "cotolora")] = how.rate
        split = self.setting.domains[domain].train
        side_by_side = runs.train(self.setting, self.base, split, rates, int(seed), self.plan.time_steps, lambda: None)
        for run, ratio in measures.times(side_by_side, over=LORA):
            yield self._row(domain, run.method.name, int(seed), ("time", None, ratio))

    def _train(self, domain: str, method: Method, rate: float, seed: int) -> runs.Run:
        split = self.setting.domains[domain].train
        if self.plan.shots is not None:
            # the two seeds of a pair, which are fused, train on the same texts
            split = encoders.few(split, self.plan.shots, seed // 2)
        (run,) = runs.train(self.setting, self.base, split, {method: rate}, seed, self.plan.steps, lambda: None)
        return run

    def _trained(self, domain: str, name: str, recipe: str, seed: str) -> Trained:
        """Loads what `train` saved, or trains it again if that is missing."""
        kept = self._kept(domain, name, seed)
        if not (kept / "adapter_model.safetensors").is_file():
            list(self.train(domain, name, recipe, seed))
        model = runs.adapted(self.setting, self.base)
        AdapterState.from_directory(kept).load_into(model)
        return Trained(Recipe.of(recipe).method(name), int(seed), model.eval())

    def _kept(self, domain: str, name: str, seed: str) -> Path:
        return self.course.out / "adapters" / self.course.name / domain / name / seed

    def _probe(self, domain: str) -> Domain:
        whole = self.setting.domains[domain]
        return replace(whole, test=thinned(whole.test, self.plan.probe))

    def _rows(self, domain: str, run: Trained, found: Iterable[Value]) -> Iterator[Row]:
        for value in found:
            yield self._row(domain, run.method.name, run.seed, value)

    def _row(self, domain: str, method: str, seed: int, found: Value) -> Row:
        measure, at, value = found
        told = {"setting": self.course.name, "domain": domain, "method": method, "measure": measure}
        return {**told, "at": at, "seed": seed, "value": value}


def thinned(split: Split, size: int) -> Split:
    """`size` samples spread evenly over the split, which is sorted by length."""
    rows = torch.linspace(0, len(split[1]) - 1, min(size, len(split[1]))).round().long()
    return split[0][rows], split[1][rows]


_benches: dict[Course, Bench] = {}  # of this process


@dataclass(frozen=True)
class Work:
    """Runs a job, in any process."""

    course: Course

    def __call__(self, job: str) -> tuple[list[Row], float]:
        """See `Bench.do`."""
        if self.course not in _benches:
            _benches[self.course] = Bench(self.course)
        return _benches[self.course].do(job)


def study(course: Course, book: Journal, processes: int, domains: list[str]) -> None:
    """Runs the jobs of both stages that are not in the journal yet."""

    def do(title: str, jobs: Iterable[str]) -> None:
        journal.work_off(book, jobs, Work(course), processes, f"{course.name}: {title}")

    for number, candidates in enumerate(rounds(course.plan, book, domains[0]), 1):
        do(f"screen, round {number}", screening(course.plan, domains[0], candidates))
    chosen = recipes(book.rows())
    do("base", (named("base_score", domain) for domain in domains))
    do("confirmation", confirming(course.plan, domains, chosen))


def screening(plan: Plan, domain: str, candidates: Iterable[Recipe]) -> list[str]:
    """One job per candidate and seed."""
    seeds = range(SWEEP_SEED, SWEEP_SEED + plan.screen_seeds)
    return [named("screen", domain, recipe, seed) for seed in seeds for recipe in candidates]


def rounds(plan: Plan, book: Journal, domain: str) -> Iterator[list[Recipe]]:
    """The candidates of each round of the screen; a round starts from the best recipe of the earlier ones."""
    plain = ("none", OF_PAPER)
    yield [Recipe(coto, rate, "linear") for rate in plan.rates for coto in plain]
    found = means(book.rows())
    yield [replace(best(found, coto), schedule=schedule) for coto in plain for schedule in ("cosine", "constant")]
    found = means(book.rows())
    yield [replace(best(found, OF_PAPER), coto=coto) for coto in VARIANTS]


def means(rows: Rows) -> dict[Recipe, float]:
    """The mean validation score over the seeds of each screened recipe."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row["measure"] == "screen":
            scores.setdefault(row["method"], []).append(row["value"])
    return {Recipe.of(recipe): statistics.fmean(found) for recipe, found in scores.items()}


def best(found: dict[Recipe, float], *coto: str) -> Recipe:
    """The best recipe among those with one of the given CoTo settings."""
    return max((recipe for recipe in found if recipe.coto in coto), key=lambda recipe: found[recipe])


def recipes(rows: Rows) -> dict[str, Recipe]:
    """The recipe chosen for each method; constant p uses the rate and schedule of CoTo with the paper's settings."""
    found = means(rows)
    paper = best(found, OF_PAPER)
    return {
        LORA: best(found, "none"), PAPER: paper, CHOSEN: best(found, *VARIANTS),
        CONSTANT: replace(paper, coto="constant p"),
    }  # fmt: skip


def confirming(plan: Plan, domains: list[str], chosen: dict[str, Recipe]) -> Iterator[str]:
    """The jobs of the confirmation, one domain after the other, so that a partial run covers whole domains."""
    timed = (chosen[LORA], chosen[LORA], chosen[PAPER], chosen[CHOSEN], chosen[CONSTANT])
    seeds = range(plan.seeds)
    constant = {CONSTANT: chosen[CONSTANT]}
    others = {name: recipe for name, recipe in chosen.items() if name != CONSTANT}
    for domain in domains:
        yield from of_domain(plan, domain, others, domain == domains[0])
        if domain == domains[0]:
            yield from (named("times", domain, seed, *timed) for seed in seeds[: plan.time_seeds])
        yield from of_domain(plan, domain, constant, domain == domains[0])
    if len(domains) > 1:
        for seed in seeds[: plan.merge_seeds]:
            yield from (named("merge", *method, seed) for method in chosen.items())


def finished(plan: Plan, domains: list[str], book: Journal) -> list[str]:
    """The domains in which all seeds of LoRA and of both kinds of CoTo are finished."""
    needed = {(name, seed) for name in (LORA, PAPER, CHOSEN) for seed in range(plan.seeds)}
    there: dict[str, set[tuple[str, int]]] = {}
    for kind, domain, *rest in map(parts_of, book.done):
        if kind == "train":
            there.setdefault(domain, set()).add((rest[0], int(rest[-1])))
    return [domain for domain in domains if needed <= there.get(domain, set())]


def of_domain(plan: Plan, domain: str, methods: dict[str, Recipe], layers: bool) -> Iterator[str]:
    """The jobs of the given methods in one domain; with `layers`, also those that remove adapters."""
    seeds = range(plan.seeds)
    for seed in seeds:
        yield from (named("train", domain, *method, seed) for method in methods.items())
    for seed in seeds[1::2]:
        yield from (named("pair", domain, *method, seed - 1, seed) for method in methods.items())
    for seed in seeds[2::3]:
        yield from (named("several", domain, *method, seed - 2, seed - 1, seed) for method in methods.items())
    for seed in seeds[: plan.layer_seeds if layers else 0]:
        yield from (named("layers", domain, *method, seed) for method in methods.items())
