"""Times one low-rank linear: every backend of ours, ours with the gate off, the frozen linear and every peer.

python -m benchmarks linear [--shapes llama3-8b] [--rows 16 2048] [--rank 16] [--variant dora] [--json F] [--plot F]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import report, sweep
from benchmarks.contenders import AUTO, FROZEN, OFF_BY_DEVICE, OFF_BY_HOST, chosen, off_by_device, ours_in_full
from benchmarks.report import Result
from benchmarks.shapes import BLOCKS, Linear, shape
from cotolora.results import save_picture

DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"shapes": ["llama3-8b"], "rows": [1, 16, 64, 512, 2048, 8192, 16384]},
    "cpu": {"shapes": ["three-256", "three-768"], "rows": [1, 16, 128, 512]},
}


OTHERS = ("C1", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "navy", "0.5", "black")  # C0 and C2 are taken


def cases(shapes: list[str], rows: list[int], *, bias: bool = True) -> list[sweep.Case]:
    """One case for each distinct linear of the models."""
    found: dict[tuple[int, int, int], sweep.Case] = {}
    for text in shapes:
        for given, k, n in shape(text):
            for m in [given] if given else rows:
                found.setdefault((m, k, n), (f"{k} → {n}", (Linear("linear", k, n, "x", bias),), m))
    return list(found.values())


def style_of(name: str, i: int) -> dict[str, Any]:
    """Style of a contender's line: ours thick, single backends of ours dotted, gate off green, peers dashed."""
    special = {
        FROZEN.name: {"color": "black"},
        AUTO.name: {"color": "C0", "linewidth": 3.5, "alpha": 0.6},
        OFF_BY_HOST.name: {"color": "C2"},
        OFF_BY_DEVICE.name: {"color": "C2", "linestyle": ":"},
    }
    other = {"color": OTHERS[i % len(OTHERS)], "linestyle": ":" if name.startswith("ours") else "--"}
    return {"marker": "o", "markersize": 3} | special.get(name, other)


def plot(result: Result, path: Path) -> None:
    """Plots the time of forward and backward relative to the frozen linear, one panel per linear.

    The horizontal axis shows rows, or ranks if there are more different ranks than rows.
    """
    rows = [row for row in result.rows if row.get("part") == "both" and row["over_frozen"] is not None]
    counts = [len({row[name] for row in rows}) for name in ("rank", "rows")]
    along, fixed = ("rank", "rows") if counts[0] > counts[1] else ("rows", "rank")
    groups = report.groups(rows, ("shape", fixed, "mode"))
    figure, axes = report.figure(len(groups))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for axis, ((weight, value, mode), members) in zip(axes, groups.items(), strict=True):
        for i, name in enumerate(names):
            line = [row for row in members if row["contender"] == name]
            axis.plot([r[along] for r in line], [r["over_frozen"] for r in line], label=name, **style_of(name, i))
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({row[along] for row in members}))
        axis.xaxis.set_major_formatter("{x:.0f}")
        report.log_axis(axis)
        axis.tick_params(labelsize=8)
        axis.set_title(f"{weight}, " + (f"{value} rows" if fixed == "rows" else f"rank {value}") + f", {mode}", size=9)
        axis.set_xlabel("rank" if along == "rank" else "rows M")
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("time / time of the frozen linear\nforward + backward, lower is better", size=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save_picture(figure, path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    """Prints a table for every shape; returns 1 if ours chose a backend that is not the fastest."""
    parser = sweep.parser_of("linear", __doc__ or "")
    add_shapes(parser)
    parser.add_argument(
        "--contenders", action="extend", nargs="+", metavar="NAME", default=argparse.SUPPRESS,
        help="time only these of ours and frozen, by their names in the table; also 'ours BACKEND off by device gate'",
    )  # fmt: skip
    options = sweep.settle(parser, arguments, DEFAULTS)
    ours = ours_in_full(options.variant, options.dtype)
    if names := getattr(options, "contenders", None):
        known = {c.name: c for c in (*ours, *off_by_device(options.variant))}
        if unknown := sorted(set(names) - known.keys()):
            parser.error(f"argument --contenders: must be among {', '.join(known)}; got {', '.join(unknown)}")
        ours = [FROZEN, *(known[name] for name in dict.fromkeys(names) if name != FROZEN.name)]
    contenders = [*ours, *chosen(options.peers, options.dtype, options.variant)]
    return sweep.run("linear", options, cases(options.shapes, options.rows), contenders, plot)


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--shapes`` for single linears."""
    names = f"{', '.join(BLOCKS)} or M,K,N"
    parser.add_argument("--shapes", action="extend", nargs="+", type=checked, help=f"{names}; may be repeated")


def checked(text: str) -> str:
    """An argparse type: checks a shape and returns it as written."""
    shape(text)
    return text
