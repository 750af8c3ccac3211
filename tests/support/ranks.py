"""Runs the cases of a distributed test in real processes connected by gloo and collects the results of each rank.

A test module with cases is also the program that the ranks run: it ends with ``serve(CASES)`` under ``__main__``.
"""

import datetime
import importlib
import logging.handlers
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.repository import ROOT, module_of

Result = dict[str, Any]
# cases by number of ranks and by name; called with (rank, number of ranks)
Cases = Mapping[int, Mapping[str, Callable[[int, int], Result]]]


def results_of(file: str, cases: Cases, folder: Path, seconds: float = 240) -> dict[tuple[int, str], list[Result]]:
    """``results[world, name][rank]`` of the cases of the test module `file`, killed after `seconds`.

    A case that raised has its traceback as "error"; if its rank died or hung, "error" is the program's output.
    """
    program = subprocess.Popen(
        [sys.executable, "-m", module_of(file), str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        output = program.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        output = program.communicate()[0]
    hung = {"error": f"did not finish:\n{output}", "log": []}
    files = {
        (world, name): [folder / f"{world}.{name}.{rank}.pt" for rank in range(world)]
        for world, named in cases.items()
        for name in named
    }
    return {key: [torch.load(file) if file.exists() else hung for file in every] for key, every in files.items()}


def serve(cases: Cases, timeout: float = 20) -> None:
    """Forks the ranks for each number of ranks in turn. Forking is cheaper than importing torch in every rank.

    Args:
        cases: the cases that `results_of` can run.
        timeout: timeout of the process groups, in seconds.
    """
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for lazily in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"):
        importlib.import_module(lazily)  # before forking, so that not every rank has to import it
    for world, named in cases.items():
        children = []
        for rank in range(world):
            if (pid := os.fork()) == 0:
                try:
                    _work(named, rank, world, folder, timeout)
                finally:
                    sys.stdout.flush()
                    os._exit(0)  # gloo's threads may abort a process that shuts down in order
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)


def _work(named: Mapping[str, Callable[[int, int], Result]], rank: int, world: int, folder: Path, limit: float) -> None:
    log = logging.getLogger("cotolora")
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")  # as in pyproject.toml
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # dynamo itself reads it
    for name, case in named.items():
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{world}.{name}.store",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=limit),  # ranks that wait for a failed rank give up and continue
        )
        records = logging.handlers.BufferingHandler(10**6)
        log.addHandler(records)
        began = time.monotonic()
        try:
            result = case(rank, world)
        except BaseException:  # errors of torch.distributed.checkpoint are no Exceptions
            result = {"error": traceback.format_exc()}
        log.removeHandler(records)
        result |= {"log": [record.getMessage() for record in records.buffer], "seconds": time.monotonic() - began}
        torch.save(result, folder / f"{world}.{name}.{rank}.pt")
        dist.destroy_process_group()
        torch.compiler.reset()
