"""Adapters under wrappers, grouping of their names, and masks that restore the previous state."""

import copy
import logging
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from cotolora import CoTo, CoToLoRALinear, adapter_mask, adapters, eject, inject, trainable_parameters
from cotolora.groups import as_mask, group_names, modules_of, plain_name, unwrap


class Net(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(blocks))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block["v"](block["q"](x))
        return x


NAMES = ["embed", *(f"blocks.{i}.{key}" for i in range(3) for key in "qv")]


def adapted(blocks=3):
    torch.manual_seed(0)
    model = Net(blocks)
    inject(model, rank=2)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_b.normal_(std=0.1)
    return model.eval()


# trainable parameters


@pytest.mark.parametrize("variant", ["lora", "dora", "vera"])
def test_every_trainable_parameter_is_in_one_group(variant):
    model = Net()
    layers = inject(model, ["q", "v"], rank=2, variant=variant, trainable=["embed"])
    groups = trainable_parameters(model)
    assert [group["name"] for group in groups] == ["adapters", "others"]
    assert groups[0]["params"] == [p for layer in layers.values() for p in layer.adapter_parameters]
    assert groups[1]["params"] == [model.embed.weight, model.embed.bias]
    groups[1]["lr"] = 1e-4
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-4]
    every = [p for group in groups for p in group["params"]]
    assert {id(p) for p in every} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len({id(p) for p in every}) == len(every)


def test_trainable_parameters_without_a_head_and_with_frozen_adapters():
    model = Net()
    inject(model, rank=2)
    assert [group["name"] for group in trainable_parameters(nn.Sequential(model))] == ["adapters"]
    for layer in list(adapters(model).values())[1:]:
        layer.requires_grad_(False)
    (group,) = trainable_parameters(model)
    assert len(group["params"]) == 2
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="all of Net is frozen"):
        trainable_parameters(model)
    eject(model)
    with pytest.raises(ValueError, match="model must have adapters; Net has none"):
        trainable_parameters(model)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        trainable_parameters([])


# names under wrappers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.q", "layers.0.q"),
        ("_orig_mod.layers.0.q", "layers.0.q"),
        ("layers.0._checkpoint_wrapped_module.q", "layers.0.q"),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.q", "layers.0.q"),
        ("layers._orig_mod", "layers"),
        ("_orig_mod", ""),
        ("", ""),
        ("my_orig_mod.module.q", "my_orig_mod.module.q"),
        ("_orig_mod_.q", "_orig_mod_.q"),
    ],
)
def test_plain_names(name, expected):
    assert plain_name(name) == expected
    assert plain_name(plain_name(name)) == expected


@contextmanager
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compiled DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
    "DDP of compiled": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")),
    "average": lambda model: averaged(model),
    "average of DDP": lambda model: averaged(nn.parallel.DistributedDataParallel(model)),
    "compiled average": lambda model: torch.compile(averaged(model), backend="eager"),
}


def averaged(model):
    """A moving average wrapper of `model` itself, not of a copy, so that modules can be compared by identity."""
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1))
    average.module = model
    return average


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_adapters_have_plain_names_in_a_wrapped_model(wrap):
    model = adapted()
    with one_rank():
        wrapped = WRAPPERS[wrap](model)
        assert unwrap(wrapped) is model
        assert list(adapters(wrapped).items()) == list(adapters(model).items())
    assert list(adapters(model)) == NAMES


@pytest.mark.parametrize("impl", list(CheckpointImpl), ids=lambda impl: impl.name)
def test_adapters_have_plain_names_under_checkpoint_wrappers(impl):
    model = adapted()
    expected = list(adapters(model).items())
    model.embed = checkpoint_wrapper(model.embed, checkpoint_impl=impl)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block, checkpoint_impl=impl)
    assert list(adapters(model).items()) == expected
    assert list(adapters(checkpoint_wrapper(model, checkpoint_impl=impl)).items()) == expected


def test_adapters_have_plain_names_in_compiled_blocks():
    model = adapted()
    expected = list(adapters(model).items())
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(checkpoint_wrapper(block), backend="eager")
    assert list(adapters(model).items()) == expected


def test_a_shared_adapter_is_listed_once_under_its_first_name():
    shared = CoToLoRALinear(2, 2)
    model = nn.ModuleDict({"b": shared, "a": nn.Sequential(shared)})
    assert adapters(model) == {"b": shared}
    assert adapters(nn.Linear(2, 2)) == {}
    assert adapters(shared) == {"": shared}


# groups


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(
            ["model.layers.0.q", "model.layers.0.v", "model.layers.1.q", "model.layers.10.q", "model.layers.10.v"],
            {"model.layers.0": [0, 1], "model.layers.1": [2], "model.layers.10": [3, 4]},
            id="uneven-targets",
        ),
        pytest.param(
            ["encoder.block.0.q", "encoder.block.1.q", "decoder.block.0.q", "decoder.block.0.x"],
            {"encoder.block.0": [0], "encoder.block.1": [1], "decoder.block.0": [2, 3]},
            id="encoder-and-decoder",
        ),
        pytest.param(
            ["vision.blocks.3.q", "text.blocks.3.q", "vision.blocks.3.v"],
            {"vision.blocks.3": [0, 2], "text.blocks.3": [1]},
            id="two-towers",
        ),
        pytest.param(
            ["layers.1.experts.0.up", "layers.1.experts.1.up", "layers.2.experts.0.up"],
            {"layers.1": [0, 1], "layers.2": [2]},
            id="experts-belong-to-their-layer",
        ),
        pytest.param(
            ["0.encoder.layer.0.q", "0.encoder.layer.0.v", "0.encoder.layer.1.q", "0.pooler.dense", "0.proj"],
            {"0.encoder.layer.0": [0, 1], "0.encoder.layer.1": [2], "0.pooler.dense": [3], "0.proj": [4]},
            id="in-a-list-of-one",
        ),
        pytest.param(["embed", "head", "pool.fc"], {"embed": [0], "head": [1], "pool.fc": [2]}, id="no-number"),
        pytest.param(["0", "1.q", "1.v", "2"], {"0": [0], "1": [1, 2], "2": [3]}, id="a-sequential"),
        pytest.param(["l1.q", "l_2.q", "-1.q"], {"l1.q": [0], "l_2.q": [1], "-1.q": [2]}, id="no-integers"),
        pytest.param([], {}, id="none"),
    ],
)  # fmt: skip
def test_layers_are_groups_up_to_the_integer_that_counts_the_blocks(names, expected):
    groups = group_names(names, "layer")
    assert groups == {key: [names[i] for i in places] for key, places in expected.items()}
    assert list(groups) == list(expected)  # in the order of the first member


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)


class OtherBlock(Block):
    pass


class Backbone(nn.Module):
    def __init__(self, *kinds):
        super().__init__()
        self.layers, self.pooler = nn.ModuleList(kind() for kind in kinds or (Block, Block)), nn.Linear(4, 4)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.experts = nn.Linear(4, 4), nn.ModuleList(Block() for _ in range(2))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)


def names_in(prefix, *leaves):
    return [f"{prefix}.{leaf}" for leaf in leaves]


MODELS = {
    "backbone-and-head": (
        lambda: nn.Sequential(Backbone(), Head()),
        {f"0.layers.{i}": names_in(f"0.layers.{i}", "q", "v") for i in (0, 1)}
        | {name: [name] for name in ("0.pooler", "1.one", "1.two")},
    ),
    "towers-of-one-class": (
        lambda: nn.ModuleList([Backbone(), Backbone()]),
        {str(i): names_in(i, "layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v", "pooler") for i in (0, 1)},
    ),
    "blocks-of-two-classes": (
        lambda: Backbone(Block, OtherBlock, Block),
        {f"layers.{i}": names_in(f"layers.{i}", "q", "v") for i in range(3)} | {"pooler": ["pooler"]},
    ),
    "a-list-that-repeats-nothing": (
        lambda: Backbone(Block, OtherBlock, Head),
        {
            name: [name]
            for name in (
                "layers.0.q",
                "layers.0.v",
                "layers.1.q",
                "layers.1.v",
                "layers.2.one",
                "layers.2.two",
                "pooler",
            )
        },
    ),
    "experts-in-blocks": (
        lambda: nn.Sequential(Backbone(Experts, Experts), nn.Tanh()),
        {
            f"0.layers.{i}": names_in(f"0.layers.{i}", "q", *(f"experts.{j}.{k}" for j in (0, 1) for k in "qv"))
            for i in (0, 1)
        }
        | {"0.pooler": ["0.pooler"]},
    ),
    "experts-in-one-block": (
        lambda: nn.Sequential(Backbone(Experts), nn.Tanh()),
        {"0.layers.0.q": ["0.layers.0.q"]}
        | {f"0.layers.0.experts.{j}": names_in(f"0.layers.0.experts.{j}", "q", "v") for j in (0, 1)}
        | {"0.pooler": ["0.pooler"]},
    ),
    "linears-around-a-backbone": (
        lambda: nn.Sequential(nn.Linear(4, 4), Backbone(), nn.Linear(4, 4)),
        {"0": ["0"]}
        | {f"1.layers.{i}": names_in(f"1.layers.{i}", "q", "v") for i in (0, 1)}
        | {"1": ["1.pooler"], "2": ["2"]},
    ),
    "linears": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), {"0": ["0"], "2": ["2"]}),
}


@pytest.mark.parametrize("wrap", [lambda model: model, checkpoint_wrapper], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("case", MODELS)
def test_the_list_of_repeated_blocks_makes_the_groups(case, wrap):
    make, expected = MODELS[case]
    model = make()
    inject(model, rank=2)
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for key, block in module.named_children():
                module[int(key)] = wrap(block)
    groups = group_names(adapters(model), "layer", modules_of(model))
    assert groups == expected
    assert list(groups) == list(expected)
    assert CoTo(model, 10).groups == expected
    with adapter_mask(model, [i % 2 == 0 for i in range(len(expected))], unit="layer"):
        on = {name for i, names in enumerate(expected.values()) if i % 2 == 0 for name in names}
        assert {name for name, layer in adapters(model).items() if layer.enabled} == on


def test_one_adapted_block_of_many_is_one_group():
    model = Backbone(Block, Block, Block)
    inject(model, "layers.1.[qv]", rank=2)
    assert CoTo(model, 10).groups == {"layers.1": ["layers.1.q", "layers.1.v"]}


def test_fewer_than_two_groups_are_reported(caplog):
    model = nn.Sequential(Backbone(), nn.Tanh())
    inject(model, rank=2)
    with caplog.at_level(logging.INFO, logger="cotolora"):
        coto = CoTo(model, 10)
        coto.step()
    assert not caplog.records
    with caplog.at_level(logging.INFO, logger="cotolora"):
        coto = CoTo(model, 10, unit=lambda name: "all")
        coto.step()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "only one group of adapters, 'all' with 5 of them" in message


COMPONENT = st.sampled_from(["0", "1", "12", "a", "b1", "layers"])
NAME = st.lists(COMPONENT, min_size=1, max_size=4).map(".".join)


@given(st.lists(NAME, unique=True), st.sampled_from(["layer", "module", len, lambda name: name[0]]))
def test_groups_partition_the_names_and_keep_their_order(names, unit):
    groups = group_names(names, unit)
    assert sorted(name for group in groups.values() for name in group) == sorted(names)
    assert all(group == [name for name in names if name in group] for group in groups.values())
    firsts = [names.index(group[0]) for group in groups.values()]
    assert firsts == sorted(firsts)
    if unit == "module":
        assert groups == {name: [name] for name in names}


def test_a_callable_names_the_group():
    groups = group_names(["a.0.q", "b.0.q", "a.1.v"], lambda name: (name[-1], 0))
    assert groups == {("q", 0): ["a.0.q", "b.0.q"], ("v", 0): ["a.1.v"]}


@pytest.mark.parametrize(
    ("unit", "error", "match"),
    [
        ("block", ValueError, "unit must be 'layer', 'module' or a callable; got 'block'"),
        ("", ValueError, "got ''"),
        (None, TypeError, "got NoneType"),
        (3, TypeError, "got int"),
    ],
)
def test_a_bad_unit(unit, error, match):
    with pytest.raises(error, match=match):
        group_names(["a"], unit)
    with pytest.raises(error, match=match), adapter_mask(adapted(), True, unit=unit):
        pass


# masks


def enabled(model):
    return [layer.enabled for layer in adapters(model).values()]


@pytest.mark.parametrize(
    "mask",
    [
        [True, False, True, False, False, True, True],
        (1, 0, 1, 0, 0, 1, 1),
        [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0],
        np.array([1, 0, 1, 0, 0, 1, 1], dtype=bool),
        np.array([1, 0, 1, 0, 0, 1, 1], dtype=np.int8),
        np.broadcast_to(np.array([1.0, 0, 1, 0, 0, 1, 1]), (7,)),  # a read-only array
        torch.tensor([1, 0, 1, 0, 0, 1, 1]),
        torch.tensor([1.0, 0, 1, 0, 0, 1, 1], requires_grad=True),
        [torch.tensor(True), *torch.tensor([0, 1, 0, 0, 1, 1]).unbind()],
    ],
    ids=["bools", "ints", "floats", "numpy-bool", "numpy-int8", "numpy-frozen", "tensor", "tensor-grad", "tensors"],
)  # fmt: skip
def test_one_value_for_each_adapter(mask):
    model = adapted()
    with adapter_mask(model, mask):
        assert enabled(model) == [True, False, True, False, False, True, True]
        assert all(type(value) is bool for value in enabled(model))  # a host gate, with which an off adapter is skipped
    assert enabled(model) == [True] * 7


@pytest.mark.parametrize("mask", [False, 0, 0.0, np.False_, torch.tensor(False), torch.tensor(0)], ids=repr)
def test_one_value_for_all(mask):
    model, x = adapted(), torch.randn(2, 4)
    torch.manual_seed(0)
    base = Net().eval()
    with adapter_mask(model, mask):
        assert torch.equal(model(x), base(x))
        assert enabled(model) == [False] * 7
    assert not torch.allclose(model(x), base(x))
    with adapter_mask(model, True):
        assert enabled(model) == [True] * 7


@pytest.mark.parametrize("training", [False, True])
def test_a_row_for_each_sample(training):
    model = adapted().train(training)
    generator = torch.Generator().manual_seed(1)
    masks = torch.randint(0, 2, (9, 7), generator=generator).bool()
    masks[0], masks[1] = True, False
    x = torch.randn(9, 3, 4)
    with adapter_mask(model, masks):
        together = model(x)
    for i, mask in enumerate(masks):
        with adapter_mask(model, mask):
            torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1]))
    assert not torch.allclose(together[1:], model(x)[1:], rtol=1e-3)  # all on


def test_units_of_layers_and_of_the_users_own():
    model = adapted()
    with adapter_mask(model, [1, 0, 1, 0], unit="layer"):
        assert enabled(model) == [True, False, False, True, True, False, False]
    with adapter_mask(model, [[1, 0], [0, 1]], unit=lambda name: name.endswith("v")):
        rows = torch.stack(enabled(model))
    assert torch.equal(rows, torch.tensor([[n.endswith("v") == bool(i) for i in (0, 1)] for n in NAMES]))


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        ([1, 0], r"\[7\] or \[batch, 7\].*got shape \(2,\)"),
        ([[True] * 6], r"got shape \(1, 6\)"),
        (torch.ones(7, 2), r"got shape \(7, 2\)"),
        (torch.ones(1, 2, 7), r"got shape \(1, 2, 7\)"),
        ([], r"got shape \(0,\)"),
        ([2] * 7, "only 0, 1, True or False"),
        (0.5, "only 0, 1, True or False"),
        (1e-320, "only 0, 1, True or False"),
        ([1 + 1e-9] * 7, "only 0, 1, True or False"),
        (float("nan"), "only 0, 1, True or False"),
        ([1, 1, 1, 1, 1, 1, -1], "only 0, 1, True or False"),
        (np.full(7, 1j), "only 0, 1, True or False"),
        (None, "mask must be a bool or hold bools"),
        ("on", "mask must be a bool or hold bools"),
        (["on"] * 7, "mask must be a bool or hold bools"),
        ([[1, 0], [1]], "mask must be a bool or hold bools"),
    ],
    ids=repr,
)
def test_bad_masks_change_nothing(mask, match):
    model = adapted()
    with pytest.raises(ValueError, match=match), adapter_mask(model, mask):
        pytest.fail("the block must not run")
    assert enabled(model) == [True] * 7


def test_a_model_without_adapters():
    with pytest.raises(ValueError, match="Net has none"), adapter_mask(Net(), True):
        pass
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"), adapter_mask(None, True):
        pass


def test_masks_nest_and_restore_the_previous_state():
    model = adapted()
    rows = torch.tensor([True, False])
    layers = list(adapters(model).values())
    layers[1].enabled = False
    layers[2].enabled = rows
    with adapter_mask(model, True):
        with adapter_mask(model, [[0] * 7, [1] * 7]):
            assert all(value.tolist() == [False, True] for value in enabled(model))
            with adapter_mask(model, False):
                assert enabled(model) == [False] * 7
            assert all(value.tolist() == [False, True] for value in enabled(model))
        assert enabled(model) == [True] * 7
    assert layers[0].enabled is True
    assert layers[1].enabled is False
    assert layers[2].enabled.tolist() == rows.tolist()
    assert enabled(model)[3:] == [True] * 4


def test_masks_restore_when_the_block_raises():
    model = adapted()
    with pytest.raises(KeyError), adapter_mask(model, False):
        raise KeyError
    assert enabled(model) == [True] * 7

    model.train()
    with pytest.raises(ValueError, match="row gate"), adapter_mask(model, torch.ones(3, 7)):
        model(torch.randn(2, 4))  # two samples, three rows
    assert enabled(model) == [True] * 7


def test_a_mask_does_not_change_gates_or_modes():
    model = adapted().train()
    layers = adapters(model)
    layers["embed"].gate = False
    with adapter_mask(model, True):
        assert layers["embed"].active is False
        assert layers["blocks.0.q"].active is True
    assert [layer.gate for layer in layers.values()] == [False] + [True] * 6
    assert model.training


def test_a_mask_is_copied():
    model, mask = adapted(), torch.ones(2, 7, dtype=torch.bool)
    array = mask.numpy()
    for given_mask in (mask, array):
        with adapter_mask(model, given_mask):
            mask.zero_()
            assert all(value.all() for value in enabled(model))
        mask.fill_(True)


def test_masks_reach_adapters_under_wrappers():
    model = adapted()
    wrapped = torch.compile(nn.DataParallel(copy.deepcopy(model)), backend="eager")
    with adapter_mask(wrapped, False):
        assert enabled(wrapped) == [False] * 7
    assert enabled(wrapped) == [True] * 7


def test_as_mask_names_its_argument():
    assert as_mask([1, 0]).tolist() == [True, False]
    with pytest.raises(ValueError, match="gates must hold only"):
        as_mask([3], "gates")
