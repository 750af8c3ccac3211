"""The methods that the study compares, and their training on the same batches, each at its best learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cotolora
from benchmarks.study.tasks import Setting, Split, batches

RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128)
SWEEP_SEED = 1000  # seeds from here on are used only to choose the learning rate


@dataclass(frozen=True, eq=False)
class Method:
    """A variant, its CoTo settings (None: always on), and its learning-rate schedule.

    Attributes:
        coto: arguments of `cotolora.CoTo`.
        schedule: learning-rate schedule, a key of `SCHEDULES`.
        library: "cotolora" or "peft", whose layers are used.
    """

    name: str
    coto: dict[str, Any] | None = None
    variant: str = "lora"
    schedule: str = "one cycle"
    library: str = "cotolora"


# the constant p equals CoTo's mean over a run, so that both skip the same amount of work
METHODS = (
    Method("LoRA"),
    Method("LoRA, constant p", {"shape": "constant", "initial_p": 0.6625}),
    Method("CoTo", {}),
    Method("CoTo, exponential", {"shape": "exponential"}),
    Method("DoRA", variant="dora"),
    Method("DoRA, CoTo", {}, "dora"),
    Method("HiRA", variant="hira"),
    Method("HiRA, CoTo", {}, "hira"),
)


# share of the run completed after the warm-up → learning rate relative to its peak
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}
WARM_UP = 0.1  # share of the steps
SCHEDULES = ("one cycle", *DECAYS)


def scheduler_of(
    optimizer: torch.optim.Optimizer, schedule: str, rate: float, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate scheduler: warm-up over a tenth of the steps, then one of `SCHEDULES`."""
    if schedule == "one cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=WARM_UP)
    warm = WARM_UP * steps
    decay = DECAYS[schedule]
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / warm if step + 1 < warm else decay((step + 1 - warm) / (steps - warm))
    )


@dataclass
class Trained:
    """A model after training."""

    method: Method
    seed: int
    model: nn.Module


@dataclass
class Run(Trained):
    """One training run and its measurements; `seconds` is CPU time."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    coto: cotolora.CoTo | None
    seconds: list[float] = field(default_factory=list)
    multiplied: float = 0.0
    skipped: float = 0.0

    def step(self, x: Tensor, y: Tensor) -> None:
        """One timed optimizer step."""
        # CPU time, because other processes may run in between and a step uses one thread
        start = time.process_time()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.coto is not None:
            self.coto.step()
        self.seconds.append(time.process_time() - start)

    def count(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook: counts the adapter's multiplications as executed or as skipped."""
        if layer.training:
            products = layer.rank * (layer.in_features + layer.out_features) * args[0].shape[:-1].numel()
            self.multiplied += products
            self.skipped += products if layer.active is False else 0


def adapted(setting: Setting, base: nn.Module, variant: str = "lora") -> nn.Module:
    """A copy of the base with new adapters."""
    model = deepcopy(base)
    cotolora.inject(
        model, setting.targets, rank=setting.rank, alpha=setting.alpha, variant=variant,
        exclude=setting.exclude or None, trainable=setting.trainable,
    )  # fmt: skip
    return model


def start(setting: Setting, base: nn.Module, method: Method, seed: int, rate: float, steps: int) -> Run:
    """A run before its first step."""
    torch.manual_seed(seed)
    model = adapted(setting, base, method.variant)
    layers = cotolora.adapters(model)
    if method.library == "peft":
        model = in_peft(setting, deepcopy(base), list(layers))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    scheduler = scheduler_of(optimizer, method.schedule, rate, steps)
    coto = None
    if method.coto is not None:
        coto = cotolora.CoTo(model, steps, seed=seed, **method.coto)
        coto.attach(optimizer)
    run = Run(method, seed, model.train(), optimizer, scheduler, coto)
    for layer in layers.values():
        layer.register_forward_pre_hook(run.count)
    return run


def in_peft(setting: Setting, base: nn.Module, targets: list[str]) -> nn.Module:
    """The base with PEFT's adapters on the same modules."""
    import peft

    config = peft.LoraConfig(
        r=setting.rank, lora_alpha=setting.alpha, target_modules=targets, modules_to_save=setting.trainable or None
    )
    return peft.get_peft_model(base, config)


def train(
    setting: Setting,
    base: nn.Module,
    split: Split,
    rates: dict[Method, float],
    seed: int,
    steps: int,
    advance: Callable[[], object],
) -> list[Run]:
    """Trains one run per method on the same batches; they take turns in every step, so that times are comparable."""
    runs = [start(setting, base, method, seed, rate, steps) for method, rate in rates.items()]
    for i, (x, y) in enumerate(batches(split, setting.batch, steps, seed, setting.lengths)):
        first = i % len(runs)
        for run in runs[first:] + runs[:first]:
            run.step(x, y)
            advance()
    for run in runs:
        if run.coto is not None:
            run.coto.finish()
        run.model.eval()
    return runs


def sweep(
    setting: Setting,
    base: nn.Module,
    methods: Iterable[Method],
    rates: Iterable[float],
    seeds: int,
    steps: int,
    advance: Callable[[], object],
) -> list[dict[str, Any]]:
    """One row per method, learning rate and seed: the validation score averaged over the domains."""
    rows = []
    for rate in rates:
        for seed in range(SWEEP_SEED, SWEEP_SEED + seeds):
            scores: dict[Method, list[float]] = {}
            for domain in setting.domains.values():
                fixed = dict.fromkeys(methods, rate)
                for run in train(setting, base, domain.train, fixed, seed, steps, advance):
                    scores.setdefault(run.method, []).append(setting.score(run.model, domain.validation))
            rows += [
                {"setting": setting.name, "domain": "all", "method": method.name, "measure": "sweep", "at": rate,
                 "seed": seed, "value": sum(found) / len(found)}
                for method, found in scores.items()
            ]  # fmt: skip
    return rows


def best_rates(rows: list[dict[str, Any]], methods: Iterable[Method]) -> dict[Method, float]:
    """For each method, the rate with the highest mean score over the sweep's seeds."""
    chosen = {}
    for method in methods:
        scores: dict[float, list[float]] = {}
        for row in rows:
            if row["measure"] == "sweep" and row["method"] == method.name:
                scores.setdefault(row["at"], []).append(row["value"])
        chosen[method] = max(scores, key=lambda rate: sum(scores[rate]) / len(scores[rate]))
    return chosen
