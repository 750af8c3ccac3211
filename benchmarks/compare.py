"""Compares contenders on one workload: refuses those with wrong results and times the others in turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import clock
from benchmarks.clock import Clock, Median
from benchmarks.contenders import Contender
from benchmarks.workload import Judge, RefusedError, Runner, Workload, reason

PARTS = ("forward", "backward", "both")


@dataclass
class Comparison:
    """The measurements of one workload in one mode.

    Attributes:
        seconds: seconds of each round, by contender and part; "backward" is "both" minus "forward" of the same round.
        errors: error of y by contender, divided by the error of `F.linear`'s own y.
        refused: the reason why a contender was not timed, by contender.
    """

    mode: str
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def median(self, name: str, part: str) -> Median:
        """The median of a contender's seconds."""
        return clock.median(self.seconds[name][part])

    def ratio(self, name: str, other: str = "frozen", part: str = "both") -> float:
        """Median over the rounds of a contender's seconds divided by another contender's in the same round."""
        pairs = zip(self.seconds[name][part], self.seconds[other][part], strict=True)
        # "backward" is a difference, which noise can make zero or negative for a tiny call; then there is no ratio
        return clock.median([a / b if b > 0 else math.nan for a, b in pairs]).median

    def rows(self, **where: Any) -> list[dict[str, Any]]:
        """One row per contender and part; `where` is added to each."""
        made = []
        for name, parts in self.seconds.items():
            for part in parts:
                median = self.median(name, part)
                over = self.ratio(name, part=part) if "frozen" in self.seconds else math.nan
                made.append({
                    **where, "mode": self.mode, "contender": name, "part": part, "median_s": median.median,
                    "p20_s": median.p20, "p80_s": median.p80, "over_frozen": over, "error": self.errors[name],
                })  # fmt: skip
        return made


def compare(
    workload: Workload,
    contenders: Sequence[Contender],
    modes: Sequence[str],
    rounds: int,
    parts: Sequence[str] = ("forward", "both"),
) -> list[Comparison]:
    """Times the contenders with correct results, in each mode ("eager" or "graph"); "backward" needs both parts."""
    torch._dynamo.reset()  # every new static shape counts towards dynamo's recompile limit
    runners: dict[str, Runner] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    judge = Judge(workload)
    for contender in contenders:
        try:
            runner = workload.runner(contender)
            errors[contender.name] = judge.check(runner)
            runners[contender.name] = runner
        except RefusedError as why:
            refused[contender.name] = str(why)
    del judge  # it holds as much memory as several layers
    begun = [Comparison(mode, errors=errors, refused=dict(refused)) for mode in modes]
    turns = itertools.cycle(range(len(workload.copies)))
    return [timed(comparison, runners, turns, rounds, parts) for comparison in begun]


def timed(
    into: Comparison, runners: dict[str, Runner], turns: Iterator[int], rounds: int, parts: Sequence[str]
) -> Comparison:
    """Adds the seconds of the contenders that run in this mode; `turns` gives the next copy of the operands to use."""
    clocks = dict[tuple[str, str], Clock]()

    def clock_of(runner: Runner, part: str) -> Clock:
        calls, device = runner.calls(part), runner.workload.device
        return clock.captured(calls, device) if into.mode == "graph" else clock.eager(calls, device, turns)

    for name, runner in runners.items():
        try:
            mine = {(name, part): clock_of(runner, part) for part in parts}
            for run in mine.values():
                run()
            clocks |= mine
        except Exception as error:
            into.refused[name] = f"in mode {into.mode}: {reason(error)}"
    for (name, part), times in clock.take_turns(clocks, rounds).items():
        into.seconds.setdefault(name, {})[part] = times
    for seconds in into.seconds.values() if {"forward", "both"} <= set(parts) else ():
        seconds["backward"] = [
            both - forward for both, forward in zip(seconds["both"], seconds["forward"], strict=True)
        ]
    return into
