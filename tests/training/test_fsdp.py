"""CoTo with FSDP2 (fully_shard), sharded by block or only at the root, on two and four gloo ranks."""

import copy
import dataclasses
import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from cotolora import CoTo, adapter_parameters, load_adapter, save_adapter, set_backend
from tests.support.ranks import results_of, serve
from tests.support.training import (
    BATCH,
    TOTAL,
    WIDTH,
    Case,
    assert_equal_on_every_rank,
    assert_equals_one_process,
    make,
    shard,
    train,
    whole,
)

pytestmark = pytest.mark.slow

HOW = ("blocks", "root")
CASES = {
    f"{how}-{name}": dataclasses.replace(case, sharded=how)
    for how in HOW
    for name, case in {
        "default": Case(),
        "coto-built-after": Case(built="after"),
        "no-sync": Case(micro=2),
        "checkpoint": Case(checkpoint="non-reentrant"),
        "checkpoint-reentrant": Case(checkpoint="reentrant"),
        "device-gates": Case(coto={"gates": "device"}),
        "zeroed-gradients": Case(set_to_none=False),
        "unread": Case(unread=True),
        "unread-dict": Case(unread=True, output="dict"),
        "disabled": Case(off=(1,)),
        "nothing-on-at-times": Case(coto={"at_least_one": False}),
        "evaluation-between-steps": Case(evaluate=True),
        "loss": Case(output="loss"),
    }.items()
}


def fsdp(case, rank, world):
    with set_backend("addmm"):  # by default, float64 uses the reference
        return train(case, rank, world)


def a_file(how, rank, world):
    """Saves full tensors and loads them into shards, also right after an evaluation, when the root is unsharded."""
    folder = Path(sys.argv[1]) / f"{world}.{how}"
    model = shard(make(Case()), how, world)
    x = torch.ones(2, WIDTH, dtype=torch.double)
    expected = [whole(p).detach().clone() for p in adapter_parameters(model)]
    save_adapter(model, folder)
    with torch.no_grad():
        for p in adapter_parameters(model):
            p.zero_()
        model.eval()(x, x)
    load_adapter(model, folder)
    with torch.no_grad():
        output = model(x, x)
    loaded = [whole(p).detach().clone() for p in adapter_parameters(model)]
    # training continues from the loaded weights
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.0)
    coto = CoTo(model.train(), TOTAL)
    coto.attach(optimizer)
    model(x, x).square().mean().backward()
    return {
        "expected": expected,
        "loaded": loaded,
        "output": output,
        "sharded": all(hasattr(p, "device_mesh") for p in adapter_parameters(model)),
        "kept": [whole(p).detach().clone() for p in adapter_parameters(model)],
        "norm": whole(nn.utils.clip_grad_norm_(adapter_parameters(model), 1.0)),
    }


def in_bfloat16(how, rank, world):
    """Parameters and compute in bfloat16, masters and reduction in float32; compared with two copies on this rank."""
    torch.manual_seed(0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    plain = make(Case()).float()
    model = shard(copy.deepcopy(plain), how, world, mp_policy=policy)
    runs = []
    for net in (model, plain):
        optimizer = torch.optim.AdamW(adapter_parameters(net), lr=0.01, weight_decay=0.1)
        coto = CoTo(net, TOTAL, seed=5)
        coto.attach(optimizer)
        runs.append((optimizer, coto))
    data = torch.Generator().manual_seed(1)
    for _ in range(TOTAL):
        x, y = (torch.randn(BATCH, WIDTH, generator=data).chunk(world) for _ in range(2))
        ((model(x[rank], y[rank]).float() - y[rank]) ** 2).mean().backward()
        halves = [copy.deepcopy(plain).bfloat16() for _ in range(world)]
        for half, x_i, y_i in zip(halves, x, y, strict=True):
            ((half(x_i.bfloat16(), y_i.bfloat16()).float() - y_i) ** 2).mean().backward()
        for p, *shares in zip(adapter_parameters(plain), *map(adapter_parameters, halves), strict=True):
            if shares[0].grad is not None:
                p.grad = sum(share.grad.float() for share in shares) / world
        for optimizer, coto in runs:
            optimizer.step()
            optimizer.zero_grad()
            coto.step()
    return {
        "parameters": [whole(p).detach() for p in adapter_parameters(model)],
        "expected": [p.detach() for p in adapter_parameters(plain)],
        "steps": [
            [float(optimizer.state[p]["step"]) for p in adapter_parameters(net)]
            for net, (optimizer, _) in zip((model, plain), runs, strict=True)
        ],
    }


ON_FOUR = ("default", "checkpoint", "checkpoint-reentrant", "no-sync", "zeroed-gradients")
BY_WORLD = {
    world: {name: functools.partial(fsdp, case) for name, case in CASES.items() if world == 2 or name.endswith(ON_FOUR)}
    | {f"{how}-{special.__name__}": functools.partial(special, how) for how in HOW for special in (a_file, in_bfloat16)}
    for world in (2, 4)
}
WORKING = [(world, name) for world, named in BY_WORLD.items() for name in named if name in CASES]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(__file__, BY_WORLD, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize(("world", "name"), WORKING)
def test_ranks_agree_bitwise_and_off_adapters_are_unchanged(results, world, name):
    assert_equal_on_every_rank(results[world, name])


@pytest.mark.parametrize(("world", "name"), WORKING)
def test_equals_one_process_on_the_joint_batches(results, world, name):
    assert_equals_one_process(CASES[name], results[world, name])


@pytest.mark.parametrize("world", BY_WORLD)
@pytest.mark.parametrize("how", HOW)
def test_sharded_adapters_are_saved_in_full_and_loaded_into_shards(results, how, world):
    plain = make(Case())
    x = torch.ones(2, WIDTH, dtype=torch.double)
    with torch.no_grad():
        output = plain.eval()(x, x)
    for result in results[world, f"{how}-a_file"]:
        assert "error" not in result, result["error"]
        for got in ("expected", "loaded", "kept"):
            for tensor, p in zip(result[got], adapter_parameters(plain), strict=True):
                torch.testing.assert_close(tensor, p, rtol=0, atol=1e-7)  # the file has float32
        torch.testing.assert_close(result["output"], output, rtol=1e-6, atol=1e-6)
        assert result["sharded"]
        assert result["norm"] > 0


@pytest.mark.parametrize("world", BY_WORLD)
@pytest.mark.parametrize("how", HOW)
def test_bfloat16_parameters_train_as_bfloat16_copies_do(results, how, world):
    for result in results[world, f"{how}-in_bfloat16"]:
        assert "error" not in result, result["error"]
        assert result["steps"][0] == result["steps"][1]
        for tensor, expected in zip(result["parameters"], result["expected"], strict=True):
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)


if __name__ == "__main__":
    serve(BY_WORLD)
