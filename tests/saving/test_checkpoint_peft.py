"""Adapters on disk: reading PEFT's files, and PEFT reading ours."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cotolora import adapters, inject, load_adapter, save_adapter
from cotolora.merging import mix
from tests.support.saving import (
    PREFIX,
    WEIGHTS,
    Inner,
    Many,
    Net,
    Odd,
    X,
    assert_few_ulps,
    base,
    keys,
    logits,
    refused,
    rewrite,
    train,
    trained,
    tuned,
)


class Nested(nn.Module):
    """Blocks within blocks."""

    def __init__(self):
        super().__init__()
        inner = (nn.ModuleDict({"inner": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))}) for _ in range(2))
        self.outer = nn.ModuleList(inner)
        for block in self.outer:
            block["inner"] = nn.ModuleList(nn.ModuleDict({"fc": linear}) for linear in block["inner"])

    def forward(self, x):
        for block in self.outer:
            for layer in block["inner"]:
                x = x + layer["fc"](x)
        return x


IDS = {"input_ids": torch.tensor([[1, 5, 2, 7], [3, 4, 8, 6]])}


def gpt2(tf, tied=True):
    config = tf.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


def llama(tf, tied=False):
    config = tf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=tied,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def bert(tf):
    config = tf.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return tf.BertForSequenceClassification(config)


def make_base(tf, make, *tied):
    if make in (Net, Odd, Many, Inner, Nested):
        return base(make), X
    torch.manual_seed(0)
    return make(tf, *tied).eval(), IDS


@contextmanager
def no_key_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [str(w.message) for w in caught if "key" in str(w.message).lower()]


PEFT_READS = {
    "net": (Net, {"rank": 2}),
    "patterns": (Net, {"rank_pattern": {"^fc": 3, "fc": 5}, "alpha_pattern": {"head.2": 0.3, "blocks.1.*": 7}}),
    "rslora": (Net, {"use_rslora": True, "rank": 3}),
    "dora": (Net, {"variant": "dora", "rank": 3, "alpha_pattern": {"^fc": 5}, "trainable": ["head"]}),
    "dora-rslora": (llama, {"variant": "dora", "rank": 3, "use_rslora": True}),
    "dora-conv1d": (gpt2, {"variant": "dora", "rank": 2}),
    "hira": (llama, {"variant": "hira", "rank": 3, "alpha": 7.0}),
    "hira-conv1d": (gpt2, {"variant": "hira", "rank": 2, "use_rslora": True}),
    "pissa": (Net, {"init": "pissa", "rank": 2, "trainable": ["norm"]}),
    "pissa-rslora": (llama, {"init": "pissa", "rank": 3, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "pissa-dora-conv1d": (gpt2, {"init": "pissa", "variant": "dora", "rank": 2}),
    "olora": (llama, {"init": "olora", "rank": 3, "alpha_pattern": {"q_proj": 5}}),
    "olora-conv1d": (gpt2, {"init": "olora", "rank": 2}),
    "ambiguous-name": (Net, {"targets": "fc", "rank_pattern": {"fc": 3}}),
    "odd-names": (Odd, {"rank_pattern": {"b": 3, r"\^": 4}, "alpha_pattern": {r".*\$": 3}}),
    "odd-head": (Odd, {"targets": r"linears\.[aé].*", "trainable": r"linears\.(\(z\)|\$|x\|y)"}),
    "head": (Net, {"targets": ["fc"], "trainable": ["head"]}),
    "bias-alone": (Net, {"targets": ["fc"], "trainable": ["head.2.bias"]}),
    "everything-else": (Net, {"targets": ["fc"], "trainable": ["head", "gamma", "token", "norm"]}),
    "ambiguous-head": (Net, {"targets": ["fc"], "trainable": "norm"}),
    "heads-named-as-pefts-own": (Inner, {"targets": ["fc"], "trainable": ["default", "layer", "A"]}),
    "many": (Many, {"targets": r"layers\..*|q", "rank": 2}),
    "many-of-one-kind": (Many, {"targets": [f"layers.{i}.{key}" for i in range(12) for key in "qv"], "rank": 2}),
    "llama": (llama, {"rank": 2, "rank_pattern": {"q_proj": 3}}),
    "llama-and-norm": (llama, {"rank": 2, "targets": ["q_proj", "down_proj"], "trainable": ["model.norm"]}),
    "gpt2": (gpt2, {"rank": 2}),
    "gpt2-one": (gpt2, {"rank": 2, "targets": ["h.1.attn.c_proj"]}),
    "gpt2-and-its-tied-embedding": (gpt2, {"rank": 2, "targets": ["c_attn"], "trainable": ["wte"]}),
    "bert": (bert, {"rank": 2, "targets": ["query", "dense"], "trainable": ["classifier"]}),
}


@pytest.mark.parametrize("case", PEFT_READS)
def test_peft_reads_our_files(case, peft, tf, tmp_path):
    make, options = PEFT_READS[case]
    model, x = make_base(tf, make)
    tuned(model, **options)
    save_adapter(model, tmp_path)
    with no_key_warnings():
        theirs = peft.PeftModel.from_pretrained(make_base(tf, make)[0], tmp_path).eval()
    assert_few_ulps(logits(theirs, x), logits(model, x))
    assert sorted(theirs.base_model.targeted_module_names) == sorted(adapters(model))


def by_peft(peft, model, directory, seed=1, **config):
    """A model that was adapted, changed and saved with PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on Conv1D and what it calls in transformers
        kind = peft.HiraConfig if "hira_dropout" in config else peft.LoraConfig
        theirs = train(peft.get_peft_model(model, kind(**{"r": 2, **config})), seed).eval()
        theirs.save_pretrained(directory)
    return theirs


WE_READ = {
    "net-list": (Net, {"target_modules": ["fc"]}),
    "net-regex": (Net, {"target_modules": r"blocks\.\d\.fc|head\.2"}),
    "net-all-linear": (Net, {"target_modules": "all-linear"}),
    "net-exclude": (Net, {"target_modules": ["fc", "head.0"], "exclude_modules": ["blocks.0.fc", "0"]}),
    "net-exclude-regex": (Net, {"target_modules": ["fc"], "exclude_modules": r"blocks\.0\..*"}),
    "net-head": (Net, {"target_modules": ["fc"], "modules_to_save": ["head"], "use_rslora": True}),
    "net-norms": (Net, {"target_modules": ["fc"], "modules_to_save": ["norm"]}),
    "net-target-in-saved": (Net, {"target_modules": ["fc", "head.0"], "modules_to_save": ["head"]}),
    "net-layers": (Net, {"target_modules": ["fc"], "layers_to_transform": 1}),
    "net-layers-list": (Net, {"target_modules": ["fc"], "layers_to_transform": [0], "layers_pattern": "blocks"}),
    "nested-layers": (
        Nested,
        {"target_modules": ["fc"], "layers_to_transform": [1], "layers_pattern": ["outer", "inner"]},
    ),
    "net-no-layers": (Net, {"target_modules": ["fc"], "layers_to_transform": []}),
    "net-exact-beats-layers": (Net, {"target_modules": ["fc", "blocks.0.fc"], "layers_to_transform": [1]}),
    "net-gaussian": (Net, {"target_modules": ["fc"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}),
    "net-mica": (Net, {"target_modules": ["fc"], "init_lora_weights": "MiCA"}),
    "net-dora": (Net, {"target_modules": ["fc"], "modules_to_save": ["head"], "use_dora": True, "use_rslora": True}),
    "llama-dora": (llama, {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "rank_pattern": {"up_proj": 3}}),
    "gpt2-dora": (gpt2, {"target_modules": ["c_attn"], "use_dora": True, "lora_dropout": 0.1}),
    "llama-hira": (llama, {"target_modules": "all-linear", "hira_dropout": 0.1, "rank_pattern": {"q_proj": 3}}),
    "gpt2-hira": (gpt2, {"target_modules": ["c_attn", "c_fc"], "hira_dropout": 0.0, "init_weights": "gaussian"}),
    "llama-list": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "llama-regex": (llama, {"target_modules": r".*layers\.1\..*_proj"}),
    "llama-all-linear": (llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama-patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"q_proj": 3, r"model\.layers\.\d+\.mlp.*": 1},
            "alpha_pattern": {"layers.0.self_attn.k_proj": 3, "^model.layers.1.*": 32},
            "use_rslora": True,
        },
    ),
    "llama-layers": (
        llama,
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    ),
    "llama-saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "gpt2-list": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "gpt2-all-linear": (gpt2, {"target_modules": "all-linear"}),
    "gpt2-layers": (gpt2, {"target_modules": ["c_fc", "c_proj"], "layers_to_transform": [1], "layers_pattern": "h"}),
    "bert-seq-cls": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert-saved": (
        bert,
        {"target_modules": ["dense"], "modules_to_save": ["classifier"], "exclude_modules": ["pooler.dense"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WE_READ)
def test_we_read_peft_files(case, peft, tf, tmp_path):
    make, options = WE_READ[case]
    model, x = make_base(tf, make)
    theirs = by_peft(peft, model, tmp_path, **options)
    ours, _ = make_base(tf, make)
    assert load_adapter(ours, tmp_path) == ([], [])
    assert list(adapters(ours)) == theirs.base_model.targeted_module_names
    assert_few_ulps(logits(ours, x), logits(theirs, x))
    assert not torch.allclose(logits(ours, x), logits(make_base(tf, make)[0], x), atol=1e-3)
    marks = (".default", "base_model.model.", ".modules_to_save", ".original_module", ".weight")
    plain = set()
    for name in trained(theirs):
        for mark in marks:
            name = name.replace(mark, "")
        for their, our in (("_A", "_a"), ("_B", "_b"), ("magnitude_vector", "magnitude"), ("hira_", "lora_")):
            name = name.replace(their, our)
        plain.add(name)
    assert {name.removesuffix(".weight") for name in trained(ours)} == plain

    again = tmp_path / "again"
    save_adapter(ours, again)
    third, _ = make_base(tf, make)
    load_adapter(third, again)
    assert torch.equal(logits(third, x), logits(ours, x))


def test_further_tensors_of_peft_are_loaded_and_stay_frozen(peft, tf, tmp_path):
    model, x = make_base(tf, llama)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    theirs = by_peft(peft, model, tmp_path, target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)  # PEFT's default after resizing the embeddings
    assert any("embed_tokens" in key for key in keys(tmp_path))
    ours, _ = make_base(tf, llama)
    load_adapter(ours, tmp_path)
    assert_few_ulps(logits(ours, x), logits(theirs, x))
    assert not any("embed" in name or "head" in name for name in trained(ours))


def retrained(tf, make, tied=False):
    """A base whose embedding and head differ from those of `make_base`, as after further pretraining."""
    model, x = make_base(tf, make, tied)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        train(module.requires_grad_(True), seed=3)
    return model, x


BASES = {
    "head": (llama, False, {"target_modules": ["q_proj", "lm_head"]}),
    "tied-head": (llama, True, {"target_modules": ["q_proj", "lm_head"]}),
    "head-dora": (llama, False, {"target_modules": ["lm_head"], "use_dora": True}),
    "tied-conv1d": (gpt2, True, {"target_modules": ["c_attn", "lm_head"]}),
}


@pytest.mark.parametrize("onto", ["base", "adapters", "merged"])
@pytest.mark.parametrize("case", BASES)
def test_the_base_of_an_adapter_is_loaded_if_peft_saved_it(case, onto, peft, tf, tmp_path):
    make, tied, options = BASES[case]
    model, x = retrained(tf, make, tied)
    theirs = by_peft(peft, model, tmp_path, **options)
    assert any(key.endswith("lm_head.base_layer.weight") for key in keys(tmp_path))
    ours, _ = make_base(tf, make, tied)
    if onto != "base":
        variant = "dora" if "use_dora" in options else "lora"
        tuned(ours, options["target_modules"], rank=2, alpha=8.0, variant=variant, seed=4)
        if onto == "merged":
            ours.lm_head.merge()
    embedding = ours.get_input_embeddings()
    assert load_adapter(ours, tmp_path) == ([], [])
    if not tied:
        embedding.load_state_dict(theirs.get_input_embeddings().state_dict())
    assert_few_ulps(logits(ours, x), logits(theirs, x))
    assert not any(name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight")) for name in trained(ours))


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_file_with_the_base_of_an_adapter_loads_in_both_libraries(tied, peft, tf, tmp_path):
    for number, seed in enumerate((1, 2)):
        model, x = retrained(tf, llama, tied)
        by_peft(peft, model, tmp_path / str(number), seed, target_modules=["q_proj", "lm_head"])
    merged = mix([tmp_path / "0", tmp_path / "1"])
    merged.save(tmp_path / "merged")
    ours, _ = make_base(tf, llama, tied)
    load_adapter(ours, tmp_path / "merged")
    with no_key_warnings():
        theirs = peft.PeftModel.from_pretrained(make_base(tf, llama, tied)[0], tmp_path / "merged").eval()
    assert_few_ulps(logits(ours, x), logits(theirs, x))
    assert torch.equal(ours.lm_head.weight, merged.other_tensors["lm_head.base_layer.weight"])
    assert "lm_head.weight" not in trained(ours)
    other = tuned(make_base(tf, llama, tied)[0], ["q_proj", "lm_head"], rank=2)
    before = logits(other, x)
    with merged.applied_to(other):
        other.get_input_embeddings().load_state_dict(ours.get_input_embeddings().state_dict())
        assert_few_ulps(logits(other, x), logits(ours, x))
        other.get_input_embeddings().load_state_dict(make_base(tf, llama, tied)[0].get_input_embeddings().state_dict())
    assert torch.equal(logits(other, x), before)


def test_base_tensors_missing_in_the_model_are_refused(peft, tf, tmp_path):
    by_peft(peft, make_base(tf, llama)[0], tmp_path, target_modules=["q_proj", "lm_head"])
    tensors, name = load_file(tmp_path / WEIGHTS), "lm_head.base_layer"
    for key, match in (
        (f"{name}.bias", rf"unexpected keys \['{name}.bias'\]"),
        ("model.layers.0.base_layer.weight", r"unexpected keys \['model.layers.0.base_layer.weight'\]"),
        (f"{name}.weight", f"{name}.weight must be of shape"),
    ):
        rewrite(tmp_path, {**tensors, PREFIX + key: torch.zeros(3)})
        with refused(model := make_base(tf, llama)[0], match):
            load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"bias": "all"}, "bias must be 'none'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
    ids=str,
)
def test_unsupported_peft_files_are_refused(config, match, peft, tmp_path):
    by_peft(peft, base(), tmp_path, **{"target_modules": ["fc"], **config})
    model = base()
    with refused(model, match):
        load_adapter(model, tmp_path)


# modules in several places, of which PEFT adapts only the first


class Places(nn.Module):
    """Two linears and a second place for them: another module, the same block, copies, or another attribute."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        shared, other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first = nn.ModuleDict({"a": shared, "b": other})
        self.second = {
            "modules": nn.ModuleDict({"a": shared, "b": other}),
            "block": self.first,
            "copies": nn.ModuleDict({"a": copy.deepcopy(shared), "b": copy.deepcopy(other)}),
            "attributes": nn.Sequential(other),
        }[how]
        if how == "attributes":
            self.first["again"] = shared

    def forward(self, x):
        for linear in (*self.first.children(), *self.second.children()):
            x = linear(x).tanh()
        return x


# PEFT expects a tensor under each name and warns the same for its own files
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize("how", ["block", "copies"])
def test_a_module_with_several_names_is_saved_and_loaded_as_in_peft(how, peft, tmp_path):
    x = torch.randn(3, 4)
    for targets in ("all-linear", ["first.a"]):
        theirs = peft.get_peft_model(Places(how), peft.LoraConfig(target_modules=targets, init_lora_weights=False))
        theirs.save_pretrained(tmp_path / "theirs")
        ours = Places(how)
        load_adapter(ours, tmp_path / "theirs")
        torch.testing.assert_close(ours(x), theirs(x))
        save_adapter(ours, tmp_path / "ours")
        torch.testing.assert_close(peft.PeftModel.from_pretrained(Places(how), tmp_path / "ours")(x), ours(x))


@pytest.mark.parametrize("how", ["modules", "attributes"])
def test_several_places_are_refused_both_ways(how, peft, tmp_path):
    others = {"modules": "'first.a', 'second.a'", "attributes": "'first.a', 'first.again'"}[how]
    says = rf"first.a must be in one place of the model; it is in {others}, .*give the other places copies"
    peft.get_peft_model(Places(how), peft.LoraConfig(target_modules=["first.a"])).save_pretrained(tmp_path)
    model = Places(how)
    with refused(model, says):
        load_adapter(model, tmp_path)
    inject(model, ["first.a"])
    with refused(model, says):
        load_adapter(model, tmp_path)
    with refused(model, says):
        save_adapter(model, tmp_path)


def test_single_modules_are_loaded_beside_modules_in_several_places(peft, tmp_path, caplog):
    theirs = peft.get_peft_model(Places("attributes"), peft.LoraConfig(target_modules="all-linear"))
    theirs.base_model.model.first["b"].lora_B["default"].weight.data.normal_()
    theirs.save_pretrained(tmp_path)
    model = nn.ModuleDict({"first": nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})})
    model["alias"] = model["first"]["a"]
    load_adapter(model, tmp_path, strict=False)
    assert list(adapters(model)) == ["first.b"]
    assert "ignored first.a, which must be in one place" in caplog.text
    save_adapter(model, tmp_path)
