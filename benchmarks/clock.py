"""How long calls take: side by side, the contenders taking turns in every round, eager or in a CUDA graph."""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[], float]  # runs something and returns the seconds that one call of it took

ENOUGH = 2e-3  # seconds of one time on a CPU: far above the clock's resolution and below a scheduler's time slice
CALLS = 16  # at least so many calls in one time on a GPU: next to a few small calls, two synchronizes would count


class Median(NamedTuple):
    """Median and percentiles of the seconds of many rounds."""

    median: float
    p20: float
    p80: float


def median(seconds: Sequence[float]) -> Median:
    """The median and the 20th and 80th percentile, inclusive."""
    if len(seconds) == 1:
        return Median(seconds[0], seconds[0], seconds[0])
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Median(statistics.median(seconds), fifths[0], fifths[3])


def take_turns(clocks: Mapping[Key, Clock], rounds: int) -> dict[Key, list[float]]:
    """Seconds of each round by clock. Every round runs every clock once, in an order of its own, the same in any run.

    So what slows the machine down for a while slows all contenders alike. And none always runs after the same one: what
    that leaves in the processor's caches and branch predictors makes up to 3 % of a small layer's call.
    """
    order, shuffle = list(clocks), random.Random(0).shuffle
    seconds: dict[Key, list[float]] = {key: [] for key in order}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(-1, rounds):  # one round to warm up
            shuffle(order)
            for key in order:
                took = clocks[key]()
                if i >= 0:
                    seconds[key].append(took)
            if i % 8 == 7:
                gc.collect()
    finally:
        if collecting:
            gc.enable()
    return seconds


def eager(calls: Sequence[Callable[[], object]], device: torch.device, turns: Iterator[int] | None = None) -> Clock:
    """A wall clock for calls made one after the other, each with its own data.

    The wall's, because of small calls on a GPU the host is the slower part, which no event sees. `turns` says which
    call is next; several clocks that share it never find in the cache what another has just left there.
    """
    on_gpu, turns = device.type == "cuda", turns or itertools.cycle(range(len(calls)))
    count = math.ceil(CALLS / len(calls)) * len(calls) if on_gpu else 0

    def run(n: int) -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(n):
            calls[next(turns)]()
        if on_gpu:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / n

    def clock() -> float:
        nonlocal count
        if not count:
            run(1)
            count = max(1, min(1000, math.ceil(ENOUGH / run(1))))
        return run(count)

    return clock


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: one, because cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


def captured(calls: Sequence[Callable[[], object]], device: torch.device) -> Clock:
    """A clock by events for the replays of a CUDA graph of `calls`, one after the other."""
    graph, stream = torch.cuda.CUDAGraph(), side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # around the capture too: one that fails leaves its stream the current one
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    torch.cuda.current_stream(device).wait_stream(stream)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    replays = max(2, math.ceil(CALLS / len(calls)))

    def clock() -> float:
        graph.replay()  # keeps the queue busy, so that the first launch is not waited for
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (replays * len(calls))

    return clock
