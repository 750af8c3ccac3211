"""Times DoRA and HiRA and measures their peak memory, against PEFT, our own LoRA and the frozen linears.

    python -m benchmarks variants [--variant dora hira] [--rounds 40] [--threads 2] [--clock wall] [--json F]

The model has three linears d → d → 4d → d and runs forward and backward in float32 with rank 8. The contenders take
turns in every round. An untimed AdamW step follows each measurement, so that no cached value stays valid for the next
round. Ratios are medians over the rounds of the ratio within a round. Before timing, y and dx of ours must agree with
PEFT's. `--clock process` uses the CPU time of the process, which varies less on a busy machine; with one thread it is
the time of the computation.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import cotolora
from benchmarks import clock, memory, report, sweep
from benchmarks.report import Result
from benchmarks.shapes import number
from cotolora.results import rounded

SIZES = ((768, 394), (256, 256), (64, 1024))  # d and rows
RANK, SCALE = 8, 2.0
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}


def frozen(width: int) -> nn.Sequential:
    """Three frozen linears with the same weights at every call."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width))
    return layers.requires_grad_(False)


def factors_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def alpha_of(variant: str) -> float:
    """Alpha such that the scale is the same as PEFT's, whose HiRA has no scale."""
    return float(RANK) if variant == "hira" else SCALE * RANK


def ours(width: int, variant: str) -> nn.Sequential:
    model = frozen(width)
    cotolora.inject(model, "[012]", rank=RANK, alpha=alpha_of(variant), variant=variant)
    return model


def peft(width: int, variant: str) -> nn.Module:
    from peft import HiraConfig, LoraConfig, inject_adapter_in_model

    names = ["0", "1", "2"]
    config = (
        HiraConfig(r=RANK, target_modules=names)
        if variant == "hira"
        else LoraConfig(r=RANK, lora_alpha=alpha_of(variant), use_dora=variant == "dora", target_modules=names)
    )
    model = inject_adapter_in_model(config, frozen(width))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "hira_" in name)
    return model


class Runner:
    """A model with its optimizer."""

    def __init__(self, model: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.model, self.x, self.dy = model, x, dy
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # as after some training, when B is nonzero
            for parameter in factors_of(model):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        parameters = factors_of(model) or [nn.Parameter(torch.zeros(()))]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def both(self) -> Tensor:
        """Forward and backward."""
        y = self.model(self.x)
        y.backward(self.dy)
        return y

    def timed(self, now: Callable[[], float]) -> Callable[[], float]:
        """A timer of `both`; an untimed optimizer step follows."""

        def run() -> float:
            self.x.grad = None
            begun = now()
            self.both()
            took = now() - begun
            self.optimizer.step()
            self.optimizer.zero_grad()
            return took

        return run


def runners(width: int, rows: int, variant: str) -> dict[str, Runner]:
    """All contenders on the same operands; raises an error if ours disagrees with PEFT."""
    generator = torch.Generator().manual_seed(2)
    x, dy = (torch.randn(rows, width, generator=generator) for _ in range(2))
    models = {
        "frozen": frozen(width), "ours lora": ours(width, "lora"),
        f"PEFT {variant}": peft(width, variant), f"ours {variant}": ours(width, variant),
    }  # fmt: skip
    # all contenders start from PEFT's factors
    values = [p.detach().clone() for p in factors_of(models[f"PEFT {variant}"])]
    with torch.no_grad():
        for parameter, value in zip(factors_of(models[f"ours {variant}"]), values, strict=True):
            parameter.copy_(value)
    made = {name: Runner(model, x.clone().requires_grad_(), dy) for name, model in models.items()}
    ours_, theirs = made[f"ours {variant}"], made[f"PEFT {variant}"]
    torch.testing.assert_close(ours_.both(), theirs.both(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours_.x.grad, theirs.x.grad, rtol=1e-4, atol=1e-4)
    return made


def measured(width: int, rows: int, variant: str, rounds: int, now: Callable[[], float]) -> list[dict[str, Any]]:
    """One row per contender."""
    made = runners(width, rows, variant)
    seconds = clock.take_turns({name: runner.timed(now) for name, runner in made.items()}, rounds)

    def over(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))

    return [
        {
            "shape": f"{variant}, {width} → {width} → {4 * width} → {width}", "rows": rows, "rank": RANK,
            "contender": name,
            "median_s": statistics.median(seconds[name]), "over_frozen": over(name, "frozen"),
            "over_lora": over(name, "ours lora"), "peak_bytes": memory.allocated(runner.both, runner.x.device)[1],
        }
        for name, runner in made.items()
    ]  # fmt: skip


def text(result: Result) -> str:
    """Everything that was measured, as it is printed."""
    titles, sections = ["", "median", "over frozen", "over our LoRA", "peak"], [report.head(result)]
    for (shape, rows), members in report.groups(result.rows, ("shape", "rows")).items():
        lines = [
            [
                row["contender"], report.duration(row["median_s"]),
                *(report.ratio(row[name]) for name in ("over_frozen", "over_lora")), memory.amount(row["peak_bytes"]),
            ]
            for row in members
        ]  # fmt: skip
        sections.append(f"### {shape}, {rows} rows\n\n{report.markdown(titles, lines)}\n")
    return "\n".join(sections)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks variants", description=__doc__, formatter_class=formatter)
    parser.add_argument("--variant", choices=("dora", "hira"), nargs="+", default=["dora", "hira"])
    parser.add_argument("--rounds", type=number(int), default=40)
    parser.add_argument("--threads", type=number(int), default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the result to this file")
    options = parser.parse_args(arguments)
    sweep.check_files(parser, options.json, None)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="peft")
    result = Result("variants", report.machine(torch.device("cpu")), sweep.settings_of(options))
    for variant, (width, rows) in tqdm(list(product(options.variant, SIZES)), disable=None):
        result.rows += rounded(measured(width, rows, variant, options.rounds, CLOCKS[options.clock]))
    print(text(result), flush=True)
    if options.json:
        report.write(options.json, result)
    return 0
