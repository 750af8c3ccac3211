"""Measures the saved and the peak memory of a block's linears, for every contender.

    python -m benchmarks memory [--shapes llama3-8b vit-b] [--rows 8192] [--rank 16] [--json F] [--plot F]

"saved" is the memory that autograd keeps for the backward, beyond x, W, bias, A and B; memory that tensors share counts
once. "peak" is the maximum during forward and backward above what was allocated before, so it includes outputs and
gradients. Both cover all linears of the block together: forward through all of them, then backward, as in a model.
On a CPU every number is the size requested from torch's allocator; on a GPU the peak counts the allocator's blocks.
Memory that a library allocates on its own is in neither.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from benchmarks import report, sweep
from benchmarks.contenders import FROZEN, OFF_BY_HOST, Contender, chosen, ours_in_full
from benchmarks.report import Result
from benchmarks.shapes import BLOCKS, outputs, title
from benchmarks.workload import Judge, RefusedError, Runner, Workload, reason
from cotolora.results import rounded, save_picture

DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"shapes": ["llama3-8b", "vit-b"], "rows": [8192]},
    "cpu": {"shapes": ["three-64", "three-256", "three-768", "vit-b"], "rows": [394]},
}
KINDS = 3  # how many kinds of saved tensors a table shows, largest first
UNSEEN = 4096  # bytes; less memory that bypasses the hooks is not reported: autograd keeps scalars as tensors


@dataclass(frozen=True)
class Memory:
    """The memory of one contender on one workload, in bytes.

    Attributes:
        saved: saved for the backward through autograd, beyond the operands.
        unseen: kept after the forward without passing autograd's hooks, for example as an attribute.
        peak: maximum during forward and backward above what was allocated before.
        kinds: the largest saved tensors, as text.
    """

    saved: int
    unseen: int
    peak: int
    kinds: str


def storages(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """The largest tensor of each piece of memory, by its address."""
    found: dict[int, Tensor] = {}
    for t in tensors:
        address = t.untyped_storage().data_ptr()
        if address not in found or t.numel() > found[address].numel():
            found[address] = t
    return found


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory that the tensors keep alive."""
    return sum(t.untyped_storage().nbytes() for t in storages(tensors).values())


def operands(runner: Runner) -> list[tuple[str, Tensor]]:
    """Tensors that every contender needs, with their names in a table: the operands and the layers' parameters."""
    copy = runner.workload.copies[0]
    named = [("x", x) for x in copy.inputs.values()]
    for base, adapter in zip(copy.bases, copy.adapters, strict=True):
        named += [("W", base.weight), ("A", adapter.lora_a), ("B", adapter.lora_b)]
        named += [(name, t) for name, t in (("bias", base.bias), ("m", adapter.magnitude)) if t is not None]
    return [*named, *(("a parameter", p) for layer in runner.layers[0] for p in layer.parameters())]


def saved_by(runner: Runner) -> tuple[list[Tensor], list[Tensor]]:
    """What a forward saves for the backward beyond the operands (one tensor per piece of memory), and its outputs."""
    free, found = storages(t for _, t in operands(runner)), []

    def pack(t: Tensor) -> Tensor:
        # detached, because its autograd history may refer to this list
        found.append(t.detach())
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        ys = runner.forward()
    # in a chain of linears, an output is the next linear's x
    last = outputs(runner.workload.linears)
    free |= storages(y for i, y in enumerate(ys) if i not in last)
    return [t for address, t in storages(found).items() if address not in free], [y.detach() for y in ys]


def repeats(t: Tensor, of: Tensor) -> bool:
    """Whether a tensor holds the same numbers as another, possibly transposed or rounded to its own dtype."""
    if t.numel() != of.numel() or not t.is_floating_point():
        return False
    laid_out = [t.reshape(of.shape), *([t.mT] if t.dim() == 2 and t.mT.shape == of.shape else [])]
    return any(torch.equal(s.to(of.dtype), of) or torch.equal(s, of.to(s.dtype)) for s in laid_out)


def kinds(saved: Sequence[Tensor], known: Sequence[tuple[str, Tensor]]) -> str:
    """Describes the largest saved tensors by dtype and shape, and says which are copies of an operand."""
    groups: dict[str, list[Tensor]] = {}
    for t in saved:
        again = next((f"{name} again in " for name, operand in known if repeats(t, operand)), "")
        groups.setdefault(f"{again}{str(t.dtype).removeprefix('torch.')} {list(t.shape)}", []).append(t)
    largest = sorted(groups, key=lambda name: -size(groups[name]))
    shown = [f"{len(groups[name])} of {name}" for name in largest[:KINDS]]
    left = sum(len(groups[name]) for name in largest[KINDS:])
    return ", ".join([*shown, *([f"{left} smaller"] if left else [])])


def allocated(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes above what was allocated before: while the call's result is alive, and at the peak of the call."""
    gc.collect()
    if device.type == "cuda":
        # the bytes requested, before the allocator rounds them up to its block sizes
        asked = lambda: torch.cuda.memory_stats(device)["requested_bytes.all.current"]  # noqa: E731
        torch.cuda.synchronize(device)
        before, asked_before = torch.cuda.memory_allocated(device), asked()
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        held, peak = asked() - asked_before, torch.cuda.max_memory_allocated(device) - before
        del result
        return held, peak
    # torch's CPU allocator keeps no statistics; MemTracker does, but refuses frozen parameters and misses what
    # compiled code allocates
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences two lines that some torch versions print per profile
    with profiler.profile(profile_memory=True) as profiled:
        result = run()
    held = peak = 0
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return held, peak


def measure(runner: Runner) -> Memory:
    """Measures one contender's memory. It must have run before, so that one-time allocations are not counted."""
    saved, ys = saved_by(runner)
    saved_bytes, y_bytes, last = size(saved), size(ys), outputs(runner.workload.linears)
    named = kinds(saved, [*operands(runner), *(("y" if i in last else "x", y) for i, y in enumerate(ys))])
    del saved, ys
    held, _ = allocated(runner.forward, runner.workload.device)
    _, peak = allocated(runner.both, runner.workload.device)
    return Memory(saved_bytes, max(0, held - y_bytes - saved_bytes), peak, named)


def measured(workload: Workload, contenders: Sequence[Contender]) -> tuple[dict[str, Memory], dict[str, str]]:
    """The memory of each contender by name, and the reasons of those refused (which includes wrong results)."""
    torch._dynamo.reset()  # every new static shape counts towards dynamo's recompile limit
    del workload.copies[1:]  # only timing needs several copies
    judge, runners, refused = Judge(workload), {}, {}
    for contender in contenders:
        try:
            runner = workload.runner(contender)
            judge.check(runner)
            runners[contender.name] = runner
        except RefusedError as why:
            refused[contender.name] = str(why)
    del judge  # it holds as much memory as several layers
    found = {}
    for name, runner in runners.items():
        try:
            found[name] = measure(runner)
        except Exception as error:
            refused[name] = reason(error)
    return found, refused


def rows_of(found: dict[str, Memory], **where: Any) -> list[dict[str, Any]]:
    """One row per contender with its ratio to the frozen linears; `where` is added to each."""
    frozen = found.get(FROZEN.name)
    made = []
    for name, memory in found.items():
        beyond = [None, None] if frozen is None else [memory.saved - frozen.saved, memory.peak - frozen.peak]
        made.append({
            **where, "contender": name, "saved_bytes": memory.saved, "saved_beyond_frozen": beyond[0],
            "unseen_bytes": memory.unseen, "peak_bytes": memory.peak, "peak_beyond_frozen": beyond[1],
            "peak_over_frozen": memory.peak / frozen.peak if frozen else math.nan, "kinds": memory.kinds,
        })  # fmt: skip
    return made


def amount(count: int | None) -> str:
    """A number of bytes as text, with three digits and a unit."""
    if count is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= factor:
            return f"{count / factor:.{max(0, 2 - int(math.log10(abs(count) / factor)))}f} {unit}"
    return f"{count} B"


def table(rows: list[dict[str, Any]]) -> str:
    """The table of one workload: a line for each contender."""
    titles = ["", "saved", "beyond frozen", "peak", "beyond frozen", "/ frozen", "what is saved"]
    lines = []
    for row in rows:
        saved = amount(row["saved_bytes"])
        if unseen(row):
            saved += f" + {amount(row['unseen_bytes'])} unseen"
        lines.append([
            row["contender"], saved, amount(row["saved_beyond_frozen"]), amount(row["peak_bytes"]),
            amount(row["peak_beyond_frozen"]), report.ratio(sweep.value(row, "peak_over_frozen")),
            row["kinds"] or "nothing",
        ])  # fmt: skip
    return report.markdown(titles, lines)


def unseen(row: dict[str, Any]) -> bool:
    """Whether the contender keeps more memory than autograd's hooks see."""
    return row["unseen_bytes"] > max(UNSEEN, row["saved_bytes"] / 100)


def doubts(rows: list[dict[str, Any]], where: str) -> list[str]:
    """A line for each contender that keeps more memory than autograd's hooks see."""
    return [
        f"{where}: {row['contender']} keeps {amount(row['unseen_bytes'])} that autograd's hooks do not see"
        for row in rows
        if unseen(row)
    ]


def failures(rows: list[dict[str, Any]], where: str) -> list[str]:
    """A line if ours saves anything with its host gate off, when it must equal the frozen linear."""
    return [
        f"{where}: FAILED: {row['contender']} saves {row['saved_beyond_frozen']} bytes more than frozen; must be 0"
        for row in rows
        if row["contender"] == OFF_BY_HOST.name and (row["saved_beyond_frozen"] or 0) > 0
    ]


WHERE = ("shape", "rows", "rank")


def section(rows: list[dict[str, Any]]) -> str:
    """One workload's table under its title."""
    shape, m, rank = (rows[0][name] for name in WHERE)
    return f"### {title(shape)}, {m} rows, rank {rank}\n\n{table(rows)}\n"


def text(result: Result) -> str:
    """The printed report."""
    sections = [section(rows) for rows in report.groups(result.rows, WHERE).values()]
    return "\n".join([report.head(result), *sections, sweep.endings(result)])


def plot(result: Result, path: Path) -> None:
    """Plots saved and peak memory beyond the frozen linears', one panel of bars per workload."""
    found = report.groups([row for row in result.rows if row["peak_beyond_frozen"] is not None], WHERE)
    figure, axes = report.figure(len(found), width=5.4, height=4.2)
    for axis, ((shape, m, rank), rows) in zip(axes, found.items(), strict=True):
        bars = [row for row in rows if row["contender"] != FROZEN.name][::-1]
        for offset, name, label, color in (
            (0.2, "saved_bytes", "saved for the backward", "C0"),
            (-0.2, "peak_beyond_frozen", "peak, beyond the frozen linears'", "0.6"),
        ):
            places = [i + offset for i in range(len(bars))]
            drawn = axis.barh(places, [row[name] / 1e6 for row in bars], height=0.4, label=label, color=color)
            axis.bar_label(drawn, labels=[amount(row[name]) for row in bars], padding=2, fontsize=7)
        axis.set_yticks(range(len(bars)), [row["contender"] for row in bars], fontsize=8)
        peak = next((row["peak_bytes"] for row in rows if row["contender"] == FROZEN.name), None)
        axis.set_title(f"{title(shape)}, {m} rows, rank {rank}", size=9)
        axis.set_xlabel(f"MB (the frozen linears' peak: {amount(peak)}), lower is better", size=8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.margins(x=0.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    save_picture(figure, path, dpi=150)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the defaults of the device."""
    parser = sweep.parser_of("memory", __doc__ or "", without=("mode", "rounds"))
    parser.add_argument("--shapes", choices=BLOCKS, action="extend", nargs="+", help="models; may be repeated")
    return sweep.settle(parser, arguments, DEFAULTS)


def contenders_of(options: argparse.Namespace) -> list[Contender]:
    """The frozen linear, ours, and the requested peers."""
    return [*ours_in_full(options.variant, options.dtype), *chosen(options.peers, options.dtype, options.variant)]


def main(arguments: list[str] | None = None) -> int:
    """Prints a table for every block; returns 1 if nothing was measured or ours, off by a host gate, saves anything."""
    options = parse(arguments)
    result = Result("memory", report.machine(options.device), sweep.settings_of(options))

    def one(workload: Workload, where: str, keys: dict[str, Any]) -> None:
        found, refused = measured(workload, contenders_of(options))
        rows = rounded(rows_of(found, **keys))
        if rows:
            tqdm.write(section(rows))
        result.rows += rows
        result.refused += [{"contender": n, "where": where, "reason": why} for n, why in refused.items()]
        result.notes += doubts(rows, where) + failures(rows, where)

    print(report.head(result))
    sweep.each(result, options, [(name, BLOCKS[name], m) for name in options.shapes for m in options.rows], one)
    print(sweep.endings(result), flush=True)
    sweep.finish(result, options, plot)
    return 1 if not result.rows or any("FAILED" in note for note in result.notes) else 0
