"""inject and eject: name matching as in PEFT, errors, what stays unchanged, and restoring the model."""

import copy
import logging
import math
import re
import warnings
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from cotolora import (
    CoToLoRALinear,
    adapter_mask,
    adapter_parameters,
    adapters,
    eject,
    inject,
    lora_plus_groups,
    trainable_report,
)
from cotolora.matching import compile_patterns, first_match, matches
from cotolora.targets import match_linears


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.not_q_proj = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x + self.gamma * self.not_q_proj(self.q_proj(self.norm(x)))


class Net(nn.Module):
    """Blocks, a head of two layers, and a parameter of the root module."""

    def __init__(self, blocks=2):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def forward(self, x):
        x = x + self.token
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Tied(nn.Module):
    """A small language model whose head is tied to its embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mid(self.embed(ids)))


def linears(model):
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def move(model):
    """Gives every adapter a nonzero B, so that it changes the output."""
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_b.normal_()
    return model


def picture(model):
    """All state that a refused call could have changed."""
    return (
        dict(model.named_modules(remove_duplicate=False)),
        {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters(remove_duplicate=False)},
        [module.__dict__.get("activation_relu_or_gelu") for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        model.training,
    )


@contextmanager
def unchanged(model):
    before = picture(model)
    yield
    assert picture(model) == before


@contextmanager
def refused(model, match, error=ValueError):
    with unchanged(model), pytest.raises(error, match=match):
        yield


# names

COMPONENT = st.sampled_from(["q", "q_proj", "not_q_proj", "v", "0", "1", "layers", "a+b", "X"])
NAME = st.lists(COMPONENT, min_size=1, max_size=4).map(".".join)
RULE = st.one_of(
    st.lists(NAME, min_size=1, max_size=3),
    st.sampled_from(
        [".*", r".*\.q_proj", "q_proj", r"(.*\.)?q(_proj)?", r"layers\.[01]\..*", "q|v", ".*_proj$", "X.*v"]
    ),
)


def in_peft(peft, targets, exclude, name):
    """Whether PEFT itself matches a name."""
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(target_modules=targets, exclude_modules=exclude)
    return bool(check_target_module_exists(config, name))


def test_attributes_set_on_a_linear_are_copied_to_the_layer():
    model = Net(1)
    linear = model.blocks[0].q_proj
    linear.layer_index, linear.mask, linear._private, linear.rank = 3, torch.ones(4), "kept where it is", 99
    inject(model, rank=2)
    for one in (model, copy.deepcopy(model)):
        layer = one.blocks[0].q_proj
        assert layer.layer_index == 3
        assert torch.equal(layer.mask, torch.ones(4))
        assert not hasattr(layer, "_private")
        assert layer.rank == 2  # its own
    model.blocks[0].q_proj.layer_index = 4
    plain = eject(model)["blocks.0.q_proj"]
    assert (plain.layer_index, plain.mask) == (4, linear.mask)


def test_a_conv1d_has_its_sizes_under_its_own_names():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(Conv1D(6, 4))
    inject(model, rank=2)
    assert (model[0].nf, model[0].nx) == (6, 4)


def test_further_tensors_and_modules_of_a_linear_stay_in_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_buffer("calls", torch.zeros(()))
    model[0].register_parameter("gain", nn.Parameter(torch.ones(4)))
    model[0].activation = nn.PReLU(4)
    names = list(model.state_dict())
    layers = inject(model, rank=2)
    assert model[0].activation is layers["0"].base.activation
    assert set(model.state_dict()) >= set(names)
    assert not model[0].gain.requires_grad
    with pytest.raises(
        RuntimeError, match=r"0: the base is .*Linear that holds \['gain', 'calls', 'activation'\] in addition"
    ):
        model[0].merge()
    eject(model, merge=False)
    assert list(model.state_dict()) == names


def test_complex_linears_are_skipped_or_refused(caplog):
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0 must be .*; got a Linear, whose weight is complex"):
        inject(model, ["0"])
    with caplog.at_level(logging.INFO, logger="cotolora"):
        assert list(inject(model, rank=2)) == ["1"]
    what = "leaves out modules that do not map in_features to out_features"
    assert f"{what}: '0'; the first is a Linear, whose weight is complex" in caplog.text


@settings(max_examples=200, deadline=None)
@given(name=NAME, targets=RULE, start=st.integers(0, 12))
def test_a_name_matches_as_in_peft(name, targets, start):
    peft = pytest.importorskip("peft")
    for rule in (targets, [name[start:] or name], re.escape(name[start:])):  # suffixes, of whole components or not
        assert matches(name, rule) == in_peft(peft, rule, None, name)


@settings(max_examples=200, deadline=None)
@given(name=NAME, keys=st.lists(st.one_of(NAME, st.sampled_from(["^q", "q.*", r"0\.v", "(q|v)", ".*"])), max_size=3))
def test_a_pattern_matches_as_in_peft(name, keys):
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    key = get_pattern_key(keys, name)
    expected = keys.index(key) if key in keys and re.match(rf"(.*\.)?({key})$", name) else None
    pattern = {key: place for place, key in reversed(list(enumerate(keys)))}  # the first of equal keys applies
    ordered = {key: pattern[key] for key in keys}
    assert first_match(compile_patterns("rank_pattern", ordered), name, None) == expected


def tree(names):
    """A model with a linear at each name; skips names inside another one."""
    root = nn.Module()
    for name in sorted(names):
        if any(name.startswith(other + ".") for other in names):
            continue
        parent, *rest = root, *name.split(".")
        for part in rest[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(rest[-1], nn.Linear(1, 1))
    return root


@settings(max_examples=150, deadline=None)
@given(names=st.sets(NAME, min_size=1, max_size=6), targets=RULE, exclude=st.one_of(st.none(), RULE))
def test_inject_targets_the_same_modules_as_peft(names, targets, exclude):
    peft = pytest.importorskip("peft")
    model = tree(names)
    expected = [name for name in linears(model) if in_peft(peft, targets, exclude, name)]
    wanting = [targets] if isinstance(targets, str) else targets
    complete = all(any(matches(name, t if isinstance(targets, str) else [t]) for name in expected) for t in wanting)
    if complete:
        assert list(inject(model, targets, exclude=exclude, rank=1)) == expected
    else:
        with refused(model, "match no linear module"):
            inject(model, targets, exclude=exclude, rank=1)


def test_a_list_matches_whole_components():
    assert list(inject(Net(), ["q_proj"])) == ["blocks.0.q_proj", "blocks.1.q_proj"]


@pytest.mark.parametrize("targets", ["all-linear", "ALL-LINEAR", "All-Linear"])
def test_all_linear_targets_every_linear_of_a_plain_model(targets):
    assert list(inject(Net(), targets)) == linears(Net())


@pytest.mark.parametrize(
    "exclude",
    [["q_proj"], ["blocks.0"], r".*\.not_q_proj", r"head\..*", ["head.0", "blocks.1.q_proj"], [], "", None],
    ids=str,
)
def test_exclude_overrides_targets(peft, exclude):
    expected = [name for name in linears(Net()) if in_peft(peft, linears(Net()), exclude, name)]
    assert list(inject(Net(), exclude=exclude)) == expected


def test_names_may_come_in_any_iterable():
    for targets in ({"q_proj"}, ("q_proj",), (name for name in ["q_proj"]), dict.fromkeys(["q_proj"])):
        assert list(inject(Net(), targets)) == ["blocks.0.q_proj", "blocks.1.q_proj"]
    taken = inject(Net(), exclude=(name for name in ["head.0"]), trainable=(name for name in ["head.2"]))
    assert list(taken) == linears(Net())[:-2]


def test_patterns_set_rank_and_alpha_by_the_first_key():
    rank_pattern = {"blocks.0.q_proj": 3, "q_proj": 5, r"head\.\d": 7}
    alpha_pattern = {"^head.0": 1.0, "proj": 99.0, ".*": 2}
    layers = inject(Net(), rank=2, alpha=4.0, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    assert {name: layer.rank for name, layer in layers.items()} == {
        "blocks.0.q_proj": 3, "blocks.0.not_q_proj": 2, "blocks.1.q_proj": 5, "blocks.1.not_q_proj": 2,
        "head.0": 7, "head.2": 7,
    }  # fmt: skip
    assert layers["head.0"].alpha == 1.0
    assert {layer.alpha for name, layer in layers.items() if name != "head.0"} == {2.0}


def test_the_layers_are_returned_in_module_order_and_are_those_in_the_model():
    model = Net()
    layers = inject(model, ["head.2", "q_proj", "not_q_proj"])  # another order than the model's
    assert list(layers) == [name for name in linears(Net()) if name != "head.0"]
    assert list(layers.items()) == list(adapters(model).items())
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())


# transformers' models

IDS = torch.tensor([[1, 5, 2, 7], [3, 4, 8, 6]])


def gpt2(tf):
    config = tf.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return tf.GPT2LMHeadModel(config), {"input_ids": IDS}


def llama(tf):
    config = tf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config), {"input_ids": IDS}


def bert(tf):
    config = tf.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return tf.BertForSequenceClassification(config), {"input_ids": IDS}


def t5(tf):
    config = tf.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS}


def vit(tf):
    config = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return tf.ViTForImageClassification(config), {"pixel_values": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8)}


MODELS = [pytest.param(make, id=make.__name__) for make in (gpt2, llama, bert, t5, vit)]


@pytest.fixture(params=MODELS)
def transformer(request, tf):
    torch.manual_seed(0)
    model, inputs = request.param(tf)
    return model.eval(), inputs


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def in_a_peft_model(peft, model, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on Conv1D and tied weights, and what it calls in transformers
        return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))


def test_all_linear_targets_the_same_modules_as_peft(peft, transformer):
    model, _ = transformer
    task = "SEQ_CLS" if "SequenceClassification" in type(model).__name__ else None
    theirs = in_a_peft_model(peft, model, target_modules="all-linear", r=2, task_type=task)
    assert list(inject(model, rank=2)) == theirs.base_model.targeted_module_names


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_all_linear_leaves_a_classification_head_to_trainable(tf, kind, caplog):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    make = {
        "bert": (tf.BertConfig, tf.BertForSequenceClassification, "classifier", ["classifier"]),
        "roberta": (tf.RobertaConfig, tf.RobertaForSequenceClassification, "classifier",
                    ["classifier.dense", "classifier.out_proj"]),
        "llama": (tf.LlamaConfig, tf.LlamaForSequenceClassification, "score", ["score"]),
    }  # fmt: skip
    config, classifier, head, linears_of_head = make[kind]

    def model():
        return classifier(config(**sizes, intermediate_size=24))

    layers = inject(frozen := model(), rank=2)
    assert layers
    assert not [name for name in layers if name.startswith(head)]
    assert not any(p.requires_grad for p in frozen.get_submodule(head).parameters())
    (line,) = [record.message for record in caplog.records if "classification head" in record.message]
    assert all(repr(name) in line for name in linears_of_head)
    assert f"trainable=['{head}']" in line
    caplog.clear()
    assert list(inject(trained := model(), rank=2, trainable=[head])) == list(layers)
    assert all(p.requires_grad for p in trained.get_submodule(head).parameters())
    # by name it is a target like any other
    assert list(inject(model(), linears_of_head, rank=2)) == linears_of_head
    assert "classification head" not in caplog.text


def test_the_report_equals_pefts(peft, transformer, capsys):
    model, _ = transformer
    names = list(inject(copy.deepcopy(model), rank=3))
    in_a_peft_model(peft, model, target_modules=names, r=3).print_trainable_parameters()
    inject(model, rank=3)
    assert trainable_report(model) == capsys.readouterr().out.strip()


def test_inject_and_eject_on_a_transformer(transformer):
    model, inputs = transformer
    before, weights = logits(model, inputs), dict(model.named_parameters(remove_duplicate=False))
    keys, kinds = set(model.state_dict()), [type(module) for module in model.modules()]

    inject(model, rank=2)
    assert torch.equal(logits(model, inputs), before)  # a new adapter's B is zero
    assert keys == {key for key in model.state_dict() if ".lora_" not in key}
    assert all(p is weights[name] for name, p in model.named_parameters() if ".lora_" not in name)

    adapted = logits(move(model), inputs)
    assert not torch.allclose(adapted, before, atol=1e-3)
    merged = copy.deepcopy(model)
    eject(merged)
    torch.testing.assert_close(logits(merged, inputs), adapted, rtol=1e-4, atol=1e-4)

    eject(model, merge=False)
    assert torch.equal(logits(model, inputs), before)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(weights)
    assert all(after[name] is weights[name] for name in weights)
    assert [type(module) for module in model.modules()] == kinds


def test_a_transformer_trains_its_adapters_and_nothing_else(transformer):
    model, inputs = transformer
    layers = inject(model, rank=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    move(model).train()
    optimizer = torch.optim.AdamW(lora_plus_groups(model, 1e-2))
    model(**inputs).logits.square().mean().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"{name}.lora_{factor}" for name in layers for factor in "ab"}


# freezing, and other trainable parameters


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


FACTORS = {f"blocks.{i}.q_proj.lora_{factor}" for i in (0, 1) for factor in "ab"}


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        pytest.param((), set(), id="nothing"),
        pytest.param(["head.2"], {"head.2.weight", "head.2.bias"}, id="a-module"),
        pytest.param(["blocks.1.norm"], {"blocks.1.norm.weight", "blocks.1.norm.bias"}, id="a-nested-module"),
        pytest.param(
            ["head"], {f"head.{i}.{key}" for i in range(3) for key in ("weight", "bias")}, id="a-module-of-modules"
        ),
        pytest.param(["token"], {"token"}, id="a-parameter-of-the-root"),
        pytest.param(["gamma"], {"blocks.0.gamma", "blocks.1.gamma"}, id="bare-parameters-by-their-end"),
        pytest.param(["blocks.1.gamma"], {"blocks.1.gamma"}, id="one-bare-parameter"),
        pytest.param(["head.2.bias", "token"], {"head.2.bias", "token"}, id="a-bias-alone-and-a-parameter"),
        pytest.param(r".*norm|token", {"token", *(f"blocks.{i}.norm.{k}" for i in (0, 1) for k in ("weight", "bias"))},
                     id="a-regular-expression"),
    ],
)  # fmt: skip
def test_only_adapters_and_trainable_train(trainable, expected):
    model = Net()
    inject(model, ["q_proj"], trainable=trainable)
    assert trained(model) == FACTORS | expected


@pytest.mark.parametrize("frozen", [True, False])
def test_earlier_requires_grad_flags_have_no_effect(frozen):
    model = Net().requires_grad_(not frozen)
    inject(model, ["q_proj"], trainable=["head.2"])
    assert trained(model) == FACTORS | {"head.2.weight", "head.2.bias"}


def test_all_linear_skips_trainable_modules():
    assert list(inject(Net(), trainable=["head"])) == linears(Net())[:-2]


def test_quantised_parameters_in_a_trainable_module_are_unchanged():
    model = Net()
    model.head.table = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    inject(model, ["q_proj"], trainable=["head"])
    assert trained(model) == FACTORS | {f"head.{i}.{key}" for i in range(3) for key in ("weight", "bias")}


def test_adapter_parameters_come_in_module_order():
    model = Net()
    layers = inject(model, ["head.0", "q_proj"])
    expected = [p for layer in layers.values() for p in (layer.lora_a, layer.lora_b)]
    assert [id(p) for p in adapter_parameters(model)] == [id(p) for p in expected]
    assert adapter_parameters(Net()) == []


def test_lora_plus_has_each_trainable_parameter_once():
    model = Net()
    layers = inject(model, ["q_proj"], trainable=["head", "token"])
    layers["blocks.0.q_proj"].lora_b.requires_grad_(False)
    slow, fast = lora_plus_groups(model, 1e-3, ratio=4.0)
    assert (slow["lr"], fast["lr"]) == (1e-3, 4e-3)
    assert lora_plus_groups(model, 1e-3)[1]["lr"] == 1.6e-2
    assert [id(p) for p in fast["params"]] == [id(layers["blocks.1.q_proj"].lora_b)]
    every = [id(p) for p in slow["params"] + fast["params"]]
    assert len(every) == len(set(every))
    assert set(every) == {id(p) for p in model.parameters() if p.requires_grad}
    torch.optim.SGD(lora_plus_groups(model, 0.1)).step()


@pytest.mark.parametrize("lr", [0, -1e-3, math.nan, math.inf, "1e-3", None, True])
def test_lora_plus_refuses_bad_rates(lr):
    model = Net()
    inject(model)
    with pytest.raises(ValueError, match="lr must be a positive finite number"):
        lora_plus_groups(model, lr)
    with pytest.raises(ValueError, match="ratio must be a positive finite number"):
        lora_plus_groups(model, 1e-3, ratio=lr)


def test_lora_plus_needs_adapters():
    with pytest.raises(ValueError, match="Net has none"):
        lora_plus_groups(Net(), 1e-3)


def test_the_report_of_a_model_without_parameters():
    assert trainable_report(nn.ReLU()) == "trainable params: 0 || all params: 0 || trainable%: 0.0000"


# refusals


def with_child(child):
    model = Net()
    model.odd = child
    return model


REFUSALS = [
    pytest.param({"targets": ["value"]}, r"\['value'\] match no linear .* end in \['0', '2', 'not_q_proj', 'q_proj'\]",
                 id="no-match-lists-what-there-is"),
    pytest.param({"targets": ["q_proj", "value"]}, r"targets \['value'\] match no", id="one-of-two-does-not-match"),
    pytest.param({"targets": ["proj"]}, r"\['proj'\] match no", id="a-part-of-a-component"),
    pytest.param({"targets": "q_proj"}, r"\['q_proj'\] match no", id="an-expression-is-for-the-whole-name"),
    pytest.param({"targets": "q_proj|v"}, "must match the whole name, and this one matches a part of 'blocks.0.q_proj'",
                 id="an-expression-that-matches-a-part"),
    pytest.param({"targets": r"blocks\.\d"}, "a part of 'blocks.0.q_proj'", id="an-expression-that-ends-too-early"),
    pytest.param({"targets": ".*q_proj", "exclude": ".*"}, r"'not_q_proj', 'q_proj'\]$", id="expression-all-excluded"),
    pytest.param({"targets": "(?i)Q_PROJ"}, r"\['\(\?i\)Q_PROJ'\] match no", id="an-expression-with-flags"),
    pytest.param({"targets": ["q_proj"], "trainable": "bias"}, "matches a part of 'blocks.0.q_proj.bias'",
                 id="trainable-matches-a-part"),
    pytest.param({"targets": []}, "at least one name", id="no-targets"),
    pytest.param({"targets": ["q_proj"], "exclude": ["norm", "q_proj"]}, "match no linear", id="all-excluded"),
    pytest.param({"targets": ["norm"]}, r"blocks.0.norm is a LayerNorm; leave it out", id="not-a-linear"),
    pytest.param({"targets": "(q_proj"}, "targets must hold regular expressions", id="bad-expression"),
    pytest.param({"exclude": "["}, "exclude must hold regular expressions", id="bad-exclude"),
    pytest.param({"trainable": "*"}, "trainable must hold regular expressions", id="bad-trainable"),
    pytest.param({"targets": "a{99999999999999999999}"}, "targets must hold regular", id="overflowing-expression"),
    pytest.param({"targets": None}, "targets must be a list of names", id="targets-none"),
    pytest.param({"targets": 3}, "targets must be a list of names", id="targets-a-number"),
    pytest.param({"targets": ["q_proj", 3]}, "targets must be a list of names", id="targets-of-numbers"),
    pytest.param({"targets": b"q_proj"}, "targets must be a list of names", id="targets-bytes"),
    pytest.param({"exclude": 3}, "exclude must be a list of names", id="exclude-a-number"),
    pytest.param({"trainable": None}, "trainable must be a list of names", id="trainable-none"),
    pytest.param({"targets": ["q_proj"], "trainable": ["classifier"]}, r"\['classifier'\] matches no parameter",
                 id="trainable-matches-nothing"),
    pytest.param({"targets": ["q_proj"], "trainable": ["head", "nowhere"]}, r"\['nowhere'\] matches no parameter",
                 id="one-trainable-matches-nothing"),
    pytest.param({"targets": ["q_proj"], "trainable": ["q_proj"]}, "both match blocks.0.q_proj", id="overlap"),
    pytest.param({"targets": ["q_proj"], "trainable": ["blocks.1"]}, "both match blocks.1.q_proj", id="overlap-above"),
    pytest.param({"targets": ["head.0"], "trainable": ["head.0.bias"]}, "both match head.0.bias", id="overlap-below"),
    pytest.param({"trainable": ["head.0.bias"]}, "both match head.0.bias", id="all-linear-overlaps-in-a-bias"),
    pytest.param({"rank": 0}, "rank must be a positive integer", id="rank-zero"),
    pytest.param({"rank": 2.0}, "rank must be a positive integer", id="rank-a-float"),
    pytest.param({"rank": True}, "rank must be a positive integer", id="rank-a-bool"),
    pytest.param({"alpha": math.nan}, "alpha must be a finite number", id="alpha-nan"),
    pytest.param({"alpha": "16"}, "alpha must be a finite number", id="alpha-a-string"),
    pytest.param({"dropout": 1.5}, "dropout must be", id="dropout"),
    pytest.param({"init": "zeros"}, "init must be one of", id="init"),
    pytest.param({"variant": "lokr"}, "variant must be one of", id="variant"),
    pytest.param({"rank_pattern": {"head.2": 0}}, "rank_pattern of 'head.2' must", id="the-last-layers-rank"),
    pytest.param({"alpha_pattern": {"head.2": math.inf}}, "alpha_pattern of 'head.2' must", id="the-last-layers-alpha"),
    pytest.param({"rank_pattern": {"(": 2}}, "rank_pattern must hold regular expressions", id="bad-rank-pattern"),
    pytest.param({"alpha_pattern": ["q_proj"]}, "alpha_pattern must be a map", id="alpha-pattern-a-list"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "match"), REFUSALS)
def test_bad_arguments_change_nothing(options, match):
    model = Net()
    model.blocks[0].requires_grad_(False)
    with refused(model, match):
        inject(model, **options)


def test_a_second_injection_is_refused():
    model = Net()
    inject(model, ["q_proj"])
    with refused(model, "has 2 .*eject them first"):
        inject(model, ["not_q_proj"])


@pytest.mark.parametrize("model", [None, "net", torch.zeros(2), nn.Linear], ids=["none", "str", "tensor", "class"])
def test_other_types_than_modules_raise_type_error(model):
    for call in (inject, eject, adapters, adapter_parameters):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
            call(model)


def test_the_advised_exclude_skips_only_the_refused_module():
    model = nn.ModuleDict({"self_attn": nn.ModuleDict({"out_proj": nn.Linear(4, 4)}), "pool": nn.ModuleDict()})
    model["pool"]["attn"], model["pool"]["out"] = nn.MultiheadAttention(4, 2), nn.Linear(4, 4)
    with refused(model, r"pool\.attn\.out_proj .*exclude=\['attn\.out_proj'\]"):
        inject(model)
    assert list(inject(model, exclude=["attn.out_proj"])) == ["self_attn.out_proj", "pool.out"]


@pytest.mark.parametrize("targets", ["all-linear", ["out_proj"], ".*out_proj"], ids=str)
def test_the_output_of_multihead_attention_is_refused(targets):
    model = with_child(nn.MultiheadAttention(4, 2))
    with refused(model, r"odd.out_proj .*MultiheadAttention .*exclude=\['out_proj'\]"):
        inject(model, targets)
    assert list(inject(model, exclude=["out_proj"])) == linears(Net())


def test_an_old_style_reparametrisation_is_refused():
    model = with_child(nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.odd)
    with refused(model, "odd must be a module that maps.*not an nn.Parameter"):
        inject(model)


def test_a_replaced_forward_is_refused():
    hooks = pytest.importorskip("accelerate.hooks", reason="it replaces forward")
    model = Net()
    hooks.add_hook_to_module(model.blocks[1].q_proj, hooks.ModelHook())
    with refused(model, r"blocks.1.q_proj must keep its own forward.*exclude=\['1\.q_proj'\]"):
        inject(model)
    hooks.remove_hook_from_module(model.blocks[1].q_proj)
    layer = inject(model)["blocks.1.q_proj"]
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    with refused(model, r"blocks.1.q_proj must have its own forward.*remove the hook first"):
        eject(model)
    hooks.remove_hook_from_module(layer)
    eject(model)


def test_a_linear_compiled_by_itself_is_refused():
    model = Net()
    model.head[0] = torch.compile(model.head[0], backend="eager")  # would still call the plain linear
    with refused(model, "head.0 must not be compiled by itself"):
        inject(model)
    assert list(inject(model, exclude=["head.0"]))[-1] == "head.2"


def test_a_single_adapter_layer_cannot_be_ejected():
    layer = CoToLoRALinear(4, 4)
    with refused(layer, "it is one itself"):
        eject(layer)
    with refused(nn.Linear(4, 4), "match no linear module in Linear: it is a linear module itself"):
        inject(nn.Linear(4, 4))


def test_a_model_without_linear_modules():
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU(), nn.BatchNorm1d(2))
    what = r"\['all-linear'\] match no linear module in Sequential, which has none that can be adapted: .* are in "
    with refused(model, what + r"\['BatchNorm1d', 'Conv1d'\]"):
        inject(model)


def test_tied_weights_overlap_with_trainable():
    model = Tied()
    with refused(model, "both match head.weight, by this name or a tied one"):
        inject(model, ["head"], trainable=["embed"])
    inject(model, ["mid"], trainable=["embed"])


# structure


class Twice(nn.Module):
    """One linear under three names, two of them in a block that occurs twice."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(4, 4)
        self.first = nn.ModuleDict({"in": shared, "out": nn.Linear(4, 4)})
        self.again = self.first
        self.alias = shared

    def forward(self, x):
        for linear in (self.first["in"], self.first["out"], self.again["in"], self.again["out"], self.alias):
            x = linear(x)
        return x


@pytest.mark.parametrize("targets", ["all-linear", ["alias", "out"], ["again.in", "again.out"], r"again\..*"], ids=str)
def test_a_module_under_several_names_is_one_adapter(targets):
    model, x = Twice().eval(), torch.randn(2, 4)
    before, original = model(x), model.alias
    layers = inject(model, targets)
    assert list(layers) == ["first.in", "first.out"]
    assert model.first["in"] is model.again["in"] is model.alias is layers["first.in"]
    assert model.first["out"] is model.again["out"] is layers["first.out"]
    assert sum(p.requires_grad for p in model.parameters()) == 4
    adapted = move(model)(x)
    assert not torch.allclose(adapted, before)

    plain = copy.deepcopy(model)
    eject(plain)
    assert plain.first["in"] is plain.again["in"] is plain.alias
    torch.testing.assert_close(plain(x), adapted, rtol=1e-4, atol=1e-4)
    eject(model, merge=False)
    assert model.first["in"] is model.again["in"] is model.alias
    assert model.alias.weight is original.weight
    assert torch.equal(model(x), before)


def test_an_alias_can_be_excluded_by_any_of_its_names():
    assert list(inject(Twice(), exclude=["alias"])) == ["first.out"]


def test_children_that_have_no_attribute_names():
    inner = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    model = nn.ModuleDict({"a-b": inner, "class": nn.Linear(2, 2), "é": nn.Linear(2, 2)})
    layers = inject(model)
    assert list(layers) == ["a-b.0", "a-b.1.0", "class", "é"]
    assert model["a-b"][1][0] is layers["a-b.1.0"]
    assert model["class"] is layers["class"]
    assert list(eject(model)) == list(layers)
    assert type(model["class"]) is nn.Linear


def test_names_are_those_of_the_unwrapped_model():
    model = nn.Sequential(checkpoint_wrapper(Net()), checkpoint_wrapper(nn.Linear(3, 3)))
    layers = inject(model, r"0\.head\.0|1", trainable=["0.token"], rank_pattern={"^0.head.0": 3})
    assert list(layers.items()) == list(adapters(model).items())
    assert list(layers) == ["0.head.0", "1"]
    assert layers["0.head.0"].rank == 3
    assert sum(p.requires_grad for p in model.parameters()) == 5
    x = torch.randn(5, 4)
    base = move(model).eval()(x)
    with adapter_mask(model, False):
        assert not torch.allclose(model(x), base)
    assert list(eject(model)) == ["0.head.0", "1"]
    torch.testing.assert_close(model(x), base, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_adapters_act_inside_a_block_that_was_compiled_before():
    model, x = Net().eval(), torch.randn(5, 4)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    before = model(x)
    layers = inject(model)
    assert list(layers) == linears(Net())
    assert torch.equal(model(x), before)
    with adapter_mask(move(model), [name == "blocks.0.q_proj" for name in layers]):
        assert not torch.allclose(model(x), before)
    eject(model, merge=False)
    assert torch.equal(model(x), before)


def test_a_wrapped_root_is_looked_through():
    model = Net()
    assert list(inject(nn.DataParallel(model), ["q_proj"])) == ["blocks.0.q_proj", "blocks.1.q_proj"]
    assert list(eject(torch.compile(model, backend="eager"))) == ["blocks.0.q_proj", "blocks.1.q_proj"]
    assert type(model.blocks[0].q_proj) is nn.Linear


def test_injection_after_wrapping_in_ddp_is_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = Net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        for root in (wrapped, torch.compile(wrapped, backend="eager")):
            with refused(model, "DistributedDataParallel after inject"):
                inject(root)
        inject(model)
        assert list(eject(nn.parallel.DistributedDataParallel(model))) == linears(Net())
    finally:
        torch.distributed.destroy_process_group()


def test_mode_device_and_dtype_are_kept():
    model = Net().double()
    model.head[0].eval()
    layers = inject(model)
    assert not layers["head.0"].training
    assert layers["head.2"].training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    meta = nn.Sequential(nn.Linear(4, 4, device="meta"))
    assert inject(meta)["0"].lora_a.is_meta


def test_a_base_checkpoint_loads_strictly_after_injection():
    state = Net().state_dict()
    model = Net()
    inject(model)
    assert set(state) == {key for key in model.state_dict() if ".lora_" not in key}
    model.load_state_dict(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("where", ["model", "outer", "copy"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_checkpoint_with_some_of_the_adapters_is_not_whole(variant, where):
    plain = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    less, model = copy.deepcopy(plain), copy.deepcopy(plain)
    inject(less, ["0", "2"], variant=variant)
    inject(model, variant=variant)
    state, prefix = less.state_dict(), ""
    if where == "copy":
        model = copy.deepcopy(model)
    elif where == "outer":
        model, state, prefix = nn.ModuleDict({"net": model}), nn.ModuleDict({"net": less}).state_dict(), "net."
    missing = [f"{prefix}1.{name}" for name, _ in adapters(model)[f"{prefix}1"].named_parameters() if "lora" in name]
    assert model.load_state_dict(state, strict=False) == (missing, [])
    with pytest.raises(RuntimeError, match=rf"Missing key.*{prefix}1.lora_a"):
        model.load_state_dict(state)
    assert model.load_state_dict(model.state_dict()) == ([], [])
    own = {key: t for key, t in state.items() if "lora" not in key}
    assert model.load_state_dict(own) == ([], [])  # of the base alone
    inner = model["net"] if where == "outer" else model
    eject(inner)
    assert not inner._load_state_dict_post_hooks


@pytest.mark.parametrize("merge", [True, False])
def test_eject_restores_the_plain_modules_and_its_result_can_be_injected_again(merge):
    model = Net()
    original = {name: model.get_submodule(name).weight for name in linears(model)}
    bias = {name: model.get_submodule(name).bias for name in linears(model)}
    inject(model, trainable=[])
    plain = eject(model, merge=merge)
    assert list(plain) == linears(Net())
    for name, linear in plain.items():
        assert model.get_submodule(name) is linear
        assert type(linear) is nn.Linear
        assert linear.bias is bias[name]
        assert (linear.weight is original[name]) is not merge
    assert not trained(model)
    assert not adapters(model)
    with refused(model, "Net has none"):
        eject(model)
    assert list(inject(model)) == linears(Net())


def test_eject_merges_enabled_adapters_only():
    model = Net().eval()
    layers = inject(model, ["q_proj", "head.0"])
    move(model)
    original = layers["head.0"].weight
    layers["head.0"].enabled = False
    layers["blocks.0.q_proj"].gate = False  # applies only in training, so merging ignores it
    x = torch.randn(3, 4)
    before = model(x)
    plain = eject(model)
    assert plain["head.0"].weight is original
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_eject_of_merged_layers():
    for merge in (True, False):
        model, x = Net().eval(), torch.randn(3, 4)
        before = model(x)
        layers = inject(model)
        adapted = move(model)(x)
        for layer in layers.values():
            layer.merge()
        eject(model, merge=merge)
        if merge:
            torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(model(x), before)


def test_eject_refuses_a_row_mask_and_changes_nothing():
    model = Net()
    layers = inject(model)
    list(layers.values())[-1].enabled = torch.tensor([True, False])
    with refused(model, rf"^{re.escape(list(layers)[-1])}: enabled is a row mask", RuntimeError):
        eject(model)
    eject(model, merge=False)


# tied weights


def test_merging_a_tied_head_does_not_change_the_embedding(caplog):
    model, ids = Tied(), torch.tensor([0, 3, 5])
    weight, value = model.embed.weight, model.embed.weight.detach().clone()
    layers = inject(model, ["head"])
    assert layers["head"].weight is weight  # still tied
    adapted = move(model)(ids)
    layers["head"].merge()
    torch.testing.assert_close(model(ids), adapted, rtol=1e-4, atol=1e-4)
    assert model.embed.weight is weight
    layers["head"].unmerge()
    assert layers["head"].weight is weight
    with caplog.at_level(logging.WARNING, "cotolora"):
        eject(model)
    assert model.embed.weight is weight
    assert torch.equal(weight, value)
    assert model.head.weight is not weight
    torch.testing.assert_close(model(ids), adapted, rtol=1e-4, atol=1e-4)
    assert [record.getMessage() for record in caplog.records] == [
        "head shared its weight with embed.weight; after merging it has its own weight"
    ]


@pytest.mark.parametrize("case", ["not-merged", "disabled", "mid-only", "twice", "checkpointed"])
def test_nothing_is_logged_if_nothing_was_untied(case, caplog):
    model = {"twice": Twice, "checkpointed": lambda: nn.Sequential(checkpoint_wrapper(Net()))}.get(case, Tied)()
    layers = inject(model, ["mid"] if case == "mid-only" else "all-linear")
    if case == "disabled":
        layers["head"].enabled = False
    with caplog.at_level(logging.WARNING, "cotolora"):
        eject(model, merge=case != "not-merged")
    assert not caplog.records
    if isinstance(model, Tied):
        assert model.head.weight is model.embed.weight


def test_gpt2s_tied_head(tf, caplog):
    model, inputs = gpt2(tf)
    model.eval()
    inject(model, ["lm_head", "c_attn"], rank=2)
    assert model.lm_head.weight is model.transformer.wte.weight
    adapted = logits(move(model), inputs)
    embedding = model.transformer.wte.weight.detach().clone()
    eject(model)
    torch.testing.assert_close(logits(model, inputs), adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.transformer.wte.weight, embedding)
    assert "lm_head shared its weight with transformer.wte.weight" in caplog.text


# hooks


def watch(linear, kind, calls):
    def note(module, *rest):
        calls.append(module)

    return {
        "forward": lambda: linear.register_forward_hook(note),
        "forward-kwargs": lambda: linear.register_forward_hook(note, with_kwargs=True),
        "forward-always": lambda: linear.register_forward_hook(note, always_call=True),
        "forward-pre": lambda: linear.register_forward_pre_hook(note),
        "forward-pre-kwargs": lambda: linear.register_forward_pre_hook(note, with_kwargs=True),
        "backward": lambda: linear.register_full_backward_hook(note),
        "backward-pre": lambda: linear.register_full_backward_pre_hook(note),
        "backward-old": lambda: linear.register_backward_hook(note),
        "state-dict": lambda: linear.register_state_dict_post_hook(note),
        "state-dict-pre": lambda: linear.register_state_dict_pre_hook(note),
        "load-pre": lambda: linear.register_load_state_dict_pre_hook(note),
        "load-post": lambda: linear.register_load_state_dict_post_hook(note),
    }[kind]()


KINDS = [
    "forward", "forward-kwargs", "forward-always", "forward-pre", "forward-pre-kwargs", "backward", "backward-pre",
    "backward-old", "state-dict", "state-dict-pre", "load-pre", "load-post",
]  # fmt: skip


def exercise(model):
    model(torch.randn(3, 4, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("remove", ["injected", "ejected"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_move_to_the_layer_and_can_be_removed(kind, remove):
    model, calls = Net().eval(), []
    handle = watch(model.blocks[1].q_proj, kind, calls)
    exercise(model)
    assert calls == [model.blocks[1].q_proj]

    layer = inject(model, ["blocks.1.q_proj"])["blocks.1.q_proj"]
    calls.clear()
    exercise(model)
    assert calls == [layer]
    if remove == "injected":
        handle.remove()
        exercise(model)
        assert calls == [layer]

    eject(model)
    calls.clear()
    exercise(model)
    assert calls == ([model.blocks[1].q_proj] if remove == "ejected" else [])
    handle.remove()
    calls.clear()
    exercise(model)
    assert calls == []


def test_a_hook_that_is_always_called_is_called_when_forward_raises():
    model, calls = Net(), []
    watch(model.head[0], "forward-always", calls)
    watch(model.head[0], "forward", calls)
    layer = inject(model)["head.0"]
    with pytest.raises(ValueError, match="x must be"):
        layer(torch.randn(2, 3))
    assert calls == [layer]


def test_hooks_still_change_inputs_and_outputs():
    model, x = Net().eval(), torch.randn(3, 4)
    model.head[2].register_forward_hook(lambda module, args, out: out * 2)
    model.head[0].register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
    before = model(x)
    inject(model)
    assert torch.equal(model(x), before)


def test_hooks_set_on_an_adapter_stay_after_eject():
    model, calls = Net(), []
    layer = inject(model)["head.0"]
    handle = watch(layer, "forward", calls)
    eject(model)
    model(torch.randn(3, 4))
    assert calls == [model.head[0]]
    handle.remove()
    model(torch.randn(3, 4))
    assert len(calls) == 1


# torch's fused encoder, which reads weights without calling their layers


def encoder(layers=2, **options):
    torch.manual_seed(0)
    options = {"dim_feedforward": 16, "dropout": 0.0, "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(8, 2, **options)
    return (nn.TransformerEncoder(layer, layers) if layers else layer).eval()


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls of torch's fused encoder layer."""
    calls, run = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or run(*args))
    return calls


@contextmanager
def unfused():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"norm_first": True}], ids=str)
@pytest.mark.parametrize("layers", [0, 2])
@torch.no_grad()
def test_adapters_act_in_the_eval_of_torchs_encoder(layers, options, padded, fused):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # norm_first warns that it does not support nested tensors
        model = encoder(layers, **options)
    x, keep = torch.randn(2, 5, 8), ~PADDING if padded else torch.ones(2, 5, dtype=torch.bool)
    inputs = {"src_key_padding_mask": PADDING} if padded else {}
    attributes = [(vars(m).get("activation_relu_or_gelu"), vars(m).get("use_nested_tensor")) for m in model.modules()]
    before = model(x, **inputs)
    assert len(fused) == max(1, layers)  # without adapters the fast path runs

    inject(model, ["linear1", "linear2"], rank=2)
    fused.clear()
    torch.testing.assert_close(model(x, **inputs)[keep], before[keep], rtol=1e-4, atol=1e-5)
    adapted = move(model)(x, **inputs)
    assert not fused
    assert not torch.allclose(adapted[keep], before[keep], atol=1e-2)
    with unfused():
        torch.testing.assert_close(model(x, **inputs)[keep], adapted[keep], rtol=1e-4, atol=1e-5)

    eject(model)
    assert attributes == [
        (vars(m).get("activation_relu_or_gelu"), vars(m).get("use_nested_tensor")) for m in model.modules()
    ]
    torch.testing.assert_close(model(x, **inputs)[keep], adapted[keep], rtol=1e-3, atol=1e-3)
    assert len(fused) == max(1, layers)
    assert not any(name.startswith("_cotolora") for module in model.modules() for name in vars(module))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@torch.no_grad()
def test_the_fast_path_is_disabled_if_only_a_later_layer_is_adapted(fused):
    model, x = encoder(), torch.randn(2, 5, 8)
    before = model(x, src_key_padding_mask=PADDING)
    fused.clear()
    inject(model, ["layers.1.linear1"], rank=2)
    assert not torch.allclose(move(model)(x, src_key_padding_mask=PADDING)[~PADDING], before[~PADDING], atol=1e-2)
    assert len(fused) == 1  # only for the layer without adapters


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@torch.no_grad()
def test_nested_tensors_are_never_computed_without_the_adapters():
    model = encoder()
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    model(x)
    inject(model, ["linear1"], rank=2)
    with pytest.raises(TypeError, match=r"[Nn]ested"):  # only the fused path can read them
        model(x)
    eject(model)
    model(x)


def test_an_encoder_layer_that_never_ran_torchs_constructor():
    class Own(nn.TransformerEncoderLayer):
        def __init__(self):
            nn.Module.__init__(self)
            self.linear1 = nn.Linear(4, 4)

    model = nn.Sequential(Own())
    assert list(inject(model)) == ["0.linear1"]
    assert list(eject(model)) == ["0.linear1"]
    assert not any(hasattr(module, "activation_relu_or_gelu") for module in model)


def test_an_adapted_encoder_survives_deepcopy():
    model = encoder()
    inject(model, ["linear1", "linear2"])
    twin = copy.deepcopy(model)
    eject(twin)
    assert {layer.activation_relu_or_gelu for layer in twin.layers} == {1}
    assert {layer.activation_relu_or_gelu for layer in model.layers} == {0}


def test_match_linears_does_not_change_the_model():
    model = nn.Sequential(checkpoint_wrapper(Net()))
    with unchanged(model):
        found = match_linears(model, ["q_proj"])
    assert list(found) == ["0.blocks.0.q_proj", "0.blocks.1.q_proj"]
    assert all(isinstance(model.get_submodule(raw), nn.Linear) for raws in found.values() for raw in raws)


def test_many_patterns_are_fast():
    model = nn.ModuleDict({f"layer{i}": nn.Linear(1, 1) for i in range(700)})
    layers = inject(model, rank_pattern={f"^layer{i}": 1 + i % 3 for i in range(700)})  # re's own cache holds 512
    assert [layer.rank for layer in layers.values()] == [1 + i % 3 for i in range(700)]
