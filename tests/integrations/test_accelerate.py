"""accelerate: masks and weights equal those of a plain loop, in one process and on two gloo ranks."""

import contextlib
import functools
import os

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cotolora
from cotolora import CoTo, adapter_parameters, adapters
from tests.support.ranks import results_of, serve

pytest.importorskip("accelerate")

STEPS, WIDTH, BLOCKS, BATCH, MICRO = 8, 8, 4, 8, 2
ODDITIES = {
    "plain": {},
    "accumulate": {"micro": MICRO},
    "bf16": {"precision": "bf16"},
    "bf16-accumulate-clip": {"precision": "bf16", "micro": MICRO, "clip": 0.01},
    "device-gates-clip": {"gates": "device", "clip": 0.01},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def parts():
    torch.manual_seed(0)
    model = Net()
    cotolora.inject(model, rank=2)
    return model, torch.optim.AdamW(adapter_parameters(model), lr=1e-2)


def batches(micro, rank, world):
    draw = torch.Generator().manual_seed(1)
    for _ in range(STEPS * micro):
        yield torch.randn(BATCH * world, WIDTH, generator=draw).chunk(world)[rank]


def outcome(model, optimizer, masks):
    layers = adapters(model).values()
    return {
        "masks": torch.stack(masks),
        "weights": torch.cat([p.detach().flatten() for p in adapter_parameters(model)]),
        "steps": [float(optimizer.state.get(layer.lora_b, {}).get("step", 0)) for layer in layers],
    }


def fresh_accelerator(**options):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    return Accelerator(cpu=True, **options)


def with_accelerate(rank=0, world=1, *, precision="no", micro=1, clip=None, gates="host"):
    if world > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        os.environ.update(zip(names, map(str, (rank, rank, world, world)), strict=True))
    accelerator = fresh_accelerator(mixed_precision=precision, gradient_accumulation_steps=micro)
    assert (accelerator.num_processes, accelerator.process_index) == (world, rank)
    own_model, own_optimizer = parts()
    model, optimizer = accelerator.prepare(own_model, own_optimizer)
    coto = CoTo(model, STEPS, seed=3, gates=gates, check_every=1)
    coto.attach(optimizer)
    masks = []
    for x in batches(micro, rank, world):
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            if accelerator.sync_gradients and clip:
                accelerator.clip_grad_norm_(adapter_parameters(own_model), clip)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            masks.append(coto.mask)
            coto.step()
    return outcome(own_model, own_optimizer, masks)


def plain_loop(rank=0, world=1, *, precision="no", micro=1, clip=None, gates="host"):
    own_model, optimizer = parts()
    model = DistributedDataParallel(own_model) if world > 1 else own_model
    coto = CoTo(model, STEPS, seed=3, gates=gates)
    coto.attach(optimizer)
    masks = []
    for i, x in enumerate(batches(micro, rank, world), 1):
        last = i % micro == 0
        with contextlib.nullcontext() if last or world == 1 else model.no_sync():
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                y = model(x)
            (y.float().square().mean() / micro).backward()
        if last:
            if clip:
                nn.utils.clip_grad_norm_(adapter_parameters(model), clip)
            optimizer.step()
            optimizer.zero_grad()
            masks.append(coto.mask)
            coto.step()
    return outcome(model, optimizer, masks)


BY_WORLD = {
    2: {
        f"{loop.__name__}-{name}": functools.partial(loop, **oddity)
        for loop in (plain_loop, with_accelerate)
        for name, oddity in ODDITIES.items()
    }
}


def assert_same(ours, plain):
    assert torch.equal(ours["masks"], plain["masks"])
    assert torch.equal(ours["weights"], plain["weights"])
    assert ours["steps"] == plain["steps"] == ours["masks"].sum(0).tolist()
    assert not ours["masks"].all()


@pytest.mark.parametrize("name", ODDITIES)
def test_one_process_ends_with_the_weights_of_a_plain_loop(name, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    assert_same(with_accelerate(**ODDITIES[name]), plain_loop(**ODDITIES[name]))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(__file__, BY_WORLD, tmp_path_factory.mktemp("accelerate"))


@pytest.mark.parametrize("name", ODDITIES)
def test_two_ranks_end_with_the_weights_of_a_plain_ddp_loop(results, name):
    accelerated, plain = results[2, f"with_accelerate-{name}"], results[2, f"plain_loop-{name}"]
    for result, expected in zip(accelerated, plain, strict=True):
        assert "error" not in result, result["error"]
        assert "error" not in expected, expected["error"]
        assert_same(result, expected)
        assert torch.equal(result["weights"], accelerated[0]["weights"])


def test_accelerate_saves_a_run_and_resumes_it(tmp_path):
    """CoTo has a state_dict, which is all that register_for_checkpointing needs."""

    def run(accelerator, seed):
        model, optimizer = accelerator.prepare(*parts())
        coto = CoTo(model, STEPS, seed=seed)
        coto.attach(optimizer)
        accelerator.register_for_checkpointing(coto)
        return model, optimizer, coto

    def train(model, optimizer, coto, steps):
        for step, x in enumerate(batches(1, 0, 1)):
            if step in steps:
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                coto.step()

    accelerator = fresh_accelerator()
    whole = run(accelerator, 3)
    train(*whole, range(2))
    accelerator.save_state(tmp_path)
    train(*whole, range(2, STEPS))
    accelerator = fresh_accelerator()
    again = run(accelerator, 4)
    accelerator.load_state(tmp_path)
    train(*again, range(2, STEPS))
    for ours, theirs in zip(adapter_parameters(again[0]), adapter_parameters(whole[0]), strict=True):
        assert torch.equal(ours, theirs)
    assert again[2].state_dict() == whole[2].state_dict()


if __name__ == "__main__":
    serve(BY_WORLD)
