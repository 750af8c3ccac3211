"""Ranks with different CoTo runs: every rank raises an error that names them, within the group's timeout."""

import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import cotolora
from cotolora import CoTo
from cotolora.training.agreement import check_agreement
from tests.support.ranks import results_of, serve

ODD = 1  # the rank that differs


def model():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    cotolora.inject(net, rank=2)
    return net


def steps(coto, count):
    """The step at which a check raised, and its message."""
    for step in range(count):
        try:
            coto.step()
        except RuntimeError as error:
            return {"at": step + 1, "says": str(error)}
    return {"at": None, "says": ""}


def other_seed(rank, world):
    try:
        CoTo(net := model(), 20, seed=7 + (rank == ODD), check_every=1)
    except RuntimeError as error:
        assert not net._forward_hooks, "the model must be unchanged"
        return {"at": 0, "says": str(error)}


def other_settings(rank, world):
    options = {"ramp": 0.5, "check_every": 3} if rank == ODD else {"check_every": 2}
    try:
        CoTo(model(), 20, **options)
    except RuntimeError as error:
        return {"at": 0, "says": str(error)}


def other_step(rank, world):
    coto = CoTo(model(), 20, check_every=3)
    if rank == ODD:  # only this rank resumed
        coto.load_state_dict({**coto.state_dict(), "step": 5})
    return steps(coto, 6)


def other_pruning(rank, world):
    net = model()
    if rank == ODD:
        net[0].enabled = net[3].enabled = False
    return steps(CoTo(net, 20, initial_p=1.0, check_every=2), 6)


def rank_zero_alone(rank, world):
    CoTo(model(), 20, seed=1 if rank else 9, check_every=1)


def half_and_half(rank, world):
    coto = CoTo(model(), 20, check_every=1)
    coto.set_step(rank // (world // 2))


def all_agree(rank, world):
    coto = CoTo(model(), 20, check_every=2)
    coto.load_state_dict({**coto.state_dict(), "step": 3})
    for _ in range(4):
        coto.step()
    return {"state": coto.state_dict(), "mask": coto.mask}


def unchecked(rank, world):
    return steps(CoTo(model(), 20, seed=rank), 6)


def one_never_checks(rank, world):
    """There is no mismatch to report: the other ranks time out and raise."""
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{sys.argv[1]}/short.store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=3),
    )
    began = time.monotonic()
    if rank == ODD:
        time.sleep(5)
        return {"waited": 0}
    try:
        CoTo(model(), 20, check_every=1)
    except RuntimeError as error:
        return {"waited": time.monotonic() - began, "says": str(error)}


CASES = [other_seed, other_settings, other_step, other_pruning, all_agree, unchecked, one_never_checks]
BY_WORLD = {
    2: {case.__name__: case for case in CASES},
    4: {case.__name__: case for case in [*CASES[:4], rank_zero_alone, half_and_half, all_agree]},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(__file__, BY_WORLD, tmp_path_factory.mktemp("agreement"))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("case", "at", "differs", "values"),
    [
        ("other_seed", 0, "seed", ("seed = 7", "seed = 8")),
        ("other_settings", 0, "ramp, check_every", ("ramp = 0.75, check_every = 2", "ramp = 0.5, check_every = 3")),
        ("other_step", 3, "step, mask", ("step = 3", "step = 8")),
        ("other_pruning", 2, "mask", ("mask = [True, True, True, True, True, True]", "mask = [False, True")),
    ],
)
def test_a_rank_that_differs_is_named_on_every_rank(results, world, case, at, differs, values):
    for rank, result in enumerate(results[world, case]):
        assert "error" not in result, result["error"]
        assert result["at"] == at
        assert f"every rank must have the same CoTo; rank {ODD} differs in {differs}; rank {rank} has" in result["says"]
        assert values[rank == ODD] in result["says"]


def test_the_majority_is_the_reference_or_rank_zero_without_one(results):
    for rank, result in enumerate(results[4, "rank_zero_alone"]):
        assert f"rank 0 differs in seed; rank {rank} has seed = {1 if rank else 9}" in result["error"]
    for result in results[4, "half_and_half"]:
        assert "rank 2 differs in step, mask; rank 3 differs in step, mask; rank" in result["error"]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_agree_continue(results, world):
    for result in results[world, "all_agree"]:
        assert "error" not in result, result["error"]
        assert result["state"]["step"] == 7
        assert "check_every" not in result["state"]
        assert torch.equal(result["mask"], results[world, "all_agree"][0]["mask"])


def test_without_check_every_nothing_is_compared(results):
    assert [result["at"] for result in results[2, "unchecked"]] == [None, None]


def test_waiting_for_a_rank_that_never_checks_times_out(results):
    waiting = results[2, "one_never_checks"][0]
    assert "Timed out" in waiting["says"]
    assert 2.5 < waiting["waited"] < 10


def test_one_process_has_nothing_to_compare(tmp_path):
    check_agreement("CoTo", {"seed": 1})
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert steps(CoTo(model(), 20, check_every=1), 3)["at"] is None
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("value", [-1, 1.0, None, True, "2"], ids=repr)
def test_a_bad_check_every_is_named_and_changes_nothing(value):
    with pytest.raises(ValueError, match="check_every must be an integer of at least 0"):
        CoTo(net := model(), 20, check_every=value)
    assert not net._forward_hooks


@pytest.fixture
def checks(monkeypatch):
    """The steps of all comparisons."""
    found = []
    monkeypatch.setattr("cotolora.coto.check_agreement", lambda _, facts: found.append(facts["step"]))
    return found


@pytest.mark.parametrize("start", [0, 4])
def test_the_trainers_callback_checks(checks, start):
    pytest.importorskip("transformers")
    from cotolora.integrations.transformers import CoToCallback

    with pytest.raises(ValueError, match="check_every"):
        CoToCallback(check_every=-1)
    ours, net, state = CoToCallback(check_every=2), model(), SimpleNamespace(max_steps=20)
    optimizer = torch.optim.SGD(cotolora.adapter_parameters(net))
    ours.on_train_begin(None, state, None, model=net, optimizer=optimizer)
    for state.global_step in range(start, start + 4):
        ours.on_step_begin(None, state, None)
    assert checks == [0, start + 1, start + 3]


@pytest.mark.parametrize("start", [0, 4])
def test_lightnings_callback_checks_equally_often_from_any_start(checks, start):
    pytest.importorskip("lightning")
    from cotolora.integrations.lightning import CoToLightningCallback

    with pytest.raises(ValueError, match="check_every"):
        CoToLightningCallback(check_every=-1)
    ours, net = CoToLightningCallback(check_every=2), model()
    optimizer = torch.optim.SGD(cotolora.adapter_parameters(net))
    trainer = SimpleNamespace(
        estimated_stepping_batches=20, num_training_batches=20, max_epochs=1, max_steps=-1, accumulate_grad_batches=1,
        callbacks=[], optimizers=[optimizer], global_step=start,
    )  # fmt: skip
    ours.on_train_start(trainer, net)
    for trainer.global_step in range(start, start + 4):
        for _ in range(2):  # gradient accumulation
            ours.on_train_batch_start(trainer, net, None, 0)
    assert checks == [0, start + 1, start + 3]


if __name__ == "__main__":
    serve(BY_WORLD)
