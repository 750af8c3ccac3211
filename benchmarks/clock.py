"""Timers for interleaved measurements: contenders take turns in every round, eagerly or in a CUDA graph."""

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
Clock = Callable[[], float]  # runs a call several times and returns the seconds per call

ENOUGH = 2e-3  # seconds per measurement on a CPU: far above the clock's resolution, below a scheduler's time slice
CALLS = 16  # least calls per measurement on a GPU, so that the two synchronizes around them are negligible


class Median(NamedTuple):
    """Median and percentiles, in seconds, over many rounds."""

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
    """Seconds of each round by clock. Every round runs every clock once, in a shuffled but reproducible order.

    A temporary slowdown of the machine therefore affects all contenders alike. The order changes from round to round
    because the previous contender's state of caches and branch predictors changes the time of a small layer by up to
    3 %.
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
    """A wall-clock timer for consecutive calls, each with its own data.

    It uses wall-clock time because small calls on a GPU are limited by the host, which CUDA events do not see. `turns`
    gives the index of the next call. Clocks that share one `turns` never reuse data that another clock has just left
    in the cache.
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
    """The stream for all captures: a single one, because cuBLAS keeps a workspace per stream."""
    return torch.cuda.Stream(device)


def captured(calls: Sequence[Callable[[], object]], device: torch.device) -> Clock:
    """A CUDA-event timer for replays of a CUDA graph that holds `calls` in sequence."""
    graph, stream = torch.cuda.CUDAGraph(), side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # also around the capture, because a capture that fails leaves its stream as the current one
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
        graph.replay()  # keeps the queue busy, so that the launch latency is not measured
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (replays * len(calls))

    return clock
