"""Adapters on disk: saving and loading gives back the same adapter."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from cotolora import CoToLoRALinear, adapters, eject, inject, load_adapter, save_adapter
from cotolora.saving import adapter as checkpoint
from tests.support.saving import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Net,
    Odd,
    assert_few_ulps,
    base,
    config_of,
    keys,
    logits,
    refused,
    train,
    trained,
    tuned,
)

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
    "ambiguous-name": (Net, {"targets": "fc", "rank_pattern": {"fc": 3}}),  # blocks.0.fc also ends in fc
    "one-of-two-names": (Net, {"targets": ["blocks.0.fc"]}),
    "odd-names": (Odd, {"rank_pattern": {"b": 3, r"\^": 4}, "alpha_pattern": {r".*\$": 3}}),
    "odd-head": (Odd, {"targets": r"linears\.[aé].*", "trainable": r"linears\.(\(z\)|\$|x\|y)"}),
    "head": (Net, {"targets": ["fc"], "trainable": ["head"]}),  # with the buffers of its BatchNorm
    "frozen-batchnorm": (Net, {"targets": ["fc"], "trainable": ["head.2"]}),
    "bias-alone": (Net, {"targets": ["fc"], "trainable": ["head.2.bias"]}),
    "root-parameter": (Net, {"targets": ["fc"], "trainable": ["token"]}),
    "bare-parameters": (Net, {"targets": ["fc"], "trainable": ["gamma"]}),
    "a-bare-parameter": (Net, {"targets": ["fc"], "trainable": ["blocks.1.gamma"]}),
    "ambiguous-head": (Net, {"targets": ["fc"], "trainable": "norm"}),  # blocks.0.norm also ends in norm
    "all-of-an-ambiguous-name": (Net, {"targets": ["fc"], "trainable": ["norm"]}),
    "everything-else": (Net, {"targets": ["fc"], "trainable": ["head", "gamma", "token", "norm"]}),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_loading_gives_back_the_saved_adapter(case, tmp_path):
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

    again = tuned(base(make), seed=2, **options)  # a model that already has adapters
    assert load_adapter(again, tmp_path) == ([], [])
    assert torch.equal(logits(again), logits(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_a_hira_scale_is_kept_though_the_file_has_none(tmp_path):
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
def test_an_init_with_nonzero_update_is_saved_as_lora_of_twice_the_rank(init, dtype, tmp_path):
    """Steps far below bfloat16's resolution of A and B are kept, and the file fits the original base model."""
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
    load_adapter(model, tmp_path)  # the scales are equal, though they come from different settings


def test_a_model_in_another_dtype_gets_the_same_factors(saved):
    other = base(lambda: Net().bfloat16())
    load_adapter(other, saved)
    assert torch.equal(other.fc.lora_b, load_file(saved / WEIGHTS)[PREFIX + "fc.lora_B.weight"])
    assert other.fc.lora_b.dtype == torch.float32


def test_buffers_of_frozen_modules_are_not_saved(tmp_path):
    save_adapter(tuned(base(), ["fc"], trainable=["head.2"]), tmp_path)
    assert {key for key in keys(tmp_path) if ".lora_" not in key} == {
        PREFIX + "head.2.weight",
        PREFIX + "head.2.bias",
    }
    assert config_of(tmp_path)["modules_to_save"] == ["head.2"]


def test_disabled_adapters_are_not_saved(tmp_path):
    model, other = tuned(base(), ["fc"], rank=2), base()
    layers = adapters(model)
    layers["blocks.0.fc"].enabled = False
    layers["blocks.1.fc"].enabled = torch.zeros(5, dtype=torch.bool)
    layers["fc"].gate = False  # applies only in training, so saving ignores it
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
    "average": AveragedModel,
    "average-of-compiled": lambda model: AveragedModel(torch.compile(model, backend="eager")),
    "fabric": lambda model: in_fabric(model),
}


def in_fabric(model):
    lightning = pytest.importorskip("lightning", reason="wraps a model as Lightning Fabric does")
    return lightning.Fabric(accelerator="cpu").setup(model)


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
    """A copy without adapters or outer wrappers, so that models can be compared by value."""
    twin = copy.deepcopy(checkpoint.unwrap(model))
    eject(twin)
    return twin


def test_ddp_must_be_applied_after_loading(saved):
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


@pytest.mark.parametrize("part", ["fc", "head"])
def test_what_has_no_memory_is_not_saved(part, tmp_path):
    model = tuned(base(), ["fc"], rank=2, trainable=["head"])
    getattr(model, part).to("meta")
    with pytest.raises(ValueError, match=rf"tensors to save must have memory; on the meta device are \['{part}"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_shared_modules_are_saved_once(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(4, 4))
            self.b, self.norm, self.again = nn.ModuleList([self.a]), nn.LayerNorm(4), nn.ModuleList()
            self.again.append(self.norm)

        def forward(self, x):
            return self.again[0](self.b[0](self.norm(self.a(x))))

    model, other = tuned(base(Shared), ["a.0"], trainable=["again.0"]), base(Shared)
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


def test_models_that_the_format_cannot_hold_are_refused(tmp_path):
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


def test_unusual_model_names_are_accepted(tmp_path):
    model = tuned(base(), ["fc"])
    model.name_or_path = Path("somewhere")
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["base_model_name_or_path"] is None
    model.name_or_path = "me/model"
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["base_model_name_or_path"] == "me/model"
