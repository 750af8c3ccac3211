"""Checks the CoTo paper's claims on two small tasks that every machine has.

    python -m benchmarks study [--quick] [--out DIR] [--settings digits text]

Setting "digits": a vision transformer that knows the handwritten digits 0 to 4, adapted to all ten. Setting "text": a
small Llama over characters that has read Python's library, adapted to English prose, to names of Unicode characters and
to code pages. Each method gets the same batches, steps and adapters, and the best of the same learning rates by its
own validation score. Scores are larger for the better: accuracy in percent, or bits per character, negated.
A claim holds if the 95 % interval of the paired differences over the seeds lies on its side, does not hold if it
lies on the other, and is not decidable here otherwise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.report import Result
from benchmarks.shapes import number
from benchmarks.study import claims, figures, measures, runs, tasks
from benchmarks.study.measures import Value
from benchmarks.study.runs import Method, Run
from benchmarks.study.tasks import Setting

SETTINGS: dict[str, Callable[[], Setting]] = {"digits": tasks.digits, "text": tasks.text}


@dataclass(frozen=True)
class Size:
    """How much of the study runs."""

    seeds: int
    steps: int
    pretrain: int
    rates: tuple[float, ...]
    sweep_seeds: int
    methods: tuple[Method, ...]
    shapley_seeds: int
    samples: int = 8  # of layers dropped at random, of each number


SIZES = {
    "digits": Size(5, 400, 300, runs.RATES, 1, runs.METHODS, 5),
    "text": Size(4, 200, 1000, runs.RATES, 1, runs.METHODS[:4], 4),
}
QUICK = {
    "digits": Size(2, 100, 150, (8e-3, 1.6e-2), 1, (runs.METHODS[0], runs.METHODS[2]), 1, samples=2),
    "text": Size(2, 30, 100, (8e-3, 1.6e-2), 1, (runs.METHODS[0], runs.METHODS[2]), 1, samples=2),
}


def study(setting: Setting, size: Size) -> list[dict[str, Any]]:
    """All rows of one setting."""
    base = setting.pretrained(size.pretrain)
    each = size.steps * len(size.methods) * len(setting.domains)
    with tqdm(total=each * size.sweep_seeds * len(size.rates), disable=None, desc=f"{setting.name}: sweep") as bar:
        rows = runs.sweep(setting, base, size.methods, size.rates, size.sweep_seeds, size.steps, bar.update)
    rates = runs.best_rates(rows, size.methods)
    for name, domain in setting.domains.items():
        before = setting.score(base, domain.test)
        rows.append(
            {
                "setting": setting.name,
                "domain": name,
                "method": "base",
                "measure": "score",
                "at": None,
                "seed": 0,
                "value": before,
            }
        )

    trained: dict[str, list[list[Run]]] = {name: [] for name in setting.domains}  # by domain and seed: a run a method
    with tqdm(total=each * size.seeds, disable=None, desc=f"{setting.name}: runs") as bar:
        for seed in range(size.seeds):
            for name, domain in setting.domains.items():
                trained[name].append(runs.train(setting, base, domain.train, rates, seed, size.steps, bar.update))
    return rows + measured(setting, size, trained)


def measured(setting: Setting, size: Size, trained: dict[str, list[list[Run]]]) -> list[dict[str, Any]]:
    """Everything that is measured of trained runs."""
    rows: list[dict[str, Any]] = []

    def keep(run: Run, found: Iterable[Value], domain: str = "all") -> None:
        told = {"setting": setting.name, "domain": domain, "method": run.method.name, "seed": run.seed}
        rows.extend({**told, "measure": measure, "at": at, "value": value} for measure, at, value in found)

    total = len(trained) * size.seeds * len(size.methods)
    with tqdm(total=total, disable=None, desc=f"{setting.name}: measures") as bar:
        for name, seeds in trained.items():
            domain = setting.domains[name]
            for of_seeds in zip(*seeds, strict=True):  # the runs of one method
                for run, other in measures.pairs(list(of_seeds)):
                    if measures.is_product(run):
                        keep(run, measures.of_pair(setting, domain, run, other), name)
                for run in of_seeds:
                    keep(run, measures.of_one(setting, domain, run, size.samples), name)
                    if run.seed < size.shapley_seeds:
                        keep(run, measures.contributions(setting, domain, run), name)
                    bar.update()
            for side_by_side in seeds:
                for run, ratio in measures.times(side_by_side, over="LoRA"):
                    keep(run, [("time", None, ratio)], name)
    if len(trained) > 1:
        for of_domains in zip(*trained.values(), strict=True):  # of one seed
            for of_method in zip(*of_domains, strict=True):
                if measures.is_product(of_method[0]):
                    runs_by_domain = dict(zip(trained, of_method, strict=True))
                    keep(of_method[0], measures.of_tasks(setting, runs_by_domain))
    return rows


def tables(results: Sequence[Result]) -> str:
    """The whole report: what was chosen, the claims, and the measures behind them."""
    parts = []
    for result in results:
        setting, rows = result.settings["setting"], result.rows
        seeds = len({row["seed"] for row in rows if row["measure"] == "time"})
        parts += [report.head(result), f"## {setting}: {result.settings['unit']}, mean ± sd of {seeds} seeds\n"]
        parts += [claims.table(rows, setting) + "\n", claims.overview(rows, setting) + "\n", *result.notes, ""]
    return "\n".join(parts)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    formatter = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog="python -m benchmarks study", description=__doc__, formatter_class=formatter)
    made.add_argument("--quick", action="store_true", help="two methods, two seeds, few steps: under five minutes")
    made.add_argument("--out", type=Path, default=Path("study-out"), help="folder for results (default: %(default)s)")
    made.add_argument(
        "--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="which of them (default: both)"
    )
    made.add_argument("--seeds", type=number(int), help="of each method, at least 2 (default: 5 and 4; 2 with --quick)")
    made.add_argument("--steps", type=number(int), help="of each run (default: 400 and 200; 100 and 30 with --quick)")
    return made


def main(arguments: Sequence[str]) -> int:
    """Runs the command; see ``--help``."""
    options = parser().parse_args(arguments)
    if options.seeds is not None and options.seeds < 2:
        parser().error(f"--seeds must be at least 2, to fuse two of them; got {options.seeds}")
    if options.steps is not None and options.steps < 20:
        parser().error(f"--steps must be at least 20, for the rate to warm up; got {options.steps}")
    try:
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        parser().error(f'the study needs {error.name}; install it with: pip install "cotolora[bench]"')
    # matrices this small gain nothing from a second thread
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(options.settings):
        began = time.perf_counter()
        setting, size = SETTINGS[name](), (QUICK if options.quick else SIZES)[name]
        changes = {"seeds": options.seeds, "steps": options.steps}
        size = replace(size, **{key: value for key, value in changes.items() if value is not None})
        asked = {
            "setting": name, "unit": setting.unit, "seeds": size.seeds, "steps": size.steps, "batch": setting.batch,
            "rank": runs.RANK, "alpha": runs.ALPHA, "pretraining": size.pretrain, "sweep seeds": size.sweep_seeds,
            "data": [f"{key} {domain.digest}".strip() for key, domain in setting.domains.items()],
        }  # fmt: skip
        result = Result("study", report.machine(torch.device("cpu")), asked, study(setting, size))
        result.notes.append(f"made in {time.perf_counter() - began:.0f} s")
        report.write(options.out / "study.json", result)
    publish(options.out)
    return 0


def publish(folder: Path) -> None:
    """Prints and writes what the results in `folder` say, and draws them."""
    results = report.read(folder / "study.json")
    told = tables(results)
    (folder / "study.md").write_text(told)
    rows = [row for result in results for row in result.rows]
    drawn = figures.draw(rows, {result.settings["setting"]: result.settings["unit"] for result in results}, folder)
    print(told)
    print(f"written to {folder}: study.md, study.json, {', '.join(path.name for path in drawn)}")
