"""Runs jobs and appends their rows to a file as they finish, so that an interrupted run can resume."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

Row = dict[str, Any]


class Journal:
    """A file with one line per finished job (its name and rows). The first line holds the options of the run.

    Raises:
        ValueError: The file belongs to a run with other options.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked = path, asked
        self.done: dict[str, list[Row]] = {}
        self.seconds = 0.0
        lines = path.read_text().splitlines() if path.exists() else []
        # a line that was being written when the run stopped is incomplete
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        if not whole:
            path.write_text(json.dumps({"asked": asked}) + "\n")
            return
        if (found := whole[0]["asked"]) != json.loads(json.dumps(asked)):
            differs = [key for key in {**found, **asked} if found.get(key) != json.loads(json.dumps(asked.get(key)))]
            raise ValueError(
                f"{path} belongs to a run with another {', '.join(differs)}; use another --out or the same options"
            )
        for line in whole[1:]:
            self.done[line["job"]] = line["rows"]
            self.seconds += line["seconds"]
        if len(whole) < len(lines):
            path.write_text("".join(json.dumps(line) + "\n" for line in whole))

    def rows(self) -> list[Row]:
        """The rows of every finished job."""
        return [row for rows in self.done.values() for row in rows]

    def add(self, job: str, rows: list[Row], seconds: float) -> None:
        """Appends the rows of a finished job."""
        with self.path.open("a") as file:
            file.write(json.dumps({"job": job, "seconds": round(seconds, 2), "rows": rows}) + "\n")
        self.done[job] = rows
        self.seconds += seconds


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work_off(
    journal: Journal,
    jobs: Iterable[str],
    work: Callable[[str], tuple[list[Row], float]],
    processes: int,
    title: str,
) -> None:
    """Runs the jobs that are not in the journal, in order, in parallel processes.

    `work` returns the rows and the seconds of a job. If a job raises an error, the jobs that have started finish and
    their rows are kept; then the error is raised.
    """
    todo = [job for job in jobs if job not in journal.done]
    with tqdm(total=len(todo), disable=None, desc=title, leave=False) as bar:
        if processes == 1:
            for job in todo:
                journal.add(job, *work(job))
                bar.update()
            return
        # spawn, because forking after torch has started its threads can hang
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context) as pool:
            futures = {pool.submit(work, job): job for job in todo}
            try:
                for future in as_completed(futures):
                    journal.add(futures[future], *future.result())
                    bar.update()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def named(*parts: object) -> str:
    """The name of a job from its parts."""
    return " | ".join(map(str, parts))


def parts_of(job: str) -> Sequence[str]:
    """The parts of a job's name: the inverse of `named`."""
    return job.split(" | ")
