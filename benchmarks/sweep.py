"""Shared by `linear`, `block` and `gates`: measures one workload after the other and prints a table for each.

The main column is the time relative to the frozen linear: the median over the rounds of the ratio within a round.
"backward" is "both" minus "forward". Refused contenders and remarks follow the tables.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.compare import PARTS, Comparison, compare
from benchmarks.contenders import (
    AUTO,
    COMPARED,
    FROZEN,
    OFF_BY_HOST,
    PEER_NAMES,
    PEERS,
    PEFT_OFF,
    Contender,
    named,
)
from benchmarks.report import Result
from benchmarks.shapes import Linear, number, title
from benchmarks.workload import Workload, reason
from cotolora.results import rounded

DTYPES, MODES, PICTURES = ("bfloat16", "float16", "float32"), ("eager", "graph"), (".png", ".pdf", ".svg")
NOISY = 1.5  # p80 / p20 of the frozen linear above which the machine was busy; on an idle machine it is below 1.1
CHOSE_WORSE = "ours chose worse than"
ENOUGH = 10  # rounds needed to judge a choice of backend
BEHIND = 1.03  # ours may take this multiple of the best backend's time when it chooses the backend itself
Case = tuple[str, tuple[Linear, ...], int]  # a name, the linears, and the number of rows


def device_of(text: str) -> torch.device:
    """An argparse type: a device that this machine has."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N; got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} finds {found} usable GPUs; got {text!r}")
    return device


def parser_of(
    command: str, doc: str, *, without: Sequence[str] = (), peers: Sequence[str] = PEER_NAMES
) -> argparse.ArgumentParser:
    """A parser with the options of all measurements except those in `without`; `peers` are the choices of --peers."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {command}", description=doc, formatter_class=formatter)
    several: dict[str, Any] = {"action": "extend", "nargs": "+"}
    options: dict[str, dict[str, Any]] = {
        "device": {"type": device_of, "help": "cpu, cuda or cuda:N (default: a GPU if there is one)"},
        "rows": {"type": number(int), **several, "metavar": "M", "help": "rows of x, for shapes without M"},
        "rank": {"type": number(int), **several, "help": "rank of the adapters; may be repeated"},
        "variant": {"choices": COMPARED, "default": "lora", "help": "kind of adapter (default: lora)"},
        "dtype": {"choices": DTYPES, "help": "dtype of x and W (default: bfloat16, on a CPU float32)"},
        "mode": {
            "choices": MODES,
            **several,
            "help": "eager, or in a CUDA graph (default on a GPU: graph; tune: both)",
        },
        "peers": {
            "choices": ("none", *peers),
            **several,
            "help": "libraries to compare with (default: all; tune and roofline: none)",
        },
        "rounds": {"type": number(int), "help": "measurements of each contender (default: 30; tune: 20)"},
        "minutes": {"type": number(float), "default": math.inf, "help": "start no new shape after this long"},
        "json": {"type": Path, "metavar": "FILE", "help": "add the result to this file"},
        "plot": {"type": Path, "metavar": "FILE", "help": "draw the result in this file"},
    }
    for name in options:
        if name not in without:
            parser.add_argument(f"--{name}", **options[name])
    return parser


def settle(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, defaults: dict[str, dict[str, Any]]
) -> argparse.Namespace:
    """Parses the arguments and adds the device's defaults; exits if an option is invalid."""
    options = parser.parse_args(arguments)
    on_cpu = getattr(options, "dry_run", False) or not torch.cuda.is_available()
    options.device = options.device or device_of("cpu" if on_cpu else "cuda")
    on_gpu = options.device.type == "cuda"
    common = {"peers": list(PEER_NAMES), "rounds": 30, "rank": [16 if on_gpu else 8]}
    common |= {"dtype": "bfloat16" if on_gpu else "float32", "mode": ["graph" if on_gpu else "eager"]}
    for name, value in (common | defaults[options.device.type]).items():
        if getattr(options, name, ...) is None:
            setattr(options, name, value)
    if "graph" in getattr(options, "mode", ()) and not on_gpu:
        parser.error("argument --mode: graph needs --device cuda: a CPU has no CUDA graphs")
    if len(set(peers := getattr(options, "peers", ()))) > 1 and "none" in peers:
        parser.error(f"argument --peers: none excludes all others; got {' '.join(options.peers)}")
    check_files(parser, options.json, options.plot)
    if on_gpu:
        torch.cuda.set_device(options.device)
    return options


def check_files(parser: argparse.ArgumentParser, json: Path | None, plot: Path | None) -> None:
    """Exits if the output files cannot be written, before anything is measured."""
    for name, path in (("json", json), ("plot", plot)):
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"argument --{name}: {path.parent} is not a folder")
    if json is not None and json.exists():
        try:
            report.read(json)
        except (ValueError, OSError) as error:
            parser.error(f"argument --json: {error}; move it away")
    if plot is not None and (plot.suffix not in PICTURES or plot.is_dir()):
        parser.error(f"argument --plot: must be a file that ends in {', '.join(PICTURES)}; got {str(plot)!r}")
    if plot is not None and report.version_of("matplotlib") == "absent":
        parser.error("argument --plot: matplotlib is not installed: pip install matplotlib")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that describe the measurement, as JSON values."""
    aside = ("device", "json", "plot", "minutes", "out", "dry_run")
    return {k: v if k != "shapes" else list(v) for k, v in vars(options).items() if k not in aside}


def table(rows: list[dict[str, Any]]) -> str:
    """The table of one workload in one mode: one line per contender, ratios to frozen first."""
    contenders: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        contenders.setdefault(row["contender"], {})[row["part"]] = row
    titles = [
        "over frozen",
        *(f"{part}" for part in PARTS),
        *(f"{part} p20–p80" for part in PARTS),
        "y error / F.linear's",
    ]
    lines = []
    for name, parts in contenders.items():
        ratios = [report.ratio(value(parts[part], "over_frozen")) for part in PARTS]
        spans = [f"{span(parts[part], 'p20_s')}–{span(parts[part], 'p80_s')}" for part in PARTS]
        lines.append([name, *ratios, *spans, f"{value(parts['both'], 'error'):.2f}"])
    return report.markdown(titles, lines)


def value(row: dict[str, Any], name: str) -> float:
    """A number of a row; NaN if it is None (null in JSON)."""
    return math.nan if row[name] is None else row[name]


def span(row: dict[str, Any], name: str) -> str:
    return report.duration(value(row, name))


WHERE = ("shape", "rows", "rank", "mode")


def text(result: Result) -> str:
    """The printed report."""
    lines = [report.head(result)]
    for (shape, rows, rank, mode), members in report.groups(result.rows, WHERE).items():
        lines += [f"### {title(shape)}, {rows} rows, rank {rank}, {mode}\n", table(members), ""]
    return "\n".join([*lines, endings(result)])


def endings(result: Result) -> str:
    """The contenders that were not measured, grouped by reason, and the notes."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for refusal in result.refused:
        by_reason.setdefault((refusal["contender"], refusal["reason"]), []).append(refusal.get("where", ""))
    lines = [
        f"- not measured: {name}" + (f" ({len(where)} shapes)" if len(where) > 1 else f" ({where[0]})") + f": {why}"
        for (name, why), where in by_reason.items()
    ]
    return "\n".join([*lines, *(f"- {note}" for note in result.notes)])


def noise(comparison: Comparison, where: str) -> list[str]:
    """A line if the spread of the frozen linear's own times shows that the machine was busy."""
    if FROZEN.name not in comparison.seconds:
        return []
    times = comparison.median(FROZEN.name, "both")
    if times.p80 <= NOISY * times.p20:
        return []
    spread = f"the p80 of the frozen linear is {times.p80 / times.p20:.2f} times its p20"
    return [f"{where}: unreliable, the machine was busy: {spread}"]


def losses(comparison: Comparison, where: str) -> list[str]:
    """Lines for cases where ours is slower than a peer, or chose a backend that is slower than another."""
    enough = len(comparison.seconds.get(AUTO.name, {}).get("both", ())) >= ENOUGH
    own = dict.fromkeys(c.name for variant in COMPARED for c in named(variant))
    pairs = [(AUTO.name, name, BEHIND, CHOSE_WORSE) for name in own if enough]
    pairs += [(AUTO.name, c.name, 1.0, "ours loses to") for c in PEERS]
    pairs += [(OFF_BY_HOST.name, PEFT_OFF.name, 1.0, "ours off loses to")]
    lines = []
    for ours, other, limit, what in pairs:
        if {ours, other} <= set(comparison.seconds) and (times := comparison.ratio(ours, other)) > limit:
            lines.append(f"{where}: {what} {other}: {times:.2f} of its time, forward and backward")
    return lines


def each(
    result: Result,
    options: argparse.Namespace,
    cases: Iterable[Case],
    measure: Callable[[Workload, str, dict[str, Any]], None],
) -> None:
    """Calls `measure(workload, title, keys of its rows)` for each case and rank, until `options.minutes` are over.

    A case that runs out of memory is recorded as refused.
    """
    dtype, begun = getattr(torch, options.dtype), time.monotonic()
    for name, linears, rows, rank in (bar := tqdm([(*case, r) for case in cases for r in options.rank], disable=None)):
        where = f"{title(name)}, {rows} rows, rank {rank}"
        if time.monotonic() - begun > 60 * options.minutes:
            result.notes.append(f"stopped before {where}: {options.minutes:g} minutes are over")
            return
        bar.set_description(where)
        try:
            workload = Workload(linears, rows, rank, dtype, options.device, getattr(options, "variant", "lora"))
            measure(workload, where, {"shape": name, "rows": rows, "rank": rank})
        except torch.OutOfMemoryError as error:
            result.refused.append({"contender": "all", "where": where, "reason": reason(error)})
        if options.json and (result.rows or result.refused):
            report.write(options.json, result)  # after every case, so that a killed run keeps its results


def measure(
    result: Result, options: argparse.Namespace, cases: Iterable[Case], contenders: Sequence[Contender]
) -> None:
    """Adds the times to a result and prints each table as soon as it is complete."""

    def one(workload: Workload, at: str, keys: dict[str, Any]) -> None:
        for comparison in compare(workload, contenders, options.mode, options.rounds):
            where = f"{at}, {comparison.mode}"
            measured = rounded(comparison.rows(**keys))
            if measured:
                tqdm.write(f"### {where}\n\n{table(measured)}\n")
            result.rows += measured
            result.refused += [{"contender": n, "where": where, "reason": w} for n, w in comparison.refused.items()]
            result.notes += [*noise(comparison, where), *losses(comparison, where)]

    print(report.head(result))
    each(result, options, cases, one)


def run(
    command: str,
    options: argparse.Namespace,
    cases: Iterable[Case],
    contenders: Sequence[Contender],
    plot: Callable[[Result, Path], None],
) -> int:
    """Measures, prints, writes and draws.

    Returns 1 if nothing was measured or if ours chose a backend that is not the fastest.
    """
    result = Result(command, report.machine(options.device), settings_of(options))
    measure(result, options, cases, contenders)
    print(endings(result), flush=True)
    return finish(result, options, plot)


def finish(result: Result, options: argparse.Namespace, plot: Callable[[Result, Path], None]) -> int:
    """Writes and draws the result as requested; returns the exit status."""
    if options.json and (result.rows or result.refused):
        report.write(options.json, result)
        print(f"written: {options.json}", file=sys.stderr)
    if options.plot and result.rows:
        plot(result, options.plot)
        print(f"drawn: {options.plot}", file=sys.stderr)
    return 1 if not result.rows or any(CHOSE_WORSE in note for note in result.notes) else 0
