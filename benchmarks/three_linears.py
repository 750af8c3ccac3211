"""Forward and backward of 768 → 768 → 3072 → 768 on 394 tokens: frozen, PEFT's LoRA, ours on, ours off.

    python -m benchmarks three_linears [--rounds N] [--rank R] [--json FILE]

All contenders compute the same function (checked first), take turns in every round and share the process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import cotolora

SIZES = (768, 768, 3072, 768)
TOKENS = 394


def contenders(rank: int) -> dict[str, nn.Module]:
    """The same three linears, frozen, with PEFT's adapters and with ours on and off; equal weights throughout."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(SIZES)))
    base.requires_grad_(False)
    names = [name for name, _ in base.named_children()]
    theirs = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), deepcopy(base))
    ours = deepcopy(base)
    for name, layer in cotolora.inject(ours, names, rank=rank, alpha=2 * rank).items():
        nn.init.normal_(layer.lora_b, std=0.02)
        twin = theirs.get_submodule(name)
        twin.lora_A["default"].weight.data.copy_(layer.lora_a)
        twin.lora_B["default"].weight.data.copy_(layer.lora_b)
    off = deepcopy(ours)
    for layer in cotolora.adapters(off).values():
        layer.gate = False
    return {"frozen": base, "PEFT LoRA": theirs, "ours on": ours, "ours off": off}


def check(models: dict[str, nn.Module], x: Tensor) -> None:
    """Raises unless ours on equals PEFT's, in output and in the input's gradient, and ours off equals the frozen."""
    gradients = {}
    for name, model in models.items():
        leaf = x.detach().clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        gradients[name] = y.detach(), leaf.grad
    for one, other in (("ours on", "PEFT LoRA"), ("ours off", "frozen")):
        torch.testing.assert_close(gradients[one], gradients[other], rtol=1e-4, atol=1e-4)
    for model in models.values():
        model.zero_grad()


def measure(models: dict[str, nn.Module], x: Tensor, dy: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, the contenders taking turns in an order that rotates."""

    def run(model: nn.Module) -> float:
        leaf = x.detach().requires_grad_()
        start = time.perf_counter()
        model(leaf).backward(dy)
        seconds = time.perf_counter() - start
        for parameter in model.parameters():
            parameter.grad = None
        return seconds

    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-5, rounds):  # five rounds to warm up
        for name in names[i % 4 :] + names[: i % 4]:
            took = run(models[name])
            if i >= 0:
                seconds[name].append(took)
    return seconds


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks three_linears", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    models = contenders(options.rank)
    x, dy = torch.randn(TOKENS, SIZES[0]), torch.randn(TOKENS, SIZES[-1])
    check(models, x)
    seconds = measure(models, x, dy, options.rounds)

    import peft

    machine = (
        f"cpu {platform.machine()}, {torch.get_num_threads()} threads · torch {torch.__version__} · "
        f"peft {peft.__version__} · cotolora {cotolora.__version__} · "
        f"{options.rounds} rounds, float32, rank {options.rank}"
    )
    print(machine)
    median: Callable[[str], float] = lambda name: statistics.median(seconds[name])  # noqa: E731
    print(f"{'':12}{'median ms':>11}{'p20-p80':>15}{'/ frozen':>10}{'/ PEFT':>9}")
    rows = {}
    for name, values in seconds.items():
        p20, p80 = (1e3 * q for q in statistics.quantiles(values, n=5)[::3])
        rows[name] = {"median_ms": 1e3 * median(name), "p20_ms": p20, "p80_ms": p80}
        print(
            f"{name:12}{1e3 * median(name):11.2f}{f'{p20:.2f}-{p80:.2f}':>15}"
            f"{median(name) / median('frozen'):10.2f}{median(name) / median('PEFT LoRA'):9.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    return 0
