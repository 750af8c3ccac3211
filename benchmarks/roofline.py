"""Compares the time of one low-rank linear with this machine's roofline and with the cost model of each backend.

    python -m benchmarks roofline [--shapes llama3-8b] [--rows 16 2048] [--rank 16] [--mode graph] [--json F] [--plot F]

Two rates are measured first: memory bandwidth with a copy far larger than any cache, and FLOP/s with a large square
matmul. They determine the floor, which no implementation of a low-rank layer can beat, and the cost model by which
`backend="auto"` chooses.
The floor: forward and backward each take the time of their memory traffic or of their FLOPs, whichever is longer, when
every operand is read once, every result is written once, and nothing else touches memory. h = x Aᵀ counts only in the
forward: the backward would either read it (more bytes) or recompute it (more FLOPs), so the floor includes neither.
The frozen linear does less work and may be faster than the floor; on a CPU, so may anything that fits in its caches.
Peers have no cost model and are timed only on request.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import clock, linear, report, sweep
from benchmarks.compare import Comparison, compare
from benchmarks.contenders import FROZEN, Contender, chosen, named
from benchmarks.report import Result
from benchmarks.workload import Workload
from cotolora.backends import cost
from cotolora.backends.cost import Machine
from cotolora.backends.types import Launches, Sizes
from cotolora.kernels.tiles import architecture
from cotolora.results import rounded, save_picture
from cotolora.variants import VARIANTS

DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"shapes": ["llama3-8b"], "rows": [1, 16, 64, 512, 2048, 8192, 16384]},
    "cpu": {"shapes": ["three-256", "three-768"], "rows": [1, 16, 128, 512]},
}
# bytes copied, and rows of the square matrix: on a GPU 20 times its L2, on a CPU about 0.1 s each
COPIED, SQUARE = {"cuda": 1 << 30, "cpu": 1 << 28}, {"cuda": 8192, "cpu": 1024}
LORA = VARIANTS["lora"]
WRONG = 2.0  # a measurement above this multiple of the modelled time means that the model is wrong


@dataclass(frozen=True)
class Rates:
    """Measured rates of this machine: byte/s (read plus written) and FLOP/s in one dtype."""

    bandwidth: float
    flops: float

    def __str__(self) -> str:
        flops = f"{self.flops / 1e12:.3g} TFLOP/s" if self.flops >= 1e12 else f"{self.flops / 1e9:.3g} GFLOP/s"
        return f"{self.bandwidth / 1e9:.3g} GB/s copied, {flops} in a square matmul"


def rates(
    device: torch.device, dtype: torch.dtype, *, rounds: int = 7, copied: int | None = None, square: int | None = None
) -> Rates:
    """Median rates of copying `copied` bytes and of multiplying two square matrices with `square` rows."""
    copied, square = copied or COPIED[device.type], square or SQUARE[device.type]
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(square, square, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    clocks = {
        "copy": clock.eager([lambda: target.copy_(source)], device),
        "matmul": clock.eager([lambda: torch.matmul(a, b, out=out)], device),
    }
    took = {name: clock.median(seconds).median for name, seconds in clock.take_turns(clocks, rounds).items()}
    return Rates(2 * copied / took["copy"], 2 * square**3 / took["matmul"])


def floor(sizes: Sizes, measured: Rates) -> float:
    """The least seconds that forward and backward together can take."""
    base, down, up = (2 * m * n * k for m, n, k in products(sizes))
    forward = sizes.bytes("x", "w", "a", "b", "y"), base + down + up
    # dx: dy W and P A with P = dy B; dA: Pᵀx; dB: dyᵀh
    backward = sizes.bytes("dy", "w", "a", "b", "x", "dx", "a", "b"), base + 2 * down + 2 * up
    return sum(max(moved / measured.bandwidth, done / measured.flops) for moved, done in (forward, backward))


def products(sizes: Sizes) -> tuple[tuple[int, int, int], ...]:
    """(M, K, N) of the products x Wᵀ, h = x Aᵀ and h Bᵀ."""
    m, n, k, rank = sizes.m, sizes.n, sizes.k, sizes.rank
    return (m, n, k), (m, rank, k), (m, n, rank)


def machine_of(measured: Rates, device: torch.device, dtype: torch.dtype) -> Machine:
    """The machine for the cost model: measured rates, and assumptions for the rest."""
    known = cost.MACHINES.get(architecture(device), Machine(0, 0, gemm=1.0))
    # the cost model takes the bfloat16 rate and halves it for larger elements
    return replace(known, bandwidth=measured.bandwidth, flops=measured.flops * (1 if dtype.itemsize == 2 else 2))


def launches_of(contender: str, sizes: Sizes) -> Launches | None:
    """The launches of the frozen linear or of one of our backends; None for any other contender."""
    if contender == FROZEN.name:
        return cost.frozen(sizes)
    backend = LORA.backends.get(contender.removeprefix("ours "))
    return None if backend is None else backend.launches(sizes.call(LORA))


def rows_of(
    comparison: Comparison, sizes: Sizes, measured: Rates, machine: Machine, shape: str
) -> list[dict[str, Any]]:
    """One row per timed contender: floor, modelled and measured time."""
    least, made = floor(sizes, measured), []
    for name in comparison.seconds:
        captured = comparison.mode == "graph"
        launches = launches_of(name, sizes)
        model = cost.seconds(launches, sizes.element_size, machine, captured=captured) if launches else math.nan
        took = comparison.median(name, "both").median
        made.append({
            "shape": shape, "rows": sizes.m, "rank": sizes.rank, "mode": comparison.mode, "contender": name,
            "bandwidth": measured.bandwidth, "flops": measured.flops, "floor_s": least, "model_s": model,
            "measured_s": took, "model_over_floor": model / least, "measured_over_floor": took / least,
            "measured_over_model": took / model,
        })  # fmt: skip
    return made


WHERE = ("shape", "rank", "mode")


def kinds(row: dict[str, Any]) -> tuple[str, ...]:
    """The columns that a table has for a contender: "model" and "measured", or only "measured" for peers."""
    return ("model", "measured") if math.isfinite(sweep.value(row, "model_s")) else ("measured",)


def table(rows: list[dict[str, Any]]) -> str:
    """The table of one linear: one line per M with each contender's modelled and measured time over the floor."""
    shown = dict.fromkeys((row["contender"], what) for row in rows for what in kinds(row))
    titles = ["rows", "floor", *(f"{name} {what}" for name, what in shown)]
    lines = []
    for m in dict.fromkeys(row["rows"] for row in rows):
        mine = {row["contender"]: row for row in rows if row["rows"] == m}
        cells = [
            report.ratio(sweep.value(mine[name], f"{what}_over_floor")) if name in mine else "-" for name, what in shown
        ]
        lines.append([str(m), report.duration(next(iter(mine.values()))["floor_s"]), *cells])
    return report.markdown(titles, lines)


def section(rows: list[dict[str, Any]]) -> str:
    """One linear's table under its title."""
    shape, rank, mode = (rows[0][name] for name in WHERE)
    return f"### {shape}, rank {rank}, {mode}: forward and backward, over the floor\n\n{table(rows)}\n"


def rates_line(measured: Rates) -> str:
    """The measured rates as printed."""
    return f"This machine: {measured}\n"


def text(result: Result) -> str:
    """The printed report."""
    first = [rates_line(Rates(row["bandwidth"], row["flops"])) for row in result.rows[:1]]
    sections = [section(rows) for rows in report.groups(result.rows, WHERE).values()]
    return "\n".join([report.head(result), *first, *sections, sweep.endings(result)])


def wrong(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each contender whose model is wrong for some shapes, naming them."""
    found: dict[str, dict[tuple, list[str]]] = {}
    for row in rows:
        if sweep.value(row, "measured_over_model") > WRONG:
            at = f"{row['rows']} rows ({report.ratio(row['measured_over_model'])} times)"
            where = tuple(row[name] for name in WHERE)
            found.setdefault(row["contender"], {}).setdefault(where, []).append(at)
    return [
        f"the model is wrong for {name}, which takes more than {WRONG:g} times the modelled time: "
        + "; ".join(f"{shape}, rank {rank}, {mode}, {', '.join(at)}" for (shape, rank, mode), at in places.items())
        for name, places in found.items()
    ]


def plot(result: Result, path: Path) -> None:
    """Plots time over the floor against rows, one panel per linear: modelled dashed, measured solid."""
    found = report.groups(result.rows, WHERE)
    figure, axes = report.figure(len(found))
    names = list(dict.fromkeys(row["contender"] for row in result.rows))
    for axis, ((shape, rank, mode), rows) in zip(axes, found.items(), strict=True):
        for i, name in enumerate(names):
            line = [row for row in rows if row["contender"] == name]
            color = "black" if name == FROZEN.name else f"C{i}"
            styles = {"model": {"linestyle": "--", "markerfacecolor": "white"}, "measured": {"linestyle": "-"}}
            for what, style in ((what, styles[what]) for what in (kinds(line[0]) if line else ())):
                over = [row[f"{what}_over_floor"] for row in line]
                style |= {"label": f"{name}, {what}", "color": color, "marker": "o", "markersize": 3}
                axis.plot([row["rows"] for row in line], over, **style)
        axis.axhline(1, color="C2", linewidth=2, label="floor: limit set by memory bandwidth and FLOP/s")
        axis.set_xscale("log", base=2)
        report.log_axis(axis)
        axis.set_xticks(sorted({row["rows"] for row in rows}))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.tick_params(labelsize=8)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("time / floor, forward + backward")
        axis.set(xlabel="rows M", title=f"{shape}, rank {rank}, {mode}")
        axis.title.set_fontsize(9)
    # a column holds both lines of a contender, and a panel is as wide as two columns
    columns = min(len(names) + 1, 2 * min(len(axes), 3))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8)
    save_picture(figure, path, dpi=150)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the defaults of the device."""
    parser = sweep.parser_of("roofline", __doc__ or "", without=("variant",))
    linear.add_shapes(parser)
    return sweep.settle(parser, arguments, {name: {"peers": ["none"], **d} for name, d in DEFAULTS.items()})


def contenders(options: argparse.Namespace) -> list[Contender]:
    """The contenders that have a model, and the requested peers."""
    modelled = [FROZEN, *(contender for contender in named("lora") if contender.name != "ours reference")]
    return [*modelled, *chosen(options.peers, options.dtype, "lora")]


def main(arguments: list[str] | None = None) -> int:
    """Prints a table for every linear; returns 1 if nothing was measured."""
    options = parse(arguments)
    device, dtype = options.device, getattr(torch, options.dtype)
    result = Result("roofline", report.machine(device), sweep.settings_of(options))
    measured = rates(device, dtype)
    machine = machine_of(measured, device, dtype)

    def one(workload: Workload, where: str, keys: dict[str, Any]) -> None:
        (it,) = workload.linears
        sizes = Sizes(workload.rows, it.out_features, it.in_features, workload.rank, dtype.itemsize)
        for found in compare(workload, contenders(options), options.mode, options.rounds, ("both",)):
            result.rows += rounded(rows_of(found, sizes, measured, machine, keys["shape"]))
            at = f"{where}, {found.mode}"
            result.refused += [{"contender": n, "where": at, "reason": why} for n, why in found.refused.items()]
            result.notes += sweep.noise(found, at)

    sweep.each(result, options, linear.cases(options.shapes, options.rows), one)
    result.notes += wrong(result.rows)
    print(text(result), flush=True)
    sweep.finish(result, options, plot)
    return 0 if result.rows else 1
