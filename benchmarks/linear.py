"""Times one low-rank linear: ours in every form and with its gate off, beside the frozen linear and every peer.

python -m benchmarks linear [--shapes llama3-8b] [--rows 16 2048] [--rank 16] [--mode graph] [--json F] [--plot F]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import report, sweep
from benchmarks.contenders import AUTO, FROZEN, NAMED, NARROW, OFF_BY_DEVICE, OFF_BY_HOST, chosen
from benchmarks.report import Result
from benchmarks.shapes import BLOCKS, Linear, shape

DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"shapes": ["llama3-8b"], "rows": [1, 16, 64, 512, 2048, 8192, 16384]},
    "cpu": {"shapes": ["three-256", "three-768"], "rows": [1, 16, 128, 512]},
}


def cases(shapes: list[str], rows: list[int]) -> list[sweep.Case]:
    """Each linear of the models by itself."""
    found: dict[tuple[int, int, int], sweep.Case] = {}
    for text in shapes:
        for given, k, n in shape(text):
            for m in [given] if given else rows:
                found.setdefault((m, k, n), (f"{k} → {n}", (Linear("linear", k, n, "x", bias=True),), m))
    return list(found.values())


def plot(result: Result, path: Path) -> None:
    """Time over frozen against rows, a panel for each linear, forward and backward."""
    rows = [row for row in result.rows if row.get("part") == "both" and row["over_frozen"] is not None]
    groups = list(dict.fromkeys((row["shape"], row["rank"], row["mode"]) for row in rows))
    figure, axes = report.figure(len(groups))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for axis, group in zip(axes, groups, strict=True):
        for i, name in enumerate(names):
            line = [r for r in rows if r["contender"] == name and (r["shape"], r["rank"], r["mode"]) == group]
            style = {"marker": "o", "color": f"C{i % 10}", "linestyle": "-" if name.startswith("ours") else "--"}
            if name == "frozen":
                style = {"color": "black"}
            axis.plot([r["rows"] for r in line], [r["over_frozen"] for r in line], label=name, markersize=3, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({row["rows"] for row in rows}))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(xlabel="rows M", title=f"{group[0]}, rank {group[1]}, {group[2]}")
        axis.title.set_fontsize(9)
        axis.set_ylim(0.9, min(4, max(axis.get_ylim()[1], 1.2)))
    axes[0].set_ylabel("forward and backward, over frozen")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    """Prints a table for every shape; 1 if ours chose a backend that is not the fastest."""
    parser = sweep.parser_of("linear", __doc__ or "")
    add_shapes(parser)
    options = sweep.settle(parser, arguments, DEFAULTS)
    ours = [AUTO, *NAMED, *([NARROW] if options.dtype != "float32" else []), OFF_BY_HOST, OFF_BY_DEVICE[0]]
    peers = chosen(options.peers, options.dtype)
    return sweep.run("linear", options, cases(options.shapes, options.rows), [FROZEN, *ours, *peers], plot)


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--shapes``, of single linears."""
    names = f"{', '.join(BLOCKS)} or M,K,N"
    parser.add_argument("--shapes", action="extend", nargs="+", type=checked, help=f"{names}; may be repeated")


def checked(text: str) -> str:
    """An argparse type: a shape as it was written."""
    shape(text)
    return text
