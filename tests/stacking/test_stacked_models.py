"""Stacks in whole models: copies, files, training, ranks; and mistakes."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cotolora
from cotolora import CoTo, adapter_parameters, adapters, eject, inject, load_adapter, save_adapter, stack
from cotolora.backends.addmm import lora as addmm_lora
from tests.support.ranks import results_of, serve
from tests.support.stacks import (
    GROUPS,
    Block,
    assert_equal_to_rounding,
    assert_same,
    count,
    inputs,
    nodes_of,
    pair,
    step,
)

# what a stack leaves alone


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_not_stacked_and_may_be(how):
    model, single = pair()
    for block in model:
        del block.memory
    Block.memory = staticmethod(lambda x: x)
    try:
        x = inputs()
        copied = how(model)
        assert count(copied, x) == 0
        assert_same(step(copied, x), step(single, x))
        assert count(model, x) == 4
        stack(copied, GROUPS)
        assert count(copied, x) == 4
        layer = how(model[0].q)
        assert torch.equal(layer(x), single[0].q(x))
    finally:
        del Block.memory


def test_files_state_dicts_merges_and_ejects_are_those_of_single_layers(tmp_path):
    model, single = pair()
    x = inputs()
    assert list(model.state_dict()) == list(single.state_dict())
    save_adapter(model, tmp_path)
    other, _ = pair()
    with torch.no_grad():
        for p in adapter_parameters(other):
            p.zero_()
    load_adapter(other, tmp_path)
    assert count(other, x) == 4
    assert torch.equal(other(x), model(x))
    for one in (model, single):
        for layer in adapters(one).values():
            layer.merge()
    assert torch.equal(model(x), single(x))
    for layer in adapters(model).values():
        layer.unmerge()
    assert count(model, x) == 4
    for one in (model, single):
        eject(one)
    assert torch.equal(model(x), single(x))
    inject(model, rank=2)
    assert count(model, x) == 0


def test_training_with_coto_is_that_of_single_layers():
    for unit in ("layer", "module"):
        runs = []
        for one in pair(torch.float64):
            optimizer = torch.optim.AdamW(adapter_parameters(one), lr=0.01)
            coto = CoTo(one, 30, unit=unit, seed=1)
            coto.attach(optimizer)
            for i in range(30):
                with cotolora.set_backend("addmm"):
                    one(inputs(torch.float64) + i).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                coto.step()
            coto.finish()
            runs.append([p.detach() for p in adapter_parameters(one)])
        for p, q in zip(*runs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_a_second_call_replaces_what_the_first_has_stacked():
    model, _ = pair()
    x = inputs()
    assert stack(model, [["k", "v"]]) == [["0.k", "0.v"], ["1.k", "1.v"]]
    assert [len(one.ranks) for one in nodes_of(model(x))] == [2, 2]
    assert stack(model, []) == []
    assert count(model, x) == 0
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_llama_and_bert(tf, dtype):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2))
    bert = tf.BertForMaskedLM(tf.BertConfig(**sizes))
    groups = {llama: [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]], bert: [["query", "key", "value"]]}
    for model, named in groups.items():
        model.to(dtype).eval()
        for layer in inject(model, [name for names in named for name in names], rank=4).values():
            nn.init.normal_(layer.lora_b, std=0.1)
        single = copy.deepcopy(model)
        assert len(stack(model, named)) == 2 * len(named)
        tokens = torch.arange(24).view(2, 12)
        results = []
        for one in (model, single, copy.deepcopy(single).double()):
            loss = one(input_ids=tokens, labels=tokens).loss
            assert len(nodes_of(loss)) == (2 * len(named) if one is model else 0)
            loss.backward()
            results.append([loss.detach(), *[p.grad for p in adapter_parameters(one)]])
        assert_equal_to_rounding(*results)


def test_t5_whose_cross_attention_reads_two_tensors(tf):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    config = tf.T5Config(
        **sizes, dropout_rate=0.0, feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0
    )
    groups = [["q", "k", "v"], ["wi_0", "wi_1"]]
    model = tf.T5ForConditionalGeneration(config)
    for layer in inject(model, [name for names in groups for name in names], rank=4).values():
        nn.init.normal_(layer.lora_b, std=0.1)
    single, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    assert len(stack(model, groups)) == 10
    tokens = torch.arange(24).view(2, 12)
    ranks = []
    for _ in range(2):
        results = []
        for one in (model, single, exact):
            loss = one(input_ids=tokens, labels=tokens).loss
            ranks += [sorted(len(node.ranks) for node in nodes_of(loss))] if one is model else []
            one.zero_grad()
            loss.backward()
            torch.optim.SGD(adapter_parameters(one), lr=0.0).step()
            results.append([loss.detach(), *[p.grad for p in adapter_parameters(one)]])
        assert_equal_to_rounding(*results)
    # in cross-attention k and v read the encoder's output: q computed them in vain, and k then q and v
    assert ranks == [[2] * 4 + [3] * 8, [2] * 6 + [3] * 4]
    generated = [one.generate(input_ids=tokens, max_new_tokens=6, do_sample=False) for one in (model, single)]
    assert torch.equal(*generated)


@pytest.mark.parametrize("gates", ["host", "device"])
def test_trainer_with_the_callback_trains_a_stacked_model_as_an_unstacked_one(gates, tmp_path):
    pytest.importorskip("accelerate")
    trainer = pytest.importorskip("tests.support.trainer")
    from cotolora.integrations.transformers import CoToCallback

    torch.manual_seed(0)
    groups = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    single = trainer.llama()
    for layer in inject(single, [name for names in groups for name in names], rank=4).values():
        nn.init.normal_(layer.lora_b, std=0.05)
    model = copy.deepcopy(single)
    stack(model, groups)
    trained = []
    for one in (model, single):
        callback = CoToCallback(gates=gates, seed=0, save=False)
        trainer.trainer_of(one, tmp_path, callbacks=[callback]).train()
        trained.append(trainer.weights(one))
    for name, weight in trained[0].items():
        torch.testing.assert_close(weight, trained[1][name], rtol=1e-4, atol=1e-5)


def test_mistakes_are_refused_by_name():
    model, _ = pair()
    before = model[0].q._stack
    with pytest.raises(ValueError, match=r"model must have adapters; Linear has none \(call inject first\)"):
        stack(nn.Linear(2, 2), GROUPS)
    for groups in ("q", ["q", "k"], [["q", 1]], 3, None, [None], {"a": ["q", "k"]}):
        with pytest.raises(TypeError, match=r"groups(\[0\])? must be a list of (lists of )?names; got "):
            stack(model, groups)
    for groups in ([["q"]], [[]], [["q", "q"]], [["q", ""]]):
        with pytest.raises(ValueError, match=r"groups\[0\] must hold two or more names, each once; got \["):
            stack(model, groups)
    with pytest.raises(ValueError, match=r"groups must hold each name once; got \['k'\] in two of them"):
        stack(model, [["q", "k"], ["k", "v"]])
    with pytest.raises(ValueError, match=r"groups\[1\] must name two or more adapters of one parent; got \['a', 'b'\]"):
        stack(model, [["q", "k"], ["a", "b"]])
    with pytest.raises(ValueError, match=r"those of '0' cannot: in_features differ, \{'0.q': 12, '0.o': 8\}"):
        stack(model, [["q", "o"]])
    listed = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    inject(listed, rank=2)
    with pytest.raises(ValueError, match=r"those of '' cannot, whose ModuleDict has no forward to call them in"):
        stack(listed, [["q", "k"]])
    for name, value in (("variant", "dora"), ("init", "pissa")):
        options, reason = {name: value}, f"{name} '{value}'"
        with pytest.raises(ValueError, match=f"'0.q' has {reason}"):
            pair(**options)
    assert model[0].q._stack is before, "nothing has changed"


# across ranks


def _wrapped(how, rank, world):
    addmm_lora._WIDE = 0
    model, single = pair()
    if how == "ddp":
        model, single = (DistributedDataParallel(one, find_unused_parameters=True) for one in (model, single))
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for one in (model, single):
            for block in one if how == "fsdp-blocks" else ():
                fully_shard(block, mesh=mesh)
            fully_shard(one, mesh=mesh)
    results = []
    for one in (model, single):
        optimizer = torch.optim.AdamW(adapter_parameters(one), lr=0.01)
        coto = CoTo(one, 20, seed=2)
        coto.attach(optimizer)
        nodes = 0
        for i in range(20):
            y = one(inputs() + i + rank)
            nodes += len(nodes_of(y))
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            coto.step()
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in adapter_parameters(one)]
        results.append([nodes, [p.detach().clone() for p in whole]])
    return {"results": results}


RANKED = {2: {how: lambda rank, world, how=how: _wrapped(how, rank, world) for how in ("ddp", "fsdp", "fsdp-blocks")}}


@pytest.mark.slow
def test_wrapped_models_train_as_single_layers_do(tmp_path):
    for (_, how), ranks in results_of(__file__, RANKED, tmp_path).items():
        for result in ranks:
            assert "error" not in result, result["error"]
            (nodes, stacked), (none, single) = result["results"]
            assert none == 0
            assert nodes > 20, how
            for p, q in zip(stacked, single, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    serve(RANKED)
    sys.exit()
