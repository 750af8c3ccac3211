"""A variant is one class: two variants defined only here are injected, gated, trained, saved and loaded."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from cotolora import CoTo, adapter_parameters, adapters, eject, inject, load_adapter, reference, save_adapter
from cotolora.linear import CoToLoRALinear
from cotolora.merging import AdapterState
from cotolora.variants import VARIANTS
from cotolora.variants.base import Part, PeftMethod, Variant, lora_a, lora_b
from tests.support.saving import CONFIG, PREFIX, WEIGHTS, config_of, keys, refused

X = torch.linspace(-1, 1, 30).reshape(5, 6)


def added(y, x, a, b, *, scale, gate, dropout):
    return reference.add_low_rank(y, x, a, b, scale=scale, gate=gate, dropout=dropout)


class Gain(Variant):
    """LoRA with a trainable factor per output."""

    name = "gain"
    parts = (lora_a("gain_A"), lora_b("gain_B"), Part("lora_gain", ("out_features",), "gain_vector", "gain"))
    trained = ("lora_a", "lora_b", "lora_gain")
    inits = ("kaiming", "gaussian")
    peft = PeftMethod("GAIN", dropout="gain_dropout", init="gain_init", default_rank=3, fields={"gain_start": 1.0})

    @staticmethod
    def addition(y, x, a, b, gain, **options):
        return added(y, x, a, gain[:, None].to(b.dtype) * b, **options)

    @staticmethod
    def definition(x, weight, bias, a, b, gain, **options):
        return Gain.addition(F.linear(x, weight, bias), x, a, b, gain, **options)

    def start(self, layer, weight):
        layer.lora_gain.fill_(1.0)

    def factors(self, a, b, extra):
        return a, extra[0][:, None].to(b.dtype) * b


class Frozen(Variant):
    """Two frozen factors that all layers share (sliced to size), and two vectors per layer."""

    name = "frozen"
    parts = (
        Part("lora_a", ("rank", "in_features"), None, "lora_a"),
        Part("lora_b", ("out_features", "rank"), None, "lora_b"),
        Part("lora_d", ("rank",), "frozen_lambda_d", "d"),
        Part("lora_o", ("out_features",), "frozen_lambda_b", "o"),
    )
    trained = ("lora_d", "lora_o")
    inits = ("kaiming",)
    shared_keys = ("frozen_A", "frozen_B")
    peft = PeftMethod(
        "FROZEN", dropout="frozen_dropout", init="init_weights", default_rank=4, scaled=False, patterned=False,
        fields={"save_projection": True, "projection_key": 0},
    )  # fmt: skip

    @staticmethod
    def addition(y, x, a, b, d, o, **options):
        return added(y, x, d[:, None] * a, o[:, None] * b, **options)

    @staticmethod
    def definition(x, weight, bias, a, b, d, o, **options):
        return Frozen.addition(F.linear(x, weight, bias), x, a, b, d, o, **options)

    def start(self, layer, weight):
        layer.lora_d.fill_(0.1)
        layer.lora_o.zero_()

    def factors(self, a, b, extra):
        d, o = extra
        return d[:, None] * a, o[:, None] * b

    def share(self, layers):
        rank = layers[0].rank
        drawn = self.drawn(0, rank, max(x.in_features for x in layers), max(x.out_features for x in layers))
        for layer in layers:
            layer.lora_a = nn.Parameter(drawn[0][:, : layer.in_features], requires_grad=False)
            layer.lora_b = nn.Parameter(drawn[1][: layer.out_features], requires_grad=False)

    def drawn(self, key, rank, in_features, out_features):
        generator = torch.Generator().manual_seed(key)
        return torch.randn(rank, in_features, generator=generator), torch.randn(out_features, rank, generator=generator)

    def saved(self, tensors, scale):
        return tensors | {"lora_o": tensors["lora_o"] * scale}

    def loaded(self, tensors, scale):
        return tensors | {"lora_o": tensors["lora_o"] / scale}

    def saved_shared(self, layers):
        widest = max(layers.values(), key=lambda layer: layer.in_features)
        tallest = max(layers.values(), key=lambda layer: layer.out_features)
        return {"frozen_A": widest.lora_a, "frozen_B": tallest.lora_b}

    def spread_shared(self, shared, fields, sizes):
        rank, ins, outs = (max(values) for values in zip(*sizes.values(), strict=True))
        if fields["save_projection"]:
            if len(shared) < 2:
                raise ValueError(f"the file must hold frozen_A and frozen_B; it holds {sorted(shared)}")
            a, b = shared["frozen_A"], shared["frozen_B"]
        else:
            a, b = self.drawn(fields["projection_key"], rank, ins, outs)
        return {name: {"lora_a": a[:, : s.in_features], "lora_b": b[: s.out_features]} for name, s in sizes.items()}


TOYS = {"gain": Gain, "frozen": Frozen}
EXTRA = {"gain": ["lora_gain"], "frozen": ["lora_d", "lora_o"]}
SHARED = {"gain": set(), "frozen": {"base_model.frozen_A", "base_model.frozen_B"}}


@pytest.fixture(params=TOYS)
def toy(request, monkeypatch):
    monkeypatch.setitem(VARIANTS, request.param, TOYS[request.param]())
    return request.param


@pytest.fixture
def frozen(monkeypatch):
    monkeypatch.setitem(VARIANTS, "frozen", Frozen())


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 7), nn.Linear(7, 2)).eval()


def tuned(variant, seed=1, **options):
    model = base()
    inject(model, variant=variant, rank=4, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(torch.randn(parameter.shape))
    return model


def test_new_and_off_equal_the_base_and_only_declared_tensors_train(toy):
    model, plain = base(), base()
    layers = inject(model, variant=toy, rank=4)
    # a new update is a sum of zeros, which changes nothing
    assert torch.equal(model(X), plain(X))
    coto = CoTo(model.train(), total_steps=8, initial_p=0.2)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.1)
    coto.attach(optimizer)
    for _ in range(8):
        before = {name: [p.clone() for p in layer.adapter_parameters] for name, layer in layers.items()}
        gates = {name: layer.gate for name, layer in layers.items()}
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in layers.items():
            moved = [not torch.equal(p, old) for p, old in zip(layer.adapter_parameters, before[name], strict=True)]
            assert any(moved) is gates[name]
        coto.step()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{part}" for name in layers for part in VARIANTS[toy].trained}
    for layer in layers.values():
        layer.enabled = False
    assert torch.equal(model.eval()(X), plain(X))


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 7.0, "dropout": 0.25, "targets": ["0", "2"]}], ids=["plain", "scaled"]
)
def test_loading_gives_back_the_saved_adapter(toy, options, tmp_path):
    variant = VARIANTS[toy]
    model = tuned(toy, **options)
    save_adapter(model, tmp_path)
    stored = [part.key for part in variant.parts if part.key is not None]
    assert keys(tmp_path) == {PREFIX + f"{name}.{key}" for name in adapters(model) for key in stored} | SHARED[toy]
    fields = config_of(tmp_path)
    assert fields["peft_type"] == variant.peft.peft_type
    assert fields[variant.peft.dropout] == options.get("dropout", 0.0)
    assert fields[variant.peft.init] is True
    assert ("lora_alpha" in fields) is ("rank_pattern" in fields) is variant.peft.scaled
    assert "lora_dropout" not in fields

    other, again = base(), tuned(toy, seed=2, **options)
    for target in (other, again):
        assert load_adapter(target, tmp_path) == ([], [])
        torch.testing.assert_close(target(X), model(X), rtol=1e-5, atol=1e-6)
    assert {name: layer.variant for name, layer in adapters(other).items()} == dict.fromkeys(adapters(model), toy)
    assert all(layer.dropout == options.get("dropout", 0.0) for layer in adapters(other).values())


def test_a_file_that_does_not_fit_changes_nothing(toy, tmp_path):
    save_adapter(tuned(toy), tmp_path)
    tensors, path = load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS
    for key in tensors:
        for changed in ({key: tensors[key][:1]}, {key: tensors[key].int()}, {}):
            rest = {name: tensor for name, tensor in tensors.items() if name != key}
            save_file({**rest, **changed}, path, {"format": "pt"})
            for model in (base(), tuned(toy, seed=2)):
                with refused(model, "must"):
                    load_adapter(model, tmp_path)


@pytest.mark.parametrize("field", ["gain_dropout", "gain_start", "r", "use_dora", "peft_type"])
def test_fields_of_a_variant_are_checked(field, tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "gain", Gain())
    save_adapter(tuned("gain"), tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {"format": "pt"})
    (tmp_path / CONFIG).write_text(json.dumps({**config_of(tmp_path), field: "no"}))
    with refused(plain := base(), field):
        load_adapter(plain, tmp_path)


def test_the_default_rank_is_used_if_none_is_given(toy, tmp_path):
    model = tuned(toy)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    fields = {key: value for key, value in config_of(tmp_path).items() if key != "r"}
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    if toy == "gain":
        with refused(plain := base(), r"gain_A must be of shape \(3, 6\); the file holds \(4, 6\)"):
            load_adapter(plain, tmp_path)
    else:
        load_adapter(base(), tmp_path)


def test_it_merges_into_the_weight_but_not_with_other_adapters(toy):
    model, twin = tuned(toy), tuned(toy)
    eject(twin)
    torch.testing.assert_close(twin(X), model(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=f"variant 'lora', whose update is a product of factors; got '{toy}'"):
        AdapterState.from_model(model)


def test_layers_share_memory_before_and_after_a_load(frozen, tmp_path):
    model = tuned("frozen")
    save_adapter(model, tmp_path)
    other = base()
    load_adapter(other, tmp_path)
    for m in (model, other):
        layers = adapters(m)
        for part in ("lora_a", "lora_b"):
            assert len({getattr(layer, part).untyped_storage().data_ptr() for layer in layers.values()}) == 1
    assert torch.equal(other[0].lora_a, load_file(tmp_path / WEIGHTS)["base_model.frozen_A"][:, :6])


def test_saving_some_adapters_saves_the_shared_tensors_they_need(frozen, tmp_path):
    model = tuned("frozen")
    model[0].enabled = model[2].enabled = False
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors["base_model.frozen_A"].shape == (4, 7)
    assert tensors["base_model.frozen_B"].shape == (2, 4)
    other = base()
    load_adapter(other, tmp_path)
    assert torch.equal(other(X), model(X))


def test_shared_tensors_may_come_from_the_config(frozen, tmp_path):
    model = tuned("frozen")
    save_adapter(model, tmp_path)
    own = {key: tensor for key, tensor in load_file(tmp_path / WEIGHTS).items() if key.startswith(PREFIX)}
    save_file(own, tmp_path / WEIGHTS, {"format": "pt"})
    with refused(plain := base(), r"must hold frozen_A and frozen_B; it holds \[\]"):
        load_adapter(plain, tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**config_of(tmp_path), "save_projection": False}))
    other = base()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other(X), model(X), rtol=1e-5, atol=1e-6)


def test_an_unknown_shared_tensor_is_refused(frozen, tmp_path):
    save_adapter(tuned("frozen"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "base_model.other_A": torch.ones(1)}, tmp_path / WEIGHTS, {"format": "pt"})
    with refused(plain := base(), r"keys that begin with 'base_model.model.'; got 'base_model.other_A'"):
        load_adapter(plain, tmp_path)


def test_a_skipped_layer_is_named(frozen, tmp_path, caplog):
    save_adapter(tuned("frozen"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[PREFIX + "2.frozen_lambda_d"]
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with caplog.at_level(logging.WARNING, "cotolora"):
        assert load_adapter(model := base(), tmp_path, strict=False).missing_keys == ["2.frozen_lambda_d"]
    assert "2.frozen_lambda_d" in caplog.text
    assert isinstance(model[0], CoToLoRALinear)
    assert not isinstance(model[2], CoToLoRALinear)
