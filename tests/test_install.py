"""`install`, the last step of inject and load_adapter, installs all adapters or none, wherever it fails."""

import importlib
import logging

import pytest
import torch
from torch import nn

from cotolora import CoToLoRALinear, adapters, inject
from cotolora.hooks import HOOKS
from cotolora.inject import install
from cotolora.spec import AdapterSpec
from cotolora.variants import VARIANTS


class Foreign(nn.Module):
    """Maps features but is not an nn.Linear, so it stays as the base of its layer."""

    in_features = out_features = 8

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.foreign = nn.Linear(8, 8), Foreign()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.last = nn.Linear(8, 8)
        self.again = nn.ModuleList([self.last])

    def forward(self, x):
        return self.again[0](self.encoder(self.foreign(self.first(x))))


SURGERY = importlib.import_module("cotolora.inject")  # the package has the function under this name
SPECS = {name: AdapterSpec(rank=2) for name in ("first", "foreign", "encoder.linear1", "last")}


def hooked():
    model = Net().eval()
    model.first.weight.requires_grad_(False)
    for module in (model.first, model.foreign, model.last):
        module.register_forward_hook(lambda *_: None)
        module.register_state_dict_pre_hook(lambda *_: None)
        module.register_load_state_dict_pre_hook(lambda *_: None)
    return model


def picture(model):
    modules = dict(model.named_modules(remove_duplicate=False))
    return (
        modules,
        {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters(remove_duplicate=False)},
        [{name: (id(getattr(m, name)), dict(getattr(m, name))) for name in HOOKS} for m in modules.values()],
        [(m.training, m._is_full_backward_hook) for m in modules.values()],
        {name: {k: v for k, v in vars(m).items() if k.startswith(("activation_", "_cotolora"))}
         for name, m in modules.items()},
    )  # fmt: skip


class Fails:
    """Wraps a function; the nth call raises, before or after the function has run."""

    def __init__(self, function, at, error, after):
        self.function, self.left, self.error, self.after = function, at, error, after

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        result = self.function(*args, **kwargs)
        if self.left == 0:
            raise self.error
        return result


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (CoToLoRALinear, "from_spec", 4),
        (VARIANTS["lora"], "share", 1),
        (SURGERY, "move_hooks", 4),
        (SURGERY, "replace_module", 5),
        (SURGERY, "block_fast_path", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_failure_leaves_the_model_unchanged(owner, name, calls, error, after, monkeypatch):
    model, x = hooked(), torch.ones(1, 3, 8)
    before, expected = picture(model), model(x)
    for at in range(1, calls + 1):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, Fails(getattr(owner, name), at, error, after))
            with pytest.raises(type(error)):
                install(model, SPECS)
        assert picture(model) == before
    assert torch.equal(model(x), expected)
    assert list(install(model, SPECS)) == list(SPECS)


def test_a_spec_that_does_not_fit_its_module_changes_nothing():
    model = hooked()
    before = picture(model)
    with pytest.raises(ValueError, match=r"variant must be one of .* on a Foreign"):
        install(model, {**SPECS, "foreign": AdapterSpec(rank=2, variant="dora")})
    assert picture(model) == before


def test_parameters_are_filled_before_the_model_gets_them():
    model = Net()

    def fill(layers):
        assert list(layers) == list(SPECS)
        assert not adapters(model)
        for layer in layers.values():
            nn.init.ones_(layer.lora_b)

    layers = install(model, SPECS, trained=[model.encoder.norm1.weight], fill=fill)
    assert list(adapters(model).items()) == list(layers.items())
    assert model.last is model.again[0] is layers["last"]
    assert all((layer.lora_b == 1).all() for layer in layers.values())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{x}" for name in SPECS for x in "ab"} | {"encoder.norm1.weight"}


def test_each_layer_gets_its_own_spec():
    specs = {"first": AdapterSpec(3, 7.0, 0.25, True, "dora"), "last": AdapterSpec(2, variant="hira")}
    model = Net()
    install(model, specs)
    assert {name: layer.spec for name, layer in adapters(model).items()} == specs


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_key_without_effect_is_named_in_a_warning(pattern, caplog):
    with caplog.at_level(logging.WARNING, "cotolora"):
        inject(Net(), ["first", "last"], **{pattern: {"last": 3, "l.*": 4}})  # the first key matches first
        assert not caplog.records
        inject(Net(), ["first", "last"], **{pattern: {"last": 3, "attn.*": 2, "qkv": 1}})
    assert [record.getMessage() for record in caplog.records] == [
        f"{pattern}: 'attn.*', 'qkv' match none of the targets, 'first', 'last'"
    ]


class Breaks(nn.Module):
    """A module with two parameters, of which the second cannot be frozen."""

    in_features = out_features = 4

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.second.requires_grad_ = self.failing

    def failing(self, flag=True):
        raise RuntimeError("not this one")

    def forward(self, x):
        return x * self.first * self.second


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_linear_that_fails_freezes_nothing(variant, monkeypatch):
    def failing(*args, **kwargs):
        raise torch.OutOfMemoryError("none left")

    for module in (nn.Linear(4, 4), Foreign()):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", failing)
            with pytest.raises((torch.OutOfMemoryError, ValueError)):
                CoToLoRALinear.from_linear(module, rank=2, variant=variant)
        assert all(parameter.requires_grad for parameter in module.parameters())
    module = nn.Linear(4, 4)
    monkeypatch.setattr(VARIANTS[variant], "start", failing)
    with pytest.raises(torch.OutOfMemoryError):
        CoToLoRALinear.from_linear(module, rank=2, variant=variant)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_that_cannot_read_w_freezes_nothing(init):
    module = nn.Linear(4, 4, device="meta")
    with pytest.raises(ValueError, match="on the meta device"):
        CoToLoRALinear.from_linear(module, rank=2, init=init)
    assert module.weight.requires_grad
    assert module.bias.requires_grad


def test_a_base_is_frozen_completely_or_not_at_all():
    module = Breaks()
    with pytest.raises(RuntimeError, match="not this one"):
        CoToLoRALinear.from_linear(module, rank=2)
    assert module.first.requires_grad
