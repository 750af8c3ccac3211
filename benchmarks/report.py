"""Results of measurements: a printed table whose first line names the machine, and a JSON file.

A file can hold the results of several commands. A new result replaces an old one with the same settings.
`python -m benchmarks show FILE` prints the tables again.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import cotolora
from cotolora.results import rounded, write_json

SCHEMA = 1
ROOT = Path(__file__).parent.parent
WIDEST = 13.0  # inches; a page would shrink a wider picture until its text is illegible
# ticks of logarithmic axes: TICKS if the axis spans less than a factor of 8
TICKS = (0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 4, 5, 7, 10)
COARSE_TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass
class Result:
    """The result of one run of a command.

    Attributes:
        command: name of the command.
        machine: what `machine` returned.
        settings: the options of the run.
        rows: the measurements; values are strings, numbers, booleans or None. They are rounded as in the file, so that
            a result is printed the same before it is written and after it is read.
        refused: what was not measured; each entry has "contender", "reason" and "where".
        notes: lines printed below the table.
    """

    command: str
    machine: dict[str, str]
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def output_of(*command: str) -> str:
    """The first line that a program prints; an empty string if it cannot be run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


def version_of(module: str) -> str:
    """A package's version, or "absent"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return "absent"


def machine(device: torch.device) -> dict[str, str]:
    """The device, the versions of packages and the commit, on which measurements depend."""
    if device.type == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        named = {"device": torch.cuda.get_device_name(device), "driver": output_of(*query) or "unknown"}
    else:
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        models = [line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")]
        named = {"device": f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"}
    commit = output_of("git", "rev-parse", "--short", "HEAD") or "unknown"
    changed = "+changes" if output_of("git", "status", "--porcelain", "--untracked-files=no") else ""
    versions = {name: version_of(name) for name in ("triton", "peft")}
    return {**named, "torch": torch.__version__, **versions, "cotolora": f"{cotolora.__version__} {commit}{changed}"}


def head(result: Result) -> str:
    """Two lines: the machine, then the command and its settings."""
    first = [result.machine["device"], *(f"{k} {v}" for k, v in result.machine.items() if k != "device")]
    asked = [f"{name} {shown(value)}" for name, value in result.settings.items() if value not in (None, [])]
    return " · ".join(first) + f"\n\n`python -m benchmarks {result.command}`: " + ", ".join(asked) + "\n"


def shown(value: Any) -> str:
    """A setting as text."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def markdown(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded to line up in a terminal; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(titles, *lines, strict=True)]

    def row(cells: Sequence[str]) -> str:
        padded = [
            f"{cell:{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([row(titles), rule, *map(row, lines)])


def groups(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[tuple, list[dict[str, Any]]]:
    """The rows grouped by their values of `names`."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def duration(seconds: float) -> str:
    """Seconds as text, with three digits and a unit."""
    if not math.isfinite(seconds):
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def ratio(value: float) -> str:
    """A ratio with two decimals, or a dash if it is NaN."""
    return f"{value:.2f}" if math.isfinite(value) else "-"


def check(result: Mapping[str, Any]) -> Result:
    """A result read from JSON; raises ValueError that names what is missing or has the wrong type."""
    kinds = {"command": str, "machine": dict, "settings": dict, "rows": list, "refused": list, "notes": list}
    for name, kind in kinds.items():
        if not isinstance(result.get(name), kind):
            raise ValueError(f"{name} must be a {kind.__name__}; got {result.get(name)!r}")
    for name in ("device", "torch", "triton", "cotolora"):
        if not isinstance(result["machine"].get(name), str):
            raise ValueError(f"machine must name its {name}; got {result['machine']}")
    for row in result["rows"]:
        if not isinstance(row, dict) or not row:
            raise ValueError(f"rows must hold objects; got {row!r}")
        for name, value in row.items():
            if not isinstance(value, (str, int, float, bool, type(None))):
                raise ValueError(f"rows: {name} must be a string, a number, a boolean or null; got {value!r}")
    for refusal in result["refused"]:
        if not isinstance(refusal, dict) or not {"contender", "reason"} <= set(refusal):
            raise ValueError(f"refused must name a contender and a reason; got {refusal!r}")
    if not result["rows"] and not result["refused"]:
        raise ValueError("rows or refused must not be empty; both are")
    return Result(**{name: result[name] for name in kinds})


def read(path: Path) -> list[Result]:
    """The results in a file; raises ValueError if it holds anything else."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("results"), list):
        raise ValueError(f"{path} holds no results of schema {SCHEMA}")
    return [check(result) for result in content["results"]]


def write(path: Path, result: Result) -> None:
    """Adds a result to a file atomically, replacing an earlier one with the same settings.

    Numbers are rounded by `cotolora.results`, so that reading the file gives the values that were written.
    """
    # JSON has no NaN: values that could not be measured become null
    rows = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in result.rows
    ]
    # rounded here, so that the settings equal those of an earlier result read from the file
    made = check(rounded({**asdict(result), "rows": rows}))
    others = [
        r for r in (read(path) if path.exists() else []) if (r.command, r.settings) != (made.command, made.settings)
    ]
    write_json(path, {"schema": SCHEMA, "results": [asdict(r) for r in (*others, made)]})


def figure(panels: int, *, width: float = 4.0, height: float = 3.6) -> tuple[Any, list[Any]]:
    """A matplotlib figure (no display needed) of panels side by side, in rows of at most `WIDEST` inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = math.ceil(panels / max(1, int(WIDEST / width)))
    columns = math.ceil(panels / rows)
    made, axes = pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    return made, list(axes.flat[:panels])


def log_axis(axis: Any) -> None:
    """Makes the vertical axis logarithmic, with round ticks labelled as plain numbers."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    ticks = TICKS if high < 8 * low else COARSE_TICKS
    axis.set_yticks([tick for tick in ticks if low <= tick <= high], minor=False)
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(axis="y", color="0.9")
