"""Times whole training steps of a small Llama: PEFT, ours with every adapter on, and ours with CoTo.

    python -m benchmarks train [--steps 100] [--rank 16] [--shapes medium] [--repeats 3] [--json F] [--plot F]

A step is forward, backward, AdamW on A and B (fused, as in transformers' Trainer) and `zero_grad`; CoTo's work between
two steps counts as optimizer time. The contenders share the frozen weights, see the same tokens, and take turns in
every step. A contender whose loss or gradients are wrong is refused before timing starts. The time of a run is the mean
of its steps, because CoTo's steps become slower by design. Memory is measured in extra steps that are not timed.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import clock, memory, report, sweep
from benchmarks.llama import COTO, ON, PEFT, PHASES, SIZES, Judge, Runner, contenders_of, llama, tokens_of
from benchmarks.report import Result
from benchmarks.shapes import number
from benchmarks.workload import reason
from cotolora.results import rounded, save_picture

PAPER = 0.072  # share of the time per run that CoTo saves over LoRA, according to the paper
SMOOTH = 5  # the picture shows the median of this many neighbouring steps
SAMPLES = 8  # number of steps of a CoTo run whose memory is measured

DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"steps": 100, "rank": 16, "size": "medium"},
    "cpu": {"steps": 60, "rank": 8, "size": "small"},
}


def runners_of(result: Result, options: argparse.Namespace) -> list[Runner]:
    """The contenders with correct results; the others are added to `result.refused`."""
    base = llama(options)
    judge, runners = Judge(base, options), []
    for name, build in contenders_of(options).items():
        try:
            runner = build(name, base, options)
            judge.check(runner)
            runners.append(runner)
        except torch.OutOfMemoryError:
            raise
        except Exception as why:
            result.refused.append({"contender": name, "where": "before the clock", "reason": reason(why)})
    return runners


@dataclass
class Course:
    """Measurements of one contender in the timed runs.

    Attributes:
        seconds: by step, then by repeat, what `Runner.step` returned.
        p: CoTo's probability at each step; None without CoTo.
        skipped: share of the adapters' multiply-adds that were skipped because the adapter was off.
        stopped: share of the blocks' backward passes that did not run.
    """

    seconds: list[list[tuple[float, ...]]]
    p: list[float | None]
    skipped: float = 0.0
    stopped: float = 0.0

    def steps(self, part: int = 0) -> list[float]:
        """Seconds of each step, the median over the repeats: of the whole step (0) or of one of `PHASES` (1 and up)."""
        return [statistics.median(repeat[part] for repeat in step) for step in self.seconds]


def race(runners: Sequence[Runner], options: argparse.Namespace) -> dict[str, Course]:
    """Runs all contenders over the same steps; they take turns in every step, in an order that rotates."""
    courses = {r.name: Course([[] for _ in range(options.steps)], [None] * options.steps) for r in runners}
    done, off = dict.fromkeys(courses, 0), dict.fromkeys(courses, 0)
    for runner in runners:
        if runner.coto is not None:
            runner.coto.finish()  # all on, so that the untimed step creates every optimizer state
        runner.step(tokens_of(options, 0))
        runner.backwards = 0
    collecting = gc.isenabled()
    bar = tqdm(total=options.repeats * options.steps, disable=None, unit="step")
    gc.disable()
    try:
        for repeat in range(options.repeats):
            for runner in runners:
                if runner.coto is not None:
                    runner.coto.set_step(0)
            for step in range(options.steps):
                tokens, first = tokens_of(options, step), (step + repeat) % len(runners)
                for runner in (*runners[first:], *runners[:first]):
                    course = courses[runner.name]
                    done[runner.name] += sum(adapter.work for adapter in runner.adapters.values())
                    off[runner.name] += sum(a.work for a in runner.adapters.values() if not a.on())
                    course.p[step] = None if runner.coto is None else runner.coto.p
                    course.seconds[step].append(runner.step(tokens))
                bar.update()
                if step % 8 == 7:
                    gc.collect()
    finally:
        bar.close()
        if collecting:
            gc.enable()
    for runner in runners:
        course = courses[runner.name]
        course.skipped = off[runner.name] / done[runner.name]
        course.stopped = 1 - runner.backwards / (options.repeats * options.steps * len(runner.blocks))
    return courses


def peaks(runner: Runner, options: argparse.Namespace) -> list[int]:
    """Peak bytes of a step above what was allocated before it; for CoTo, of several steps spread over the run."""
    count = 1 if runner.coto is None else min(SAMPLES, options.steps)
    found = []
    for step in (options.steps * (2 * i + 1) // (2 * count) for i in range(count)):
        if runner.coto is not None:
            runner.coto.set_step(step)
        tokens = tokens_of(options, step)
        # kept alive, because torch warns if memory allocated before, such as CoTo's last mask, is freed while it counts
        kept = runner.coto and runner.coto.mask
        found.append(memory.allocated(partial(runner.step, tokens), options.device)[1])
        del kept
    return found


def rows_of(courses: dict[str, Course], held: dict[str, list[int]]) -> list[dict[str, Any]]:
    """One row per contender for its run, then one row per contender and step."""
    means = {name: [statistics.mean(c.steps(i)) for i in range(1 + len(PHASES))] for name, c in courses.items()}
    runs, steps = [], []
    for name, course in courses.items():
        mean, *phases = means[name]
        spread = clock.median(course.steps())
        runs.append({
            "contender": name, "mean_s": mean, "p20_s": spread.p20, "p80_s": spread.p80,
            "over_peft": mean / means[PEFT][0] if PEFT in means else math.nan,
            **{f"{phase}_s": seconds for phase, seconds in zip(PHASES, phases, strict=True)},
            "peak_mean_bytes": statistics.mean(held[name]), "peak_max_bytes": max(held[name]),
            "peak_steps": len(held[name]), "work_skipped": course.skipped, "backwards_skipped": course.stopped,
        })  # fmt: skip
        steps += [
            {"contender": name, "step": step, "seconds": seconds, "p": p}
            for step, (seconds, p) in enumerate(zip(course.steps(), course.p, strict=True))
        ]
    return runs + steps


def runs_of(result: Result) -> dict[str, dict[str, Any]]:
    """The row of each contender's whole run."""
    return {row["contender"]: row for row in result.rows if "step" not in row}


def table(result: Result) -> str:
    """The table: one line per contender."""
    titles = [
        "", "mean step", "p20–p80", "/ PEFT", *PHASES, "peak MB, mean", "max", "adapter work skipped %",
        "block backwards skipped %",
    ]  # fmt: skip
    lines = []
    for name, row in runs_of(result).items():
        lines.append([
            name, report.duration(row["mean_s"]), f"{report.duration(row['p20_s'])}–{report.duration(row['p80_s'])}",
            report.ratio(sweep.value(row, "over_peft")), *(report.duration(row[f"{phase}_s"]) for phase in PHASES),
            *(f"{row[f'peak_{which}_bytes'] / 1e6:.1f}" for which in ("mean", "max")),
            *(f"{100 * row[f'{what}_skipped']:.1f}" for what in ("work", "backwards")),
        ])  # fmt: skip
    return report.markdown(titles, lines)


def saving(runs: dict[str, dict[str, Any]]) -> str:
    """What each change saves, in percent of PEFT's step time; empty if a contender is missing."""
    if not {PEFT, ON, COTO} <= set(runs):
        return ""
    whole, lines = runs[PEFT]["mean_s"], []
    for before, after in ((PEFT, ON), (ON, COTO), (PEFT, COTO)):
        changes = [
            100 * (runs[after][name] - runs[before][name]) / whole
            for name in (*(f"{phase}_s" for phase in PHASES), "mean_s")
        ]
        lines.append([f"{before} → {after}", *(f"{change:+.1f}" for change in changes)])
    return report.markdown(["where the saving comes from: % of PEFT's step", *PHASES, "total"], lines)


def remarks(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Comparison with the saving that the paper reports, also where it is not reached."""
    if not {PEFT, ON, COTO} <= set(runs):
        return ["no comparison with the paper's saving: PEFT, ours always on or ours with CoTo was not measured"]
    over = {name: 100 * (runs[COTO]["mean_s"] / runs[name]["mean_s"] - 1) for name in (PEFT, ON)}
    lines = [
        f"the paper reports -{100 * PAPER:.1f} % time per run for LoRA with CoTo over LoRA without, both in its own "
        f"code; here ours with CoTo takes {over[PEFT]:+.1f} % over PEFT as shipped and {over[ON]:+.1f} % over ours "
        "always on"
    ]
    if not over[PEFT] < -100 * PAPER:
        lines.append(f"ours with CoTo does NOT reach the paper's -{100 * PAPER:.1f} % over PEFT: {over[PEFT]:+.1f} %")
    if not over[ON] < 0:
        lines.append(f"ours with CoTo is NOT faster than ours always on: {over[ON]:+.1f} %")
    return lines


def text(result: Result) -> str:
    """The printed report."""
    runs = runs_of(result)
    lines = [report.head(result)]
    if runs:
        lines += [table(result), ""]
    if found := saving(runs):
        lines += [found, ""]
    return "\n".join([*lines, sweep.endings(result)])


def smoothed(values: Sequence[float]) -> list[float]:
    """A running median over up to `SMOOTH` neighbouring values."""
    half = SMOOTH // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def plot(result: Result, path: Path) -> None:
    """Plots the time per step over the run with CoTo's p, and the phases of the mean step."""
    figure, (course, parts) = report.figure(2, width=5.5, height=4.2)
    runs = runs_of(result)
    p_axis = course.twinx()
    for i, name in enumerate(runs):
        steps = [row for row in result.rows if "step" in row and row["contender"] == name]
        at = [row["step"] for row in steps]
        course.plot(at, [1e3 * y for y in smoothed([row["seconds"] for row in steps])], label=name, color=f"C{i}")
        if steps[0]["p"] is not None:
            p_axis.plot(at, [row["p"] for row in steps], color="0.6", linestyle=":", label="CoTo's p (right axis)")
    course.set(xlabel="step", ylabel="ms per step", title=f"time per step, median of {SMOOTH} neighbours")
    course.set_ylim(bottom=0)
    p_axis.set(ylim=(0, 1.02), ylabel="CoTo's p")
    left = [0.0] * len(runs)
    for phase, color in zip(PHASES, ("0.75", "0.5", "0.25"), strict=True):
        widths = [1e3 * row[f"{phase}_s"] for row in runs.values()]
        parts.barh(list(runs), widths, left=left, label=phase, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, row in enumerate(runs.values()):
        parts.text(left[i], i, f" {report.ratio(sweep.value(row, 'over_peft'))}", va="center", fontsize=8)
    parts.set(xlabel="ms per step", title="mean step of the run; number: ratio to PEFT as shipped")
    parts.margins(x=0.12)
    parts.invert_yaxis()
    for axis in (course, parts):
        axis.title.set_fontsize(10)
    parts.tick_params(axis="y", labelsize=8)
    labelled = [axis.get_legend_handles_labels() for axis in (course, p_axis, parts)]
    handles, labels = (list(chain(*lists)) for lists in zip(*labelled, strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    save_picture(figure, path, dpi=150)


def from_zero(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0; got {text!r}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments and adds the defaults of the device and of the size."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__, formatter_class=formatter)
    add, positive = parser.add_argument, number(int)
    add("--steps", type=positive, help="steps of the run (default: 100, on a CPU 60)")
    add("--rank", type=positive, help="rank of the adapters (default: 16, on a CPU 8)")
    add("--shapes", choices=SIZES, dest="size", help="sizes of model and batch (default: medium, on a CPU small)")
    add("--peers", choices=("none", "peft"), nargs="+", default=["peft"], help="compare with these (default: peft)")
    for name in ("layers", "hidden", "batch", "tokens"):
        add(f"--{name}", type=positive, help="overrides the value of --shapes")
    add("--dtype", choices=("bfloat16", "float32"), help="dtype of the base (default: bfloat16, on a CPU float32)")
    add("--device", type=sweep.device_of, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--repeats", type=positive, default=1, help="runs, of which a step counts with its median (default: 1)")
    add("--seed", type=from_zero, default=0, help="seed of the masks, the weights and the tokens (default: 0)")
    add("--json", type=Path, metavar="FILE", help="add the result to this file")
    add("--plot", type=Path, metavar="FILE", help="draw the result in this file")
    # options that only measurements of single layers have
    parser.set_defaults(mode=["eager"], rounds=1)
    options = sweep.settle(parser, arguments, DEFAULTS)
    del options.mode, options.rounds
    size = SIZES[options.size]
    for name in ("layers", "hidden", "batch", "tokens"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(size, name))
    if options.hidden % (2 * size.heads):
        parser.error(f"argument --hidden: must be a multiple of {2 * size.heads}; got {options.hidden}")
    if options.tokens < 2:
        parser.error(f"argument --tokens: must be at least 2 for next-token prediction; got {options.tokens}")
    options.intermediate = size.intermediate * options.hidden // size.hidden
    options.vocab = size.vocab
    for package in ("peft", "transformers"):
        if report.version_of(package) == "absent":
            parser.error(f'{package} is not installed, but train compares with PEFT: pip install "{package}"')
    return options


def measure(options: argparse.Namespace) -> Result:
    """Checks every contender's results, then measures its time and memory."""
    result = Result("train", report.machine(options.device), sweep.settings_of(options))
    try:
        runners = runners_of(result, options)
        if runners:
            courses = race(runners, options)
            held = {runner.name: peaks(runner, options) for runner in runners}
            result.rows = rows_of(courses, held)
            sampled = max(map(len, held.values()))
            result.notes.append(
                f"peak MB is over what was allocated before the step; with CoTo, of {sampled} steps spread over the run"
            )
    except torch.OutOfMemoryError as error:
        result.refused.append({"contender": "all", "where": options.size, "reason": reason(error)})
    result.notes += remarks(runs_of(result))
    return result


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; returns 1 if a contender was refused."""
    options = parse(arguments)
    result = measure(options)
    result.rows = rounded(result.rows)
    print(text(result), flush=True)
    return max(sweep.finish(result, options, plot), 1 if result.refused else 0)
