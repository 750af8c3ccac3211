"""Prints measurements from their JSON as they were printed at first.

python -m benchmarks show FILE [FILE ...]
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks import report, sweep
from benchmarks.report import Result


def text(result: Result) -> str:
    """A result by the command that made it; ValueError if there is none of that name."""
    from benchmarks.__main__ import COMMANDS

    if result.command not in COMMANDS:
        raise ValueError(f"no command makes results of {result.command!r}")
    return getattr(importlib.import_module(f"benchmarks.{result.command}"), "text", sweep.text)(result)


def main(arguments: list[str] | None = None) -> int:
    """Prints every result of every file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks show", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="as --json writes it")
    for path in parser.parse_args(arguments).files:
        try:
            results = report.read(path)
            texts = [text(result) for result in results]
        except (OSError, ValueError) as error:
            parser.error(f"argument FILE: {error}")
        print("\n\n".join(texts))
    return 0
