"""Training for the distributed tests: a small model, wrapped and run in the ways of the training stacks."""

import collections
import contextlib
import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cotolora import CoTo, adapters, inject, set_backend

TOTAL, WIDTH, BLOCKS, BATCH = 20, 6, 4, 12


@dataclass(frozen=True)
class Case:
    """The settings of one training run.

    ddp: options of DistributedDataParallel. coto: options of CoTo, built "before" or "after" wrapping.
    output: what the model returns. checkpoint: "reentrant" or "non-reentrant", around every block.
    compiled: "inside" or "outside" of DDP, "blocks", or "call" (Module.compile). micro: micro-batches per step, all
    but the last without gradient synchronization. forwards: forward passes per backward. off: adapters that the user
    disabled. merged: adapters that the user merged after the start. unread: adds a last adapter whose result is not
    used. sharded: by FSDP2 instead of DDP, only the "root" or "blocks" and root. counted: whether to count the nodes
    that backward runs.
    """

    ddp: dict[str, Any] = field(default_factory=dict)
    coto: dict[str, Any] | None = field(default_factory=dict)  # None: ordinary LoRA
    built: str = "before"
    output: str = "tensor"
    checkpoint: str = ""
    compiled: str = ""
    micro: int = 1
    forwards: int = 1
    off: tuple[int, ...] = ()
    merged: tuple[int, ...] = ()
    unread: bool = False
    train: bool = True
    evaluate: bool = False
    set_to_none: bool = True
    sharded: str = ""
    counted: bool = False
    steps: int = 20


@dataclass(frozen=True)
class Frozen:
    loss: Tensor
    more: dict[str, Any]


class Opaque:
    def __init__(self, loss: Any) -> None:
        self.loss = loss


Pair = collections.namedtuple("Pair", "text loss")


class Net(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS))
        self.pooler = nn.Linear(WIDTH, WIDTH) if case.unread else nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        if self.case.checkpoint == "reentrant":
            x = x.requires_grad_()
        for layer in self.layers:
            if self.case.checkpoint:
                x = checkpoint(layer, x, use_reentrant=self.case.checkpoint == "reentrant")
            else:
                x = layer(x)
        self.pooler(x)
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
            # the derivative of sqrt at 0 is infinite: sending zero gradients this way gives 0 · inf = NaN
            "unused": lambda: {"loss": loss, "norm": ((x - x.detach()) ** 2).sum().sqrt()},
            "opaque": lambda: (Opaque(Opaque(loss)), 3),
            "iterator": lambda: iter([loss]),
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
        "opaque": lambda: output[0].loss.loss,
        "iterator": lambda: next(output),
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


def shard(model: nn.Module, how: str, world: int, **options: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for module in (*(model.layers if how == "blocks" else ()), model):
        fully_shard(module, mesh=mesh, **options)
    return model


def whole(p: Tensor) -> Tensor:
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def train(case: Case, rank: int, world: int) -> dict[str, Any]:
    """Runs some optimizer steps on this rank's share of the batches; returns what the tests check."""
    model = make(case)
    layers = adapters(model)
    options = {"total_steps": TOTAL, "seed": 5, **({"initial_p": 1.0} if case.coto is None else case.coto)}
    run = model
    coto = CoTo(run, **options) if case.built == "before" else None
    if world > 1 and case.sharded:
        run = shard(model, case.sharded, world)
    elif world > 1:
        run = DistributedDataParallel(compile_parts(model, case), **case.ddp)
    if coto is None:
        coto = CoTo(run, **options)
    if world > 1 and case.compiled == "outside":
        run = torch.compile(run, backend="eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    coto.attach(optimizer)

    for i in case.merged:
        layers[f"layers.{i}.0"].merge()
        coto.set_step(0)
    data = torch.Generator().manual_seed(1)
    masks, losses, touched, norms, ran = [], [], [], [], []
    for step in range(case.steps):
        for micro in range(case.micro):
            x, y = (torch.randn(BATCH, WIDTH, generator=data, dtype=torch.double) for _ in range(2))
            if world > 1:
                x, y = (t.chunk(world)[rank] for t in (x, y))
            # a static graph must synchronize in its first step, otherwise an assertion of torch fails
            sync = world == 1 or micro == case.micro - 1 or (step == 0 and "static_graph" in case.ddp)
            if case.sharded and world > 1:
                run.set_requires_gradient_sync(sync)
            with contextlib.nullcontext() if sync or case.sharded else run.no_sync():
                loss = sum(loss_of(case, run(x.clone() + i, y), y) for i in range(case.forwards))
                loss /= case.micro
                if case.counted:
                    ran.append(counted_backward(loss))
                elif loss.requires_grad or case.coto.get("at_least_one", True):
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
        "ran": ran,
    }


def graph_nodes(tensor: Tensor) -> list[Node]:
    """All autograd nodes that a backward of `tensor` can reach."""
    seen, queue = set(), [tensor.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [parent for parent, _ in node.next_functions]
    return list(seen)


def counted_backward(loss: Tensor) -> dict[str, int]:
    """Runs backward and returns how many nodes of each kind ran."""
    ran: collections.Counter[str] = collections.Counter()

    def count(kind: str, _: Any) -> None:
        ran[kind] += 1

    for node in graph_nodes(loss):
        node.register_prehook(functools.partial(count, type(node).__name__))
    loss.backward()
    return dict(ran)


def parameters(layers: dict[str, Any]) -> list[Tensor]:
    return [p for layer in layers.values() for p in (layer.lora_a, layer.lora_b)]


def state_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    return {key: whole(value).clone() for key, value in optimizer.state.get(p, {}).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_equal_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    """Masks, weights and norms are bitwise equal, and no adapter changed while it was off."""
    for result in ranks:
        assert "error" not in result, result["error"]
        assert result["touched"] == []
        for what in ("masks", "parameters", "norms"):
            assert torch.equal(result[what], ranks[0][what]), what


def assert_equals_one_process(case: Case, ranks: list[dict[str, Any]]) -> None:
    """Equal up to the order of summation in float64: the ranks average their means, one process sums everything."""
    alone = train_alone(case)
    assert torch.equal(alone["masks"], ranks[0]["masks"])
    losses = torch.stack([result["losses"] for result in ranks]).mean(0)
    for what, got in (("losses", losses), ("norms", ranks[0]["norms"]), ("parameters", ranks[0]["parameters"])):
        torch.testing.assert_close(got, alone[what], rtol=1e-9, atol=1e-9, msg=lambda text, w=what: f"{w}: {text}")


_ALONE: dict[str, dict[str, Any]] = {}


def train_alone(case: Case) -> dict[str, Any]:
    """The results of one process on all batches, computed once for all cases that give the same."""
    case = replace(case, ddp={}, sharded="", compiled="", built="before", counted=False)
    if repr(case) not in _ALONE:
        with set_backend("addmm"):  # by default, float64 uses the reference
            _ALONE[repr(case)] = train(case, 0, 1)
    return _ALONE[repr(case)]
