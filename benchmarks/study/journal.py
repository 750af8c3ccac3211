"""Jobs whose rows are kept in a file as they are finished, so that a run that was stopped goes on where it was."""

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
    """A file with a line for each finished job: its name and its rows. The first line says what was asked.

    Raises:
        ValueError: the file is of a run that was asked something else.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked = path, asked
        self.done: dict[str, list[Row]] = {}
        self.seconds = 0.0
        lines = path.read_text().splitlines() if path.exists() else []
        # a line that was being written when the run was stopped has no end
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        if not whole:
            path.write_text(json.dumps({"asked": asked}) + "\n")
            return
        if (found := whole[0]["asked"]) != json.loads(json.dumps(asked)):
            differs = [key for key in {**found, **asked} if found.get(key) != json.loads(json.dumps(asked.get(key)))]
            raise ValueError(
                f"{path} is of a run with another {', '.join(differs)}; give another --out, or the same options"
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
        """Keeps the rows of a finished job."""
        with self.path.open("a") as file:
            file.write(json.dumps({"job": job, "seconds": round(seconds, 2), "rows": rows}) + "\n")
        self.done[job] = rows
        self.seconds += seconds


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work_off(
    journal: Journal,
    jobs: Iterable[str],
    work: Callable[[str], tuple[list[Row], float]],
    processes: int,
    title: str,
) -> None:
    """Does the jobs that the journal has not, in order, side by side; `work` gives the rows and the seconds of one.

    An error of one job is raised after the others that had begun, whose rows are kept.
    """
    todo = [job for job in jobs if job not in journal.done]
    with tqdm(total=len(todo), disable=None, desc=title, leave=False) as bar:
        if processes == 1:
            for job in todo:
                journal.add(job, *work(job))
                bar.update()
            return
        # forked, a child would inherit torch's threads without their having been forked
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
    """A job's name."""
    return " | ".join(map(str, parts))


def parts_of(job: str) -> Sequence[str]:
    """What `named` was given."""
    return job.split(" | ")
