"""Prints saved measurements from their JSON, in full or in brief, and draws their pictures again.

python -m benchmarks show FILE [FILE ...] [--brief] [--plot FOLDER]
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from benchmarks import report, sweep
from benchmarks.report import Result
from benchmarks.shapes import title


def made_by(result: Result) -> Any:
    """The module of the command that made a result; raises ValueError if no command has that name."""
    from benchmarks.__main__ import COMMANDS

    if result.command not in COMMANDS:
        raise ValueError(f"command must be one of {', '.join(COMMANDS)}; got {result.command!r}")
    return importlib.import_module(f"benchmarks.{result.command}")


def text(result: Result) -> str:
    """A result as its command printed it."""
    return getattr(made_by(result), "text", sweep.text)(result)


def brief(result: Result) -> str:
    """One line per workload with every contender's main figure, then the notes; the full text if there is no figure."""
    main = {"memory": "peak_over_frozen", "roofline": "measured_over_floor", "train": "over_peft"}
    figure = main.get(result.command, "over_frozen")
    rows = [row for row in result.rows if figure in row and row.get("part", "both") == "both"]
    if result.rows and not rows:
        return text(result)
    lines = [f"{result.command}, {figure.replace('_', ' ')}:"]
    for members in report.groups([{n: r.get(n) for n in sweep.WHERE} | r for r in rows], sweep.WHERE).values():
        shape, m, rank, mode = (members[0][name] for name in sweep.WHERE)
        where = f"{title(shape)}, {m} rows, rank {rank}" + (f", {mode}" if mode else "") if shape else "whole steps"
        each = (f"{row['contender']} {report.ratio(sweep.value(row, figure))}" for row in members)
        lines.append(f"  {where}: " + " · ".join(each))
    return "\n".join([*lines, *(f"  - {note}" for note in result.notes)])


def main(arguments: list[str] | None = None) -> int:
    """Prints every result of every file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks show", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a file written by --json")
    parser.add_argument("--brief", action="store_true", help="one line per workload with the main figures")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw each result as FOLDER/COMMAND_FILE.png")
    options = parser.parse_args(arguments)
    if options.plot and not options.plot.is_dir():
        parser.error(f"argument --plot: {options.plot} is not a folder")
    if options.plot and report.version_of("matplotlib") == "absent":
        parser.error("argument --plot: matplotlib is not installed: pip install matplotlib")
    for path in options.files:
        try:
            results = report.read(path)
            texts = [(brief if options.brief else text)(result) for result in results]
        except (OSError, ValueError) as error:
            parser.error(f"argument FILE: {error}")
        print("\n\n".join(texts))
        if options.plot:
            draw(results, options.plot, path.stem)
    return 0


def draw(results: list[Result], folder: Path, name: str) -> None:
    """Draws the results whose command has a picture; a second picture of a command gets the suffix 2."""
    drawn: dict[str, int] = {}
    for result in results:
        plot = getattr(made_by(result), "plot", None)
        if plot is not None and result.rows:
            drawn[result.command] = number = drawn.get(result.command, 0) + 1
            plot(result, folder / f"{result.command}_{name}{number if number > 1 else ''}.png")
