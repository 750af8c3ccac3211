"""Runs saved by torch.distributed.checkpoint on four ranks and resumed on two, with FSDP2 and DDP."""

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from cotolora import CoTo, adapter_parameters, set_backend
from tests.support.ranks import results_of, serve
from tests.support.training import BATCH, WIDTH, Case, make, shard, whole

STEPS, CUT, TOTAL = 12, 5, 20  # after CUT steps, one adapter has never been on and has no optimizer state
pytestmark = pytest.mark.slow

SEED = 3
OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
}


class Run:
    """Everything that a checkpoint must hold, as a Stateful of torch.distributed.checkpoint."""

    def __init__(self, how, world, optimizer, seed=SEED):
        self.model = make(Case())
        if how == "ddp" and world > 1:
            self.model = DistributedDataParallel(self.model)
        elif world > 1:
            self.model = shard(self.model, how, world)
        self.optimizer = OPTIMIZERS[optimizer](adapter_parameters(self.model))
        self.coto = CoTo(self.model, TOTAL, seed=seed)
        self.coto.attach(self.optimizer)
        self.masks = []

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "coto": self.coto.state_dict()}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.coto.load_state_dict(state["coto"])

    def train(self, rank, world, start, end):
        data = torch.Generator().manual_seed(1)
        for step in range(end):
            x, y = (torch.randn(BATCH, WIDTH, generator=data, dtype=torch.double).chunk(world)[rank] for _ in range(2))
            if step < start:
                continue
            self.masks.append(self.coto.mask)
            with set_backend("addmm"):  # by default, float64 uses the reference
                ((self.model(x, y) - y) ** 2).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.coto.step()

    def result(self):
        return {
            "masks": torch.stack(self.masks),
            "parameters": torch.cat([whole(p).detach().flatten() for p in adapter_parameters(self.model)]),
            "steps": [float(self.optimizer.state.get(p, {}).get("step", 0)) for p in adapter_parameters(self.model)],
            "without state": self.without_state(),
        }

    def without_state(self):
        return [p not in self.optimizer.state for p in adapter_parameters(self.model)]


def save(how, optimizer, rank, world):
    run = Run(how, world, optimizer)
    run.train(rank, world, 0, CUT)
    kept = run.result()
    dcp.save({"run": run}, checkpoint_id=Path(sys.argv[1]) / f"{how}.{optimizer}")
    assert run.result()["without state"] == kept["without state"], "saving must change nothing"
    return kept


def resume(how, optimizer, rank, world):
    run = Run(how, world, optimizer, seed=0)  # must load everything from the checkpoint
    with torch.no_grad():
        for p in run.model.parameters():
            p.zero_()
    dcp.load({"run": run}, checkpoint_id=Path(sys.argv[1]) / f"{how}.{optimizer}")
    loaded = run.without_state()
    run.train(rank, world, CUT, STEPS)
    return run.result() | {"loaded without state": loaded}


KINDS = [(how, optimizer) for how in ("ddp", "blocks", "root") for optimizer in OPTIMIZERS]
BY_WORLD = {
    4: {f"save-{how}-{name}": functools.partial(save, how, name) for how, name in KINDS},
    2: {f"resume-{how}-{name}": functools.partial(resume, how, name) for how, name in KINDS},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(__file__, BY_WORLD, tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize(("how", "optimizer"), KINDS)
def test_a_run_resumed_on_fewer_ranks_equals_an_uninterrupted_one(results, how, optimizer):
    saved, resumed = results[4, f"save-{how}-{optimizer}"], results[2, f"resume-{how}-{optimizer}"]
    for result in (*saved, *resumed):
        assert "error" not in result, result["error"]
    run = Run("alone", 1, optimizer)
    run.train(0, 1, 0, STEPS)
    expected = run.result()
    never_on = saved[0]["without state"]
    assert 0 < sum(never_on) < len(never_on), "the run must be interrupted before some adapter has been on"
    for result in resumed:
        assert torch.equal(result["masks"], expected["masks"][CUT:])
        assert torch.equal(result["parameters"], resumed[0]["parameters"])
        assert result["loaded without state"] == never_on
        assert result["steps"] == expected["steps"]
    torch.testing.assert_close(resumed[0]["parameters"], expected["parameters"], rtol=1e-9, atol=1e-9)


if __name__ == "__main__":
    serve(BY_WORLD)
