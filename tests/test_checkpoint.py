"""Adapters on disk: round trips, PEFT's files both ways, bad files, kills and full disks, and two ranks."""

import copy
import errno
import itertools
import json
import logging
import math
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from cotolora import CoToLoRALinear, adapters, checkpoint, eject, files, inject, load_adapter, save_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture
def tf():
    return pytest.importorskip("transformers", reason="compares with transformers' models")


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="compares with PEFT")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x + self.gamma * self.fc(self.norm(x))


class Inner(nn.Module):
    """Modules that are called as PEFT calls its own."""

    def __init__(self):
        super().__init__()
        self.default, self.layer, self.A, self.fc = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        return self.default(self.layer(self.A(self.fc(x))))


class Many(nn.Module):
    """More modules than PEFT lists before it shortens their names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(13))
        self.q, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        for layer in self.layers:
            x = x + 0.1 * layer["v"](layer["q"](x))
        return self.other(self.q(x))


class Net(nn.Module):
    """Two blocks and a head; `norm` and `fc` are also the ends of other names."""

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


X = torch.linspace(-1, 1, 20).reshape(5, 4)


def base(make=Net, seed=0):
    torch.manual_seed(seed)
    return make().eval()


@torch.no_grad()
def train(model, seed=1):
    """Moves everything that trains, and the statistics that training moves with it."""
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
    """All that a refused load could have changed: modules, parameters, their flags and every byte."""
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
    """Changes a saved adapter as someone else would have saved it: without our hash."""
    tensors = load_file(directory / WEIGHTS) if tensors is None else tensors
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps({**config_of(directory), **fields}))


@pytest.fixture
def saved(tmp_path):
    """An adapter on blocks.0.fc, blocks.1.fc and fc of `Net`, rank 2, alpha 16."""
    save_adapter(tuned(base(), ["fc"], rank=2), tmp_path)
    return tmp_path


# round trips

ODD_NAMES = ["a+b", "x|y", "(z)", "$", "é", "a b", "^", "w*", "[0]", "d\\d", "-"]


class Odd(nn.Module):
    """Names that mean something in a regular expression."""

    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleDict({name: nn.Linear(4, 4) for name in ODD_NAMES})

    def forward(self, x):
        for linear in self.linears.values():
            x = torch.tanh(linear(x))
        return x


ROUND_TRIPS = {
    "all-linear": (Net, {}),
    "fp64": (lambda: Net().double(), {"rank": 2}),
    "bf16": (lambda: Net().bfloat16(), {"rank": 2}),
    "rank-3": (Net, {"rank": 3, "alpha": 1.7}),
    "rank-and-alpha-patterns": (
        Net,
        {"rank_pattern": {"^fc": 3, "fc": 5}, "alpha_pattern": {"head.2": 0.3, r"blocks\.1.*": 7, "^fc": -2}},
    ),
    "rslora": (Net, {"use_rslora": True, "rank": 3, "rank_pattern": {"^fc": 5}}),
    "dropout": (Net, {"dropout": 0.25}),
    "dora": (Net, {"variant": "dora", "rank": 3, "use_rslora": True, "rank_pattern": {"^fc": 5}}),
    "dora-bf16": (lambda: Net().bfloat16(), {"variant": "dora", "rank": 2}),
    "ambiguous-name": (Net, {"targets": "fc", "rank_pattern": {"fc": 3}}),  # which ends blocks.0.fc
    "one-of-two-names": (Net, {"targets": ["blocks.0.fc"]}),
    "odd-names": (Odd, {"rank_pattern": {"b": 3, r"\^": 4}, "alpha_pattern": {r".*\$": 3}}),
    "odd-head": (Odd, {"targets": r"linears\.[aé].*", "trainable": r"linears\.(\(z\)|\$|x\|y)"}),
    "head": (Net, {"targets": ["fc"], "trainable": ["head"]}),  # with the buffers of its BatchNorm
    "frozen-batchnorm": (Net, {"targets": ["fc"], "trainable": ["head.2"]}),
    "bias-alone": (Net, {"targets": ["fc"], "trainable": ["head.2.bias"]}),
    "root-parameter": (Net, {"targets": ["fc"], "trainable": ["token"]}),
    "bare-parameters": (Net, {"targets": ["fc"], "trainable": ["gamma"]}),
    "a-bare-parameter": (Net, {"targets": ["fc"], "trainable": ["blocks.1.gamma"]}),
    "ambiguous-head": (Net, {"targets": ["fc"], "trainable": "norm"}),  # which ends blocks.0.norm
    "all-of-an-ambiguous-name": (Net, {"targets": ["fc"], "trainable": ["norm"]}),
    "everything-else": (Net, {"targets": ["fc"], "trainable": ["head", "gamma", "token", "norm"]}),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_what_is_saved_is_what_is_loaded(case, tmp_path):
    make, options = ROUND_TRIPS[case]
    model, other = tuned(base(make), **options), base(make)
    save_adapter(model, tmp_path)
    assert load_adapter(other, str(tmp_path)) == ([], [])
    assert torch.equal(logits(other), logits(model))
    assert not torch.equal(logits(other), logits(base(make)))
    assert trained(other) == trained(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
    described = [
        {name: (la.rank, la.alpha, la.use_rslora, la.dropout) for name, la in adapters(m).items()}
        for m in (model, other)
    ]
    assert described[0] == described[1]

    again = tuned(base(make), seed=2, **options)  # onto adapters that are there
    assert load_adapter(again, tmp_path) == ([], [])
    assert torch.equal(logits(again), logits(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_a_hira_scale_of_ones_own_survives_the_file_that_has_none(tmp_path):
    options = {
        "variant": "hira",
        "rank": 2,
        "alpha": 8.0,
        "rank_pattern": {"head.0": 3},
        "alpha_pattern": {"head.0": 12},
    }
    model = tuned(base(), **options)
    save_adapter(model, tmp_path)
    assert {"lora_alpha", "use_dora"}.isdisjoint(config_of(tmp_path))
    assert config_of(tmp_path)["peft_type"] == "HIRA"
    other, again = base(), tuned(base(), seed=2, **options)
    for target, scale in ((other, 1.0), (again, 4.0)):
        load_adapter(target, tmp_path)
        assert {layer.scale for layer in adapters(target).values()} == {scale}
        assert_few_ulps(logits(target), logits(model))
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    silent = tuned(base(), variant="hira", rank=2, alpha=0.0)
    with refused(silent, "must have the rank and scale of the file, 2 and 1; the model's are 2 and 0"):
        load_adapter(silent, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_away_from_zero_is_saved_as_plain_lora_of_twice_the_rank(init, dtype, tmp_path):
    """Steps far below bfloat16's resolution of A and B come through, and the base is the one that everybody has."""
    model = base().to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inject(model, ["fc"], rank=2, alpha=3.0, init=init)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_a.mul_(1 + 1e-4)
            layer.lora_b.sub_(1e-5)
    save_adapter(model, tmp_path)
    other = base().to(dtype)
    load_adapter(other, tmp_path)
    for name, layer in adapters(other).items():
        ours = adapters(model)[name]
        assert (layer.rank, layer.alpha, layer.init) == (4, 6.0, "kaiming")
        exact = ours.lora_b.double() @ ours.lora_a.double() - ours.lora_b0.double() @ ours.lora_a0.double()
        torch.testing.assert_close(layer.delta_weight().double(), 1.5 * exact, rtol=1e-3, atol=1e-9)
        assert layer.delta_weight().abs().max() > 0
        assert torch.equal(layer.weight, before[f"{name}.weight"])
    assert torch.equal(logits(other), logits(model.eval()))


def test_one_file_holds_one_variant(tmp_path):
    model = tuned(base(), ["fc"])
    model.fc = CoToLoRALinear.from_linear(model.fc.to_linear(merge=False), variant="hira").eval()
    with pytest.raises(ValueError, match=r"one variant.*'lora' \(blocks.1.fc\) and 'hira' \(fc\)"):
        save_adapter(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_both_of_pefts_names_of_a_magnitude_are_read(form, tmp_path):
    model = tuned(base(), ["fc"], variant="dora")
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    renamed = {key.replace("lora_magnitude_vector", form): value for key, value in tensors.items()}
    assert sum(key.endswith(form) for key in renamed) == 3
    save_file(renamed, tmp_path / WEIGHTS, {"format": "pt"})
    other = base()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_mixed_rslora(tmp_path):
    model = base()
    for name, use_rslora in (("blocks.0.fc", True), ("blocks.1.fc", False), ("fc", True)):
        linear = model.get_submodule(name)
        layer = CoToLoRALinear.from_linear(linear, rank=3, alpha=5.0, use_rslora=use_rslora)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    model.requires_grad_(False)
    for layer in adapters(model).values():
        layer.lora_a.requires_grad_()
        layer.lora_b.requires_grad_()
    save_adapter(train(model).eval(), tmp_path)
    other = base()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert not any(layer.use_rslora for layer in adapters(other).values())
    load_adapter(model, tmp_path)  # the scales agree, whatever they are called


def test_a_model_in_another_dtype_gets_the_same_factors(saved):
    other = base(lambda: Net().bfloat16())
    load_adapter(other, saved)
    assert torch.equal(other.fc.lora_b, load_file(saved / WEIGHTS)[PREFIX + "fc.lora_B.weight"])
    assert other.fc.lora_b.dtype == torch.float32


def test_buffers_of_frozen_modules_are_left_out(tmp_path):
    save_adapter(tuned(base(), ["fc"], trainable=["head.2"]), tmp_path)
    assert {key for key in keys(tmp_path) if ".lora_" not in key} == {
        PREFIX + "head.2.weight",
        PREFIX + "head.2.bias",
    }
    assert config_of(tmp_path)["modules_to_save"] == ["head.2"]


def test_disabled_adapters_are_left_out(tmp_path):
    model, other = tuned(base(), ["fc"], rank=2), base()
    layers = adapters(model)
    layers["blocks.0.fc"].enabled = False
    layers["blocks.1.fc"].enabled = torch.zeros(5, dtype=torch.bool)
    layers["fc"].gate = False  # of training: does not count
    save_adapter(model, tmp_path)
    assert keys(tmp_path) == {PREFIX + f"fc.lora_{factor}.weight" for factor in "AB"}
    load_adapter(other, tmp_path)
    assert list(adapters(other)) == ["fc"]
    assert torch.equal(logits(other), logits(model))

    layers["fc"].enabled = torch.tensor(0)
    with pytest.raises(ValueError, match="must have enabled adapters to save; Net has none"):
        save_adapter(model, tmp_path)
    layers["blocks.0.fc"].enabled = torch.tensor([True, False])
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == ["blocks.0.fc"]


@pytest.mark.parametrize("onto", ["plain", "injected", "merged"])
def test_merged_layers(onto, tmp_path):
    model, other = tuned(base(), ["fc"], rank=2), base()
    expected = logits(model)
    for layer in adapters(model).values():
        layer.merge()
    save_adapter(model, tmp_path)
    if onto != "plain":
        tuned(other, ["fc"], rank=2, seed=5)
    if onto == "merged":
        for layer in adapters(other).values():
            layer.merge()
    load_adapter(other, tmp_path)
    assert all(layer.merged is (onto == "merged") for layer in adapters(other).values())
    if onto == "merged":
        assert torch.equal(logits(other), logits(model))
        for layer in adapters(other).values():
            layer.unmerge()
    assert torch.equal(logits(other), expected)
    assert torch.equal(other.fc.weight, base().fc.weight)


def test_loading_onto_a_layer_merged_under_a_row_mask_is_refused(saved):
    model = tuned(base(), ["fc"], rank=2, seed=5)
    model.fc.merge()
    model.fc.enabled = torch.ones(5, dtype=torch.bool)
    with refused(model, "fc must not be merged while enabled is a row mask"):
        load_adapter(model, saved)


def test_a_merged_head_follows_its_tied_embedding(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid = nn.Embedding(6, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.mid(self.embed(torch.arange(6))))

    save_adapter(tuned(base(Tied), ["mid"], trainable=["embed"]), tmp_path)
    model = base(Tied)
    inject(model, ["mid"])
    model.head = CoToLoRALinear.from_linear(model.head)
    model.head.merge()
    load_adapter(model, tmp_path, strict=False)
    assert torch.equal(model.head.weight, model.embed.weight)  # B of the head is zero


def wrapped_inside(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    model.fc = checkpoint_wrapper(model.fc)
    model.head = torch.compile(model.head, backend="eager")
    return model


WRAPS = {
    "inside": wrapped_inside,
    "DataParallel": nn.DataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "checkpoint": checkpoint_wrapper,
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_models(wrap, tmp_path):
    options = {"targets": ["fc"], "trainable": ["head", "gamma", "token"], "rank": 2}
    plain = tuned(base(), **options)
    model = WRAPS[wrap](tuned(base(), **options))
    save_adapter(model, tmp_path / "wrapped")
    save_adapter(plain, tmp_path / "plain")
    assert keys(tmp_path / "wrapped") == keys(tmp_path / "plain")
    assert config_of(tmp_path / "wrapped") == config_of(tmp_path / "plain")

    other = base()
    load_adapter(other, tmp_path / "wrapped")
    assert torch.equal(logits(other), logits(plain))
    for target in (WRAPS[wrap](base()), WRAPS[wrap](tuned(base(), seed=3, **options))):
        assert load_adapter(target, tmp_path / "plain") == ([], [])
        assert torch.equal(logits(eject_copy(target)), logits(eject_copy(plain)))


def eject_copy(model):
    """A copy without adapters or wrappers at the root, to compare by value whatever wraps what."""
    twin = copy.deepcopy(checkpoint.unwrap(model))
    eject(twin)
    return twin


def test_ddp_needs_its_adapters_first(saved):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = base()
        ddp = nn.parallel.DistributedDataParallel(model)
        with refused(model, "DistributedDataParallel after inject"):
            load_adapter(ddp, saved)
        load_adapter(model, saved)
        ddp = nn.parallel.DistributedDataParallel(tuned(base(), ["fc"], rank=2, seed=4))
        assert load_adapter(ddp, saved) == ([], [])
        assert torch.equal(logits(ddp.module), logits(model))
        save_adapter(ddp, saved / "again")
        assert keys(saved / "again") == keys(saved)
    finally:
        torch.distributed.destroy_process_group()


def test_shared_modules_are_saved_once(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b, self.norm, self.again = nn.ModuleList([self.a]), nn.LayerNorm(4), nn.ModuleList()
            self.again.append(self.norm)

        def forward(self, x):
            return self.again[0](self.b[0](self.norm(self.a(x))))

    model, other = tuned(base(Shared), ["a"], trainable=["again.0"]), base(Shared)
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert trained(other) == trained(model)


def test_saving_again_keeps_other_files_and_replaces_ours(saved):
    (saved / "README.md").write_text("mine")
    model = tuned(base(), ["head.0"], rank=1, seed=9)
    save_adapter(model, saved)
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    other = base()
    load_adapter(other, saved)
    assert torch.equal(logits(other), logits(model))


def test_directories_are_made(tmp_path):
    save_adapter(tuned(base(), ["fc"]), tmp_path / "a" / "b")
    load_adapter(base(), tmp_path / "a" / "b")


def test_saving_what_the_format_has_no_place_for(tmp_path):
    with pytest.raises(ValueError, match="must have enabled adapters to save; Net has none"):
        save_adapter(base(), tmp_path)
    with pytest.raises(ValueError, match="it is one itself"):
        save_adapter(CoToLoRALinear(4, 4), tmp_path)
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        save_adapter({}, tmp_path)
    model = tuned(base(), ["fc"])
    model.blocks[1].fc.bias.requires_grad_()
    with pytest.raises(ValueError, match=r"must not train the base of an adapter; blocks\.1\.fc\.bias requires grad"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_models_odd_name_is_no_obstacle(tmp_path):
    model = tuned(base(), ["fc"])
    model.name_or_path = Path("somewhere")
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["base_model_name_or_path"] is None
    model.name_or_path = "me/model"
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["base_model_name_or_path"] == "me/model"


# PEFT

IDS = {"input_ids": torch.tensor([[1, 5, 2, 7], [3, 4, 8, 6]])}


def gpt2(tf):
    config = tf.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return tf.GPT2LMHeadModel(config)


def llama(tf):
    config = tf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def bert(tf):
    config = tf.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return tf.BertForSequenceClassification(config)


def make_base(tf, make):
    if make in (Net, Odd, Many, Inner):
        return base(make), X
    torch.manual_seed(0)
    return make(tf).eval(), IDS


@contextmanager
def no_key_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [str(w.message) for w in caught if "key" in str(w.message).lower()]


def assert_few_ulps(got, expected):
    assert (got - expected).abs().max() <= 32 * torch.finfo(expected.dtype).eps * expected.abs().max()


PEFT_READS = {
    "net": (Net, {"rank": 2}),
    "patterns": (Net, {"rank_pattern": {"^fc": 3, "fc": 5}, "alpha_pattern": {"head.2": 0.3, "blocks.1.*": 7}}),
    "rslora": (Net, {"use_rslora": True, "rank": 3}),
    "dora": (Net, {"variant": "dora", "rank": 3, "alpha_pattern": {"^fc": 5}, "trainable": ["head"]}),
    "dora-rslora": (llama, {"variant": "dora", "rank": 3, "use_rslora": True}),
    "dora-conv1d": (gpt2, {"variant": "dora", "rank": 2}),
    "hira": (llama, {"variant": "hira", "rank": 3, "alpha": 7.0}),
    "hira-conv1d": (gpt2, {"variant": "hira", "rank": 2, "use_rslora": True}),
    "pissa": (Net, {"init": "pissa", "rank": 2, "trainable": ["norm"]}),
    "pissa-rslora": (llama, {"init": "pissa", "rank": 3, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "pissa-dora-conv1d": (gpt2, {"init": "pissa", "variant": "dora", "rank": 2}),
    "olora": (llama, {"init": "olora", "rank": 3, "alpha_pattern": {"q_proj": 5}}),
    "olora-conv1d": (gpt2, {"init": "olora", "rank": 2}),
    "ambiguous-name": (Net, {"targets": "fc", "rank_pattern": {"fc": 3}}),
    "odd-names": (Odd, {"rank_pattern": {"b": 3, r"\^": 4}, "alpha_pattern": {r".*\$": 3}}),
    "odd-head": (Odd, {"targets": r"linears\.[aé].*", "trainable": r"linears\.(\(z\)|\$|x\|y)"}),
    "head": (Net, {"targets": ["fc"], "trainable": ["head"]}),
    "bias-alone": (Net, {"targets": ["fc"], "trainable": ["head.2.bias"]}),
    "everything-else": (Net, {"targets": ["fc"], "trainable": ["head", "gamma", "token", "norm"]}),
    "ambiguous-head": (Net, {"targets": ["fc"], "trainable": "norm"}),
    "heads-named-as-pefts-own": (Inner, {"targets": ["fc"], "trainable": ["default", "layer", "A"]}),
    "many": (Many, {"targets": r"layers\..*|q", "rank": 2}),
    "many-of-one-kind": (Many, {"targets": [f"layers.{i}.{key}" for i in range(12) for key in "qv"], "rank": 2}),
    "llama": (llama, {"rank": 2, "rank_pattern": {"q_proj": 3}}),
    "llama-and-norm": (llama, {"rank": 2, "targets": ["q_proj", "down_proj"], "trainable": ["model.norm"]}),
    "gpt2": (gpt2, {"rank": 2}),
    "gpt2-one": (gpt2, {"rank": 2, "targets": ["h.1.attn.c_proj"]}),
    "gpt2-and-its-tied-embedding": (gpt2, {"rank": 2, "targets": ["c_attn"], "trainable": ["wte"]}),
    "bert": (bert, {"rank": 2, "targets": ["query", "dense"], "trainable": ["classifier"]}),
}


@pytest.mark.parametrize("case", PEFT_READS)
def test_peft_reads_ours(case, peft, tf, tmp_path):
    make, options = PEFT_READS[case]
    model, x = make_base(tf, make)
    tuned(model, **options)
    save_adapter(model, tmp_path)
    with no_key_warnings():
        theirs = peft.PeftModel.from_pretrained(make_base(tf, make)[0], tmp_path).eval()
    assert_few_ulps(logits(theirs, x), logits(model, x))
    assert sorted(theirs.base_model.targeted_module_names) == sorted(adapters(model))


def by_peft(peft, model, directory, **config):
    """A model that PEFT adapted, moved and saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on Conv1D and what it calls in transformers
        kind = peft.HiraConfig if "hira_dropout" in config else peft.LoraConfig
        theirs = train(peft.get_peft_model(model, kind(**{"r": 2, **config}))).eval()
        theirs.save_pretrained(directory)
    return theirs


WE_READ = {
    "net-list": (Net, {"target_modules": ["fc"]}),
    "net-regex": (Net, {"target_modules": r"blocks\.\d\.fc|head\.2"}),
    "net-all-linear": (Net, {"target_modules": "all-linear"}),
    "net-exclude": (Net, {"target_modules": ["fc", "head.0"], "exclude_modules": ["blocks.0.fc", "0"]}),
    "net-exclude-regex": (Net, {"target_modules": ["fc"], "exclude_modules": r"blocks\.0\..*"}),
    "net-head": (Net, {"target_modules": ["fc"], "modules_to_save": ["head"], "use_rslora": True}),
    "net-norms": (Net, {"target_modules": ["fc"], "modules_to_save": ["norm"]}),
    "net-target-in-saved": (Net, {"target_modules": ["fc", "head.0"], "modules_to_save": ["head"]}),
    "net-layers": (Net, {"target_modules": ["fc"], "layers_to_transform": 1}),
    "net-layers-list": (Net, {"target_modules": ["fc"], "layers_to_transform": [0], "layers_pattern": "blocks"}),
    "net-no-layers": (Net, {"target_modules": ["fc"], "layers_to_transform": []}),
    "net-exact-beats-layers": (Net, {"target_modules": ["fc", "blocks.0.fc"], "layers_to_transform": [1]}),
    "net-gaussian": (Net, {"target_modules": ["fc"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}),
    "net-dora": (Net, {"target_modules": ["fc"], "modules_to_save": ["head"], "use_dora": True, "use_rslora": True}),
    "llama-dora": (llama, {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "rank_pattern": {"up_proj": 3}}),
    "gpt2-dora": (gpt2, {"target_modules": ["c_attn"], "use_dora": True, "lora_dropout": 0.1}),
    "llama-hira": (llama, {"target_modules": "all-linear", "hira_dropout": 0.1, "rank_pattern": {"q_proj": 3}}),
    "gpt2-hira": (gpt2, {"target_modules": ["c_attn", "c_fc"], "hira_dropout": 0.0, "init_weights": "gaussian"}),
    "llama-list": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "llama-regex": (llama, {"target_modules": r".*layers\.1\..*_proj"}),
    "llama-all-linear": (llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama-patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"q_proj": 3, r"model\.layers\.\d+\.mlp.*": 1},
            "alpha_pattern": {"layers.0.self_attn.k_proj": 3, "^model.layers.1.*": 32},
            "use_rslora": True,
        },
    ),
    "llama-layers": (
        llama,
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    ),
    "llama-saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "gpt2-list": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "gpt2-all-linear": (gpt2, {"target_modules": "all-linear"}),
    "gpt2-layers": (gpt2, {"target_modules": ["c_fc", "c_proj"], "layers_to_transform": [1], "layers_pattern": "h"}),
    "bert-seq-cls": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert-saved": (
        bert,
        {"target_modules": ["dense"], "modules_to_save": ["classifier"], "exclude_modules": ["pooler.dense"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WE_READ)
def test_we_read_pefts(case, peft, tf, tmp_path):
    make, options = WE_READ[case]
    model, x = make_base(tf, make)
    theirs = by_peft(peft, model, tmp_path, **options)
    ours, _ = make_base(tf, make)
    assert load_adapter(ours, tmp_path) == ([], [])
    assert list(adapters(ours)) == theirs.base_model.targeted_module_names
    assert_few_ulps(logits(ours, x), logits(theirs, x))
    assert not torch.allclose(logits(ours, x), logits(make_base(tf, make)[0], x), atol=1e-3)
    marks = (".default", "base_model.model.", ".modules_to_save", ".original_module", ".weight")
    plain = set()
    for name in trained(theirs):
        for mark in marks:
            name = name.replace(mark, "")
        for their, our in (("_A", "_a"), ("_B", "_b"), ("magnitude_vector", "magnitude"), ("hira_", "lora_")):
            name = name.replace(their, our)
        plain.add(name)
    assert {name.removesuffix(".weight") for name in trained(ours)} == plain

    again = tmp_path / "again"
    save_adapter(ours, again)
    third, _ = make_base(tf, make)
    load_adapter(third, again)
    assert torch.equal(logits(third, x), logits(ours, x))


def test_what_peft_saved_beside_is_loaded_and_stays_frozen(peft, tf, tmp_path):
    model, x = make_base(tf, llama)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    theirs = by_peft(peft, model, tmp_path, target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)  # as PEFT does after a resize
    assert any("embed_tokens" in key for key in keys(tmp_path))
    ours, _ = make_base(tf, llama)
    load_adapter(ours, tmp_path)
    assert_few_ulps(logits(ours, x), logits(theirs, x))
    assert not any("embed" in name or "head" in name for name in trained(ours))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"bias": "all"}, "bias must be 'none'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"target_parameters": ["fc.weight"], "target_modules": []}, "target_parameters"),
    ],
    ids=str,
)
def test_what_peft_wrote_and_we_cannot_read_is_refused(config, match, peft, tmp_path):
    by_peft(peft, base(), tmp_path, **{"target_modules": ["fc"], **config})
    model = base()
    with refused(model, match):
        load_adapter(model, tmp_path)


# settings that are not supported, and configs that make no sense


def nested(depth):
    return "[" * depth + "]" * depth


BAD_FIELDS = [
    ("use_dora", 1), ("use_dora", "yes"), ("lora_bias", True), ("bias", "all"), ("bias", "lora_only"), ("bias", None),
    ("layer_replication", [[0, 2], [1, 2]]), ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"), ("init_lora_weights", "loftq"), ("init_lora_weights", "corda"),
    ("init_lora_weights", []), ("trainable_token_indices", [1, 2]), ("target_parameters", ["fc.weight"]),
    ("use_qalora", True), ("megatron_config", {"a": 1}), ("alora_invocation_tokens", [1]), ("velora_config", {"a": 1}),
    ("ensure_weight_tying", True), ("something_new", 1), ("something_new", {"a": None}),
    ("peft_type", "LOHA"), ("peft_type", "lora"), ("peft_type", None), ("peft_type", ["LORA"]),
    ("r", 0), ("r", -1), ("r", "2"), ("r", 2.0), ("r", True), ("r", None), ("r", [2]),
    ("lora_alpha", "16"), ("lora_alpha", math.nan), ("lora_alpha", math.inf), ("lora_alpha", 10**400),
    ("lora_alpha", None), ("lora_dropout", 1.5), ("lora_dropout", "0"), ("lora_dropout", -(10**400)),
    ("use_rslora", 1), ("use_rslora", "no"), ("target_modules", None), ("target_modules", []), ("target_modules", ""),
    ("target_modules", 3), ("target_modules", [3]), ("target_modules", {"fc": 1}), ("target_modules", "(fc"),
    ("target_modules", "a{99999999999999999999}"), ("exclude_modules", 3), ("exclude_modules", "["),
    ("rank_pattern", ["fc"]), ("rank_pattern", {"fc": 0}), ("rank_pattern", {"fc": "2"}), ("rank_pattern", {"(": 2}),
    ("alpha_pattern", {"fc": math.nan}), ("alpha_pattern", {"fc": None}), ("alpha_pattern", {"*": 2}),
    ("layers_to_transform", "1"), ("layers_to_transform", [-1]), ("layers_to_transform", [True]),
    ("layers_pattern", 3), ("layers_pattern", ["("]), ("modules_to_save", {"head": 1}), ("modules_to_save", [None]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=lambda value: str(value)[:24])
def test_a_bad_field_is_named(field, value, saved):
    rewrite(saved, **{field: value})
    for model in (base(), tuned(base(), ["fc"], rank=2)):
        with refused(model, rf"{CONFIG}: .*{field}"):
            load_adapter(model, saved)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("r", 10**12, r"lora_A.weight must be of shape \(1000000000000, 4\)"),
        ("r", 10**100, "must be of shape"),
        ("rank_pattern", {"fc": 10**9}, "must be of shape"),
        ("target_modules", ["value"], r"target_modules \['value'\] must take linear modules"),
        ("target_modules", "fc.*x", "must take linear modules"),
        ("exclude_modules", [".*", "fc"], "must take linear modules"),
        ("modules_to_save", ["fc"], "must take linear modules"),
        ("target_modules", ["fc", "head.0"], r"missing keys \['head.0.lora_A.weight', 'head.0.lora_B.weight'\]"),
        ("exclude_modules", ["blocks.0.fc"], r"unexpected keys \['blocks.0.fc.lora_A.weight'"),
        ("modules_to_save", ["head.2"], r"missing keys \['head.2.bias', 'head.2.weight'\]"),
    ],
)
def test_a_config_that_does_not_fit_the_weights(field, value, match, saved):
    rewrite(saved, **{field: value})
    for model in (base(), tuned(base(), ["fc"], rank=2)):
        with refused(model, match):
            load_adapter(model, saved)


@pytest.mark.parametrize("field", ["bias", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"])
def test_fields_that_are_absent_have_pefts_defaults(field, peft, saved):
    defaults = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list))
    model = tuned(base(), ["fc"], rank=8, alpha=8.0)
    save_adapter(model, saved)
    fields = config_of(saved)
    assert fields.pop(field) == defaults[field]
    rewrite(saved)
    (saved / CONFIG).write_text(json.dumps(fields))
    other = base()
    load_adapter(other, saved)
    assert torch.equal(logits(other), logits(model))


def test_pefts_default_config_is_read(peft, saved):
    fields = json.loads(json.dumps(peft.LoraConfig(r=2, lora_alpha=16, target_modules=["fc"]).to_dict(), default=list))
    rewrite(saved, **fields)
    load_adapter(base(), saved)


SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["fc", ".*", "(", "head"]),
)
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=120, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(sorted({field for field, _ in BAD_FIELDS})), VALUE, max_size=3))
def test_any_config_is_read_or_refused(fields):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        directory, model = Path(name), base()
        patch.setattr(os, "fsync", lambda _: None)
        save_adapter(tuned(base(), ["fc"], rank=2), directory)
        rewrite(directory, **fields)
        before = picture(model)
        try:
            load_adapter(model, directory)
        except ValueError:
            assert picture(model) == before
        else:
            assert adapters(model)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"{'r': 2}", "must be JSON"),
        (b'{"r": 2}\xff', "must be JSON"),
        (b"\x80\x04K\x01.", "must be JSON"),
        (b'{"r": ' + b"1" * 5000 + b"}", "must be JSON"),
        (nested(100_000).encode(), "must be JSON|must hold a JSON object"),
        (b'{"peft_type": "LORA", "target_modules": ' + nested(100_000).encode() + b"}", "must be"),
        (b"[]", "must hold a JSON object; got list"),
        (b"null", "must hold a JSON object; got NoneType"),
        (b'"LORA"', "must hold a JSON object; got str"),
        (b"{}", "peft_type must be 'LORA'"),
    ],
    ids=lambda value: repr(value)[:16],
)
def test_a_config_that_is_no_config(text, match, saved):
    rewrite(saved)
    (saved / CONFIG).write_bytes(text)
    model = base()
    with refused(model, match):
        load_adapter(model, saved)


# files that are missing, damaged or hostile


def test_missing_files(saved, tmp_path):
    model = base()
    with refused(model, "must hold adapter_model.safetensors; there is none", FileNotFoundError):
        load_adapter(model, tmp_path / "nowhere")
    rewrite(saved)
    (saved / CONFIG).unlink()
    with refused(model, "must hold adapter_config.json; there is none", FileNotFoundError):
        load_adapter(model, saved)
    (saved / WEIGHTS).unlink()
    (saved / WEIGHTS).mkdir()
    with refused(model, "must hold adapter_model.safetensors", FileNotFoundError):
        load_adapter(model, saved)


def test_the_config_must_be_the_one_the_weights_were_saved_with(saved, tmp_path):
    model = base()
    save_adapter(tuned(base(), ["fc"], rank=2, alpha=17.0), tmp_path / "other")
    mine = (saved / CONFIG).read_bytes()
    for text in ((tmp_path / "other" / CONFIG).read_bytes(), mine + b" ", None):
        (saved / CONFIG).unlink() if text is None else (saved / CONFIG).write_bytes(text)
        for strict in (True, False):
            with refused(model, "must be the config that .* was saved with"):
                load_adapter(model, saved, strict=strict)
    (saved / CONFIG).write_bytes(mine)
    load_adapter(model, saved)


def header(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path, fields, data):
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("share", [0.0, 1, 7, 8, 9, 0.1, 0.5, 0.9, 0.999, -1])
def test_truncated_weights(share, saved):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[: int(share * len(data)) if isinstance(share, float) else share])
    model = base()
    with refused(model, "must be a whole safetensors file"):
        load_adapter(model, saved)


def test_random_bytes(saved):
    generator, model = random.Random(0), base()
    for size in (1, 8, 100, 10_000):
        (saved / WEIGHTS).write_bytes(generator.randbytes(size))
        with refused(model, "must be a whole safetensors file"):
            load_adapter(model, saved)


def test_flipped_bytes_in_the_header(saved):
    """Each flip is refused, or harms nothing: the factors of the file are what is loaded."""
    data, generator = (saved / WEIGHTS).read_bytes(), random.Random(1)
    length = 8 + struct.unpack("<Q", data[:8])[0]
    reference, refusals = tuned(base(), ["fc"], rank=2), 0
    model = tuned(base(), ["fc"], rank=2, seed=2)
    for _ in range(300):
        flipped = bytearray(data)
        flipped[generator.randrange(length)] ^= 1 << generator.randrange(8)
        (saved / WEIGHTS).write_bytes(flipped)
        before = picture(model)
        try:
            load_adapter(model, saved)
        except ValueError:
            refusals += 1
            assert picture(model) == before
        else:
            assert torch.equal(logits(model), logits(reference))
            train(model)
    assert refusals > 200


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("oversized-header", "must be a whole safetensors file"),
        ("huge-header", "must be a whole safetensors file"),
        ("header-not-json", "must be a whole safetensors file"),
        ("overlap", "must be a whole safetensors file"),
        ("beyond-the-end", "must be a whole safetensors file"),
        ("unknown-dtype", "must be a whole safetensors file"),
        ("half-the-keys", r"missing keys \['blocks.0.fc.lora_A.weight'"),
        ("one-factor", r"missing keys \['fc.lora_B.weight'\], unexpected keys \[\]"),
        ("renamed", r"missing keys .*fc.lora_A.weight.* unexpected keys .*fc.lora_a.weight"),
        ("no-prefix", r"must hold keys that begin with 'base_model.model.'; got"),
        ("extra", r"unexpected keys \['nowhere.lora_A.weight'\]"),
        ("base-weight", r"unexpected keys \['fc.weight'\]"),
        ("transposed", r"fc.lora_B.weight must be of shape \(4, 2\); the file holds \(2, 4\)"),
        ("another-rank", r"fc.lora_A.weight must be of shape \(2, 4\); the file holds \(3, 4\)"),
        ("flat", r"must be of shape \(2, 4\); the file holds \(8,\)"),
        ("scalar", r"the file holds \(\)"),
        ("empty-tensor", r"the file holds \(0, 4\)"),
        ("integers", "fc.lora_A.weight must be of a dtype like torch.float32; the file holds torch.int32"),
        ("bools", "must be of a dtype like torch.float32; the file holds torch.bool"),
        ("complex", "must be of a dtype like torch.float32; the file holds torch.complex64"),
        ("head-shape", r"head.2.bias must be of shape \(3,\); the file holds \(2,\)"),
        ("head-integers", r"head.2.bias must be of a dtype like torch.float32; the file holds torch.int64"),
        ("counter-floats", r"num_batches_tracked must be of a dtype like torch.int64; the file holds torch.float32"),
        ("no-tensors", "missing keys"),
    ],
)
def test_weights_that_do_not_fit(case, match, saved):
    path = saved / WEIGHTS
    fields, data = header(path)
    tensors = load_file(path)
    first = PREFIX + "blocks.0.fc.lora_A.weight"
    raw = {
        "oversized-header": lambda: path.write_bytes(struct.pack("<Q", 10**6) + b"{}"),
        "huge-header": lambda: path.write_bytes(struct.pack("<Q", 2**63) + b"{}"),
        "header-not-json": lambda: write_raw(path, b"{'a': 1}", data),
        "overlap": lambda: write_raw(path, {**fields, first: {**fields[first], "data_offsets": [8, 40]}}, data),
        "beyond-the-end": lambda: write_raw(path, fields, data[:-4]),
        "unknown-dtype": lambda: write_raw(path, {**fields, first: {**fields[first], "dtype": "F7"}}, data),
    }
    if case in raw:
        raw[case]()
    else:
        a, b = (PREFIX + f"fc.lora_{factor}.weight" for factor in "AB")
        head, counter = PREFIX + "head.2.bias", PREFIX + "head.1.num_batches_tracked"
        changed = {
            "half-the-keys": lambda: {key: t for key, t in tensors.items() if "blocks" not in key},
            "one-factor": lambda: {key: t for key, t in tensors.items() if key != b},
            "renamed": lambda: {key.replace("lora_A", "lora_a"): t for key, t in tensors.items()},
            "no-prefix": lambda: {key.removeprefix(PREFIX): t for key, t in tensors.items()},
            "extra": lambda: {**tensors, PREFIX + "nowhere.lora_A.weight": torch.zeros(2, 4)},
            "base-weight": lambda: {**tensors, PREFIX + "fc.weight": torch.zeros(4, 4)},
            "transposed": lambda: {**tensors, b: tensors[b].T.contiguous()},
            "another-rank": lambda: {**tensors, a: torch.zeros(3, 4)},
            "flat": lambda: {**tensors, a: tensors[a].reshape(8)},
            "scalar": lambda: {**tensors, a: torch.tensor(1.0)},
            "empty-tensor": lambda: {**tensors, a: torch.zeros(0, 4)},
            "integers": lambda: {**tensors, a: tensors[a].int()},
            "bools": lambda: {**tensors, a: tensors[a] > 0},
            "complex": lambda: {**tensors, a: tensors[a].to(torch.complex64)},
            "head-shape": lambda: {**tensors, head: torch.zeros(2)},
            "head-integers": lambda: {**tensors, head: torch.zeros(3, dtype=torch.int64)},
            "counter-floats": lambda: {**tensors, counter: torch.tensor(1.0)},
            "no-tensors": lambda: {},
        }[case]()
        rewrite(saved, changed)
    for model in (base(), tuned(base(), ["fc"], rank=2)):
        with refused(model, match):
            load_adapter(model, saved)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "head-shape", "rank"])
def test_all_of_a_file_is_checked_before_any_of_it_is_loaded(damage, tmp_path):
    options = {"targets": ["fc"], "rank": 2, "trainable": ["head", "gamma", "token"]}
    save_adapter(tuned(base(), **options), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    last, head = PREFIX + "fc.lora_B.weight", PREFIX + "token"
    if damage == "missing":
        del tensors[last]
    rewrite(tmp_path, {
        **tensors,
        **{
            "missing": {},
            "extra": {PREFIX + "zzz.lora_A.weight": torch.zeros(2, 4)},
            "shape": {last: torch.zeros(4, 3)},
            "head-shape": {head: torch.zeros(5)},
            "rank": {},
        }[damage],
    }, **({"rank_pattern": {"^fc": 1}} if damage == "rank" else {}))  # fmt: skip
    for model in (base(), tuned(base(), **options, seed=2)):
        with refused(model, "must"):
            load_adapter(model, tmp_path)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "F8_E4M3", "F8_E5M2", "C64", "U64", "F16", "BF16"])
def test_every_dtype_of_the_format_is_read_or_refused(dtype, saved):
    """Whatever the file calls them, bytes that are no factors of the right shape are refused."""
    fields, data = header(saved / WEIGHTS)
    first = PREFIX + "blocks.0.fc.lora_A.weight"
    write_raw(saved / WEIGHTS, {**fields, first: {**fields[first], "dtype": dtype}}, data)
    model = base()
    with refused(model, "must be"):
        load_adapter(model, saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_factors_of_another_floating_dtype_are_cast(dtype, saved):
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(saved / WEIGHTS).items()}
    rewrite(saved, tensors)
    model = base()
    load_adapter(model, saved)
    assert torch.equal(model.fc.lora_b, tensors[PREFIX + "fc.lora_B.weight"].float())


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
def test_no_pickle_is_ever_read(name, saved, tmp_path):
    mark = tmp_path / "code-ran"
    (saved / WEIGHTS).unlink()
    torch.save({"a": Bomb(mark)}, saved / name)
    (saved / CONFIG).write_bytes(pickle.dumps(Bomb(mark)))
    model = base()
    with refused(model, "adapter_model.bin, a pickle, which can run code|must be a whole safetensors file"):
        load_adapter(model, saved)
    assert not mark.exists()
    with open(saved / name, "rb") as file:
        torch.load(file, weights_only=False)
    assert mark.exists()  # it would have run


def test_an_adapter_for_a_module_that_cannot_be_adapted(saved):
    class MyLinear(nn.Linear):
        pass

    model = base()
    model.blocks[1].fc.__class__ = MyLinear
    with refused(model, r"blocks.1.fc must be an nn.Linear .* MyLinear"):
        load_adapter(model, saved)
    model = base()
    model.fc = nn.LazyLinear(4)  # has no shape yet
    with pytest.raises(ValueError, match=r"fc must be an nn.Linear .* LazyLinear"):
        load_adapter(model, saved)
    model = base().to("meta")
    with pytest.raises(ValueError, match=r"must have memory in the model.* meta device"):
        load_adapter(model, saved)
    assert not adapters(model)
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        load_adapter(None, saved)
    with pytest.raises(ValueError, match="must take linear modules"):
        load_adapter(CoToLoRALinear(4, 4), saved)


# strict


def without(directory, *names):
    tensors = load_file(directory / WEIGHTS)
    rewrite(directory, {key: t for key, t in tensors.items() if not key.startswith(tuple(PREFIX + n for n in names))})


def factors(*names):
    return [f"{name}.lora_{factor}.weight" for name in names for factor in "AB"]


def test_adapters_missing_from_the_file(saved, caplog):
    without(saved, "blocks.0.fc")
    fresh, injected, reference = base(), tuned(base(), ["fc"], rank=2, seed=3), tuned(base(), ["fc"], rank=2)
    before = copy.deepcopy(injected.blocks[0].fc.state_dict())
    for model in (fresh, injected):
        with refused(model, r"missing keys \['blocks.0.fc.lora_A.weight'.* unexpected keys \[\]"):
            load_adapter(model, saved)
        with caplog.at_level(logging.WARNING, "cotolora"):
            result = load_adapter(model, saved, strict=False)
        assert result.missing_keys == factors("blocks.0.fc")
        assert result.unexpected_keys == []
        assert "blocks.0.fc.lora_A.weight" in caplog.text
        caplog.clear()
        for name in ("blocks.1.fc", "fc"):
            assert torch.equal(adapters(model)[name].lora_b, adapters(reference)[name].lora_b)
    assert list(adapters(fresh)) == ["blocks.1.fc", "fc"]
    assert all(torch.equal(before[key], value) for key, value in injected.blocks[0].fc.state_dict().items())


def test_adapters_missing_from_the_model(saved, caplog):
    model = tuned(base(), ["blocks.1.fc"], rank=2, seed=3)
    with refused(model, r"missing keys \[\], unexpected keys \['blocks.0.fc.lora_A.weight'"):
        load_adapter(model, saved)
    with caplog.at_level(logging.WARNING, "cotolora"):
        result = load_adapter(model, saved, strict=False)
    assert result == ([], factors("blocks.0.fc", "fc"))
    assert "unexpected keys" in caplog.text
    assert list(adapters(model)) == ["blocks.1.fc"]
    reference = tuned(base(), ["fc"], rank=2)
    assert torch.equal(model.blocks[1].fc.lora_b, reference.blocks[1].fc.lora_b)


def test_more_adapters_in_the_model_than_the_config_knows(saved):
    model = tuned(base(), ["fc", "head.0"], rank=2, seed=3)
    with refused(model, r"missing keys \['head.0.lora_A.weight', 'head.0.lora_B.weight'\]"):
        load_adapter(model, saved)
    before = model.head[0].lora_b.clone()
    assert load_adapter(model, saved, strict=False) == (factors("head.0"), [])
    assert torch.equal(model.head[0].lora_b, before)


def test_half_an_adapter_is_not_loaded(saved):
    tensors = load_file(saved / WEIGHTS)
    del tensors[PREFIX + "fc.lora_B.weight"]
    rewrite(saved, tensors)
    model = tuned(base(), ["fc"], rank=2, seed=3)
    before = copy.deepcopy(model.fc.state_dict())
    assert load_adapter(model, saved, strict=False) == (["fc.lora_B.weight"], [])
    assert all(torch.equal(before[key], value) for key, value in model.fc.state_dict().items())


def test_strict_false_forgives_nothing_else(saved):
    model = base()
    without(saved, "blocks", "fc")
    with refused(model, "must hold an adapter that fits the model; it holds none"):
        load_adapter(model, saved, strict=False)
    save_adapter(tuned(base(), ["fc"], rank=2), saved)
    tensors = load_file(saved / WEIGHTS)
    rewrite(saved, {**tensors, PREFIX + "fc.lora_A.weight": torch.zeros(3, 4)})
    with refused(model, "must be of shape"):
        load_adapter(model, saved, strict=False)


def test_a_complete_load_says_nothing(saved, caplog):
    with caplog.at_level(logging.DEBUG, "cotolora"):
        result = load_adapter(base(), saved)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 3}, r"must have the rank and scale of the file, 2 and 8; the model's are 3 and"),
        ({"rank": 2, "alpha": 17.0}, "must have the rank and scale of the file, 2 and 8; the model's are 2 and 8.5"),
        ({"rank": 2, "use_rslora": True}, "must have the rank and scale"),
        ({"rank": 2, "alpha_pattern": {"^fc": 15.999}}, "^fc must have the rank and scale"),
        ({"rank": 2, "rank_pattern": {"^fc": 1}}, "^fc must have the rank and scale"),
        ({"rank": 2, "variant": "dora"}, "must have the variant of the file, 'lora'; the model's is 'dora'"),
        ({"rank": 2, "variant": "hira"}, "must have the variant of the file, 'lora'; the model's is 'hira'"),
        ({"rank": 2, "init": "pissa"}, "must not have an init taken from W.*'pissa'"),
    ],
    ids=str,
)
def test_an_injected_model_must_agree(options, match, saved):
    model = tuned(base(), ["fc"], **options)
    for strict in (True, False):
        with refused(model, match):
            load_adapter(model, saved, strict=strict)


# kills and full disks


def variants():
    """Three adapters of one model that differ in rank, targets and values."""
    return [
        tuned(base(), ["fc"], rank=2, seed=1),
        tuned(base(), ["fc", "head.0"], rank=3, alpha=7.0, seed=2),
        tuned(base(), ["head.2"], rank=1, trainable=["token"], seed=3),
    ]


def which(directory, models):
    """The place in `models` of the adapter that the directory holds, or None: neither of them as a whole."""
    model = base()
    try:
        load_adapter(model, directory)
    except (ValueError, FileNotFoundError):
        return None
    return next((i for i, other in enumerate(models) if torch.equal(logits(model), logits(other))), None)


class Steps:
    """Runs `act` at the nth boundary between two file operations of `save_adapter`."""

    def __init__(self, at, act):
        self.at, self.act, self.count = at, act, 0

    def step(self):
        self.count += 1
        if self.count == self.at:
            self.act()

    def around(self, operation):
        def run(*args, **kwargs):
            self.step()
            result = operation(*args, **kwargs)
            self.step()
            return result

        return run

    def open(self, path, mode):
        self.step()
        return Torn(open(path, mode), self)


class Torn:
    """A file whose writes come in two halves."""

    def __init__(self, file, steps):
        self.file, self.steps = file, steps
        self.flush, self.fileno = file.flush, file.fileno

    def write(self, data):
        self.steps.step()
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.steps.step()
        self.file.write(data[len(data) // 2 :])
        self.file.flush()
        self.steps.step()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.steps.step()


@contextmanager
def stepping(at, act):
    steps, fsync, replace = Steps(at, act), os.fsync, os.replace
    files.open, os.fsync, os.replace = steps.open, steps.around(fsync), steps.around(replace)
    try:
        yield steps
    finally:
        del files.open
        os.fsync, os.replace = fsync, replace


def forked(act):
    """Runs `act` in a child; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except OSError:
            os._exit(3)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_save(model, directory, at):
    """Saves in a child that dies at the given boundary; whether it got so far."""

    def save():
        with stepping(at, lambda: os._exit(9)):
            save_adapter(model, directory)

    return forked(save) == 9


def main_kills(directory):
    """Kills saves at every boundary, also a second one after the first, and checks what is left."""
    old, first, second = models = variants()
    os.fsync = lambda _: None  # matters when the power goes, not when a process does
    outcomes = set()
    for at in itertools.count(1):
        save_adapter(old, directory)
        reached = killed_save(first, directory, at)
        found = which(directory, models)
        assert found in (0, 1), f"killed at {at}: neither adapter is whole"
        outcomes.add(found)
        if not reached:
            break
        for again in itertools.count(1) if found == 1 or at == 5 else ():
            reached = killed_save(second, directory, again)
            after = which(directory, models)
            assert after in (found, 2), f"killed at {at}, then at {again}: had {found}, found {after}"
            save_adapter(old, directory)
            assert which(directory, models) == 0
            if not reached:
                break
            killed_save(first, directory, at)
    assert at > 15, at
    assert outcomes == {0, 1}
    save_adapter(first, directory)
    assert sorted(p.name for p in Path(directory).iterdir()) == [CONFIG, WEIGHTS]


def main_signals(directory, seconds=4.0):
    """Kills a process that saves again and again, at random times."""
    models, generator = variants(), random.Random(0)
    os.fsync = lambda _: None
    found, end = set(), time.monotonic() + seconds
    while time.monotonic() < end:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for count, model in enumerate(models * 1000):  # not without end: the parent may be killed too
                    save_adapter(model, directory)
                    if count == 1:
                        os.write(writer, b".")
            finally:
                os._exit(0)
        os.close(writer)
        assert os.read(reader, 1), "the child could not save"  # two adapters by now, however busy the machine
        time.sleep(generator.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        found.add(which(directory, models))
        assert found <= {0, 1, 2}, found
    assert len(found) > 1


def main_limit(directory):
    """A file size limit of the system, which fails the write half way through."""
    old, new, _ = models = variants()
    save_adapter(old, directory)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = (Path(directory) / WEIGHTS).stat().st_size

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        save_adapter(new, directory)

    assert forked(save) == 3
    assert which(directory, models) == 0
    assert sorted(p.name for p in Path(directory).iterdir()) == [CONFIG, WEIGHTS]


def in_a_process(*args):
    """Runs a `main_…` of this file by itself: a process that forks must not have threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, args)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def finished(*processes):
    try:
        for process in processes:
            output, _ = process.communicate(timeout=100)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()


def test_a_kill_leaves_the_old_pair_or_the_new_one(tmp_path):
    names = ("kills", "signals", "limit")
    finished(*(in_a_process(name, tmp_path / name) for name in names))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_an_error_leaves_the_old_pair(number, tmp_path):
    old, new, _ = models = variants()

    def fail():
        raise OSError(number, os.strerror(number))

    reached = []
    for at in itertools.count(1):
        save_adapter(old, tmp_path)
        with stepping(at, fail) as steps:
            try:
                save_adapter(new, tmp_path)
                break
            except OSError as error:
                seen = error.errno
        assert seen == number
        reached.append(which(tmp_path, models))
        assert reached[-1] is not None
    # until the weights are renamed the old pair, from then on the new one
    renamed = reached.index(1)
    assert reached == [0] * renamed + [1] * (len(reached) - renamed)
    assert renamed > 12
    assert steps.count == len(reached)


def test_a_failed_write_leaves_no_litter(tmp_path, monkeypatch):
    old, new, _ = variants()
    save_adapter(old, tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_adapter(new, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_saving_onto_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_adapter(variants()[0], tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


# two ranks


def main_rank(rank, directory):
    """All ranks call, one writes, an error on it reaches all, and sharded parameters come out whole."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    rank, directory = int(rank), Path(directory)
    dist.init_process_group("gloo", init_method=f"file://{directory / 'meeting'}", rank=rank, world_size=2)
    model, _, other = variants()
    write = files._write
    if rank == 1:

        def write_elsewhere(*_):
            raise AssertionError("only rank 0 writes")

        files._write = write_elsewhere
    save_adapter(model, directory / "whole")
    assert which(directory / "whole", [model]) == 0  # on both ranks, at once

    (directory / "file").touch()
    with pytest.raises(OSError, match="file"):
        save_adapter(other, directory / "file")

    if rank == 0:

        def break_down(*_):
            raise RuntimeError("not an OSError")

        files._write = break_down
    with pytest.raises(RuntimeError if rank == 0 else OSError, match="not an OSError"):
        save_adapter(other, directory / "whole")
    if rank == 0:
        files._write = write
    assert which(directory / "whole", [model]) == 0

    mesh = init_device_mesh("cpu", (2,))
    for layer in adapters(model).values():
        for name in ("lora_a", "lora_b"):
            sharded = distribute_tensor(getattr(layer, name).detach(), mesh, [Shard(0)])
            setattr(layer, name, nn.Parameter(sharded))
    save_adapter(model, directory / "sharded")
    whole, gathered = (load_file(directory / name / WEIGHTS) for name in ("whole", "sharded"))
    assert set(whole) == set(gathered)  # not the bytes: safetensors orders its metadata at random
    assert all(torch.equal(whole[key], gathered[key]) for key in whole)
    expected = {name: layer.lora_b.full_tensor() for name, layer in adapters(model).items()}
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_b.zero_()
    load_adapter(model, directory / "sharded")
    for name, layer in adapters(model).items():
        assert isinstance(layer.lora_b, DTensor)
        assert torch.equal(layer.lora_b.full_tensor(), expected[name])
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that shuts down in order


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks(tmp_path):
    finished(in_a_process("rank", 0, tmp_path), in_a_process("rank", 1, tmp_path))


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[f"main_{sys.argv[1]}"](*sys.argv[2:])
