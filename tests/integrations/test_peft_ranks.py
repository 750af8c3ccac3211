"""CoTo on PEFT's own layers under DDP and FSDP2, on two gloo ranks."""

import functools

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from cotolora import CoTo
from tests.support.ranks import results_of, serve
from tests.support.training import assert_equal_on_every_rank, shard, whole

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from tests.support.peft_models import METHODS, SEED, Net, shaken, trained  # noqa: E402

WORLD, PER_RANK = 2, 3
# a method, DDP options or the sharded part of the model, and the kind of activation checkpoint around the blocks
pytestmark = pytest.mark.slow

CASES = {
    "default": ("lora", {}, None),
    "static-graph": ("lora", {"static_graph": True}, None),
    "find-unused": ("lora", {"find_unused_parameters": True}, None),
    "checkpoint": ("lora", {}, False),
    "checkpoint-reentrant-static": ("lora", {"static_graph": True}, True),
    "dora": ("dora", {}, None),
    "shared-bank": ("vblora", {}, None),
    **{f"sharded-{how}": ("lora", how, None) for how in ("blocks", "root")},
    **{f"sharded-{how}-checkpoint": ("lora", how, False) for how in ("blocks", "root")},
    "sharded-blocks-hira": ("hira", "blocks", None),
}


def train(case, rank, world):
    """Eight optimizer steps on this rank's share of the batches."""
    method, options, reentrant = CASES[case]
    torch.manual_seed(0)
    model = shaken(peft.get_peft_model(Net(reentrant=reentrant).double(), METHODS[method]())).train()
    coto = CoTo(model, 20, seed=SEED)
    network = model
    if world > 1 and isinstance(options, str):
        shard(model.get_base_model(), options, world)
    elif world > 1:
        network = DistributedDataParallel(model, **options)
    optimizer = torch.optim.AdamW(trained(model), lr=0.05, weight_decay=0.1)
    coto.attach(optimizer)
    masks, touched, norms = [], [], []
    for step in range(8):
        x = torch.randn(WORLD * PER_RANK, 6, generator=torch.Generator().manual_seed(step), dtype=torch.double)
        network(x[rank * PER_RANK : (rank + 1) * PER_RANK] if world > 1 else x).square().mean().backward()
        layers, mask = list(coto._layers.values()), coto.mask.tolist()
        used = {p for switch, on in zip(layers, mask, strict=True) if on for p in switch.adapter_parameters}
        off = {p: whole(p).detach().clone() for s in layers for p in s.adapter_parameters if p not in used}
        norms.append(whole(torch.nn.utils.clip_grad_norm_(trained(model), 1.0)))
        optimizer.step()
        touched += [step for p, value in off.items() if not torch.equal(whole(p), value)]
        masks.append(coto.mask)
        optimizer.zero_grad()
        coto.step()
    return {
        "masks": torch.stack(masks),
        "parameters": torch.cat([whole(p).detach().flatten() for p in trained(model)]),
        "norms": torch.stack(norms),
        "touched": touched,
    }


BY_WORLD = {WORLD: {case: functools.partial(train, case) for case in CASES}}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(__file__, BY_WORLD, tmp_path_factory.mktemp("peft"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_two_ranks_equal_one_process_and_off_adapters_are_unchanged(case, results):
    assert_equal_on_every_rank(results[WORLD, case])
    alone, first = train(case, 0, 1), results[WORLD, case][0]
    assert not alone["masks"].all(1).any()
    assert torch.equal(first["masks"], alone["masks"])
    for what in ("parameters", "norms"):
        torch.testing.assert_close(first[what], alone[what], rtol=1e-9, atol=1e-9)  # the order of summation in float64


if __name__ == "__main__":
    serve(BY_WORLD)
