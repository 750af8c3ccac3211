"""Helpers for the tests of saved adapters: small models, and the contents of files and models."""

import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cotolora import adapters, inject

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ODD_NAMES = ["a+b", "x|y", "(z)", "$", "é", "a b", "^", "w*", "[0]", "d\\d", "-"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x + self.gamma * self.fc(self.norm(x))


class Inner(nn.Module):
    """Modules with the same names as PEFT's own."""

    def __init__(self):
        super().__init__()
        self.default, self.layer, self.A, self.fc = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        return self.default(self.layer(self.A(self.fc(x))))


class Many(nn.Module):
    """So many modules that PEFT shortens their names in its config."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(13))
        self.q, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        for layer in self.layers:
            x = x + 0.1 * layer["v"](layer["q"](x))
        return self.other(self.q(x))


class Net(nn.Module):
    """Two blocks and a head; other names also end in `norm` and `fc`."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def forward(self, x):
        x = x + self.token
        for block in self.blocks:
            x = block(x)
        return self.head(self.fc(self.norm(x)))


class Odd(nn.Module):
    """Module names with special characters of regular expressions."""

    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleDict({name: nn.Linear(4, 4) for name in ODD_NAMES})

    def forward(self, x):
        for linear in self.linears.values():
            x = torch.tanh(linear(x))
        return x


X = torch.linspace(-1, 1, 20).reshape(5, 4)


def base(make=Net, seed=0):
    torch.manual_seed(seed)
    return make().eval()


@torch.no_grad()
def train(model, seed=1):
    """Changes all trainable parameters, and the statistics that training changes too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) and module.weight.requires_grad:
            module.running_mean += 0.5
            module.running_var *= 2
            module.num_batches_tracked += 7
    return model


def tuned(model, *args, seed=1, **options):
    inject(model, *args, **options)
    return train(model, seed)


@torch.no_grad()
def logits(model, x=X):
    if isinstance(x, dict):
        return model(**x).logits
    return model(x.to(next(model.parameters()).dtype))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def picture(model):
    """All that a refused load could have changed: modules, parameters, their flags and all bytes."""
    return (
        dict(model.named_modules()),
        {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()},
        {key: t.clone().contiguous().view(-1).view(torch.uint8).tolist() for key, t in model.state_dict().items()},
        [layer.merged for layer in adapters(model).values()],
    )  # fmt: skip


@contextmanager
def refused(model, match, error=ValueError):
    before = picture(model)
    with pytest.raises(error, match=match):
        yield
    assert picture(model) == before


def keys(directory):
    return set(load_file(directory / WEIGHTS))


def config_of(directory):
    return json.loads((directory / CONFIG).read_text())


def rewrite(directory, tensors=None, **fields):
    """Rewrites a saved adapter as another program would save it, without our hash."""
    tensors = load_file(directory / WEIGHTS) if tensors is None else tensors
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps({**config_of(directory), **fields}))


def assert_few_ulps(got, expected):
    assert (got - expected).abs().max() <= 32 * torch.finfo(expected.dtype).eps * expected.abs().max()
