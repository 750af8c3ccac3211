"""Tests the claims of the CoTo paper on a pretrained model from disk and on two small tasks that need no download.

    python -m benchmarks study --settings sentiment news --model DIR --data DIR [--quick] [--out DIR]
    python -m benchmarks study [--settings digits text] [--quick] [--out DIR] [--methods LoRA CoTo]

Settings "sentiment" and "news": a pretrained text encoder is adapted to rated sentences of several domains, or to a few
headlines per topic (see `benchmarks/study/README.md` for model and data). First, a screen on the validation split of
one domain chooses each method's learning rate and schedule, and CoTo's own settings. Then new seeds confirm the choice
on the test splits. Finished jobs are saved in the --out folder; the same command resumes an interrupted run.

Setting "digits": a vision transformer pretrained on the handwritten digits 0 to 4 is adapted to all ten. Setting
"text": a small character-level Llama pretrained on the source code of Python's standard library is adapted to English
prose, to names of Unicode characters and to code pages. All methods use the same batches, steps and adapters, and each
uses the learning rate with its best validation score. Scores are accuracy in percent or negated bits per character;
larger is better. Settings (or jobs of a pretrained setting) run in parallel, one single-threaded process per core.
A claim holds if the 95 % confidence interval of the paired differences over the seeds lies on its side, does not hold
if it lies on the other side, and is not decidable here otherwise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.report import Result
from benchmarks.shapes import number
from benchmarks.study import claims, encoders, figures, measures, runs, stages, tasks
from benchmarks.study.journal import Journal, cores
from benchmarks.study.measures import Value
from benchmarks.study.runs import Method, Run
from benchmarks.study.tasks import Setting

T = TypeVar("T")
S = TypeVar("S")

SETTINGS: dict[str, Callable[[], Setting]] = {"digits": tasks.digits, "text": tasks.text}


@dataclass(frozen=True)
class Size:
    """How much of the study to run: methods, seeds and steps."""

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


SENTIMENT = stages.Plan(
    steps=150, rates=(5e-4, 1.5e-3, 4.5e-3), screen_seeds=3, seeds=8, layer_seeds=4, merge_seeds=4, time_seeds=4,
    time_steps=60, longest=16, held_out=(200, 300), probe=150,
)  # fmt: skip
NEWS = replace(SENTIMENT, steps=2000, rates=(5e-4, 1.6e-3, 5e-3), merge_seeds=0, time_seeds=2, shots=16)
PRETRAINED = {"sentiment": SENTIMENT, "news": NEWS}
HURRIED = {
    "steps": 20, "rates": (1.5e-3,), "screen_seeds": 1, "seeds": 2, "layer_seeds": 1, "time_seeds": 1, "time_steps": 10,
    "held_out": (50, 50), "probe": 50,
}  # fmt: skip
QUICK_PRETRAINED = {
    "sentiment": replace(SENTIMENT, merge_seeds=1, **HURRIED),
    "news": replace(NEWS, **HURRIED),
}


def study(setting: Setting, size: Size, line: int = 0) -> list[dict[str, Any]]:
    """All rows of one setting; `line` is the terminal line of its progress bar."""
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
    }  # by domain, then by seed: one run per method
    with progress(setting, "runs", each * size.seeds, line) as bar:
        for seed in range(size.seeds):
            for name, domain in setting.domains.items():
                trained[name].append(runs.train(setting, base, domain.train, rates, seed, size.steps, bar.update))
    return rows + measured(setting, size, trained, line)


def progress(setting: Setting, part: str, total: int, line: int) -> tqdm:
    """A progress bar, disabled if there is no terminal."""
    return tqdm(total=total, disable=None, desc=f"{setting.name}: {part}", position=line, leave=False)


def measured(setting: Setting, size: Size, trained: dict[str, list[list[Run]]], line: int) -> list[dict[str, Any]]:
    """All measures of trained runs."""
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
        for of_domains in zip(*trained.values(), strict=True):  # the runs of one seed
            for of_method in zip(*of_domains, strict=True):
                if measures.is_product(of_method[0]):
                    runs_by_domain = dict(zip(trained, of_method, strict=True))
                    keep(of_method[0], measures.of_tasks(setting, runs_by_domain))
    return rows


def tables(results: Sequence[Result]) -> str:
    """The whole report: the chosen settings, the claims, and the measures behind them."""
    parts = []
    for result in results:
        setting, rows = result.settings["setting"], result.rows
        seeds = len({row["seed"] for row in rows if row["measure"] == "score" and row["method"] != "base"})
        parts += [report.head(result), f"## {setting}: {result.settings['unit']}, mean ± sd of {seeds} seeds\n"]
        if setting in PRETRAINED:
            parts += [claims.screened(rows) + "\n"]
        parts += [claims.table(rows, setting) + "\n", claims.overview(rows, setting) + "\n", *result.notes, ""]
    return "\n".join(parts)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    formatter = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog="python -m benchmarks study", description=__doc__, formatter_class=formatter)
    made.add_argument("--quick", action="store_true", help="two methods, two seeds, few steps: two and a half minutes")
    made.add_argument("--out", type=Path, default=Path("study-out"), help="folder for results (default: %(default)s)")
    made.add_argument(
        "--settings", nargs="+", choices=[*SETTINGS, *PRETRAINED], default=list(SETTINGS),
        help="settings to run (default: digits text)",
    )  # fmt: skip
    made.add_argument("--model", type=Path, metavar="DIR", help="transformers checkpoint for sentiment and news")
    made.add_argument(
        "--data", type=Path, metavar="DIR", help="data for sentiment and news, written by benchmarks.study.corpora"
    )
    made.add_argument(
        "--report", action="store_true", help="for sentiment and news: run no jobs, only report the results in --out"
    )
    made.add_argument("--processes", type=number(int), help="for sentiment and news (default: one per core)")
    names = [method.name for method in runs.METHODS]
    made.add_argument(
        "--methods", nargs="+", choices=names, metavar="METHOD",
        help=f"LoRA and any of {', '.join(map(repr, names[1:]))} (default: all; LoRA and CoTo with --quick)",
    )  # fmt: skip
    made.add_argument("--seeds", type=number(int), help="per method, at least 2 (default: 5 and 4; 2 with --quick)")
    made.add_argument("--steps", type=number(int), help="per run (default: 400 and 200; 100 and 30 with --quick)")
    return made


def main(arguments: Sequence[str]) -> int:
    """Runs the command; see ``--help``."""
    options = parser().parse_args(arguments)
    if options.seeds is not None and options.seeds < 2:
        parser().error(f"--seeds must be at least 2, because two seeds are fused; got {options.seeds}")
    if options.steps is not None and options.steps < 20:
        parser().error(f"--steps must be at least 20 for the learning-rate warm-up; got {options.steps}")
    if options.methods is not None and "LoRA" not in options.methods:
        parser().error(f"--methods must include LoRA, the baseline of the times; got {' '.join(options.methods)}")
    pretrained = [name for name in dict.fromkeys(options.settings) if name in PRETRAINED]
    if pretrained and (options.model is None or options.data is None):
        parser().error(f"--model and --data must be given for {' and '.join(pretrained)}")
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
    for line, name in enumerate(name for name in dict.fromkeys(options.settings) if name in SETTINGS):
        changes = {"seeds": options.seeds, "steps": options.steps, "methods": methods}
        jobs.append((name, changed((QUICK if options.quick else SIZES)[name], changes), line))
    for result in in_processes(result_of, jobs) if jobs else ():
        report.write(options.out / "study.json", result)
    for name in pretrained:
        plan = (QUICK_PRETRAINED if options.quick else PRETRAINED)[name]
        plan = changed(plan, {"seeds": options.seeds, "steps": options.steps})
        try:
            result = pretrained_result(stages.Course(name, options.model, options.data, options.out, plan), options)
        except ValueError as error:
            parser().error(str(error))
        report.write(options.out / "study.json", result)
    publish(options.out)
    return 0


def changed(size: T, changes: dict[str, Any]) -> T:
    """`size` with the requested changes."""
    return replace(size, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[type-var]


def result_of(job: tuple[str, Size, int]) -> Result:
    """The study of one setting, with its settings."""
    name, size, line = job
    # a second thread does not speed up matrices this small
    torch.set_num_threads(1)
    began = time.perf_counter()
    setting = SETTINGS[name]()
    asked = {
        "setting": name, "unit": setting.unit, "seeds": size.seeds, "steps": size.steps, "batch": setting.batch,
        "rank": setting.rank, "alpha": setting.alpha, "pretraining": size.pretrain, "sweep seeds": size.sweep_seeds,
        "data": [f"{key} {domain.digest}".strip() for key, domain in setting.domains.items()],
    }  # fmt: skip
    result = Result("study", report.machine(torch.device("cpu")), asked, study(setting, size, line))
    result.notes.append(f"made in {time.perf_counter() - began:.0f} s")
    return result


def pretrained_result(course: stages.Course, options: argparse.Namespace) -> Result:
    """The study of a pretrained model; resumes from the jobs saved in the results folder."""
    setting = course.setting()
    domains = sorted(setting.domains, key=lambda name: -len(setting.domains[name].train[1]))
    asked = {
        "setting": course.name, "unit": setting.unit, "batch": setting.batch, "rank": setting.rank,
        "alpha": setting.alpha, **asdict(course.plan), "model": encoders.digest(course.model),
        "data": [f"{name} {setting.domains[name].digest}" for name in domains],
    }  # fmt: skip
    book = Journal(options.out / f"{course.name}.jsonl", asked)
    if not options.report:
        stages.study(course, book, options.processes or cores(), domains)
    elif not (domains := stages.finished(course.plan, domains, book)):
        raise ValueError(f"--report needs a confirmed domain; {book.path} has {len(book.done)} jobs, but confirms none")
    asked["confirmed"] = domains
    asked["chosen"] = [f"{name}: {recipe};" for name, recipe in stages.recipes(book.rows()).items()]
    order = [stages.LORA, stages.PEFT, *stages.METHODS]
    rows = [row for row in book.rows() if row["domain"] in (*domains, "all")]
    rows.sort(key=lambda row: order.index(row["method"]) if row["method"] in order else -1)
    result = Result("study", report.machine(torch.device("cpu")), asked, rows)
    result.notes.append(f"{len(book.done)} jobs, {book.seconds:.0f} s of the processor")
    return result


def in_processes(function: Callable[[T], S], arguments: Sequence[T]) -> Iterator[S]:
    """Yields the results of `function` from parallel processes as they complete; raises errors at the end."""
    if len(arguments) == 1:
        yield function(arguments[0])
        return
    # spawn, because forking after torch has started its threads can hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(cores(), len(arguments)), context) as pool:
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
    """Prints and writes the report of the results in `folder`, and draws the pictures."""
    order = [*PRETRAINED, *SETTINGS]
    results = sorted(report.read(folder / "study.json"), key=lambda result: order.index(result.settings["setting"]))
    told = tables(results)
    (folder / "study.md").write_text(told)
    rows = [row for result in results for row in result.rows]
    drawn = figures.draw(rows, {result.settings["setting"]: result.settings["unit"] for result in results}, folder)
    print(told)
    print(f"written to {folder}: study.md, study.json, {', '.join(path.name for path in drawn)}")
