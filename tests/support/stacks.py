"""Blocks whose projections are stacked, the same unstacked, and what their results are held to."""

import copy

import torch
from torch import nn

from cotolora import adapter_parameters, inject, stack
from cotolora.backends.stacked import StackedLinear
from tests.support.training import graph_nodes

WIDTH, RANK, GROUPS = 12, 3, [["q", "k", "v"], ["gate", "up"]]


class Block(nn.Module):
    """What a decoder's block does with its seven linears; `memory` is what k and v read if not x."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n, bias=n < WIDTH, dtype=dtype) for n in (WIDTH, 8, 8))
        self.o = nn.Linear(8, WIDTH, dtype=dtype)
        self.gate, self.up = (nn.Linear(WIDTH, 16, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(16, WIDTH, dtype=dtype)
        self.memory = lambda x: x

    def forward(self, x):
        memory = self.memory(x)
        weights = (self.q(x)[..., :8] * self.k(memory)).softmax(-1)
        x = x + self.o(weights * self.v(memory))
        return x + self.down(self.gate(x).relu() * self.up(x))


def pair(dtype=torch.float32, make=Block, groups=GROUPS, **options):
    """Two models of equal weights and adapters, of which the first is stacked."""
    torch.manual_seed(0)
    model = nn.Sequential(make(dtype), make(dtype))
    for layer in inject(model, **{"rank": RANK, "alpha": 2.0, **options}).values():
        nn.init.normal_(layer.lora_b, std=0.3)
    single = copy.deepcopy(model)
    stack(model, groups)
    return model, single


def inputs(dtype=torch.float32, rows=(2, 5), grad=True):
    x = torch.randn(*rows, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).requires_grad_(grad)


def step(model, x, run=lambda model, x: model(x)):
    """y, dx and the gradients of all adapters."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    y = run(model, x)
    y.float().square().mean().backward()
    gradients = [p.grad for p in adapter_parameters(model)]
    model.zero_grad()
    return [y.detach(), x.grad, *gradients]


def nodes_of(y):
    return [node for node in graph_nodes(y) if type(node).__name__ == StackedLinear.__name__ + "Backward"]


def count(model, x, run=lambda model, x: model(x)):
    """How many nodes of several layers a forward makes."""
    return len(nodes_of(run(model, x)))


def assert_same(found, expected):
    """Bit for bit: by single layers."""
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def assert_equal_to_rounding(found, expected, exact):
    """The error against float64 is that of single layers: of each tensor at most four times, on average 1.5 times."""
    errors = [], []
    for results, of_each in zip((found, expected), errors, strict=True):
        for one, true in zip(results, exact, strict=True):
            assert (one is None) == (true is None)
            if one is not None and one.numel():
                norm = true.double().norm().clamp(min=1e-30)
                of_each.append(((one.double() - true.double()).norm() / norm).item() + torch.finfo(one.dtype).eps)
    for one, other in zip(*errors, strict=True):
        assert one <= 4 * other
    assert sum(errors[0]) <= 1.5 * sum(errors[1])


def reads_another(model):
    for block in model:
        block.memory = lambda x: x.flip(0)


def writes_between(model):
    for block in model:
        block.memory = lambda x: x.add_(0)
        block.q.register_forward_pre_hook(lambda layer, args: (args[0].clone(),))


def of(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def one(value, dtype=torch.int32):
    return torch.tensor(value, dtype=dtype)


# of q, k, v, gate and up
GATES = {
    "on": [one(1)] * 5,
    "off": [one(0)] * 5,
    "mixed": [one(1), one(0), one(2), one(0), one(1)],
    "beside-bools": [True, one(0), one(1), one(1, torch.bool), True],
    "one-is-off-at-once": [one(1), False, one(0), False, one(1)],
    "dtypes": [one(1), one(True, torch.bool), one(1, torch.uint8), one(1, torch.int64), one(False, torch.bool)],
    "rows": [of(1, 0), of(0, 1), of(1, 1), of(0, 0), of(True, False, dtype=torch.bool)],
    "rows-beside-others": [of(1, 0), one(1), True, of(0, 1), one(0)],
}


def gated(model, how, switch="gate"):
    for block in model:
        for layer, gate in zip((block.q, block.k, block.v, block.gate, block.up), GATES[how], strict=True):
            gate = gate.clone() if isinstance(gate, torch.Tensor) else gate
            setattr(layer, switch, gate)
            if switch == "enabled":
                layer.gate = torch.ones((), dtype=torch.int32)


class Heads(nn.Module):
    """Returns what each of its layers makes of x."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, 8, dtype=dtype), nn.Linear(WIDTH, 6, bias=False, dtype=dtype)

    def forward(self, x):
        return self.q(x), self.k(x)


def heads(dtype, gates):
    torch.manual_seed(0)
    model = Heads(dtype)
    for layer, gate in zip(inject(model, rank=3).values(), gates, strict=True):
        nn.init.normal_(layer.lora_b, std=0.3)
        layer.gate = gate
    stack(model, [["q", "k"]])
    return model
