"""The adapters and entries that pruning removes, the cost of pruned adapters, and undo, which is bitwise exact."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cotolora import CoTo, adapter_mask, adapters, eject, inject, load_adapter, save_adapter
from cotolora.pruning import best, magnitude, prune
from cotolora.shapley import Shapley


class Net(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(depth))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block["v"](block["q"](x))
        return x


def adapted(depth=3, targets=("q", "v"), rank=3):
    torch.manual_seed(0)
    model = Net(depth)
    inject(model, list(targets), rank=rank)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_b.normal_(std=0.1)
    return model.eval()


def on(model):
    return [name for name, layer in adapters(model).items() if layer.enabled]


def bits(model):
    return {name: tensor.detach().clone().view(torch.int32) for name, tensor in model.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


# whole adapters: the choice


@pytest.mark.parametrize(
    ("depth", "low", "middle", "high", "other"),
    [
        (2, [0], [], [1], [0]),
        (3, [0], [1], [2], [0, 2]),
        (4, [0], [1, 2], [3], [0, 2]),
        (5, [0, 1], [2], [3, 4], [0, 2, 4]),
        (6, [0, 1], [2, 3], [4, 5], [0, 2, 4]),
        (7, [0, 1], [2, 3, 4], [5, 6], [0, 2, 4, 6]),
        (32, range(11), range(11, 21), range(21, 32), range(0, 32, 2)),
    ],
)
def test_a_label_selects_the_layers_to_keep(depth, low, middle, high, other):
    for label, stay in {"low": low, "middle": middle, "high": high, "every-other": other}.items():
        model = adapted(depth)
        if not stay:
            with pytest.raises(ValueError, match=f"keep must leave an enabled adapter; '{label}' leaves none of 4"):
                prune(model, label)
            continue
        pruning = prune(model, keep=label)
        assert on(model) == [f"blocks.{i}.{key}" for i in stay for key in "qv"]
        assert pruning.removed == dict.fromkeys(set(adapters(model)) - set(on(model)), 24)


def test_labels_work_for_any_unit():
    model = adapted()
    with prune(model, "every-other", unit="module"):
        assert on(model) == ["blocks.0.q", "blocks.1.q", "blocks.2.q"]
    with prune(model, "high", unit=lambda name: name[-1]):
        assert on(model) == ["blocks.0.v", "blocks.1.v", "blocks.2.v"]
    with pytest.raises(ValueError, match="unit must be"):
        prune(model, "high", unit="block")


SHAPLEY = Shapley(
    torch.tensor([0.5, -1.0, 0.5], dtype=torch.float64), torch.zeros(3), 8,
    {f"blocks.{i}": [f"blocks.{i}.q", f"blocks.{i}.v"] for i in range(3)},
)  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (["q"], ["blocks.0.q", "blocks.1.q", "blocks.2.q"]),
        (("1.q", "blocks.2.v"), ["blocks.1.q", "blocks.2.v"]),
        (iter(["0.q"]), ["blocks.0.q"]),
        (r"blocks\.[02]\..*", ["blocks.0.q", "blocks.0.v", "blocks.2.q", "blocks.2.v"]),
        (lambda name: "1" in name, ["blocks.1.q", "blocks.1.v"]),
        (best(SHAPLEY, 1), ["blocks.0.q", "blocks.0.v"]),
        (best(SHAPLEY, 2), ["blocks.0.q", "blocks.0.v", "blocks.2.q", "blocks.2.v"]),
    ],
    ids=["projection", "ends", "iterator", "regex", "callable", "best", "best-of-equals"],
)
def test_named_adapters_are_kept(keep, expected):
    model = adapted()
    prune(model, keep)
    assert on(model) == expected


@pytest.mark.parametrize(
    ("keep", "error", "match"),
    [
        (["q", "k"], ValueError, r"keep \['k'\] matches no adapter; adapters end in \['q', 'v'\]"),
        ("q", ValueError, r"keep \['q'\] matches no adapter.*labels are \('every-other'"),
        ("q|v", ValueError, r"must match the whole name, and this one matches a part of 'blocks\.0\.q'"),
        ("(", ValueError, "keep must hold regular expressions"),
        (["blocks.0"], ValueError, r"their groups are \['blocks.0', 'blocks.1', 'blocks.2'\], labels"),
        ([], ValueError, r"keep must hold at least one name; got \[\]"),
        (lambda name: False, ValueError, "leaves none of 6"),
        (lambda name: torch.zeros(2), TypeError, r"keep must return True or False for a name; got <Tensor of .*\(2,\)"),
        (3, TypeError, "keep must be one of .* got 3"),
        ([1], TypeError, r"got \[1\]"),
        (None, TypeError, "got None"),
    ],
)
def test_a_bad_keep_changes_nothing(keep, error, match):
    model = adapted()
    with pytest.raises(error, match=match):
        prune(model, keep)
    assert len(on(model)) == 6


@pytest.mark.parametrize("count", [0, 4, -1, 1.0, True, None])
def test_a_bad_count(count):
    with pytest.raises(ValueError, match="count must be an integer from 1 to 3"):
        best(SHAPLEY, count)


def test_models_that_cannot_be_pruned():
    for call in (lambda model: prune(model, "low"), lambda model: magnitude(model, 0.5)):
        with pytest.raises(ValueError, match="Net has none"):
            call(Net(1))
        with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
            call(None)
        model = adapted()
        adapters(model)["blocks.1.q"].merge()
        with pytest.raises(ValueError, match=r"merged: \['blocks.1.q'\]"):
            call(model)


# whole adapters: cost and saved tensors


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def costs(run):
    """The operations of a call and the bytes that it saves for the backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Operations() as operations, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return operations.names, sum(kept.values())


def test_a_pruned_adapter_equals_the_frozen_linear_in_result_operations_and_memory():
    model = adapted().train()
    prune(model, ["v"])
    layer, x = adapters(model)["blocks.1.q"], torch.randn(5, 4, requires_grad=True)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    frozen = costs(lambda: F.linear(x, layer.weight, layer.bias))
    assert costs(lambda: layer(x)) == frozen
    layer.enabled = True
    operations, kept = costs(lambda: layer(x))
    assert len(operations) > len(frozen[0])
    assert kept > frozen[1]


def test_pruned_adapters_are_not_saved(tmp_path):
    model, x = adapted(), torch.randn(5, 4)
    with prune(model, "every-other"):
        expected = model(x)
        save_adapter(model, tmp_path)
    torch.manual_seed(0)
    again = Net(3)
    load_adapter(again, tmp_path)
    assert list(adapters(again)) == ["blocks.0.q", "blocks.0.v", "blocks.2.q", "blocks.2.v"]
    assert torch.equal(again.eval()(x), expected)
    assert not torch.allclose(model(x), expected)


def test_pruned_adapters_stay_off_while_training_goes_on():
    model = adapted().train()
    with prune(model, "low"):
        coto = CoTo(model, 4, initial_p=0.0)
        for _ in range(4):
            assert coto.mask.tolist() == [True, False, False]
            coto.step()


# whole adapters: undo


def test_undo_restores_the_previous_switches():
    model = adapted()
    layers = list(adapters(model).values())
    rows = torch.tensor([True, False])
    layers[0].enabled, layers[2].enabled = False, rows
    before = [layer.enabled for layer in layers]
    pruning = prune(model, ["2.v"])
    assert on(model) == ["blocks.2.v"]
    assert list(pruning.removed) == ["blocks.0.v", "blocks.1.q", "blocks.1.v", "blocks.2.q"]
    for _ in range(2):
        pruning.undo()
        assert all(layer.enabled is value for layer, value in zip(layers, before, strict=True))
        layers[1].enabled = before[1] = False  # undo keeps later changes by the user


@pytest.mark.parametrize("order", [(1, 0), (0, 1)], ids=["reverse", "as-made"])
def test_nested_prunings_end_where_they_began(order):
    model = adapted(6)
    prunings = [prune(model, "every-other"), prune(model, ["q"])]
    assert on(model) == ["blocks.0.q", "blocks.2.q", "blocks.4.q"]
    prunings[order[0]].undo()
    if order == (1, 0):
        assert on(model) == [f"blocks.{i}.{key}" for i in (0, 2, 4) for key in "qv"]
    prunings[order[1]].undo()
    assert len(on(model)) == 12
    with prune(model, "low"), pytest.raises(ValueError, match=r"none of 12 \(4 that it keeps are already disabled\)"):
        prune(model, "high")


@pytest.mark.parametrize("call", [lambda m: prune(m, "low"), lambda m: magnitude(m, 0.4)], ids=["prune", "magnitude"])
class TestUndo:
    def test_also_when_the_block_raises(self, call):
        model, x = adapted(), torch.randn(5, 4)
        before, expected = bits(model), model(x)
        with pytest.raises(KeyError), call(model) as pruning:  # noqa: PT012
            assert sum(pruning.removed.values()) == (96 if len(on(model)) == 2 else round(0.4 * 144))
            assert not torch.equal(model(x), expected)
            raise KeyError
        assert torch.equal(model(x), expected)
        assert same(bits(model), before)
        assert len(on(model)) == 6

    def test_refused_where_the_adapters_are_gone_or_merged(self, call):
        model = adapted()
        pruning = call(model)
        layers = adapters(model)
        layers["blocks.1.q"].merge()
        with pytest.raises(RuntimeError, match=r"unmerged adapters.*merged: \['blocks.1.q'\]"):
            pruning.undo()
        layers["blocks.1.q"].unmerge()
        model.blocks[2] = nn.Identity()
        state = bits(model)
        with pytest.raises(RuntimeError, match=r"no longer has \['blocks.2.q', 'blocks.2.v'\]"):
            pruning.undo()
        assert same(bits(model), state)
        eject(model)
        with pytest.raises(RuntimeError, match=r"no longer has"):
            pruning.undo()

    def test_of_a_wrapped_model_reaches_the_model_inside(self, call):
        model = adapted()
        before = bits(model)
        pruning = call(torch.compile(model, backend="eager"))
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
        pruning.undo()
        assert len(on(model)) == 6
        model.blocks[0] = model.blocks[0]._orig_mod
        assert same(bits(model), before)

    def test_leaves_copies_modes_and_random_numbers_alone(self, call):
        model = adapted().train()
        model.blocks[1].eval()
        modes = [module.training for module in model.modules()]
        state = torch.random.get_rng_state()
        with call(model):
            clone = copy.deepcopy(model)
            held = bits(clone)
        assert same(bits(clone), held)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.random.get_rng_state(), state)


# entries


def entries(model, names=None):
    """A and B of the adapters, flat, in module order."""
    layers = adapters(model)
    return torch.cat([p.detach().flatten() for n in names or layers for p in (layers[n].lora_a, layers[n].lora_b)])


def smallest(values, count):
    """The entries to prune, by a stable sort of the magnitudes."""
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[values.abs().argsort(stable=True)[:count]] = True
    return mask


def coarse(model):
    """Few distinct magnitudes of both signs, with zeros and infinities, so that there are many ties."""
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, torch.inf, 2**-149])
    with torch.no_grad():
        for layer in adapters(model).values():
            for p in (layer.lora_a, layer.lora_b):
                p.copy_(values[torch.randint(0, len(values), p.shape, generator=generator)])
    return model


@pytest.mark.parametrize("sparsity", [0, 0.0, 1 / 144, 0.25, 0.5, 0.731, 1, 1.0])
@pytest.mark.parametrize("make", [adapted, lambda: coarse(adapted())], ids=["distinct", "ties"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_exactly_the_smallest_entries_are_zeroed(scope, make, sparsity):
    model = make()
    for pool in [None] if scope == "global" else [[name] for name in adapters(model)]:
        before = entries(model, pool)
        count = round(sparsity * len(before))
        expected = before.masked_fill(smallest(before, count), 0)
        pruned = copy.deepcopy(model)
        pruning = magnitude(pruned, sparsity, scope)
        assert torch.equal(entries(pruned, pool), expected)
        assert sum(pruning.removed[name] for name in pool or pruning.removed) == count
        pruning.undo()
        assert same(bits(pruned), bits(model))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=12, max_size=12), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_any_values_and_sparsities(values, sparsity):
    model = nn.Sequential(nn.Linear(3, 3))
    layer = inject(model, rank=2)["0"]
    with torch.no_grad():
        layer.lora_a.copy_(torch.tensor(values[:6]).view(2, 3))
        layer.lora_b.copy_(torch.tensor(values[6:]).view(3, 2))
    before = entries(model)
    with magnitude(model, sparsity):
        assert torch.equal(entries(model), before.masked_fill(smallest(before, round(sparsity * 12)), 0))
    assert torch.equal(entries(model).view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_and_strides(dtype):
    model = adapted().to(dtype)
    for layer in adapters(model).values():
        layer.lora_a.data = layer.lora_a.data.T.contiguous().T
    adapters(model)["blocks.0.q"].to(torch.float64)  # magnitudes of two dtypes compare by value
    before = entries(model)
    assert before.dtype == torch.float64
    with magnitude(model, 0.5):
        assert torch.equal(entries(model), before.masked_fill(smallest(before, 72), 0))
    assert torch.equal(entries(model), before)


def test_float64_magnitudes_that_float32_cannot_tell_apart():
    model = adapted().double()
    with torch.no_grad():
        for layer in adapters(model).values():
            for p in (layer.lora_a, layer.lora_b):
                p.copy_(1 + 1e-12 * torch.randn(p.shape, dtype=p.dtype))
    before = entries(model)
    with magnitude(model, 0.5):
        assert torch.equal(entries(model), before.masked_fill(smallest(before, 72), 0))


@pytest.mark.parametrize("order", [(1, 0), (0, 1)], ids=["reverse", "as-made"])
def test_nested_magnitudes_end_where_they_began(order):
    model = coarse(adapted())
    before = bits(model)
    prunings = [magnitude(model, 0.3), magnitude(model, 0.6)]
    assert (entries(model) == 0).sum() == round(0.6 * 144)
    for index in order:
        prunings[index].undo()
    assert same(bits(model), before)


def test_adapters_that_are_off_are_neither_zeroed_nor_counted():
    model = adapted()
    with prune(model, "low"):
        pruning = magnitude(model, 1.0)
        assert pruning.removed == {"blocks.0.q": 24, "blocks.0.v": 24}
    assert (entries(model) == 0).sum() == 48
    pruning.undo()
    with adapter_mask(model, False), pytest.raises(ValueError, match="all of them are disabled"):
        magnitude(model, 0.5)


def test_undo_refuses_weights_that_were_trained_loaded_or_cast_afterwards():
    model = adapted().train()
    pruning = magnitude(model, 0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    state = bits(model)
    with pytest.raises(RuntimeError, match="as pruning left it; it was trained or loaded since"):
        pruning.undo()
    assert same(bits(model), state)
    model = adapted()
    pruning = magnitude(model, 0.5)
    model.double()
    with pytest.raises(RuntimeError, match=r"in its dtype torch.float32 and shape"):
        pruning.undo()
    model.float()
    pruning.undo()
    assert torch.equal(entries(model), entries(adapted()))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((-0.1,), r"sparsity must be a number in \[0, 1\]; got -0.1"),
        ((1.1,), "got 1.1"),
        ((float("nan"),), "got nan"),
        ((True,), "got True"),
        (("0.5",), "got '0.5'"),
        ((0.5, "module"), r"scope must be one of \('global', 'layer'\); got 'module'"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        magnitude(adapted(), *arguments)


def test_bad_weights_change_nothing():
    model = adapted()
    with torch.no_grad():
        adapters(model)["blocks.2.v"].lora_b[0, 0] = torch.nan
    before = bits(model)
    with pytest.raises(ValueError, match=r"no NaN in A or B; blocks.2.v has"):
        magnitude(model, 0.5)
    assert same(bits(model), before)
    with pytest.raises(ValueError, match="on the meta device"):
        magnitude(adapted().to("meta"), 0.5)
