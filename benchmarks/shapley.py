"""Times Shapley values: many coalitions per forward pass (with row gates) against one coalition per forward pass.

    python -m benchmarks shapley [--samples 1 4 16 64 256] [--batch 64 256 1024] [--width 48] [--rounds 3] [--json F]

The model is the demo's vision transformer of eight blocks on scikit-learn's digits. Its adapters are not trained,
because the time does not depend on their values. Every batched result is checked against that of single coalitions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import cotolora
from benchmarks import clock, report
from benchmarks.report import Result
from cotolora import demo
from cotolora.results import rounded
from cotolora.shapley import PerSample, Shapley, shapley_values

ORDERS = 8  # permutations; half as many from 64 samples on, which still evaluates 30 coalitions


def model_of(width: int, device: torch.device) -> torch.nn.Module:
    """The demo's model with adapters whose B is nonzero."""
    torch.manual_seed(0)
    model = demo.VisionTransformer(width=width).to(device)
    for layer in cotolora.inject(model, demo.PARTS, rank=demo.RANK).values():
        torch.nn.init.normal_(layer.lora_b, std=0.02)
    return model


def measure(width: int, samples: int, batches: list[int], rounds: int, device: torch.device) -> list[dict]:
    """A row for one coalition per forward pass, then one for each batch size that holds at least two coalitions."""
    model, (images, labels) = model_of(width, device), demo.load_data(device).train
    images, labels = images[:samples], labels[:samples]

    def fn(logits: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(logits, labels)

    found: dict[int, Shapley] = {}
    scores = {0: lambda m: fn(m(images)), **{b: PerSample(images, fn, b) for b in batches if b >= 2 * samples}}

    def timed(batch: int) -> float:
        start = time.perf_counter()
        found[batch] = shapley_values(model, scores[batch], samples=ORDERS if samples < 64 else ORDERS // 2)
        return time.perf_counter() - start

    seconds = clock.take_turns({batch: lambda batch=batch: timed(batch) for batch in scores}, rounds)
    rows = []
    for batch, result in found.items():
        # float32, and another matmul size may sum in another order
        torch.testing.assert_close(result.values, found[0].values, rtol=1e-3, atol=1e-5)
        middle = clock.median(seconds[batch]).median
        speed_up = clock.median(seconds[0]).median / middle
        each = middle / result.evaluations
        rows.append({"width": width, "samples": samples, "batch": batch, "seconds": each, "speed_up": speed_up})
    return rows


def text(result: Result) -> str:
    """The table."""
    batches = sorted({row["batch"] for row in result.rows if row["batch"]})
    lines = []
    for (width, samples), rows in report.groups(result.rows, ["width", "samples"]).items():
        by_batch = {row["batch"]: row for row in rows}
        cells = [report.ratio(by_batch[b]["speed_up"]) if b in by_batch else "-" for b in batches]
        lines.append([f"{width}", f"{samples}", report.duration(by_batch[0]["seconds"]), *cells])
    titles = ["width", "samples", "time per coalition", *(f"batch {b}" for b in batches)]
    return report.head(result) + "\n" + report.markdown(titles, lines) + "\n\nspeed-up over one coalition per forward"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; raises AssertionError if a batched result differs from that of single coalitions."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks shapley", description=__doc__, formatter_class=formatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="samples of the score")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024], help="most samples per forward")
    parser.add_argument("--width", type=int, nargs="+", default=[48, 192], help="width of the vision transformer")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the result to this file")
    options = parser.parse_args(arguments)
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "device")}
    result = Result("shapley", report.machine(options.device), settings)
    for width in options.width:
        for samples in options.samples:
            result.rows += rounded(measure(width, samples, options.batch, options.rounds, options.device))
    print(text(result), flush=True)
    if options.json:
        report.write(options.json, result)
    return 0
