"""What an attached optimizer does and saves where adapters are off, for every optimizer and kind of loop."""

import copy

import pytest
import torch
from torch import nn

import cotolora
from cotolora import CoTo, adapter_parameters, adapters, lora_plus_groups

WIDTH, BLOCKS, STEPS = 6, 5, 12
SEED = 0


def make():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS)))
    for layer in cotolora.inject(model, rank=2).values():
        nn.init.normal_(layer.lora_b)
    return model


def batch(step):
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step))


ADAMW = {"lr": 0.05, "weight_decay": 0.1}
OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(adapter_parameters(model), **ADAMW),
    "adamw-foreach": lambda model: torch.optim.AdamW(adapter_parameters(model), **ADAMW, foreach=True),
    "adamw-fused": lambda model: torch.optim.AdamW(adapter_parameters(model), **ADAMW, fused=True),
    "adamw-amsgrad": lambda model: torch.optim.AdamW(adapter_parameters(model), **ADAMW, amsgrad=True),
    "sgd-momentum": lambda model: torch.optim.SGD(adapter_parameters(model), lr=0.05, momentum=0.9, weight_decay=0.1),
    "lora-plus": lambda model: torch.optim.AdamW(lora_plus_groups(model, 0.005, ratio=16), weight_decay=0.1),
}
OPTIONS = {
    "plain": {},
    "zeroed": {"set_to_none": False},
    "clipped": {"clip": 0.01},
    "accumulated": {"micro": 3, "set_to_none": False},
    "closure": {"closure": True, "set_to_none": False},
    "scaled": {"scaler": True},
    "scaled-clipped-zeroed": {"scaler": True, "clip": 0.01, "set_to_none": False},
}


class Loop:
    def __init__(self, optimizer, gates="host", attached=True, **options):
        self.model = make()
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        self.coto = CoTo(self.model, STEPS, seed=SEED, gates=gates)
        if attached:
            self.coto.attach(self.optimizer)
        self.options = {"set_to_none": True, "clip": None, "micro": 1, "scaler": False, "closure": False} | options
        self.scaler = torch.amp.GradScaler("cpu", enabled=self.options["scaler"])

    def backward(self, step):
        for micro in range(self.options["micro"]):
            loss = self.model(batch(100 * micro + step)).square().mean()
            self.scaler.scale(loss).backward()
        return loss

    def step(self, step):
        if self.options["closure"]:  # as Lightning does it: everything inside the step
            self.optimizer.step(lambda: self.backward(step))
        else:
            self.backward(step)
            if self.options["clip"]:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(adapter_parameters(self.model), self.options["clip"])
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=self.options["set_to_none"])

    def run(self, steps):
        """The adapters that moved or whose state changed, step by step."""
        moved = []
        for step in steps:
            before = [self.kept(layer) for layer in adapters(self.model).values()]
            self.step(step)
            after = [self.kept(layer) for layer in adapters(self.model).values()]
            moved.append([not same(old, new) for old, new in zip(before, after, strict=True)])
            self.coto.step()
        return moved

    def kept(self, layer):
        """Everything that a step could change of an adapter: weights and optimizer state, its count of steps too."""
        factors = (layer.lora_a, layer.lora_b)
        return copy.deepcopy([(p.detach(), dict(self.optimizer.state.get(p, {}))) for p in factors])


def same(old, new):
    return all(
        torch.equal(p, q) and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for (p, a), (q, b) in zip(old, new, strict=True)
    )


def masks():
    coto = CoTo(make(), STEPS, seed=SEED)
    found = []
    for _ in range(STEPS):
        found.append(coto.mask.tolist())
        coto.step()
    return found


@pytest.mark.parametrize("gates", ["host", "device"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_adapters_that_are_off_neither_move_nor_count_a_step(optimizer, option, gates):
    loop = Loop(optimizer, gates, **OPTIONS[option])
    assert loop.run(range(STEPS)) == masks()
    counts = torch.tensor(masks()).sum(0).tolist()
    assert min(counts) < max(counts) < STEPS, "the run must have adapters to leave alone"
    for layer, count in zip(adapters(loop.model).values(), counts, strict=True):
        for p in (layer.lora_a, layer.lora_b):
            assert loop.optimizer.state[p].get("step", count) == count


@pytest.mark.parametrize(
    ("gates", "option"), [("device", "plain"), ("host", "zeroed"), ("device", "scaled-clipped-zeroed")]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_attach_zeros_move_what_is_off(optimizer, gates, option):
    """Why attach is needed: device gates, zeroed gradients and DDP leave zeros, which an optimizer takes for gradients.

    Momentum and weight decay then move the weights, and Adam counts a step.
    """
    moved = torch.tensor(Loop(optimizer, gates, attached=False, **OPTIONS[option]).run(range(STEPS)))
    # with zeroed gradients an adapter that has not been on yet still has None
    been_on = torch.tensor(masks()).cummax(0).values.bool()
    assert torch.equal(moved, torch.ones_like(moved) if gates == "device" else been_on)


# what is saved


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "attached-after-loading"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_is_whole_where_it_is_saved_and_loads_as_it_was(optimizer, attached):
    """Some adapter has not been on yet: it has no state before, zeros in the file, none after."""
    loop, cut = Loop(optimizer), 2
    loop.run(range(cut))
    assert len(loop.optimizer.state) < len(adapter_parameters(loop.model)), "no adapter is left that was never on"
    counted = len(loop.optimizer.state)
    saved = copy.deepcopy(loop.optimizer.state_dict())
    assert len(loop.optimizer.state) == counted
    parameters = [p for group in loop.optimizer.param_groups for p in group["params"]]
    assert sorted(saved["state"]) == list(range(len(parameters)))
    for key, p in enumerate(parameters):
        shapes = {name: value.shape for name, value in saved["state"][key].items() if torch.is_tensor(value)}
        assert all(shape in ((), p.shape) for shape in shapes.values())
        assert (p in loop.optimizer.state) == any(bool(value.any()) for value in saved["state"][key].values())

    again = Loop(optimizer, attached=attached)
    again.model.load_state_dict(loop.model.state_dict())
    again.coto.load_state_dict(loop.coto.state_dict())
    again.optimizer.load_state_dict(saved)
    if attached:
        assert len(again.optimizer.state) == counted
    else:
        again.coto.attach(again.optimizer)
    loop.run(range(cut, STEPS))
    again.run(range(cut, STEPS))
    for ours, theirs in zip(adapter_parameters(again.model), adapter_parameters(loop.model), strict=True):
        assert torch.equal(ours, theirs)


def test_the_handle_takes_off_what_attach_has_put_on():
    loop = Loop("adamw", attached=False)
    handle = loop.coto.attach(loop.optimizer)
    loop.run(range(2))
    whole = len(loop.optimizer.state_dict()["state"])
    handle.remove()
    handle.remove()
    assert len(loop.optimizer.state_dict()["state"]) < whole == 2 * BLOCKS


def test_frozen_parameters_and_fresh_optimizers_get_no_zeros():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    coto = CoTo(model, STEPS, initial_p=1.0)
    coto.attach(optimizer)
    assert optimizer.state_dict()["state"] == {}
    model(batch(0)).square().mean().backward()
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == 2 * BLOCKS


def test_states_of_other_shapes_are_left_as_they_are():
    model = make()
    optimizer = torch.optim.Adafactor(adapter_parameters(model))
    coto = CoTo(model, STEPS, seed=SEED)
    coto.attach(optimizer)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    assert 0 < len(optimizer.state) < 2 * BLOCKS
    assert len(optimizer.state_dict()["state"]) == len(optimizer.state)
