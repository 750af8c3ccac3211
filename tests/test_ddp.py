"""CoTo under DistributedDataParallel: every case runs on two gloo processes, started once for the whole module.

This file is also the program of those processes: ``python test_ddp.py RANK FOLDER``.
"""

import collections
import contextlib
import datetime
import importlib.util
import logging.handlers
import os
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cotolora import CoTo, adapters, inject, sample_mask, set_backend
from cotolora.schedule import activation_probability

TOTAL, WIDTH, BLOCKS, PER_RANK = 20, 6, 4, 3


@dataclass(frozen=True)
class Case:
    """One way to train.

    ddp: options of DistributedDataParallel. coto: options of CoTo, built "before" or "after" wrapping.
    output: what the model returns. checkpoint: "reentrant" or "non-reentrant", around every block.
    compiled: "inside" or "outside" of DDP, "blocks", or "call" (Module.compile). micro: micro-batches a step, all but
    the last without sync. forwards: forwards of one backward. off: adapters the user disabled. merged: those the user
    merged after the start. sharded: by FSDP2, in place of DDP.
    """

    ddp: dict[str, Any] = field(default_factory=dict)
    coto: dict[str, Any] = field(default_factory=dict)
    built: str = "before"
    output: str = "tensor"
    checkpoint: str = ""
    compiled: str = ""
    micro: int = 1
    forwards: int = 1
    off: tuple[int, ...] = ()
    merged: tuple[int, ...] = ()
    train: bool = True
    evaluate: bool = False
    set_to_none: bool = True
    sharded: bool = False
    steps: int = 12


CASES = {
    "default": Case(),
    "coto-built-after": Case(built="after"),
    "static-graph": Case(ddp={"static_graph": True}),
    "static-graph-coto-built-after": Case(ddp={"static_graph": True}, built="after"),
    "find-unused": Case(ddp={"find_unused_parameters": True}),
    "bucket-views": Case(ddp={"gradient_as_bucket_view": True}),
    "bucket-views-zeroed": Case(ddp={"gradient_as_bucket_view": True}, set_to_none=False),
    "static-bucket-views": Case(ddp={"gradient_as_bucket_view": True, "static_graph": True}),
    "no-sync": Case(micro=3),
    "no-sync-static": Case(micro=2, ddp={"static_graph": True}),
    "no-sync-find-unused": Case(micro=2, ddp={"find_unused_parameters": True}),
    "no-sync-bucket-views": Case(micro=2, ddp={"gradient_as_bucket_view": True}),
    "checkpoint": Case(checkpoint="non-reentrant"),
    "checkpoint-static": Case(checkpoint="non-reentrant", ddp={"static_graph": True}),
    "checkpoint-find-unused": Case(checkpoint="non-reentrant", ddp={"find_unused_parameters": True}),
    "checkpoint-reentrant": Case(checkpoint="reentrant"),
    "checkpoint-reentrant-static": Case(checkpoint="reentrant", ddp={"static_graph": True}),
    "checkpoint-reentrant-no-sync": Case(checkpoint="reentrant", micro=2),
    "scalar-divided-in-place": Case(output="loss"),
    "scalar-divided-in-place-static": Case(output="loss", ddp={"static_graph": True}),
    "tuple": Case(output="tuple"),
    "namedtuple": Case(output="namedtuple"),
    "dict": Case(output="dict"),
    "dict-static": Case(output="dict", ddp={"static_graph": True}),
    "dataclass": Case(output="dataclass"),
    "model-output": Case(output="model-output"),
    "output-without-gradient": Case(output="partly"),
    "unused-output-with-infinite-slope": Case(output="unused"),
    "opaque": Case(output="opaque"),
    "zeroed-gradients": Case(set_to_none=False),
    "device-gates": Case(coto={"gates": "device"}),
    "device-gates-static": Case(coto={"gates": "device"}, built="after", ddp={"static_graph": True}),
    "modules-and-tilt": Case(coto={"unit": "module", "tilt": 1.0}),
    "disabled": Case(off=(1,)),
    "disabled-static": Case(off=(0, 3), ddp={"static_graph": True}),
    "merged-in-the-run": Case(merged=(2,), coto={"unit": lambda name: name < "layers.2"}),
    "eval-mode": Case(train=False),
    "eval-mode-disabled": Case(train=False, off=(2,)),
    "evaluation-between-steps": Case(evaluate=True),
    "evaluation-between-steps-static": Case(evaluate=True, ddp={"static_graph": True}),
    "two-forwards": Case(forwards=2),
    "two-forwards-device": Case(forwards=2, coto={"gates": "device"}),
    "nothing-on-at-times": Case(coto={"at_least_one": False}),
    "sharded": Case(sharded=True),
    "sharded-device": Case(sharded=True, built="after", coto={"gates": "device"}),
    "compiled-inside": Case(compiled="inside", steps=4),
    "compiled-inside-after": Case(compiled="inside", built="after", steps=4),
    "compiled-outside": Case(compiled="outside", steps=4),
    "compiled-blocks": Case(compiled="blocks"),
    "compiled-call": Case(compiled="call", steps=4),
    "compiled-device": Case(compiled="inside", coto={"gates": "device"}),
}


@dataclass(frozen=True)
class Frozen:
    loss: Tensor
    more: dict[str, Any]


class Opaque:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


Pair = collections.namedtuple("Pair", "text loss")


class Net(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        if self.case.checkpoint == "reentrant":
            x = x.requires_grad_()
        for layer in self.layers:
            if self.case.checkpoint:
                x = checkpoint(layer, x, use_reentrant=self.case.checkpoint == "reentrant")
            else:
                x = layer(x)
        loss = ((x - y) ** 2).mean()
        return {
            "tensor": lambda: x,
            "loss": lambda: loss,
            "tuple": lambda: (3, [None, loss], x),
            "namedtuple": lambda: Pair("text", loss),
            "dict": lambda: {"logits": x, "more": {"loss": loss, "text": "text"}},
            "dataclass": lambda: Frozen(loss, {"hidden": [x]}),
            "model-output": lambda: model_output(loss, x),
            "partly": lambda: (x.detach(), torch.tensor([1, 2]), loss),
            # the slope of a square root at 0 is infinite: 0 · inf poisons the gradient if zeros go this way
            "unused": lambda: {"loss": loss, "norm": ((x - x.detach()) ** 2).sum().sqrt()},
            "opaque": lambda: Opaque(loss),
        }[self.case.output]()


def model_output(loss: Tensor, logits: Tensor) -> Any:
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(loss=loss, logits=logits)


def loss_of(case: Case, output: Any, y: Tensor) -> Tensor:
    read = {
        "tensor": lambda: ((output - y) ** 2).mean(),
        "loss": lambda: output,
        "tuple": lambda: output[1][1],
        "namedtuple": lambda: output.loss,
        "dict": lambda: output["more"]["loss"],
        "dataclass": lambda: output.loss,
        "model-output": lambda: output.loss,
        "partly": lambda: output[2],
        "unused": lambda: output["loss"],
        "opaque": lambda: output.loss,
    }
    return read[case.output]()


def make(case: Case) -> Net:
    torch.manual_seed(0)
    model = Net(case).double()
    for layer in inject(model, rank=2).values():
        nn.init.normal_(layer.lora_b)
    for i in case.off:
        adapters(model)[f"layers.{i}.0"].enabled = False
    return model.train(case.train)


def compile_parts(model: nn.Module, case: Case) -> nn.Module:
    if case.compiled == "inside":
        return torch.compile(model, backend="eager")
    if case.compiled == "call":
        model.compile(backend="eager")
    if case.compiled == "blocks":
        for layer in model.layers:
            layer.compile(backend="eager")
    return model


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


def whole(p: Tensor) -> Tensor:
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def train(case: Case, rank: int, world: int) -> dict[str, Any]:
    """Twelve optimizer steps of this rank's share of the joint batches; what a test wants to know of them."""
    model = make(case)
    layers = adapters(model)
    options = {"total_steps": TOTAL, "seed": 5, **case.coto}
    run = model
    coto = CoTo(run, **options) if case.built == "before" else None
    if world > 1:
        run = shard(model) if case.sharded else DistributedDataParallel(compile_parts(model, case), **case.ddp)
    if coto is None:
        coto = CoTo(run, **options)
    if world > 1 and case.compiled == "outside":
        run = torch.compile(run, backend="eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    coto.attach(optimizer)

    for i in case.merged:
        layers[f"layers.{i}.0"].merge()
        coto.set_step(0)
    data = torch.Generator().manual_seed(1)
    masks, losses, touched, norms = [], [], [], []
    for step in range(case.steps):
        for micro in range(case.micro):
            x, y = (torch.randn(2 * PER_RANK, WIDTH, generator=data, dtype=torch.double) for _ in range(2))
            if world > 1:
                x, y = (t[rank * PER_RANK : (rank + 1) * PER_RANK] for t in (x, y))
            # a static graph must sync in its first step, or torch fails an assertion of its own
            sync = world == 1 or micro == case.micro - 1 or (step == 0 and "static_graph" in case.ddp)
            with contextlib.nullcontext() if sync else run.no_sync():
                loss = sum(loss_of(case, run(x.clone() + i, y), y) for i in range(case.forwards))
                loss /= case.micro
                if loss.requires_grad or case.coto.get("at_least_one", True):
                    loss.backward()
        on = torch.tensor(
            [bool(layer.enabled and (layer.gate or not case.train) and not layer.merged) for layer in layers.values()]
        )
        before = [(whole(p).clone(), state_of(optimizer, p)) for p in parameters(layers)]
        norms.append(whole(nn.utils.clip_grad_norm_(parameters(layers), 1.0)).double())
        optimizer.step()
        for i, (p, (old, state)) in enumerate(zip(parameters(layers), before, strict=True)):
            if not on[i // 2] and not (torch.equal(whole(p), old) and same(state_of(optimizer, p), state)):
                touched.append(f"step {step}, adapter {i // 2}")
        optimizer.zero_grad(set_to_none=case.set_to_none)
        losses.append(loss.detach())
        masks.append(coto.mask)
        if case.evaluate:
            run.eval()
            with torch.no_grad():
                run(x.clone(), y)
            run(x.clone(), y)
            run.train()
        coto.set_step(step + 1)
    return {
        "masks": torch.stack(masks),
        "parameters": torch.cat([whole(p).detach().flatten() for p in model.parameters()]),
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "touched": touched,
    }


def parameters(layers: dict[str, Any]) -> list[Tensor]:
    return [p for layer in layers.values() for p in (layer.lora_a, layer.lora_b)]


def state_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    return {key: whole(value).clone() for key, value in optimizer.state.get(p, {}).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def work(rank: int, folder: Path) -> None:
    """Runs all cases as one of two ranks and writes what came of each."""
    torch.set_num_threads(1)
    log = logging.getLogger("cotolora")
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")  # as pyproject.toml has it
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # dynamo's own reading
    for name, case in CASES.items():
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{name}.store",
            rank=rank,
            world_size=2,
            timeout=datetime.timedelta(seconds=30),  # a rank that waits for one that failed gives up, and goes on
        )
        records = logging.handlers.BufferingHandler(10**6)
        log.addHandler(records)
        try:
            with set_backend("addmm"):  # which float64 does not take of itself
                result = train(case, rank, 2)
        except Exception:
            result = {"error": traceback.format_exc()}
        log.removeHandler(records)
        result["log"] = [record.getMessage() for record in records.buffer]
        torch.save(result, folder / f"{name}.{rank}.pt")
        dist.destroy_process_group()
        torch.compiler.reset()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """``results[name]``: what the two ranks made of a case."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    output, deadline = "", time.monotonic() + 60
    for process in ranks:
        try:
            output += process.communicate(timeout=max(1, deadline - time.monotonic()))[0]
        except subprocess.TimeoutExpired:
            process.kill()
            output += process.communicate()[0]
    hung = {"error": f"did not finish:\n{output}", "log": []}
    files = {name: [folder / f"{name}.{rank}.pt" for rank in range(2)] for name in CASES}
    return {name: [torch.load(file) if file.exists() else hung for file in both] for name, both in files.items()}


transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
WORKING = [
    pytest.param(name, marks=transformers if name == "model-output" else ()) for name in CASES if name != "opaque"
]


@pytest.mark.parametrize("name", WORKING)
def test_ranks_agree_bit_for_bit(results, name):
    first, second = results[name]
    assert "error" not in first, first["error"]
    assert "error" not in second, second["error"]
    assert torch.equal(first["masks"], second["masks"])
    assert torch.equal(first["parameters"], second["parameters"])
    assert torch.equal(first["norms"], second["norms"])


@pytest.mark.parametrize("name", WORKING)
def test_adapters_that_are_off_are_not_touched(results, name):
    for result in results[name]:
        assert result["touched"] == []


@pytest.mark.parametrize("name", WORKING)
def test_equals_one_process_on_the_joint_batches(results, name):
    """Up to float64's order of summation: the ranks average two means, one process sums all."""
    case = CASES[name]
    with set_backend("addmm"):
        alone = train(case, 0, 1)
    ranks = results[name]
    assert torch.equal(alone["masks"], ranks[0]["masks"])
    losses = (ranks[0]["losses"] + ranks[1]["losses"]) / 2
    for what, got in (("losses", losses), ("norms", ranks[0]["norms"]), ("parameters", ranks[0]["parameters"])):
        torch.testing.assert_close(got, alone[what], rtol=1e-9, atol=1e-9, msg=lambda text, w=what: f"{w}: {text}")


def test_an_output_that_hides_its_tensors_is_an_error_and_in_the_log(results):
    for result in results["opaque"]:
        assert "Expected to have finished reduction" in result["error"]
        assert [message for message in result["log"] if "a Opaque, shows no tensors" in message] == result["log"][:1]


def test_masks_are_those_of_the_pure_function(results):
    expected = [sample_mask(BLOCKS, activation_probability(step, TOTAL), seed=5, step=step) for step in range(12)]
    assert torch.equal(results["default"][1]["masks"], torch.stack(expected))
    off = ~torch.stack(expected)
    assert off.any(1).sum() >= 6, "the cases must have steps in which adapters are off"
    assert off[:, 0].any(), "and steps in which backward does not reach the first block"


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
