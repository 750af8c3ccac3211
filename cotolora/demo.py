"""Compares plain LoRA with CoTo on a small data set: ``python -m cotolora.demo``.

A small vision transformer is trained on the handwritten digits 0 to 4. Then plain LoRA and CoTo each
adapt this base to all ten digits, with the same number of steps and several seeds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cotolora
from cotolora.results import save_picture, write_json

STEPS, BATCH, RANK, ALPHA = 400, 64, 4, 8.0
PRETRAIN_STEPS = 300
PARTS = ["qkv", "proj", "up", "down"]
# the best of LEARNING_RATES for each method on the validation split, found with `python -m cotolora.demo --sweep`
LEARNING_RATE = {"LoRA": 1.5e-2, "CoTo": 1.5e-2}
LEARNING_RATES = (2e-3, 5e-3, 1e-2, 1.5e-2, 2e-2)
LAMBDAS = [i / 10 for i in range(11)]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` → the same."""
        from einops import rearrange  # in the extra "demo", as are the other imports inside functions

        q, k, v = rearrange(self.qkv(self.norm1(x)), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(rearrange(attended, "b h t d -> b t (h d)"))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Classifies 8x8 images into ten digits: 2x2 patches, a class token, pre-norm blocks."""

    def __init__(self, width: int = 48, depth: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(0.02 * torch.randn(17, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """``[batch, 8, 8]`` → logits ``[batch, 10]``."""
        from einops import rearrange, repeat

        x = self.patches(rearrange(images, "b (h p) (w q) -> b (h w) (p q)", p=2, q=2))
        x = torch.cat([repeat(self.class_token, "d -> b 1 d", b=len(x)), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


@dataclass
class Data:
    """The digits, split 60 / 20 / 20 with the same share of each digit."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_data(device: torch.device) -> Data:
    """Scikit-learn's 1797 handwritten digits; nothing is downloaded."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = digits.images / 8 - 1, digits.target
    x, x_test, y, y_test = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    x, x_val, y, y_val = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)

    def tensors(a: Any, b: Any) -> tuple[Tensor, Tensor]:
        return torch.tensor(a, dtype=torch.float32, device=device), torch.tensor(b, device=device)

    return Data(tensors(x, y), tensors(x_val, y_val), tensors(x_test, y_test))


def batches(data: tuple[Tensor, Tensor], steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` random batches, determined by the seed."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator).to(x.device)
        yield x[rows], y[rows]


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Accuracy of `model` on `data`, in percent."""
    was_training = model.training
    right = model.eval()(data[0]).argmax(1) == data[1]
    model.train(was_training)
    return 100 * right.float().mean().item()


def pretrain(data: Data, device: torch.device, progress: Any) -> VisionTransformer:
    """A base model, fully trained on the digits 0 to 4."""
    torch.manual_seed(0)
    model = VisionTransformer().to(device)
    known = data.train[1] < 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for x, y in batches((data.train[0][known], data.train[1][known]), PRETRAIN_STEPS, seed=0):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.update()
    return model


@dataclass
class Run:
    """One training run and its measurements."""

    method: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    coto: cotolora.CoTo | None
    seconds: list[float] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    gates: list[list[bool]] = field(default_factory=list)
    multiplied: float = 0.0
    skipped: float = 0.0

    def step(self, x: Tensor, y: Tensor) -> None:
        """One timed optimizer step."""
        if self.coto is not None:
            self.probabilities.append(self.coto.p)
            self.gates.append(self.coto.mask.tolist())
        start = time.perf_counter()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.coto is not None:
            self.coto.step()
        if x.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    def count(self, layer: nn.Module, args: Any) -> None:
        """Forward pre-hook: counts the adapter's multiplications, in total and of skipped ones."""
        assert isinstance(layer, cotolora.CoToLoRALinear)
        products = layer.rank * (layer.in_features + layer.out_features) * args[0].shape[:-1].numel()
        if layer.training:
            self.multiplied += products
            self.skipped += products if layer.active is False else 0


# the choices of --variant, with their arguments of `inject`
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "dora": {"variant": "dora"},
    "hira": {"variant": "hira"},
}


def start(method: str, base: nn.Module, seed: int, lr: float, steps: int, kind: str = "lora") -> Run:
    """A copy of the base with new adapters, ready to train; the head is trained too."""
    torch.manual_seed(seed)
    model = deepcopy(base)
    layers = cotolora.inject(model, PARTS, rank=RANK, alpha=ALPHA, trainable=["head"], **KINDS[kind])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    coto = None
    if method == "CoTo":
        coto = cotolora.CoTo(model, steps, seed=seed)
        coto.attach(optimizer)
    run = Run(method, model, optimizer, scheduler, coto)
    for layer in layers.values():
        layer.register_forward_pre_hook(run.count)
    return run


def adapt(
    base: nn.Module, data: Data, seed: int, rates: dict[str, float], steps: int, progress: Any, kind: str = "lora"
) -> list[Run]:
    """One run of each method on the same batches; the methods alternate step by step, so that their times compare."""
    runs = [start(method, base, seed, rate, steps, kind) for method, rate in rates.items()]
    for i, (x, y) in enumerate(batches(data.train, steps, seed)):
        for run in runs if i % 2 else runs[::-1]:
            run.step(x, y)
            progress.update()
    for run in runs:
        if run.coto is not None:
            run.coto.finish()
        run.model.eval()
    return runs


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all trained parameters: the adapters and the head."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def interpolation(runs: list[Run], data: tuple[Tensor, Tensor]) -> list[list[float]]:
    """Accuracy of ``λ · factors of one seed + (1 - λ) · factors of the next`` at each λ, one curve for each pair."""
    curves = []
    for first, second in zip(runs, runs[1:] + runs[:1], strict=True):
        one, two = trained_state(first.model), trained_state(second.model)
        fused = deepcopy(first.model)
        curve = []
        for weight in LAMBDAS:
            fused.load_state_dict({name: weight * one[name] + (1 - weight) * two[name] for name in one}, strict=False)
            curve.append(accuracy(fused, data))
        curves.append(curve)
    return curves


def every_other(run: Run, data: tuple[Tensor, Tensor]) -> float:
    """Accuracy with the adapters of every second block disabled."""
    modules = cotolora.groups.modules_of(run.model)
    depth = len(cotolora.groups.group_names(cotolora.adapters(run.model), "layer", modules))
    with cotolora.adapter_mask(run.model, [i % 2 == 0 for i in range(depth)], unit="layer"):
        return accuracy(run.model, data)


def mean_sd(values: list[float]) -> str:
    """``mean ± sd``, as the table prints it."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.1f} ± {sd:.1f}"


def measure(runs: list[Run], reference: list[Run], data: Data) -> dict[str, Any]:
    """The values of one method that the table and the figure show."""
    curves = interpolation(runs, data.test)
    return {
        "learning_rate": LEARNING_RATE[runs[0].method],
        "accuracy": [accuracy(run.model, data.test) for run in runs],
        "fused": [curve[len(curve) // 2] for curve in curves],
        "every_other_layer": [every_other(run, data.test) for run in runs],
        "adapter_compute_skipped": [100 * run.skipped / run.multiplied for run in runs],
        # the methods alternated on the same batches
        "time_per_step_over_lora": [
            statistics.median(run.seconds) / statistics.median(other.seconds)
            for run, other in zip(runs, reference, strict=True)
        ],
        "mean_time_per_step_over_lora": [
            sum(run.seconds) / sum(other.seconds) for run, other in zip(runs, reference, strict=True)
        ],
        "interpolation": curves,
    }


def table(results: dict[str, dict[str, Any]], before: float) -> str:
    """The comparison as text."""
    rows = [
        ("learning rate", "learning_rate"),
        ("accuracy %", "accuracy"),
        ("two seeds fused 1:1, accuracy %", "fused"),
        ("every other layer's adapters dropped, accuracy %", "every_other_layer"),
        ("adapter compute skipped %", "adapter_compute_skipped"),
        ("time per step over LoRA's", "mean_time_per_step_over_lora"),
    ]
    lines = [f"{'':50}" + "".join(f"{method:>14}" for method in results)]
    for label, key in rows:
        cells = []
        for result in results.values():
            value = result[key]
            if key == "learning_rate":
                cells.append(f"{value:g}")
            elif key.startswith("mean_time"):
                cells.append(f"{statistics.fmean(value):.2f}")
            else:
                cells.append(mean_sd(value))
        lines.append(f"{label:50}" + "".join(f"{cell:>14}" for cell in cells))
    lines.append(f"(mean ± sd over the seeds; the base, before adapting, gets {before:.1f} %)")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], run: Run, path: Path) -> None:
    """Activation probability and gates over the run; accuracy against λ."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    gates = torch.tensor(run.gates).T.numpy()
    left.imshow(gates, aspect="auto", origin="lower", interpolation="nearest", cmap="Blues", vmin=0, vmax=1.6)
    left.set(
        xlabel="optimizer step", ylabel="block", title="adapters on (blue) in one CoTo run", yticks=range(len(gates))
    )
    probability = left.twinx()
    probability.plot(run.probabilities, color="tab:red", linewidth=2)
    probability.set(ylim=(0, 1.02), ylabel="activation probability p")
    probability.yaxis.label.set_color("tab:red")

    for method, result in results.items():
        curves = torch.tensor(result["interpolation"])
        middle, sd = curves.mean(0).numpy(), curves.std(0).numpy()
        (line,) = right.plot(LAMBDAS, middle, marker="o", label=method)
        right.fill_between(LAMBDAS, middle - sd, middle + sd, color=line.get_color(), alpha=0.2)
    right.set(
        xlabel="λ, weight of the first seed's factors", ylabel="test accuracy %", title="two seeds' adapters, fused"
    )
    right.legend()
    save_picture(figure, path, dpi=130)
    plt.close(figure)


def sweep(base: nn.Module, data: Data, seeds: int, steps: int) -> None:
    """Prints each method's validation accuracy for each learning rate."""
    from tqdm import tqdm

    with tqdm(total=2 * seeds * steps * len(LEARNING_RATES), disable=None, desc="sweep") as progress:
        for rate in LEARNING_RATES:
            rates = dict.fromkeys(LEARNING_RATE, rate)
            # seeds that the comparison does not use
            runs = [adapt(base, data, 100 + seed, rates, steps, progress) for seed in range(seeds)]
            for i, method in enumerate(rates):
                scores = [accuracy(pair[i].model, data.validation) for pair in runs]
                tqdm.write(f"lr {rate:g} {method}: validation accuracy {mean_sd(scores)} %")


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m cotolora.demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, at least 2 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument(
        "--variant", choices=KINDS, default="lora", help="variant of all adapters (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="only compare learning rates, on the validation split")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2, because pairs of seeds are fused; got {options.seeds}")
    if options.steps < 10:
        parser.error(f"--steps must be at least 10; got {options.steps}")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device must be a device that torch can use here; got {name!r} ({error})")
    try:
        import einops  # noqa: F401
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        parser.error(f'the demo needs {error.name}; install it with: pip install "cotolora[demo]"')
    from tqdm import tqdm

    # such small matrices gain nothing from a second thread, which would only compete with other programs
    torch.set_num_threads(1)
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_data(device)
    with tqdm(total=PRETRAIN_STEPS, disable=None, desc="pretraining on the digits 0-4") as progress:
        base = pretrain(data, device, progress)
    if options.sweep:
        sweep(base, data, options.seeds, options.steps)
        return 0
    with tqdm(total=2 * options.seeds * options.steps, disable=None, desc="adapting to all ten") as progress:
        pairs = [
            adapt(base, data, seed, LEARNING_RATE, options.steps, progress, options.variant)
            for seed in range(options.seeds)
        ]

    by_method = {method: [pair[i] for pair in pairs] for i, method in enumerate(LEARNING_RATE)}
    results = {method: measure(runs, by_method["LoRA"], data) for method, runs in by_method.items()}
    for method, runs in by_method.items():
        for seed, run in enumerate(runs):
            cotolora.save_adapter(run.model, options.out / "adapters" / f"{method.lower()}-seed{seed}")
    before = accuracy(base, data.test)
    report = {
        "settings": {
            "seeds": options.seeds, "steps": options.steps, "batch": BATCH, "rank": RANK, "alpha": ALPHA,
            "variant": options.variant, "blocks": len(base.blocks), "device": str(device),
        },
        "versions": {"cotolora": cotolora.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "base_accuracy": before,
        "lambdas": LAMBDAS,
        "results": results,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    write_json(options.out / "report.json", report)
    draw(results, by_method["CoTo"][0], options.out / "coto.png")

    print(f"{options.variant}: {options.steps} steps of {BATCH}, rank {RANK}, {options.seeds} seeds, on {device}")
    print(table(results, before))
    print(f"{options.out}/coto.png, report.json and adapters/ written in {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
