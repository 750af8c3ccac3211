"""Steps and saved state of an attached optimizer while adapters are off, for every optimizer and kind of loop."""

import copy
import functools
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

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


def make_optimizer(name, options, model, package="torch.optim"):
    kind, _, _ = name.partition("-")
    place = pytest.importorskip(package, reason=f"{package} is not installed")
    return getattr(place, kind)(adapter_parameters(model), **{"lr": 0.01} | options)


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
        self.optimizer = EVERY[optimizer](self.model)
        if optimizer in SCHEDULE_FREE:
            self.optimizer.train()
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
        if self.options["closure"]:  # as in Lightning: forward and backward run inside the step
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
        """For each step, the adapters whose weights or optimizer state changed."""
        moved = []
        for step in steps:
            before = [self.kept(layer) for layer in adapters(self.model).values()]
            self.step(step)
            after = [self.kept(layer) for layer in adapters(self.model).values()]
            moved.append([not same(old, new) for old, new in zip(before, after, strict=True)])
            self.coto.step()
        return moved

    def kept(self, layer):
        """Everything that a step could change for an adapter: weights and optimizer state, including its step count."""
        factors = (layer.lora_a, layer.lora_b)
        return copy.deepcopy([(p.detach(), dict(self.optimizer.state.get(p, {}))) for p in factors])


def same(old, new):
    return all(
        torch.equal(p, q) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        for (p, a), (q, b) in zip(old, new, strict=True)
    )


def equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


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
def test_adapters_that_are_off_are_neither_changed_nor_stepped(optimizer, option, gates):
    loop = Loop(optimizer, gates, **OPTIONS[option])
    assert loop.run(range(STEPS)) == masks()
    counts = torch.tensor(masks()).sum(0).tolist()
    assert min(counts) < max(counts) < STEPS, "the run must have steps with adapters that are off"
    for layer, count in zip(adapters(loop.model).values(), counts, strict=True):
        for p in (layer.lora_a, layer.lora_b):
            assert loop.optimizer.state[p].get("step", count) == count


@pytest.mark.parametrize(
    ("gates", "option"), [("device", "plain"), ("host", "zeroed"), ("device", "scaled-clipped-zeroed")]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_attach_zero_gradients_change_off_adapters(optimizer, gates, option):
    """Why attach is needed: device gates, zeroed gradients and DDP leave zero gradients, not None.

    With zero gradients, momentum and weight decay still change the weights, and Adam counts a step.
    """
    moved = torch.tensor(Loop(optimizer, gates, attached=False, **OPTIONS[option]).run(range(STEPS)))
    # with zeroed gradients, an adapter that has never been on still has None
    been_on = torch.tensor(masks()).cummax(0).values.bool()
    assert torch.equal(moved, torch.ones_like(moved) if gates == "device" else been_on)


# saved state

SCHEDULE_FREE = {
    "AdamWScheduleFree": {"weight_decay": 0.1},
    "AdamWScheduleFree-warmup": {"warmup_steps": 4, "r": 1.0, "foreach": False},
    "RAdamScheduleFree": {},
    "SGDScheduleFree": {"lr": 0.1, "weight_decay": 0.1},
}
EIGHT_BIT = {
    "AdamW8bit": {"weight_decay": 0.1},
    "Adam8bit": {},
    "AdEMAMix8bit": {},
    "Lion8bit": {"weight_decay": 0.1},
    "RMSprop8bit": {},
    "SGD8bit": {"momentum": 0.9},
}
EVERY = OPTIMIZERS | {
    name: functools.partial(make_optimizer, name, options)
    for name, options in {
        "AdamW": {"weight_decay": 0.1, "amsgrad": True},
        "Adam": {"weight_decay": 0.1},
        "Adam-maximize": {"maximize": True},
        "NAdam": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "RAdam": {"weight_decay": 0.1},
        "Adamax": {},
        "Adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.5},
        "Adadelta": {},
        "Adafactor": {},
        "ASGD": {"lambd": 0.1, "t0": 2.0},
        "Rprop": {},
        "RMSprop": {"momentum": 0.9, "centered": True},
        "SGD": {"weight_decay": 0.1},
        "SGD-dampening": {"momentum": 0.9, "dampening": 0.5},
        "SGD-nesterov": {"momentum": 0.9, "nesterov": True},
        "SGD-maximize": {"momentum": 0.9, "dampening": 0.9, "maximize": True},
        "Muon": {},
    }.items()
}
PARTS: list = list(EVERY)
for package, kinds in {"schedulefree": SCHEDULE_FREE, "bitsandbytes.optim": EIGHT_BIT}.items():
    for name, options in kinds.items():
        # otherwise small tensors would have 32-bit states
        own = options | ({"min_8bit_size": 1} if kinds is EIGHT_BIT else {})
        EVERY[name] = functools.partial(make_optimizer, name, own, package=package)
        usual = name in ("AdamWScheduleFree", "AdamW8bit", "Lion8bit")
        PARTS.append(pytest.param(name, marks=() if usual else pytest.mark.slow))
CUT = 3


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def plainly(loop, again, copy_of):
    state = copy_of(loop.optimizer.state_dict())
    # some optimizers have an empty state for parameters without a step
    saved, held = state["state"].values(), loop.optimizer.state.values()
    assert sum(map(bool, saved)) == sum(map(bool, held))
    return lambda: again.optimizer.load_state_dict(state)


def by_dcp(loop, again, folder):
    """Through torch.distributed.checkpoint, which requires states of the same parameters on both sides."""
    before = {p: copy.deepcopy(dict(state)) for p, state in loop.optimizer.state.items()}
    dcp.save({"optimizer": get_optimizer_state_dict(loop.model, loop.optimizer)}, checkpoint_id=folder)
    assert before.keys() == loop.optimizer.state.keys(), "saving must change nothing"
    assert all(same([(p, before[p])], [(p, state)]) for p, state in loop.optimizer.state.items())

    def load():
        state = {"optimizer": get_optimizer_state_dict(again.model, again.optimizer)}
        dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(again.model, again.optimizer, state["optimizer"])

    return load


def whole_state(loop, again):
    """The whole state at once, as when one process reads another's file."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = through_a_file(get_optimizer_state_dict(loop.model, loop.optimizer, options=options))
    return lambda: set_optimizer_state_dict(again.model, again.optimizer, state, options=options)


@pytest.mark.parametrize("order", ["loaded-before-attach", "loaded-after-attach"])
@pytest.mark.parametrize(
    ("way", "cut"),
    [
        ("file", CUT),
        ("dcp", CUT),
        *(
            pytest.param(way, cut, marks=pytest.mark.slow)
            for way, cut in (("deepcopy", CUT), ("dcp", 0), ("dcp-whole", CUT), ("dcp-whole", 0))
        ),
    ],
)
@pytest.mark.parametrize("optimizer", PARTS)
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning", "ignore:torch.distributed is:UserWarning")
def test_a_resumed_run_is_bit_equal_to_one_that_was_not_interrupted(optimizer, cut, way, order, tmp_path):
    if (optimizer, way) == ("SGD", "dcp-whole"):
        pytest.skip("torch loads no whole state that holds no tensor")
    if optimizer in SCHEDULE_FREE and way.startswith("dcp"):
        pytest.skip("torch.distributed.checkpoint loses a part of these states, with or without CoTo")
    uninterrupted, loop, again = (Loop(optimizer, attached=False) for _ in range(3))
    uninterrupted.coto.attach(uninterrupted.optimizer)
    loop.coto.attach(loop.optimizer)
    uninterrupted.run(range(STEPS))
    loop.run(range(cut))
    assert not torch.tensor(masks()[:cut] or [[False]]).any(0).all(), "some adapter must not have been on yet"
    again.model.load_state_dict(loop.model.state_dict())
    load = {
        "file": lambda: plainly(loop, again, through_a_file),
        "deepcopy": lambda: plainly(loop, again, copy.deepcopy),
        "dcp": lambda: by_dcp(loop, again, tmp_path),
        "dcp-whole": lambda: whole_state(loop, again),
    }[way]()
    for act in (load, lambda: again.coto.attach(again.optimizer))[:: 1 if order == "loaded-before-attach" else -1]:
        act()
    again.coto.load_state_dict(loop.coto.state_dict())
    states = [run.optimizer.state_dict()["state"] for run in (loop, again)]
    assert {key for key, state in states[0].items() if state} == {key for key, state in states[1].items() if state}
    again.run(range(cut, STEPS))
    for ours, theirs in zip(adapter_parameters(again.model), adapter_parameters(uninterrupted.model), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("optimizer", SCHEDULE_FREE)
def test_a_schedule_free_run_saved_in_eval_mode_continues_correctly(optimizer):
    whole, loop, again = (Loop(optimizer) for _ in range(3))
    for run in (whole, loop):
        run.run(range(CUT))
        run.optimizer.eval()  # the weights are now the averages, and these are saved
    again.model.load_state_dict(loop.model.state_dict())
    again.optimizer.load_state_dict(through_a_file(loop.optimizer.state_dict()))
    again.coto.load_state_dict(loop.coto.state_dict())
    get_optimizer_state_dict(loop.model, loop.optimizer)  # works without leaving eval mode
    for run in (whole, again):
        run.optimizer.train()
        assert run.run(range(CUT, STEPS)) == masks()[CUT:]
    for ours, theirs in zip(adapter_parameters(again.model), adapter_parameters(whole.model), strict=True):
        assert torch.equal(ours, theirs)


def test_a_wrapper_of_schedule_free_is_refused_by_name():
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    loop = Loop("SGD", attached=False)
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer; got ScheduleFreeWrapper"):
        loop.coto.attach(schedulefree.ScheduleFreeWrapper(loop.optimizer))


def test_a_copied_run_continues_like_the_original():
    loop = Loop("sgd-momentum")
    loop.run(range(CUT))
    model, optimizer = copy.deepcopy((loop.model, loop.optimizer))
    again = Loop("sgd-momentum", attached=False)
    again.model, again.optimizer = model, optimizer
    again.coto = CoTo(model, STEPS, seed=SEED)
    again.coto.attach(optimizer)
    again.coto.set_step(CUT)
    for either in (loop, again):
        either.run(range(CUT, STEPS))
    for ours, theirs in zip(adapter_parameters(model), adapter_parameters(loop.model), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("optimizer", PARTS)
def test_any_optimizer_skips_off_adapters(optimizer):
    assert Loop(optimizer, "device", set_to_none=False).run(range(STEPS)) == masks()


def test_a_scheduler_that_wraps_the_step_does_not_wrap_internal_steps():
    loop = Loop("adamw")
    scheduler = torch.optim.lr_scheduler.StepLR(loop.optimizer, 1, gamma=0.5)
    loop.run(range(2))
    scheduler.step()
    before = loop.optimizer.param_groups[0]["lr"]
    weights = [p.detach().clone() for p in adapter_parameters(loop.model)]
    get_optimizer_state_dict(loop.model, loop.optimizer)
    assert loop.optimizer.param_groups[0]["lr"] == before
    assert all(torch.equal(p, w) for p, w in zip(adapter_parameters(loop.model), weights, strict=True))


def test_an_optimizer_that_steps_all_parameters_together_is_refused():
    loop = Loop("adamw", attached=False)
    optimizer = torch.optim.LBFGS(adapter_parameters(loop.model))
    with pytest.raises(TypeError, match="optimizer must step each parameter by its own gradient; got LBFGS"):
        loop.coto.attach(optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def test_fused_sgd_with_momentum_is_refused_because_torch_starts_all_parameters_at_once():
    loop = Loop("adamw", attached=False)
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    plain = torch.optim.SGD([first, second], momentum=0.9, fused=True)
    first.grad = torch.ones(2)
    plain.step()
    second.grad = torch.ones(2)
    with pytest.raises(TypeError, match="NoneType"):  # the reason why it is refused
        plain.step()
    with pytest.raises(TypeError, match=r"optimizer must accept parameters .*; got SGD .* and fused=True.*fused=False"):
        loop.coto.attach(torch.optim.SGD(adapter_parameters(loop.model), momentum=0.9, fused=True))
    loop.coto.attach(torch.optim.SGD(adapter_parameters(loop.model), fused=True))


def test_removing_the_handle_undoes_attach_completely():
    loop = Loop("adamw", attached=False)
    handle = loop.coto.attach(loop.optimizer)
    loop.run(range(2))
    whole = len(get_optimizer_state_dict(loop.model, loop.optimizer)["state"])
    handle.remove()
    handle.remove()
    assert len(get_optimizer_state_dict(loop.model, loop.optimizer)["state"]) < whole == 2 * BLOCKS


def test_frozen_parameters_and_new_optimizers_get_no_zero_gradients():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    coto = CoTo(model, STEPS, initial_p=1.0)
    coto.attach(optimizer)
    assert optimizer.state_dict()["state"] == {}
    model(batch(0)).square().mean().backward()
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == 2 * BLOCKS
