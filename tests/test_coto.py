"""CoTo in one process: masks, gates, resuming, and the adapters that an attached optimizer skips."""

import copy
import io
import json
import logging
import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cotolora import (
    CoTo,
    CoToLoRALinear,
    Schedule,
    activation_probability,
    adapter_mask,
    adapter_parameters,
    adapters,
    inject,
    pruning,
    sample_mask,
)
from cotolora.backends import autograd
from tests.support import captured, training

WIDTH, BLOCKS = 6, 5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.down(torch.sigmoid(self.up(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def make(seed=0, targets="all-linear"):
    """A small model whose adapters have a nonzero B."""
    torch.manual_seed(seed)
    model = Net()
    for layer in inject(model, targets, rank=2).values():
        nn.init.normal_(layer.lora_b)
    return model.train()


def batch(step=0):
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1000 + step))


def backward(model, step=0):
    model(batch(step)).square().mean().backward()


def gates(model):
    return [bool(layer.gate) for layer in adapters(model).values()]


def weights(model):
    return [p.detach().clone() for p in adapter_parameters(model)]


def all_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def expected_mask(step, total, *, groups=BLOCKS, seed=0, **schedule):
    return sample_mask(groups, activation_probability(step, total, **schedule), seed=seed, step=step)


# masks and gates


def test_the_constructor_applies_step_zero():
    model = make()
    coto = CoTo(model, 20, seed=4)
    assert coto.current_step == 0
    assert coto.p == 0.1
    assert torch.equal(coto.mask, expected_mask(0, 20, seed=4))
    assert gates(model) == coto.mask.repeat_interleave(2).tolist()


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize(
    "schedule", [{}, {"initial_p": 0.0, "ramp": 0.5, "shape": "sine"}, {"shape": "constant", "initial_p": 0.5}]
)
def test_masks_are_those_of_the_pure_function_and_gates_follow(schedule, kind):
    model = make()
    coto = CoTo(model, 20, seed=4, gates=kind, **schedule)
    for step in range(25):
        assert coto.current_step == step
        assert coto.p == activation_probability(step, 20, **schedule)
        assert torch.equal(coto.mask, expected_mask(step, 20, seed=4, **schedule))
        assert coto.mask.device.type == "cpu"
        assert coto.mask.dtype == torch.bool
        assert gates(model) == coto.mask.repeat_interleave(2).tolist()
        coto.step()


def test_set_step_jumps_to_any_step_and_step_continues_from_there():
    coto = CoTo(make(), 20)
    for step in (13, 2, 2, 500, 0):
        coto.set_step(step)
        assert coto.current_step == step
        assert torch.equal(coto.mask, expected_mask(step, 20))
    coto.set_step(7)
    coto.step()
    assert coto.current_step == 8
    assert torch.equal(coto.mask, expected_mask(8, 20))


@pytest.mark.parametrize("kind", ["host", "device"])
def test_gates_change_only_where_they_should(kind):
    model = make()
    coto = CoTo(model, 20, gates=kind)
    optimizer = torch.optim.AdamW(adapter_parameters(model))
    coto.attach(optimizer)
    for _ in range(8):
        before = gates(model)
        model.eval()
        model(batch())
        model.train()
        backward(model)
        with adapter_mask(model, False):
            model(batch())
        optimizer.step()
        optimizer.zero_grad()
        coto.state_dict()
        assert gates(model) == before
        coto.step()


@pytest.mark.parametrize("kind", ["host", "device"])
def test_every_adapter_is_on_in_eval(kind):
    model = make()
    coto = CoTo(model, 20, gates=kind)
    assert not coto.mask.all()
    off = model(batch())
    model.eval()
    everything_on = model(batch())
    assert not torch.allclose(off, everything_on)
    coto.finish()
    torch.testing.assert_close(model.train()(batch()), everything_on)


@pytest.mark.parametrize(
    ("unit", "groups"),
    [
        ("layer", {f"blocks.{i}": [f"blocks.{i}.up", f"blocks.{i}.down"] for i in range(BLOCKS)}),
        ("module", {f"blocks.{i}.{leaf}": [f"blocks.{i}.{leaf}"] for i in range(BLOCKS) for leaf in ("up", "down")}),
        (
            lambda name: name.rpartition(".")[2],
            {leaf: [f"blocks.{i}.{leaf}" for i in range(BLOCKS)] for leaf in ("up", "down")},
        ),
    ],
    ids=["layer", "module", "callable"],
)
def test_units(unit, groups):
    model = make()
    coto = CoTo(model, 20, unit=unit)
    assert coto.groups == groups
    assert list(coto.groups) == list(groups)
    layers = adapters(model)
    for step in range(20):
        assert torch.equal(coto.mask, expected_mask(step, 20, groups=len(groups)))
        for names, on in zip(groups.values(), coto.mask.tolist(), strict=True):
            assert {layers[name].gate for name in names} == {on}
        coto.step()


@pytest.mark.parametrize("tilt", [1.0, 0.5, 0.0, -0.4, -1.0])
def test_tilt_gives_each_group_its_own_rate(tilt):
    """A positive tilt drops high layers more often. With at_least_one=False, rates are the plain probabilities."""
    p, draws = 0.4, 3000
    coto = CoTo(make(), 10, initial_p=p, shape="constant", tilt=tilt, at_least_one=False)
    on = torch.zeros(BLOCKS)
    for step in range(draws):
        coto.set_step(step)
        on += coto.mask
    for l in range(BLOCKS):
        rate = p * (1 - tilt * (1 - p) * (2 * l / (BLOCKS - 1) - 1))
        assert abs(on[l] - draws * rate) < 4 * math.sqrt(draws * rate * (1 - rate)), f"group {l}: {on / draws}"


def test_tilt_has_no_effect_if_all_are_on_or_there_is_one_group():
    coto = CoTo(make(), 20, tilt=1.0)
    coto.set_step(15)
    assert coto.mask.all()
    alone = CoTo(make(targets=["blocks.3.up"]), 20, tilt=1.0, at_least_one=False)
    for step in range(20):
        alone.set_step(step)
        assert torch.equal(alone.mask, sample_mask(1, alone.p, seed=0, step=step, at_least_one=False))


@pytest.mark.parametrize("tilt", [0.0, 1.0, -1.0])
def test_at_least_one_is_on_also_at_zero(tilt):
    coto = CoTo(make(), 10, initial_p=0.0, shape="constant", tilt=tilt)
    seen = torch.zeros(BLOCKS)
    for step in range(600):
        coto.set_step(step)
        assert coto.mask.sum() == 1
        seen += coto.mask
    # the limit of p_i / Σp as p falls to 0
    shares = torch.tensor([1 - tilt * (2 * l / (BLOCKS - 1) - 1) for l in range(BLOCKS)]) / BLOCKS
    deviation = (seen - 600 * shares).abs()
    assert (deviation <= 4 * (600 * shares * (1 - shares)).sqrt()).all(), seen


def test_without_at_least_one_every_adapter_may_be_off():
    model = make()
    coto = CoTo(model, 10, initial_p=0.0, at_least_one=False)
    assert not coto.mask.any()
    backward(model)  # a valid step in which nothing is trained
    assert all(p.grad is None for p in adapter_parameters(model))


@pytest.mark.parametrize("how", ["enabled", "mask", "tensor"])
def test_at_least_one_counts_enabled_adapters(how):
    model = make()
    coto = CoTo(model, 10, initial_p=0.0, shape="constant")
    context = adapter_mask(model, [False, True, True, False, False], unit="layer") if how == "mask" else None
    if context is not None:
        context.__enter__()
    else:
        value = False if how == "enabled" else torch.tensor(0)
        for i in (0, 3, 4):
            model.blocks[i].up.enabled = model.blocks[i].down.enabled = value
    model.blocks[1].up.enabled = False  # its group still has the other
    seen = set()
    for step in range(30):
        coto.set_step(step)
        assert coto.mask.sum() == 1
        assert torch.equal(coto.mask[[1, 2]], sample_mask(2, 1e-30, seed=0, step=step))
        seen.add(coto.mask.nonzero().item())
    assert seen == {1, 2}
    if context is not None:
        context.__exit__(None, None, None)


def test_a_pruning_still_in_effect_is_named(caplog):
    model = make()
    pruned = pruning.prune(model, "low")
    CoTo(model, 10).step()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        f"{len(pruned.removed)} of {len(adapters(model))} adapters are disabled (`enabled`), so they"
    )
    assert repr(next(iter(pruned.removed))) in line
    pruned.undo()
    caplog.clear()
    CoTo(model, 10).step()
    assert not caplog.records


def test_with_every_adapter_disabled_none_is_on():
    model = make()
    coto = CoTo(model, 10)
    with adapter_mask(model, False):
        for _ in range(12):
            coto.step()
            assert not coto.mask.any()
    coto.step()
    assert coto.mask.all()


def test_a_run_reads_and_changes_no_random_state():
    def masks_of_a_run(disturb):
        model = make()
        before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        coto = CoTo(model, 12)
        masks = []
        for step in range(12):
            masks.append(coto.mask)
            coto.step()
            if disturb:
                for seed in (torch.manual_seed, np.random.seed, random.seed):
                    seed(step)
        coto.load_state_dict(coto.state_dict())
        coto.finish()
        if not disturb:
            assert torch.equal(torch.random.get_rng_state(), before[0])
            assert np.array_equal(np.random.get_state()[1], before[1])
            assert random.getstate() == before[2]
        return torch.stack(masks)

    assert torch.equal(masks_of_a_run(False), masks_of_a_run(True))


def test_the_default_device_has_no_effect():
    model = make()
    with torch.device("meta"):
        for kind in ("host", "device"):
            coto = CoTo(model, 20, gates=kind)
            coto.step()
            assert coto.mask.device.type == "cpu"
            assert torch.equal(coto.mask, expected_mask(1, 20))
            coto.finish()


# finish, and a second run on the same model


@pytest.mark.parametrize("kind", ["host", "device"])
def test_finish_switches_everything_on_and_removes_the_hook(kind):
    model = make()
    coto = CoTo(model, 20, gates=kind)
    assert len(model._forward_hooks) == 1
    coto.finish()
    assert coto.p == 1.0
    assert coto.mask.all()
    assert all(gates(model))
    assert not model._forward_hooks
    coto.finish()
    coto.set_step(1)  # continuing is allowed and needs the hook again
    coto.set_step(2)
    assert len(model._forward_hooks) == 1
    assert torch.equal(coto.mask, expected_mask(2, 20))


@pytest.mark.parametrize("kinds", [("device", "host"), ("host", "device"), ("device", "device")], ids="-then-".join)
def test_a_second_run_takes_over(kinds):
    model = make()
    first = CoTo(model, 20, seed=1, gates=kinds[0])
    old = [layer.gate for layer in adapters(model).values()]
    second = CoTo(model, 20, seed=2, gates=kinds[1])
    assert len(model._forward_hooks) == 1
    assert first.mask.all()
    for layer in adapters(model).values():
        assert isinstance(layer.gate, bool) == (kinds[1] == "host")
        assert isinstance(layer.gate, bool) == ("_gate" not in dict(layer.named_buffers()))
    assert gates(model) == second.mask.repeat_interleave(2).tolist()
    if kinds[0] == "device":
        assert all(gate.item() == 1 for gate in old), "the new gates are tensors of their own"


def test_the_optimizer_of_an_earlier_run_no_longer_skips_adapters():
    model = make()
    optimizer = torch.optim.AdamW(adapter_parameters(model))
    first = CoTo(model, 20)
    first.attach(optimizer)
    assert not first.mask.all()
    second = CoTo(model, 20)
    second.attach(optimizer)
    second.set_step(20)
    backward(model)
    before = weights(model)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_an_earlier_run_has_nothing_to_say_of_adapters_that_were_off(caplog):
    model = make()
    optimizer = torch.optim.AdamW(adapter_parameters(model))
    CoTo(model, 20, seed=1).attach(optimizer)
    second = CoTo(model, 20, seed=2)
    second.attach(optimizer)
    assert not second.mask.all()
    backward(model)
    optimizer.step()
    assert not caplog.records


@pytest.mark.parametrize("kind", ["made-before-inject", "of-another-model", "of-a-head", "of-adapters", "of-more"])
def test_an_optimizer_that_trains_nothing_of_the_model_is_told_of(kind, caplog):
    plain = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 2))
    early = torch.optim.AdamW(plain.parameters())
    inject(plain, ["0", "1", "2"], rank=1, trainable=["3"])
    early.param_groups[0]["params"] = early.param_groups[0]["params"][:6]  # without what still trains
    others = {
        "of-another-model": make().parameters(),
        "of-a-head": plain[3].parameters(),
        "of-adapters": adapter_parameters(plain),
        "of-more": [nn.Parameter(torch.ones(1)), *plain.parameters()],
    }
    optimizer = early if kind == "made-before-inject" else torch.optim.AdamW(others[kind])
    CoTo(plain, 20).attach(optimizer)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (kind in ("made-before-inject", "of-another-model"))
    assert all(text.startswith("AdamW holds no parameter of the model that trains") for text in told)


@pytest.mark.parametrize("way", ["outer-after-inner", "inner-after-outer", "part-after-whole", "whole-after-part"])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_the_last_run_sets_the_gates_for_any_modules(kind, way):
    model = make()
    modules = {"outer": nn.ModuleDict({"model": model}), "inner": model, "whole": model, "part": model.blocks[:3]}
    late, _, early = way.split("-")
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.1)
    first = CoTo(modules[early], 10, seed=1, gates=kind, unit="module")
    first.attach(optimizer)
    assert not first.mask.all()
    second = CoTo(modules[late], 10, seed=2, gates=kind, unit="module")
    second.attach(optimizer)
    assert first.mask.all()
    assert all(sum(1 for _ in module._forward_hooks) <= 1 for module in model.modules())
    switched = {id(layer) for layer in adapters(modules[late]).values()}
    for step in range(5):
        on = iter(second.mask.tolist())
        expected = [next(on) if id(layer) in switched else True for layer in adapters(model).values()]
        assert gates(model) == expected
        assert moved(model, second, optimizer, lambda step=step: zeroed(model, optimizer, step)) == expected
        second.step()
    first.finish()  # late, when the gates belong to the other run
    assert gates(model) == expected_gates(second, model)

    first.step()  # the first run takes over again, so the other is finished
    assert second.mask.all()
    assert gates(model) == expected_gates(first, model)
    first.finish()
    assert all(gates(model))
    assert not any(module._forward_hooks for module in (*modules["outer"].modules(), modules["part"]))


def expected_gates(coto, model):
    on = dict(zip(coto._layers.values(), coto.mask.tolist(), strict=True))
    by_layer = {id(switch.layer): value for switch, value in on.items()}
    return [by_layer.get(id(layer), True) for layer in adapters(model).values()]


def test_runs_on_disjoint_parts_are_independent():
    model = make()
    low, high = CoTo(model.blocks[:3], 20, seed=1), CoTo(model.blocks[3:], 20, seed=2)
    for _ in range(5):
        assert gates(model) == torch.cat([low.mask, high.mask]).repeat_interleave(2).tolist()
        low.step()
        high.step()
    low.finish()
    assert gates(model) == [True] * 6 + high.mask.repeat_interleave(2).tolist()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_a_copied_model_has_a_run_of_its_own(kind, how):
    model = make()
    coto = CoTo(model, 20, gates=kind)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    before = gates(other)
    assert before == gates(model)
    coto.finish()
    assert gates(other) == before
    second = CoTo(nn.ModuleDict({"model": other}), 20)  # on a wrapper, not on the module with the copied run's hook
    assert len(other._forward_hooks) == 1
    second = CoTo(other, 20)
    second.set_step(1)
    assert len(other._forward_hooks) == 1
    assert all(gates(model))


# resume


def through_torch(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_json(state):
    return json.loads(json.dumps(state))


def run(model, coto, optimizer, steps):
    masks = []
    for step in steps:
        masks.append(coto.mask)
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        coto.step()
    return masks


OPTIONS = {"initial_p": np.float64(0.2), "ramp": 0.6, "shape": "exponential", "tilt": 0.5, "seed": 7, "unit": "module"}


@pytest.mark.parametrize("keep", [through_torch, through_json])
@pytest.mark.parametrize("kinds", [("host", "host"), ("device", "device"), ("host", "device")], ids="-then-".join)
def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(kinds, keep):
    def start(kind, **options):
        model = make()
        optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.05, weight_decay=0.1)
        coto = CoTo(model, gates=kind, **options)
        coto.attach(optimizer)
        return model, coto, optimizer

    model, coto, optimizer = start(kinds[0], total_steps=12, **OPTIONS)
    masks = run(model, coto, optimizer, range(12))
    assert not torch.stack(masks[5:7]).all(), "the run must be interrupted where masks matter"

    half, coto, optimizer = start(kinds[0], total_steps=12, **OPTIONS)
    first = run(half, coto, optimizer, range(5))
    state = keep(coto.state_dict())

    resumed, other, another = start(kinds[1], total_steps=99, unit="module")  # settings come with the state
    resumed.load_state_dict(half.state_dict())
    another.load_state_dict(optimizer.state_dict())
    other.load_state_dict(state)
    assert torch.equal(other.mask, coto.mask)
    assert other.p == coto.p
    assert other.state_dict() == coto.state_dict()
    second = run(resumed, other, another, range(5, 12))

    assert torch.equal(torch.stack(first + second), torch.stack(masks))
    assert all_equal(weights(resumed), weights(model))


def test_loading_applies_the_mask_at_once_and_after_finish():
    model = make()
    state = {**CoTo(model, 20, seed=3).state_dict(), "step": 4}
    coto = CoTo(model, 20)
    coto.finish()
    coto.load_state_dict(state)
    assert torch.equal(coto.mask, expected_mask(4, 20, seed=3))
    assert gates(model) == coto.mask.repeat_interleave(2).tolist()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda state: None, id="none"),
        pytest.param(lambda state: list(state), id="a-list"),
        pytest.param(lambda state: {}, id="empty"),
        pytest.param(lambda state: {key: value for key, value in state.items() if key != "seed"}, id="key-missing"),
        pytest.param(lambda state: {**state, "extra": 1}, id="key-too-many"),
        pytest.param(lambda state: {**state, 3: 1}, id="key-of-another-type"),
        pytest.param(lambda state: {**state, "groups": state["groups"][:-1]}, id="fewer-groups"),
        pytest.param(lambda state: {**state, "groups": state["groups"][::-1]}, id="groups-in-another-order"),
        pytest.param(lambda state: {**state, "groups": None}, id="no-groups"),
        pytest.param(lambda state: {**state, "seed": 9, "tilt": 0.5, "step": -1}, id="other-settings-and-a-bad-step"),
        *[
            pytest.param(lambda state, key=key, value=value: {**state, key: value}, id=f"{key}={value!r}")
            for key, values in {
                "step": (-1, 1.0, None, True, 2**64),
                "total_steps": (0, None, 1.5),
                "initial_p": (2, None, "x", math.nan),
                "ramp": (0, None),
                "shape": ("none", None),
                "tilt": (1.5, "x", None, math.nan),
                "seed": (-1, 1.5, None),
                "at_least_one": ("yes", None, 1),
            }.items()
            for value in values
        ],
    ],
)
def test_a_bad_state_changes_nothing(change):
    model = make()
    coto = CoTo(model, 20, seed=3)
    coto.set_step(2)
    before = coto.state_dict(), coto.mask, coto.p, gates(model)
    with pytest.raises(ValueError, match="must be"):
        coto.load_state_dict(change(coto.state_dict()))
    assert (coto.state_dict(), coto.mask, coto.p, gates(model)) == before
    coto.step()
    assert torch.equal(coto.mask, expected_mask(3, 20, seed=3))


def test_a_bad_step_changes_nothing():
    model = make()
    coto = CoTo(model, 20)
    coto.set_step(3)
    before = coto.state_dict(), coto.mask, coto.p, gates(model)
    for step in (-1, 1.0, True, None, 2**64):
        with pytest.raises(ValueError, match=r"^step must be"):
            coto.set_step(step)
    assert (coto.state_dict(), coto.mask, coto.p, gates(model)) == before


# device gates


def test_device_gates_are_int32_buffers_written_in_place():
    model = make()
    coto = CoTo(model, 20, gates="device")
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("._gate")}
    assert len(buffers) == 2 * BLOCKS
    assert {(buffer.dtype, buffer.dim()) for buffer in buffers.values()} == {(torch.int32, 0)}
    assert not any("_gate" in key for key in model.state_dict())
    addresses = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    for step in (1, 2, 19, 3):
        coto.set_step(step)
        coto.load_state_dict(coto.state_dict())
    coto.finish()
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == addresses
    assert all(buffer.item() == 1 for buffer in buffers.values())


def test_casting_the_model_leaves_device_gates_integers():
    model = make()
    coto = CoTo(model, 20, gates="device")
    for cast in (model.half, model.bfloat16, model.double, lambda: model.to(torch.float16)):
        cast()
        assert {layer.gate.dtype for layer in adapters(model).values()} == {torch.int32}
        coto.step()
        assert gates(model) == coto.mask.repeat_interleave(2).tolist()


def test_an_adapter_that_is_off_has_zeros_by_device_gate_and_none_by_host_gate():
    for kind in ("device", "host"):
        model = make()
        coto = CoTo(model, 20, gates=kind)
        backward(model)
        for layer, on in zip(adapters(model).values(), coto.mask.repeat_interleave(2).tolist(), strict=True):
            for p in (layer.lora_a, layer.lora_b):
                if on:
                    assert p.grad.any()
                elif kind == "device":
                    assert not p.grad.any()
                else:
                    assert p.grad is None
        assert not coto.mask.all()


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
    "adamw-foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1, fused=True),
    "adam-with-decay": lambda parameters: torch.optim.Adam(parameters, lr=0.05, weight_decay=0.1),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_device_gates_train_as_host_gates_do(name):
    ends = []
    for kind in ("host", "device"):
        model = make()
        coto = CoTo(model, 14, gates=kind)
        optimizer = OPTIMIZERS[name](adapter_parameters(model))
        coto.attach(optimizer)
        run(model, coto, optimizer, range(14))
        ends.append(weights(model))
    assert all_equal(*ends)


# attach


def state_of(optimizer, p):
    return {
        key: torch.as_tensor(value).clone() for key, value in optimizer.state.get(p, {}).items() if value is not None
    }


def moved(model, coto, optimizer, step):
    """Runs `step`; returns for every adapter whether its weights or its optimizer state changed."""
    before = [(p.detach().clone(), state_of(optimizer, p)) for p in adapter_parameters(model)]
    step()
    changed = []
    for p, (value, state) in zip(adapter_parameters(model), before, strict=True):
        now = state_of(optimizer, p)
        changed.append(
            not torch.equal(p, value)
            or now.keys() != state.keys()
            or any(not torch.equal(now[key], state[key]) for key in now)
        )
    pairs = [{a, b} for a, b in zip(changed[::2], changed[1::2], strict=True)]
    assert all(len(pair) == 1 for pair in pairs), "A and B go together"
    return [pair.pop() for pair in pairs]


def on_by_adapter(coto):
    return coto.mask.repeat_interleave(2).tolist()


def plain(model, optimizer, step):
    backward(model, step)
    optimizer.step()
    optimizer.zero_grad()


def zeroed(model, optimizer, step):
    backward(model, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def test_host_gates_need_no_attach_in_one_process():
    model = make()
    coto = CoTo(model, 10)
    optimizer = OPTIMIZERS["adamw"](adapter_parameters(model))
    for step in range(10):
        assert moved(model, coto, optimizer, lambda step=step: plain(model, optimizer, step)) == on_by_adapter(coto)
        coto.step()


def test_removing_the_handle_undoes_attach():
    model = make()
    coto = CoTo(model, 10, gates="device")
    optimizer = OPTIMIZERS["adamw"](adapter_parameters(model))
    handle = coto.attach(optimizer)
    assert moved(model, coto, optimizer, lambda: plain(model, optimizer, 0)) == on_by_adapter(coto)
    handle.remove()
    assert all(moved(model, coto, optimizer, lambda: plain(model, optimizer, 1)))
    assert not coto.mask.all()


def test_attach_accepts_accelerates_optimizer():
    accelerate = pytest.importorskip("accelerate")
    model = make()
    coto = CoTo(model, 10, gates="device")
    optimizer = OPTIMIZERS["adamw"](adapter_parameters(model))
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    handle = coto.attach(wrapped)

    def step():
        backward(model)
        wrapped.step()
        wrapped.zero_grad()

    assert moved(model, coto, optimizer, step) == on_by_adapter(coto)
    handle.remove()
    assert all(moved(model, coto, optimizer, step))


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize("part", ["whole", "blocks"])
def test_training_in_eval_mode_loses_no_gradients(part, kind):
    """In eval mode every adapter is on, so every adapter trains; single blocks can be in eval mode."""
    model = make()
    coto = CoTo(model, 10, gates=kind)
    optimizer = OPTIMIZERS["adamw"](adapter_parameters(model))
    coto.attach(optimizer)
    off = (~coto.mask).nonzero().flatten().tolist()
    assert len(off) > 1
    expected = on_by_adapter(coto)
    if part == "whole":
        model.eval()
        expected = [True] * len(expected)
    else:
        model.blocks[off[0]].eval()
        expected[2 * off[0]] = expected[2 * off[0] + 1] = True
    assert moved(model, coto, optimizer, lambda: plain(model, optimizer, 0)) == expected


@pytest.mark.parametrize("value", [False, torch.tensor(0), torch.zeros(3, dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_disabled_adapter_is_unchanged(mode, value):
    model = make()
    coto = CoTo(model, 10, initial_p=1.0)
    optimizer = OPTIMIZERS["adamw"](adapter_parameters(model))
    coto.attach(optimizer)
    model.train(mode)
    model.blocks[2].up.enabled = value
    expected = [name != "blocks.2.up" for name in adapters(model)]
    assert moved(model, coto, optimizer, lambda: zeroed(model, optimizer, 0)) == expected
    assert moved(model, coto, optimizer, lambda: zeroed(model, optimizer, 1)) == expected


def test_attach_does_not_affect_other_parameters():
    model = make()
    head = nn.Linear(WIDTH, 1)
    coto = CoTo(model, 10)
    optimizer = torch.optim.AdamW([*adapter_parameters(model), *head.parameters()])
    coto.attach(optimizer)
    before = head.weight.detach().clone()
    head(model(batch())).mean().backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)


# saving work


def graph_nodes(tensor):
    return [type(node).__name__ for node in training.graph_nodes(tensor)]


def assert_stops_below_the_lowest(model, coto):
    on = coto.mask.nonzero().flatten().tolist()
    nodes = graph_nodes(model(batch()))
    assert sum("LowRankLinear" in node for node in nodes) == 2 * len(on), "an adapter that is off launches nothing"
    assert sum("Tanh" in node for node in nodes) == BLOCKS - on[0], "blocks below the lowest active one have no graph"
    assert sum("AccumulateGrad" in node for node in nodes if "Join" not in node) >= 4 * len(on)
    return on[0]


def test_backward_stops_below_the_lowest_active_adapter():
    model = make()
    coto = CoTo(model, 30)
    lowest = []
    for _ in range(30):
        lowest.append(assert_stops_below_the_lowest(model, coto))
        coto.step()
    assert len(set(lowest)) > 2


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_joining_the_graph_for_ddp_keeps_the_early_stop(one_rank):
    model = make()
    coto = CoTo(model, 20)
    for _ in range(10):
        joined = any("Join" in node for node in graph_nodes(model(batch())))
        assert joined == (not coto.mask.all().item())
        assert_stops_below_the_lowest(model, coto)
        coto.step()


def test_joining_gives_zero_gradients_to_off_adapters_and_changes_nothing_else(one_rank):
    gradients = []
    for hooked in (True, False):
        model = make()
        coto = CoTo(model, 20)
        if not hooked:
            model._forward_hooks.clear()
        y = model(batch())
        y.square().mean().backward()
        gradients.append([p.grad for p in adapter_parameters(model)])
    for joined, alone in zip(*gradients, strict=True):
        assert torch.equal(joined, torch.zeros_like(joined) if alone is None else alone)
    assert any(alone is None for alone in gradients[1])
    assert not coto.mask.all()


def test_joining_keeps_in_place_errors_and_shared_tensors(one_rank):
    class Wrapper(nn.Module):
        def __init__(self, inner, output):
            super().__init__()
            self.inner, self.output = inner, output

        def forward(self, x):
            return self.output(self.inner(x))

    model = Wrapper(make(), lambda x: x)  # ends in a tanh, whose backward needs its output
    CoTo(model, 20)
    y = model(batch())
    y /= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

    model = Wrapper(make(), lambda x: {"loss": (loss := x.sum()), "more": [loss, loss.detach(), "text", 3]})
    CoTo(model, 20)
    output = model(batch())
    assert output["loss"] is output["more"][0]
    assert output["more"][2:] == ["text", 3]
    expected = output["loss"].item() / 4
    output["loss"] /= 4
    assert output["more"][0].item() == pytest.approx(expected)


def test_an_output_without_tensors_is_logged_once_and_returned(one_rank, caplog):
    model = make()
    model.register_forward_hook(lambda module, args, output: "text")  # before CoTo's
    CoTo(model, 20)
    with caplog.at_level(logging.INFO, logger="cotolora"):
        assert [model(batch()) for _ in range(3)] == ["text"] * 3
    assert ["output, a str: " in record.getMessage() for record in caplog.records] == [True]


def test_without_a_graph_nothing_is_joined(one_rank):
    model = make()
    coto = CoTo(model, 20)
    with torch.no_grad():
        assert not model(batch()).requires_grad
    with torch.inference_mode():
        model(batch())
    model.eval()
    assert not any("Join" in node for node in graph_nodes(model(batch())))
    model.train()
    # per-sample gradients: torch.func does not support old-style autograd.Functions
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradient = torch.func.grad(lambda p: torch.func.functional_call(model, p, (batch(),)).sum())(parameters)
    on = on_by_adapter(coto)
    assert [bool(gradient[f"{name}.lora_a"].any()) for name in adapters(model)] == on
    coto.finish()
    assert not any("Join" in node for node in graph_nodes(model(batch())))


# torch.compile, warnings and errors


def compile_blocks(model):
    for block in model.blocks:
        block.compile(backend="eager")
    return model


def compile_call(model):
    model.compile(backend="eager")
    return model


def compile_whole(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("compiled", "unit", "kind", "notice"),
    [
        (compile_blocks, "layer", "host", False),
        (compile_blocks, "module", "host", True),
        (compile_blocks, lambda name: name.rpartition(".")[0], "host", False),
        (compile_blocks, lambda name: name.rpartition(".")[2], "host", True),
        (compile_blocks, "module", "device", False),
        (compile_call, "layer", "host", True),
        (compile_whole, "layer", "host", True),
        (compile_whole, "layer", "device", False),
        (lambda model: model, "module", "host", False),
    ],
)
def test_the_compile_notice_is_logged_once_if_gates_make_many_graphs(compiled, unit, kind, notice, caplog):
    with caplog.at_level(logging.INFO, logger="cotolora"):
        coto = CoTo(compiled(make()), 20, unit=unit, gates=kind)
        for _ in range(5):
            coto.step()
    messages = [record.getMessage() for record in caplog.records if "torch.compile" in record.getMessage()]
    assert len(messages) == notice
    assert all("gates='device'" in message for message in messages)


def count_graphs(model, coto, steps):
    for step in range(steps):
        model(batch(step)).square().mean().backward()
        coto.step()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_take_few_graphs_and_a_model_with_device_gates_one():
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    model = make()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    coto = CoTo(model, 30)
    count_graphs(model, coto, 30)
    assert counter.frame_count <= 4

    torch.compiler.reset()
    counter = CompileCounter()
    model = make()
    coto = CoTo(model, 30, gates="device")
    count_graphs(torch.compile(model, backend=counter, fullgraph=True), coto, 30)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_a_compiled_model_is_named_and_gated_as_the_plain_one():
    model = make()
    compiled = compile_whole(model)
    coto = CoTo(compiled, 20, gates="device")
    assert list(coto.groups) == [f"blocks.{i}" for i in range(BLOCKS)]
    assert gates(model) == on_by_adapter(coto)


def test_stepping_in_eval_warns_once():
    model = make().eval()
    coto = CoTo(model, 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        coto.step()
        coto.step()
    assert ["no adapter is in training mode" in str(warning.message) for warning in caught] == [True]
    assert caught[0].filename == __file__
    assert coto.current_step == 2


def test_stepping_with_one_adapter_in_training_does_not_warn():
    model = make().eval()
    model.blocks[3].up.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CoTo(model, 20).step()


def test_refuses_merged_adapters_and_models_without():
    model = make()
    model.blocks[1].down.merge()
    with pytest.raises(ValueError, match=r"no merged adapters.*blocks\.1\.down"):
        CoTo(model, 20)
    with pytest.raises(ValueError, match="must have adapters; Net has none"):
        CoTo(Net(), 20)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got list"):
        CoTo([1], 20)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        *[({"total_steps": value}, ValueError, "total_steps must be") for value in (0, -1, 1.5, None, True)],
        *[({"initial_p": value}, ValueError, "initial_p must be") for value in (-0.1, 1.1, None, "x")],
        *[({"ramp": value}, ValueError, "ramp must be") for value in (0, 1.5, None)],
        ({"shape": "none"}, ValueError, "shape must be"),
        ({"unit": "block"}, ValueError, "unit must be"),
        ({"unit": 3}, TypeError, "unit must be"),
        *[({"tilt": value}, ValueError, "tilt must be") for value in (1.1, -1.1, math.nan, True, None, "x")],
        *[({"at_least_one": value}, ValueError, "at_least_one must be") for value in (None, 1, "yes")],
        *[({"seed": value}, ValueError, "seed must be") for value in (-1, 2**64, 0.5, None)],
        *[({"gates": value}, ValueError, "gates must be") for value in ("cpu", None, True)],
    ],
    ids=str,
)
def test_bad_arguments_are_named_and_change_nothing(arguments, error, message):
    model = make()
    earlier = CoTo(model, 20)
    before = gates(model), earlier.mask
    with pytest.raises(error, match=f"^{message}.*; got "):
        CoTo(model, **{"total_steps": 20, **arguments})
    assert (gates(model), earlier.mask) == before
    assert len(model._forward_hooks) == 1


def test_a_schedule_replaces_its_fields():
    fields = {"initial_p": 0.3, "ramp": 0.6, "shape": "sine", "tilt": 0.5, "at_least_one": False, "seed": 9}
    one, other = CoTo(make(), 20, Schedule(**fields)), CoTo(make(), 20, **fields)
    assert one.schedule == other.schedule == Schedule(**fields)
    assert one.state_dict() == other.state_dict()
    for _ in range(12):
        assert torch.equal(one.mask, other.mask)
        one.step()
        other.step()
    assert CoTo(make(), 20).schedule == Schedule()


def test_a_schedule_and_a_field_of_it_are_refused_together():
    schedule = Schedule(seed=1)
    message = r"schedule must not be combined with ramp, seed.*; got Schedule\(.*ramp=0.75, seed=0"
    with pytest.raises(ValueError, match=message):
        CoTo(make(), 20, schedule, ramp=0.75, seed=0)  # even with the value that the schedule has
    for other in (0.1, {"seed": 1}):
        with pytest.raises(TypeError, match="schedule must be a Schedule; got"):
            CoTo(make(), 20, other)


def test_numpy_numbers_become_python_numbers_in_the_state():
    coto = CoTo(make(), np.int64(20), seed=np.int64(3), initial_p=np.float32(0.25), check_every=np.int64(0))
    coto.set_step(np.int64(4))
    state = coto.state_dict()
    assert through_torch(state) == through_json(state) == state
    assert (state["total_steps"], state["seed"], state["initial_p"], state["step"]) == (20, 3, 0.25, 4)


def test_attach_refuses_other_types():
    coto = CoTo(make(), 20)
    for other in (None, object(), [1]):
        with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer; got"):
            coto.attach(other)


def test_a_failed_constructor_leaves_no_hook():
    model = make()
    with pytest.raises(ValueError):
        CoTo(model, 20, seed=-1)
    assert not model._forward_hooks
    assert all(layer.gate is True for layer in adapters(model).values())


# CUDA graphs, as far as they can be tested on a CPU; the rest is in tests/kernels/test_gpu.py


class Operators(TorchDispatchMode):
    """Records the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_captured_step_does_the_same_under_every_mask_and_trains_as_a_plain_loop(monkeypatch):
    monkeypatch.setattr(autograd, "readable", lambda gate: False)  # as for a gate on a GPU
    seen = []

    def noted(compute):
        def run():
            with Operators() as operators:
                results = compute()
            seen.append(operators.names)
            return results

        return captured.without_a_graph(run)

    weights, masks = captured.train_captured(captured.model_of("cpu"), noted)
    assert len(set(masks)) > 3
    _, first, *others = seen
    assert all(names == first for names in others)
    assert all_equal(weights, captured.train_eagerly(captured.model_of("cpu")))


def test_its_repr_shows_where_the_run_is():
    coto = CoTo(nn.Sequential(CoToLoRALinear(4, 4), CoToLoRALinear(4, 4)), total_steps=100)
    assert repr(coto) == "CoTo(step 0 of 100, p=0.1, 1 of 2 groups active)"
    coto.set_step(75)
    assert repr(coto) == "CoTo(step 75 of 100, p=1, 2 of 2 groups active)"
