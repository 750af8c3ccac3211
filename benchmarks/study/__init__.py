"""Checks the CoTo paper's claims on two small tasks that every machine has.

    python -m benchmarks study [--quick] [--out DIR] [--settings digits text] [--methods LoRA CoTo]

Setting "digits": a vision transformer that knows the handwritten digits 0 to 4, adapted to all ten. Setting "text": a
small Llama over characters that has read Python's library, adapted to English prose, to names of Unicode characters and
to code pages. Each method gets the same batches, steps and adapters, and the best of the same learning rates by its
own validation score. Scores are larger for the better: accuracy in percent, or bits per character, negated.
Settings run side by side, a process and a thread each, where the machine has a core for each.
A claim holds if the 95 % interval of the paired differences over the seeds lies on its side, does not hold if it
lies on the other, and is not decidable here otherwise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.report import Result
from benchmarks.shapes import number
from benchmarks.study import claims, figures, measures, runs, tasks
from benchmarks.study.measures import Value
from benchmarks.study.runs import Method, Run
from benchmarks.study.tasks import Setting

T = TypeVar("T")
S = TypeVar("S")

SETTINGS: dict[str, Callable[[], Setting]] = {"digits": tasks.digits, "text": tasks.text}


@dataclass(frozen=True)
class Size:
    """How much of the study to run."""

    seeds: int
    steps: int
    pretrain: int
    rates: tuple[float, ...]
    sweep_seeds: int
    methods: tuple[Method, ...]
    shapley_seeds: int


SIZES = {
    "digits": Size(5, 400, 300, runs.RATES, 1, runs.METHODS, 5),
    "text": Size(4, 200, 1000, runs.RATES, 1, runs.METHODS, 4),
}
QUICK = {
    "digits": Size(2, 100, 150, (8e-3, 1.6e-2), 1, (runs.METHODS[0], runs.METHODS[2]), 1),
    "text": Size(2, 30, 100, (8e-3, 1.6e-2), 1, (runs.METHODS[0], runs.METHODS[2]), 1),
}


def study(setting: Setting, size: Size, line: int = 0) -> list[dict[str, Any]]:
    """All rows of one setting; progress is shown on that line of the terminal."""
    base = setting.pretrained(size.pretrain)
    each = size.steps * len(size.methods) * len(setting.domains)
    with progress(setting, "sweep", each * size.sweep_seeds * len(size.rates), line) as bar:
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

    trained: dict[str, list[list[Run]]] = {
        name: [] for name in setting.domains
    }  # by domain and seed: one run for each method
    with progress(setting, "runs", each * size.seeds, line) as bar:
        for seed in range(size.seeds):
            for name, domain in setting.domains.items():
                trained[name].append(runs.train(setting, base, domain.train, rates, seed, size.steps, bar.update))
    return rows + measured(setting, size, trained, line)


def progress(setting: Setting, part: str, total: int, line: int) -> tqdm:
    """A bar, where there is a terminal to see it."""
    return tqdm(total=total, disable=None, desc=f"{setting.name}: {part}", position=line, leave=False)


def measured(setting: Setting, size: Size, trained: dict[str, list[list[Run]]], line: int) -> list[dict[str, Any]]:
    """Everything that is measured of trained runs."""
    rows: list[dict[str, Any]] = []

    def keep(run: Run, found: Iterable[Value], domain: str = "all") -> None:
        told = {"setting": setting.name, "domain": domain, "method": run.method.name, "seed": run.seed}
        rows.extend({**told, "measure": measure, "at": at, "value": value} for measure, at, value in found)

    total = len(trained) * size.seeds * len(size.methods)
    with progress(setting, "measures", total, line) as bar:
        for name, seeds in trained.items():
            domain = setting.domains[name]
            for of_seeds in zip(*seeds, strict=True):  # the runs of one method
                for run, other in measures.pairs(list(of_seeds)):
                    if measures.is_product(run):
                        keep(run, measures.of_pair(setting, domain, run, other), name)
                for run in of_seeds:
                    keep(run, measures.of_one(setting, domain, run), name)
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
    made.add_argument("--quick", action="store_true", help="two methods, two seeds, few steps: two and a half minutes")
    made.add_argument("--out", type=Path, default=Path("study-out"), help="folder for results (default: %(default)s)")
    made.add_argument(
        "--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="which of them (default: both)"
    )
    names = [method.name for method in runs.METHODS]
    made.add_argument(
        "--methods", nargs="+", choices=names, metavar="METHOD",
        help=f"LoRA and which others of {', '.join(map(repr, names[1:]))} (default: all; LoRA and CoTo with --quick)",
    )  # fmt: skip
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
    if options.methods is not None and "LoRA" not in options.methods:
        parser().error(f"--methods must hold LoRA, which the others are timed against; got {' '.join(options.methods)}")
    methods = options.methods and tuple(method for method in runs.METHODS if method.name in options.methods)
    try:
        import einops  # noqa: F401
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        parser().error(f'the study needs {error.name}; install it with: pip install "cotolora[bench]"')
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = []
    for line, name in enumerate(dict.fromkeys(options.settings)):
        changes = {"seeds": options.seeds, "steps": options.steps, "methods": methods}
        size = replace((QUICK if options.quick else SIZES)[name], **{k: v for k, v in changes.items() if v is not None})
        jobs.append((name, size, line))
    for result in in_processes(result_of, jobs):
        report.write(options.out / "study.json", result)
    publish(options.out)
    return 0


def result_of(job: tuple[str, Size, int]) -> Result:
    """The study of one setting, with what it was asked."""
    name, size, line = job
    # matrices this small gain nothing from a second thread
    torch.set_num_threads(1)
    began = time.perf_counter()
    setting = SETTINGS[name]()
    asked = {
        "setting": name, "unit": setting.unit, "seeds": size.seeds, "steps": size.steps, "batch": setting.batch,
        "rank": runs.RANK, "alpha": runs.ALPHA, "pretraining": size.pretrain, "sweep seeds": size.sweep_seeds,
        "data": [f"{key} {domain.digest}".strip() for key, domain in setting.domains.items()],
    }  # fmt: skip
    result = Result("study", report.machine(torch.device("cpu")), asked, study(setting, size, line))
    result.notes.append(f"made in {time.perf_counter() - began:.0f} s")
    return result


def in_processes(function: Callable[[T], S], arguments: Sequence[T]) -> Iterator[S]:
    """Yields the function's results in order of completion, from parallel processes; raises errors at the end."""
    if len(arguments) == 1:
        yield function(arguments[0])
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # forked, a child would inherit torch's threads without their having been forked
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(cores, len(arguments)), context) as pool:
        errors = []
        for future in as_completed([pool.submit(function, argument) for argument in arguments]):
            error = future.exception()
            if error is None:
                yield future.result()
            else:
                errors.append(error)
    if errors:
        raise errors[0]


def publish(folder: Path) -> None:
    """Prints and writes what the results in `folder` say, and draws them."""
    order = list(SETTINGS)
    results = sorted(report.read(folder / "study.json"), key=lambda result: order.index(result.settings["setting"]))
    told = tables(results)
    (folder / "study.md").write_text(told)
    rows = [row for result in results for row in result.rows]
    drawn = figures.draw(rows, {result.settings["setting"]: result.settings["unit"] for result in results}, folder)
    print(told)
    print(f"written to {folder}: study.md, study.json, {', '.join(path.name for path in drawn)}")
