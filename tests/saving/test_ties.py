"""Saved adapters of models with tied weights: as in PEFT, a trained copy belongs only to its module."""

import importlib
import logging
import warnings
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cotolora import adapters, inject, load_adapter, save_adapter
from cotolora.merging import AdapterState
from tests.support.saving import (
    PREFIX,
    WEIGHTS,
    assert_few_ulps,
    base,
    config_of,
    logits,
    refused,
    rewrite,
    train,
    trained,
    tuned,
)

IDS = {"input_ids": torch.tensor([[1, 5, 2, 7], [3, 4, 8, 6]])}


def llama(tf, tied=True):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


class Tied(nn.Module):
    """An embedding and a head with one weight, or with `by_data` two parameters that share memory."""

    def __init__(self, by_data=False):
        super().__init__()
        self.embed, self.mid = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        if by_data:
            self.head.weight.data = self.embed.weight.data
        else:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.mid(self.embed(torch.arange(6))))


class Twice(nn.Module):
    """One norm in two places, and in a third through the module around it."""

    def __init__(self):
        super().__init__()
        self.fc, self.first = nn.Linear(4, 4), nn.ModuleDict({"norm": nn.LayerNorm(4)})
        self.again, self.last = self.first, nn.ModuleList([self.first["norm"]])

    def forward(self, x):
        return self.last[0](self.fc(self.again["norm"](x)))


def by_peft(peft, model, directory, save_embedding_layers="auto", **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about tied weights
        theirs = train(peft.get_peft_model(model, peft.LoraConfig(r=2, **config))).eval()
        theirs.save_pretrained(directory, save_embedding_layers=save_embedding_layers)
    return theirs


def read_by_peft(peft, model, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, directory).eval()


@pytest.mark.parametrize("beside", ["auto", True])
@pytest.mark.parametrize(
    ("targets", "saved"),
    [
        (["q_proj"], ["embed_tokens"]),
        (["q_proj"], ["lm_head"]),
        (["q_proj"], ["embed_tokens", "lm_head"]),
        (["q_proj", "lm_head"], ["embed_tokens"]),
    ],
)
def test_pefts_trained_copy_of_a_tied_weight_is_not_tied(targets, saved, beside, peft, tf, tmp_path, caplog):
    theirs = by_peft(peft, llama(tf), tmp_path, beside, target_modules=targets, modules_to_save=saved)
    ours = llama(tf)
    with caplog.at_level(logging.WARNING, "cotolora"):
        assert load_adapter(ours, tmp_path) == ([], [])
    assert_few_ulps(logits(ours, IDS), logits(theirs, IDS))
    copies = {f"{'model.' * (name == 'embed_tokens')}{name}.weight" for name in saved}
    assert trained(ours) == copies | {f"{name}.lora_{x}" for name in adapters(ours) for x in "ab"}
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == sorted(copies, reverse=True)
    save_adapter(ours, tmp_path / "again")
    third = llama(tf)
    load_adapter(third, tmp_path / "again")
    assert torch.equal(logits(third, IDS), logits(ours, IDS))
    assert_few_ulps(logits(read_by_peft(peft, llama(tf), tmp_path / "again"), IDS), logits(ours, IDS))


def test_a_copied_module_keeps_its_internal_ties(peft, tmp_path):
    class Outer(nn.Sequential):
        def __init__(self):
            inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            super().__init__(OrderedDict(fc=nn.Linear(4, 4), inner=inner, last=nn.Linear(4, 4)))
            inner[0].weight = inner[1].weight = self.last.weight

    theirs = by_peft(peft, base(Outer), tmp_path, target_modules=["fc"], modules_to_save=["inner"])
    ours = base(Outer)
    assert load_adapter(ours, tmp_path) == ([], [])
    assert ours.inner[0].weight is ours.inner[1].weight is not ours.last.weight
    assert_few_ulps(logits(ours), logits(theirs))


@pytest.mark.parametrize("trainable", ["embed_tokens", "lm_head"])
def test_our_trained_tied_weight_stays_tied_and_peft_loads_it_into_both(trainable, peft, tf, tmp_path, caplog):
    model = tuned(llama(tf), ["q_proj"], rank=2, trainable=[trainable])
    save_adapter(model, tmp_path)
    theirs = read_by_peft(peft, llama(tf), tmp_path)
    assert_few_ulps(logits(theirs, IDS), logits(model, IDS))
    for other in (llama(tf), tuned(llama(tf), ["q_proj"], rank=2, trainable=[trainable], seed=2)):
        load_adapter(other, tmp_path)
        assert other.lm_head.weight is other.model.embed_tokens.weight
        assert torch.equal(logits(other, IDS), logits(model, IDS))
        assert trained(other) == trained(model)
    assert not caplog.records
    untied = llama(tf, tied=False)
    load_adapter(untied, tmp_path)
    assert torch.equal(logits(untied, IDS), logits(model, IDS))


def tied_by_data():
    return base(lambda: Tied(by_data=True))


@pytest.mark.parametrize("trainable", ["embed", "head"])
def test_shared_memory_counts_as_a_tie(trainable, peft, tmp_path):
    model = tuned(tied_by_data(), ["mid"], rank=2, trainable=[trainable])
    assert torch.equal(model.embed.weight, model.head.weight)
    save_adapter(model, tmp_path)
    ours = tied_by_data()
    load_adapter(ours, tmp_path)
    assert torch.equal(logits(ours), logits(model))
    assert len(trained(ours)) == len(trained(model))  # one of the two tied parameters
    assert_few_ulps(logits(read_by_peft(peft, tied_by_data(), tmp_path)), logits(model))


def test_pefts_copy_unties_shared_memory(peft, tmp_path):
    theirs = by_peft(peft, tied_by_data(), tmp_path, target_modules=["mid"], modules_to_save=["embed"])
    ours = tied_by_data()
    before = ours.head.weight.clone()
    load_adapter(ours, tmp_path)
    assert_few_ulps(logits(ours), logits(theirs))
    assert torch.equal(ours.head.weight, before)


def test_an_adapter_whose_base_trains_through_its_memory_is_not_saved(tmp_path):
    model = tied_by_data()
    inject(model, ["head"], rank=2, trainable=["embed"])
    for change in (lambda: None, model.head.merge):
        change()
        with pytest.raises(ValueError, match=r"must not train the base of an adapter; head.weight requires grad, or"):
            save_adapter(model, tmp_path)


def only_the_embedding(directory):
    """The file that PEFT saves for `Tied` with ``modules_to_save=["embed"]``."""
    save_adapter(tuned(base(Tied), ["mid"], rank=2, trainable=["embed"]), directory)
    tensors = load_file(directory / WEIGHTS)
    rewrite(directory, {k: t for k, t in tensors.items() if "head" not in k}, modules_to_save=["embed"])
    return directory


def test_loading_onto_adapters_never_unties_parameters_of_an_optimizer(tmp_path):
    model = tuned(base(Tied), ["mid"], rank=2, trainable=["embed"], seed=2)
    copy = "modules_to_save makes embed.weight a separate trained copy"
    match = rf"{WEIGHTS}: {copy}.* tied to 'head.weight'; load onto a model without adapters"
    with refused(model, match):
        load_adapter(model, only_the_embedding(tmp_path))
    state = AdapterState.from_directory(tmp_path)
    with refused(model, "embed.weight must be .* tied to 'head.weight'"), state.applied_to(model):
        pass
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    load_adapter(model, tmp_path)
    with state.applied_to(model):
        assert torch.equal(model.embed.weight, state.other_tensors["embed.weight"])


def test_two_values_for_one_tensor_are_refused(tmp_path):
    save_adapter(tuned(base(Tied), ["mid"], rank=2, trainable=["embed"]), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[PREFIX + "head.weight"] = tensors[PREFIX + "head.weight"] + 1
    rewrite(tmp_path, tensors, modules_to_save=None)
    for model in (base(Tied), tuned(base(Tied), ["mid"], rank=2, seed=2)):
        with refused(model, r"embed.weight and head.weight are tied in the model and must be equal"):
            load_adapter(model, tmp_path)


def test_a_load_that_fails_late_restores_ties(tmp_path, monkeypatch):
    def failing(*_):
        raise RuntimeError("no memory")

    only_the_embedding(tmp_path)
    model = base(Tied)
    monkeypatch.setattr(importlib.import_module("cotolora.inject"), "block_fast_path", failing)
    with refused(model, "no memory", RuntimeError):
        load_adapter(model, tmp_path)
    assert model.embed.weight is model.head.weight


def test_a_module_in_two_places_is_saved_for_each_as_peft_copies_each(peft, tmp_path):
    model = tuned(base(Twice), ["fc"], rank=2, trainable=["norm"])
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["first.norm", "last.0"]
    assert_few_ulps(logits(read_by_peft(peft, base(Twice), tmp_path)), logits(model))
    ours = base(Twice)
    load_adapter(ours, tmp_path)
    assert torch.equal(logits(ours), logits(model))
    assert ours.last[0] is ours.first["norm"]


def test_a_copy_for_one_of_two_places_is_refused(peft, tmp_path):
    by_peft(peft, base(Twice), tmp_path, target_modules=["fc"], modules_to_save=["first.norm"])
    for model in (base(Twice), tuned(base(Twice), ["fc"], rank=2)):
        with refused(
            model, rf"{WEIGHTS}: modules_to_save must match .*; the module of first.norm.weight.* last.0.weight"
        ):
            load_adapter(model, tmp_path)


def test_name_suffixes_without_a_dot_are_copied_too(peft, tmp_path):
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.pre_norm, self.norm = nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)
            self.other = nn.LayerNorm(4)
            self.other.weight = self.pre_norm.weight

        def forward(self, x):
            return self.other(self.norm(self.fc(self.pre_norm(x))))

    theirs = by_peft(peft, base(Ends), tmp_path, target_modules=["fc"], modules_to_save=["norm"])
    ours = base(Ends)
    assert load_adapter(ours, tmp_path) == ([], [])
    assert_few_ulps(logits(ours), logits(theirs))
    assert trained(ours) == {f"{x}.{y}" for x in ("norm", "pre_norm") for y in ("weight", "bias")} | {
        "fc.lora_a", "fc.lora_b",
    }  # fmt: skip


def test_adapters_on_a_tied_head_load_its_trained_weight(tmp_path):
    save_adapter(tuned(base(Tied), ["mid"], rank=2, trainable=["embed"]), tmp_path)
    model = base(Tied)
    inject(model, ["mid"], rank=2)
    load_adapter(model, tmp_path)
    assert torch.equal(model.head.weight, load_file(tmp_path / WEIGHTS)[PREFIX + "embed.weight"])
