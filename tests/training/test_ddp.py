"""CoTo with DistributedDataParallel: every case runs on two gloo processes, the main ones also on four."""

import functools
import importlib.util

import pytest
import torch

from cotolora import sample_mask, set_backend
from cotolora.schedule import activation_probability
from tests.support.ranks import results_of, serve
from tests.support.training import (
    BLOCKS,
    TOTAL,
    WIDTH,
    Case,
    assert_equal_on_every_rank,
    assert_equals_one_process,
    train,
    train_alone,
)

pytestmark = pytest.mark.slow

OLD = torch.__version__ < (2, 13)
CASES = {
    "default": Case(counted=True),
    "without-coto": Case(coto=None, counted=True),
    "coto-built-after": Case(built="after"),
    "static-graph": Case(ddp={"static_graph": True}),
    "static-graph-coto-built-after": Case(ddp={"static_graph": True}, built="after"),
    "find-unused": Case(ddp={"find_unused_parameters": True}),
    "bucket-views": Case(ddp={"gradient_as_bucket_view": True}),
    "bucket-views-zeroed": Case(ddp={"gradient_as_bucket_view": True}, set_to_none=False),
    "static-bucket-views": Case(ddp={"gradient_as_bucket_view": True, "static_graph": True}),
    "no-sync": Case(micro=3),
    "no-sync-static": Case(micro=2, ddp={"static_graph": True}),
    "no-sync-find-unused": Case(micro=2, ddp={"find_unused_parameters": True}),
    "no-sync-bucket-views": Case(micro=2, ddp={"gradient_as_bucket_view": True}),
    "checkpoint": Case(checkpoint="non-reentrant"),
    "checkpoint-static": Case(checkpoint="non-reentrant", ddp={"static_graph": True}),
    "checkpoint-find-unused": Case(checkpoint="non-reentrant", ddp={"find_unused_parameters": True}),
    "checkpoint-reentrant": Case(checkpoint="reentrant"),
    "checkpoint-reentrant-static": Case(checkpoint="reentrant", ddp={"static_graph": True}),
    "checkpoint-reentrant-no-sync": Case(checkpoint="reentrant", micro=2),
    "scalar-divided-in-place": Case(output="loss"),
    "scalar-divided-in-place-static": Case(output="loss", ddp={"static_graph": True}),
    "tuple": Case(output="tuple"),
    "namedtuple": Case(output="namedtuple"),
    "dict": Case(output="dict"),
    "dict-static": Case(output="dict", ddp={"static_graph": True}),
    "dataclass": Case(output="dataclass"),
    "model-output": Case(output="model-output"),
    "output-without-gradient": Case(output="partly"),
    "unused-output-with-infinite-slope": Case(output="unused"),
    "opaque": Case(output="opaque"),
    "iterator": Case(output="iterator"),
    "zeroed-gradients": Case(set_to_none=False),
    "device-gates": Case(coto={"gates": "device"}),
    "device-gates-static": Case(coto={"gates": "device"}, built="after", ddp={"static_graph": True}),
    "modules-and-tilt": Case(coto={"unit": "module", "tilt": 1.0}),
    "disabled": Case(off=(1,)),
    "disabled-static": Case(off=(0, 3), ddp={"static_graph": True}),
    "merged-in-the-run": Case(merged=(2,), coto={"unit": lambda name: name < "layers.2"}),
    "eval-mode": Case(train=False),
    "eval-mode-disabled": Case(train=False, off=(2,)),
    "evaluation-between-steps": Case(evaluate=True),
    "evaluation-between-steps-static": Case(evaluate=True, ddp={"static_graph": True}),
    "two-forwards": Case(forwards=2),
    # torch 2.11's buffer broadcast overwrites the gate that the first forward has saved
    "two-forwards-device": Case(ddp={"broadcast_buffers": False} if OLD else {}, forwards=2, coto={"gates": "device"}),
    "unread": Case(unread=True, ddp={"find_unused_parameters": True}),
    "unread-default": Case(unread=True),
    "unread-default-no-sync": Case(unread=True, micro=2),
    "unread-static": Case(unread=True, ddp={"static_graph": True}),
    "unread-loss": Case(unread=True, output="loss", ddp={"find_unused_parameters": True}),
    "unread-checkpoint": Case(unread=True, checkpoint="non-reentrant", ddp={"find_unused_parameters": True}),
    "nothing-on-at-times": Case(coto={"at_least_one": False}),
    "compiled-inside": Case(compiled="inside", steps=4),
    "compiled-inside-after": Case(compiled="inside", built="after", steps=4),
    "compiled-outside": Case(compiled="outside", steps=4),
    "compiled-blocks": Case(compiled="blocks"),
    "compiled-call": Case(compiled="call", steps=4),
    "compiled-device": Case(compiled="inside", coto={"gates": "device"}),
}


ON_FOUR = (
    "default", "static-graph", "find-unused", "bucket-views", "no-sync", "no-sync-static", "no-sync-find-unused",
    "checkpoint", "checkpoint-static", "checkpoint-find-unused", "checkpoint-reentrant", "checkpoint-reentrant-static",
    "checkpoint-reentrant-no-sync", "device-gates", "zeroed-gradients", "disabled",
)  # fmt: skip


def ddp(case, rank, world):
    with set_backend("addmm"):  # by default, float64 uses the reference
        return train(case, rank, world)


BY_WORLD = {
    2: {name: functools.partial(ddp, case) for name, case in CASES.items()},
    4: {name: functools.partial(ddp, CASES[name]) for name in ON_FOUR},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(__file__, BY_WORLD, tmp_path_factory.mktemp("ddp"))


transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
WORKING = [
    pytest.param(world, name, marks=transformers if name == "model-output" else (), id=f"{name}-{world}")
    for world, named in BY_WORLD.items()
    for name in named
    if name != "iterator"
]


@pytest.mark.parametrize(("world", "name"), WORKING)
def test_ranks_agree_bitwise_and_off_adapters_are_unchanged(results, world, name):
    assert_equal_on_every_rank(results[world, name])


@pytest.mark.parametrize(("world", "name"), WORKING)
def test_equals_one_process_on_the_joint_batches(results, world, name):
    ranks = results[world, name]
    if name.startswith(("unread-default", "unread-static")):
        # without find_unused_parameters, DDP gives unused parameters zero gradients, and AdamW decays them
        alone = train_alone(CASES[name])["parameters"]
        unread = 2 * (WIDTH * 2) + WIDTH * WIDTH + WIDTH  # A, B, W and bias of the unused adapter come last
        ranks = [
            result | {"parameters": torch.cat([result["parameters"][:-unread], alone[-unread:]])} for result in ranks
        ]
    assert_equals_one_process(CASES[name], ranks)


def test_an_output_that_hides_its_tensors_raises_and_is_logged(results):
    for result in results[2, "iterator"]:
        assert "Expected to have finished reduction" in result["error"]
        assert [message for message in result["log"] if "output, a list_iterator: " in message] == result["log"][:1]


def test_masks_equal_sample_mask(results):
    expected = [sample_mask(BLOCKS, activation_probability(step, TOTAL), seed=5, step=step) for step in range(TOTAL)]
    assert torch.equal(results[2, "default"][1]["masks"], torch.stack(expected))
    off = ~torch.stack(expected)
    assert off.any(1).sum() >= 6, "the cases must have steps in which adapters are off"
    assert off[:, 0].any(), "and steps in which backward does not reach the first block"


def layers_in(ran):
    """The number of our layers' autograd nodes that a backward ran, of either Function."""
    return sum(count for name, count in ran.items() if name.endswith("LowRankLinearBackward"))


@pytest.mark.parametrize("world", [2, 4])
def test_backward_still_stops_below_the_lowest_active_adapter(results, world):
    masks = results[world, "default"][0]["masks"]
    for result in results[world, "default"]:
        for mask, ran in zip(masks, result["ran"], strict=True):
            lowest = mask.nonzero()[0].item()
            assert ran["TanhBackward0"] == BLOCKS - lowest
            assert layers_in(ran) == mask.sum()
            # DDP sees every parameter; those of off adapters get their gradients from the single node that joins them
            assert ran["AccumulateGrad"] == 2 * BLOCKS
            assert ran.get("_JoinBackward", 0) == (not mask.all())
    for ran in results[2, "without-coto"][0]["ran"]:
        assert (ran["TanhBackward0"], layers_in(ran), "_JoinBackward" in ran) == (BLOCKS, BLOCKS, False)


if __name__ == "__main__":
    serve(BY_WORLD)
