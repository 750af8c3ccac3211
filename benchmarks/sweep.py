"""The course of `linear`, `block` and `gates`: one workload after the other, a table each, then what went wrong.

The main column is the time over the frozen linear's: medians of the ratios of the same round. "backward" is forward and
backward less forward.
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
from benchmarks.contenders import AUTO, NAMED, PEER_NAMES, Contender
from benchmarks.report import Result
from benchmarks.shapes import Linear, number
from benchmarks.workload import Workload, reason

BEHIND = 1.03  # how many times the best backend's time ours may take when it chooses for itself
Case = tuple[str, tuple[Linear, ...], int]  # a name, the linears, and rows


def device_of(text: str) -> torch.device:
    """An argparse type: a device that is there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N; got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} finds {found} GPUs that it can use; got {text!r}")
    return device


def parser_of(command: str, doc: str) -> argparse.ArgumentParser:
    """The options that all measurements have."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {command}", description=doc, formatter_class=formatter)
    several: dict[str, Any] = {"action": "extend", "nargs": "+"}
    add = parser.add_argument
    add("--device", type=device_of, help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--rows", type=number(int), **several, metavar="M", help="rows of x, for shapes that do not say")
    add("--rank", type=number(int), **several, help="of the adapters; may be repeated")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="of x and W (default: bfloat16, on a CPU float32)")
    add(
        "--mode",
        choices=("eager", "graph"),
        **several,
        help="eager, or captured in a CUDA graph (the default on a GPU)",
    )
    add("--peers", choices=("none", *PEER_NAMES), **several, help="whom to compare with (default: all)")
    add("--rounds", type=number(int), help="times of each contender (default: 30)")
    add("--minutes", type=number(float), default=math.inf, help="start no new shape after this long")
    add("--json", type=Path, metavar="FILE", help="add the result to this file")
    add("--plot", type=Path, metavar="FILE", help="draw it here")
    return parser


def settle(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, defaults: dict[str, dict[str, Any]]
) -> argparse.Namespace:
    """The options, with the defaults of the device; bad ones end the program."""
    options = parser.parse_args(arguments)
    options.device = options.device or device_of("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = options.device.type == "cuda"
    common = {"peers": list(PEER_NAMES), "rounds": 30, "rank": [16 if on_gpu else 8]}
    common |= {"dtype": "bfloat16" if on_gpu else "float32", "mode": ["graph" if on_gpu else "eager"]}
    for name, value in (common | defaults[options.device.type]).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if "graph" in options.mode and not on_gpu:
        parser.error("argument --mode: graph needs --device cuda: a CPU has no CUDA graphs")
    if "none" in options.peers and len(set(options.peers)) > 1:
        parser.error(f"argument --peers: none goes with no other; got {' '.join(options.peers)}")
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"argument --{name}: {path.parent} is no folder")
    if options.json is not None and options.json.exists():
        try:
            report.read(options.json)
        except (ValueError, OSError) as error:
            parser.error(f"argument --json: {error}; move it away")
    if on_gpu:
        torch.cuda.set_device(options.device)
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked to be measured, as JSON has it."""
    aside = ("device", "json", "plot", "minutes")
    return {k: v if k != "shapes" else list(v) for k, v in vars(options).items() if k not in aside}


def table(rows: list[dict[str, Any]]) -> str:
    """Of one workload in one mode: a line for each contender, the ratios to frozen first."""
    contenders: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        contenders.setdefault(row["contender"], {})[row["part"]] = row
    titles = [
        "/ frozen",
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
    """A number, which JSON has as null where there is none."""
    return math.nan if row[name] is None else row[name]


def span(row: dict[str, Any], name: str) -> str:
    return report.duration(value(row, name))


WHERE = ("shape", "rows", "rank", "mode")


def text(result: Result) -> str:
    """Everything that was measured, as it is printed."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in result.rows:
        groups.setdefault(tuple(row[name] for name in WHERE), []).append(row)
    lines = [report.head(result)]
    for (shape, rows, rank, mode), members in groups.items():
        lines += [f"### {shape}, {rows} rows, rank {rank}, {mode}\n", table(members), ""]
    return "\n".join([*lines, endings(result)])


def endings(result: Result) -> str:
    """What did not run, once for each reason, and the notes."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for refusal in result.refused:
        by_reason.setdefault((refusal["contender"], refusal["reason"]), []).append(refusal.get("where", ""))
    lines = [
        f"- not measured: {name}" + (f" ({len(where)} shapes)" if len(where) > 1 else f" ({where[0]})") + f": {why}"
        for (name, why), where in by_reason.items()
    ]
    return "\n".join([*lines, *(f"- {note}" for note in result.notes)])


def losses(comparison: Comparison, where: str) -> list[str]:
    """Lines for what ours lost: against each peer, and for what it chose against each of its own backends."""
    if AUTO.name not in comparison.seconds:
        return []
    named = [c.name for c in NAMED if c.name in comparison.seconds]
    peers = [n for n in comparison.seconds if not n.startswith(("ours", "frozen"))]
    lines = []
    for name, limit, what in (
        *((n, BEHIND, "chose worse than") for n in named),
        *((n, 1.0, "loses to") for n in peers),
    ):
        if (times := comparison.ratio(AUTO.name, name)) > limit:
            lines.append(f"{where}: ours {what} {name}: {times:.2f} of its time, forward and backward")
    return lines


def run(
    command: str,
    options: argparse.Namespace,
    cases: Iterable[Case],
    contenders: Sequence[Contender],
    plot: Callable[[Result, Path], None],
) -> int:
    """Measures, prints, writes and draws; 1 if nothing was measured or ours chose a backend that is not the fastest."""
    dtype, begun = getattr(torch, options.dtype), time.monotonic()
    result = Result(command, report.machine(options.device), settings_of(options))
    print(report.head(result))
    for name, linears, rows, rank in (bar := tqdm([(*case, r) for case in cases for r in options.rank], disable=None)):
        if time.monotonic() - begun > 60 * options.minutes:
            result.notes.append(f"stopped before {name}, {rows} rows: {options.minutes:g} minutes are over")
            break
        bar.set_description(f"{name}, {rows} rows")
        try:
            comparisons = compare(
                Workload(linears, rows, rank, dtype, options.device), contenders, options.mode, options.rounds
            )
        except torch.OutOfMemoryError as error:
            result.refused.append({"contender": "all", "where": f"{name}, {rows} rows", "reason": reason(error)})
            continue
        for comparison in comparisons:
            where = f"{name}, {rows} rows, rank {rank}, {comparison.mode}"
            measured = comparison.rows(shape=name, rows=rows, rank=rank)
            if measured:
                tqdm.write(f"### {where}\n\n{table(measured)}\n")
            result.rows += measured
            result.refused += [{"contender": n, "where": where, "reason": w} for n, w in comparison.refused.items()]
            result.notes += losses(comparison, where)
    print(endings(result), flush=True)
    finish(result, options, plot)
    return 1 if not result.rows or any("chose worse than" in note for note in result.notes) else 0


def finish(result: Result, options: argparse.Namespace, plot: Callable[[Result, Path], None]) -> None:
    """Writes and draws what was asked for."""
    if options.json and (result.rows or result.refused):
        report.write(options.json, result)
        print(f"written: {options.json}", file=sys.stderr)
    if options.plot and result.rows:
        plot(result, options.plot)
        print(f"drawn: {options.plot}", file=sys.stderr)
