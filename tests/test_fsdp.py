"""CoTo under FSDP2 (fully_shard), by block and at the root alone, on two and four gloo ranks."""

import dataclasses
import functools

import pytest

from cotolora import set_backend
from tests.ranks import results_of, serve
from tests.training import (
    Case,
    assert_equal_on_every_rank,
    assert_equals_one_process,
    train,
)

CASES = {
    f"{how}-{name}": dataclasses.replace(case, sharded=how)
    for how in ("blocks", "root")
    for name, case in {
        "default": Case(),
        "coto-built-after": Case(built="after"),
        "no-sync": Case(micro=2),
        "checkpoint": Case(checkpoint="non-reentrant"),
        "checkpoint-reentrant": Case(checkpoint="reentrant"),
        "device-gates": Case(coto={"gates": "device"}),
        "zeroed-gradients": Case(set_to_none=False),
        "disabled": Case(off=(1,)),
        "nothing-on-at-times": Case(coto={"at_least_one": False}),
        "evaluation-between-steps": Case(evaluate=True),
        "loss": Case(output="loss"),
    }.items()
}


def fsdp(case, rank, world):
    with set_backend("addmm"):  # which float64 does not take of itself
        return train(case, rank, world)


BY_WORLD = {world: {name: functools.partial(fsdp, case) for name, case in CASES.items()} for world in (2, 4)}
WORKING = [(world, name) for world in BY_WORLD for name in CASES]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(__file__, BY_WORLD, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize(("world", "name"), WORKING)
def test_ranks_agree_bit_for_bit_and_leave_alone_what_is_off(results, world, name):
    assert_equal_on_every_rank(results[world, name])


@pytest.mark.parametrize(("world", "name"), WORKING)
def test_equals_one_process_on_the_joint_batches(results, world, name):
    assert_equals_one_process(CASES[name], results[world, name])


if __name__ == "__main__":
    serve(BY_WORLD)
