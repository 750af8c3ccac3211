"""Tests every architecture of transformers that can be built small from its config, and one model per family of timm.

    python -m benchmarks models [--quick | --only NAME ...] [--again] [--keep] [--out DIR]

Each model runs in its own process through inject, 20 steps of CoTo, save, load and merge, and is compared with PEFT.
The command writes DIR/models.json, row by row as models finish, and DIR/models.md with the printed report. It skips
models that already have a row, so an interrupted run resumes. Rows made with other versions of a package are made
again; with --keep, rows of other commits of cotolora are kept, and the report says how many.
Outcomes: "works"; "works, warned" (a warning says what has no effect); "refused" (an error names the layer);
"PEFT fails as well"; "wrong" (results differ without a warning, or an error names no layer); "not built" (no small
enough config or no inputs were found, so nothing was tested).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.models import families, tiny, trial
from benchmarks.models.trial import NOT_BUILT, OUTCOMES, WARNED, WRONG
from benchmarks.report import Result
from cotolora.results import rounded

SECONDS = 60  # limit of CPU time per architecture
PATIENCE = 5 * SECONDS  # limit of wall-clock time, longer because the machine may be busy
OUT = report.ROOT / "benchmarks" / "results"
# one model of each kind: Conv1D, encoder-decoder, two towers, experts, state space, images, speech, a model that reads
# weights without calling their layer, one that cannot be merged; and one of timm if it is installed
QUICK = (
    "llama", "gpt2", "bert", "t5", "vit", "clip", "mixtral", "glm4_moe", "mamba", "wavlm", "whisper", "falcon",
    "vision_transformer",
)  # fmt: skip


def architectures() -> list[tuple[str, str, str]]:
    """Library, model type (or family) and class (or model name) of every architecture."""
    found = [("transformers", key, name) for key, name in tiny.architectures().items()]
    return found + [("timm", key, name) for key, name in families.architectures().items()]


def child(connection: Connection, library: str, key: str, name: str) -> None:
    """Entry point of the child process: sends back the row of one architecture."""
    import logging
    import warnings

    # SIGXCPU at the soft limit, SIGKILL at the hard one (a system out of memory also sends SIGKILL)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    for noisy in ("transformers", "peft", "timm"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    build = tiny.subject if library == "transformers" else families.subject
    with tempfile.TemporaryDirectory() as folder:
        connection.send(trial.tried(lambda: build(key, name), Path(folder)))


def row_of(library: str, key: str, name: str) -> dict[str, Any]:
    """The row of one architecture, from a child process that may crash or hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.models.preloaded"])
    start = time.monotonic()
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(its, library, key, name), daemon=True)
    process.start()
    its.close()
    found: dict[str, Any]
    try:
        if late := not mine.poll(PATIENCE):
            process.kill()
        found = mine.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        if late or code == -signal.SIGXCPU:
            taken = f"{PATIENCE} seconds" if late else f"{SECONDS} seconds of CPU time"
            found = {"outcome": NOT_BUILT, "stage": "time", "reason": f"took more than {taken}"}
        else:
            end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code} and no row"
            found = {"outcome": WRONG, "stage": "process", "reason": f"its process {end}"}
    process.kill()
    process.join()
    empty = dict.fromkeys(("parameters", "adapters", "peft", "difference", "warnings", "told", "notes"))
    named = {"library": library, "type": key, "architecture": name}
    return rounded({**named, **empty, **found, "seconds": time.monotonic() - start})


def counts(rows: Sequence[dict[str, Any]]) -> str:
    """The table of outcomes per library."""
    titles, lines = ["", "tried", *OUTCOMES], []
    for (library,), members in report.groups(rows, ("library",)).items():
        found = Counter(row["outcome"] for row in members)
        lines.append([library, str(len(members)), *(str(found[outcome]) for outcome in OUTCOMES)])
    return report.markdown(titles, lines)


def listing(rows: Sequence[dict[str, Any]]) -> str:
    """All architectures by outcome, one line per reason, then the notes."""
    parts = []
    for outcome in OUTCOMES:
        members = [row for row in rows if row["outcome"] == outcome]
        if not members:
            continue
        text = "told" if outcome == WARNED else "reason"
        found = report.groups(members, (text, "stage"))
        lines = []
        for (why, stage), alike in sorted(found.items(), key=lambda item: -len(item[1])):
            names = ", ".join(row["architecture"] for row in alike)
            lines.append(": ".join(filter(None, (f"- {names}", stage, why))))
        legend = "; ".join(f'{kind} is a warning "... {words} ..."' for words, kind in trial.KINDS.items())
        parts.append(f"### {outcome}\n\n" + (f"{legend}.\n\n" if outcome == WARNED else "") + "\n".join(lines))
    noted = [row for row in rows if row["notes"] or row["peft"] not in (None, "equal")]
    if noted:
        lines = []
        for row in noted:
            told = [row["notes"], f"PEFT {row['peft']}" if row["peft"] not in (None, "equal") else ""]
            lines.append(f"- {row['architecture']}: " + "; ".join(filter(None, told)))
        parts.append("### notes\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def text(result: Result) -> str:
    """The printed report."""
    made = report.groups(result.rows, ("cotolora",))
    older = [f"{len(rows)} rows are of cotolora {by}" for (by,), rows in made.items() if by != version(result)]
    return "\n".join([report.head(result), counts(result.rows), "", listing(result.rows), "", *result.notes, *older])


def version(result: Result) -> str:
    """The version and commit of this library, without the mark of uncommitted changes."""
    return result.machine["cotolora"].removesuffix("+changes")


def kept(before: Result, result: Result, keep: bool) -> list[dict[str, Any]]:
    """The rows of `before` made with the versions of `result`; those of other commits only with `keep`."""
    if before.machine | {"cotolora": ""} != result.machine | {"cotolora": ""}:
        return []
    return [row for row in before.rows if keep or row["cotolora"] == version(result)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; exits if an option is invalid."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks models", description=__doc__, formatter_class=formatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help=f"only these: {' '.join(QUICK)}")
    which.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these types, families or classes")
    parser.add_argument("--again", action="store_true", help="make existing rows again")
    parser.add_argument("--keep", action="store_true", help="keep rows made by other commits")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="folder for models.json and models.md")
    options = parser.parse_args(arguments)
    if options.out is not None and not options.out.is_dir():
        parser.error(f"argument --out: {options.out} is not a folder")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; returns 1 if any outcome is "wrong"."""
    options = parse(arguments)
    chosen, wanted = architectures(), tuple(options.only)
    if options.quick:
        wanted = tuple(key for _, key, _ in chosen if key in QUICK)
    if missing := set(wanted) - {name for one in chosen for name in one[1:]}:
        print(f"no architecture is named {', '.join(sorted(missing))}")
        return 2
    if wanted:
        chosen = list(dict.fromkeys(one for name in wanted for one in chosen if name in one[1:]))
    machine = report.machine(torch.device("cpu")) | {n: report.version_of(n) for n in ("transformers", "timm")}
    result = Result("models", machine, {"rank": 4, "steps": 20})
    if reason := families.why_not():
        result.notes.append(f"timm cannot be imported: {reason}")
    path = None if options.out is None else options.out / "models.json"
    before = report.read(path)[0] if path is not None and path.exists() else None
    found = [] if before is None else kept(before, result, options.keep)
    rows = {(row["library"], row["type"]): row for row in found}
    for library, key, name in tqdm(chosen, disable=None):
        if options.again or (library, key) not in rows:
            rows[library, key] = row = row_of(library, key, name) | {"cotolora": version(result)}
            tqdm.write(f"{row['seconds']:5.1f} s  {name}: {row['outcome']}  {row['reason'][:150]}")
            result.rows = list(rows.values())
            if path is not None:
                report.write(path, result)
    shown = [rows[library, key] for library, key, _ in chosen]
    result.rows = list(rows.values()) if not wanted else shown
    print(text(result))
    if options.out is not None and not wanted:
        (options.out / "models.md").write_text(text(result) + "\n")
    return 1 if any(row["outcome"] == WRONG for row in shown) else 0
