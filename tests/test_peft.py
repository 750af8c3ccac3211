"""PEFT: its LoRA layers become ours and come back, and CoTo drives its own by its own switch.

This file is also the program of the two DDP processes: ``python test_peft.py RANK FOLDER``.
"""

import copy
import datetime
import io
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import cotolora
from cotolora import CoTo, CoToLoRALinear, activation_probability, adapters, sample_mask, set_backend, switches

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from cotolora.integrations.peft import from_peft, to_peft  # noqa: E402
from tests.tolerance import assert_as_accurate_as_torch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

TOKENS = torch.randint(1, 63, (2, 8), generator=torch.Generator().manual_seed(0))
STEPS, SEED = 6, 5


def llama(layers=4):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=layers,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **dropouts))


class Net(nn.Module):
    """Four blocks of one linear each; `reentrant` says which kind of checkpoint lies around them, if any."""

    def __init__(self, width=6, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4))

    def forward(self, x):
        if self.reentrant:
            x = x.detach().requires_grad_()
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def mlp():
    torch.manual_seed(0)
    return Net()


def shaken(model):
    """Moves what trains away from where it starts, for zeros hide mistakes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def lora(make, targets="all-linear", **options):
    config = peft.LoraConfig(target_modules=targets, **{"r": 4, "lora_alpha": 8, **options})
    return shaken(peft.get_peft_model(make(), config))


def output(model, x=None):
    if x is None:
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2)) if make_of(model) is Net else TOKENS
    result = model(x.to(next(model.parameters()).dtype) if x.is_floating_point() else x)
    return getattr(result, "logits", result)


def make_of(model):
    return type(model.get_base_model() if isinstance(model, peft.PeftModel) else model)


CONVERSIBLE = {
    "patterns": (llama, ["q_proj", "v_proj"], {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}),
    "all-linear-rslora-dropout": (llama, "all-linear", {"use_rslora": True, "lora_dropout": 0.3}),
    "conv1d-and-tied-head": (gpt2, ["c_attn", "lm_head"], {"fan_in_fan_out": True}),
    "modules-to-save": (llama, ["q_proj"], {"modules_to_save": ["lm_head"]}),
    "plain-torch": (mlp, "all-linear", {}),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CONVERSIBLE)
def test_there_and_back_nothing_is_copied_and_logits_are_equal(case, training, tmp_path):
    make, targets, options = CONVERSIBLE[case]
    theirs = lora(make, targets, **options).train(training)
    flags = {parameter: parameter.requires_grad for parameter in theirs.parameters()}
    count = sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in theirs.modules())
    draws = torch.get_rng_state()
    expected = output(theirs)

    ours = from_peft(theirs)
    torch.set_rng_state(draws)
    with set_backend("reference"):
        assert torch.equal(output(ours), expected)
    assert type(ours) is type(make())
    assert len(adapters(ours)) == count
    assert {p: p.requires_grad for p in ours.parameters()}.items() <= flags.items(), "the same parameters, as they were"
    assert all(module.training is training for module in ours.modules())
    assert not hasattr(ours, "peft_config")

    kept = {parameter: parameter.requires_grad for parameter in ours.parameters()}
    back = to_peft(ours, adapter="again")
    torch.set_rng_state(draws)
    assert torch.equal(output(back), expected)
    now = {parameter: parameter.requires_grad for parameter in back.parameters()}
    assert kept.items() <= now.items()
    assert not any(flag for parameter, flag in now.items() if parameter not in kept)
    assert all(module.training is training for module in back.modules())
    assert back.active_adapters == ["again"]

    back.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(make(), tmp_path / "again").eval()
    assert torch.equal(output(read), output(back.eval()))


def test_converting_draws_no_random_numbers():
    theirs = lora(mlp)
    before = torch.get_rng_state()
    to_peft(from_peft(theirs))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("autocast", [True, False], ids=["float32-adapters", "bfloat16-adapters"])
def test_half_precision_is_as_accurate_as_pefts(autocast):
    config = peft.LoraConfig(target_modules="all-linear", r=4)
    theirs = shaken(peft.get_peft_model(llama(1).bfloat16(), config, autocast_adapter_dtype=autocast)).eval()
    exact, same_dtype = output(copy.deepcopy(theirs).double()), output(theirs)
    given = {p.data_ptr(): p.dtype for name, p in theirs.named_parameters() if "lora_" in name}
    ours = from_peft(theirs)
    assert_as_accurate_as_torch(output(ours), same_dtype, exact)
    layers = adapters(ours).values()
    assert {p.data_ptr(): p.dtype for layer in layers for p in (layer.lora_a, layer.lora_b)} == given
    assert set(given.values()) == {torch.float32 if autocast else torch.bfloat16}


def two_adapters():
    model = lora(mlp, ["layers.0.0", "layers.1.0"])
    model.add_adapter("other", peft.LoraConfig(target_modules=["layers.1.0", "layers.2.0"], r=2))
    model.set_adapter("other")
    return shaken(model)


def test_one_adapter_of_several_is_taken():
    theirs = two_adapters()
    expected = output(theirs)
    ours = from_peft(theirs)
    assert {name: layer.rank for name, layer in adapters(ours).items()} == {"layers.1.0": 2, "layers.2.0": 2}
    with set_backend("reference"):
        assert torch.equal(output(ours), expected)
    theirs = two_adapters()
    ours = from_peft(theirs, "default")
    assert {name: layer.rank for name, layer in adapters(ours).items()} == {"layers.0.0": 4, "layers.1.0": 4}
    assert type(ours.layers[2][0]) is nn.Linear


def test_an_unclear_choice_of_adapter_is_refused():
    theirs = two_adapters()
    with pytest.raises(ValueError, match=r"adapter must be one of \['default', 'other'\]; got 'third'"):
        from_peft(theirs, "third")
    theirs.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"since 2 are active: \['default', 'other'\]"):
        from_peft(theirs)


def test_disabled_adapters_stay_disabled():
    theirs = lora(mlp)
    theirs.base_model.disable_adapter_layers()
    expected = output(theirs)
    ours = from_peft(theirs)
    assert all(layer.enabled is False for layer in adapters(ours).values())
    assert torch.equal(output(ours), expected)


def test_a_rescaled_adapter_keeps_its_scale():
    theirs = lora(mlp, use_rslora=True)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 1.7)
    expected = output(theirs)
    with set_backend("reference"):
        ours = from_peft(theirs)
        torch.testing.assert_close(output(ours), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(output(to_peft(ours)), expected, rtol=1e-6, atol=1e-7)


def test_a_module_under_two_names_and_its_hooks_stay_one():
    base = mlp()
    base.layers[2][0] = base.layers[0][0]
    plain, seen = cotolora.inject(base, rank=2), []
    assert len(plain) == 3
    shaken(base)
    handle = base.layers[0][0].register_forward_hook(lambda *_: seen.append(1))
    expected = output(base)
    back = to_peft(base)
    torch.testing.assert_close(output(back), expected, rtol=1e-6, atol=1e-7)
    again = from_peft(back)
    assert again.layers[2][0] is again.layers[0][0]
    assert torch.equal(output(again), expected)
    assert len(seen) == 6
    handle.remove()
    assert output(again) is not None
    assert len(seen) == 6


def test_pruned_adapters_are_left_out_and_other_trained_parameters_told_of(caplog):
    model = mlp()
    cotolora.inject(model, rank=2)
    shaken(model)
    adapters(model)["layers.1.0"].enabled = False
    model.bare = nn.Parameter(torch.ones(2))
    expected = output(model)
    with caplog.at_level("WARNING", "cotolora"):
        back = to_peft(model)
    torch.testing.assert_close(output(back), expected, rtol=1e-6, atol=1e-7)
    assert type(model.layers[1][0]) is nn.Linear
    assert "PEFT will not save them: bare" in caplog.text
    assert model.bare.requires_grad


def test_models_that_hold_peft_inside():
    added = llama(2)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], r=2), added)
    added._hf_peft_config_loaded = True  # as transformers' add_adapter
    expected = output(shaken(added))
    assert from_peft(added) is added
    with set_backend("reference"):
        assert torch.equal(output(added), expected)
    assert not added._hf_peft_config_loaded
    assert list(adapters(added)) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = lora(mlp)

        def forward(self, x):
            return self.inner(x)

    outer = Outer()
    expected = outer(torch.ones(2, 6))
    assert from_peft(outer) is outer
    assert type(outer.inner) is Net
    with set_backend("reference"):
        assert torch.equal(outer(torch.ones(2, 6)), expected)


def test_an_encoders_fast_path_is_kept_off_our_layers():
    base = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True))
    theirs = shaken(peft.get_peft_model(base, peft.LoraConfig(target_modules=["linear1", "linear2"])))
    x = torch.randn(2, 3, 8)
    expected = theirs(x)
    ours = from_peft(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), expected)


class FourBit(nn.Linear):
    """What a quantised base looks like from outside: a subclass."""


def quantised():
    model = mlp()
    model.layers[1][0].__class__ = FourBit
    return model


def merged():
    model = lora(mlp)
    model.merge_adapter()
    return model


def held():
    model = lora(mlp)
    CoTo(model, 10)
    return model


def hooked_base():
    base = mlp()
    base.layers[0][0].register_forward_hook(lambda *_: None)
    return peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))


def with_embedding():
    return lora(lambda: nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 6)), ["0", "1"])


def disabled_head():
    model = lora(mlp, ["layers.0.0"], modules_to_save=["layers.3.0"])
    model.base_model.disable_adapter_layers()
    return model


def with_tokens():
    return lora(llama, ["q_proj"], trainable_token_indices=[0, 1])


def with_hira():
    return peft.get_peft_model(mlp(), peft.HiraConfig(target_modules=["layers.1.0"]))


UNCONVERTIBLE = {
    "dora": (lambda: lora(mlp, use_dora=True), r"layers.0.0 .* a variant of LoRA, DoraLinearVariant"),
    "hira": (with_hira, r"layers.1.0 .* it is a peft.tuners.hira.layer.Linear"),
    "lora-bias": (lambda: lora(mlp, lora_bias=True), r"lora_bias"),
    "embedding": (with_embedding, r"model\.0 must .* peft.tuners.lora.layer.Embedding"),
    "quantised": (lambda: lora(quantised), r"layers.1.0 .* its base must be an nn.Linear .*; got FourBit"),
    "merged": (merged, r"layers.0.0 .* merged; call unmerge_adapter"),
    "held-by-coto": (held, r"model must not be driven by a CoTo; call its finish"),
    "hooked-base": (hooked_base, r"layers.0.0 .* base layer has hooks"),
    "disabled-module-to-save": (disabled_head, r"layers.3.0 .* modules_to_save and disabled"),
    "trainable-tokens": (with_tokens, r"embed_tokens .* TrainableTokensWrapper"),
    "no-adapters": (mlp, r"Net has none"),
    "a-layer-itself": (lambda: lora(mlp).base_model.model.layers[0][0], r"Linear is one itself"),
    "wrapped": (lambda: nn.DataParallel(lora(mlp)), r"model must not be wrapped; got a DataParallel"),
}


def state_of(model):
    tensors = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return {name: id(module) for name, module in model.named_modules()}, tensors


def assert_unchanged(model, before):
    modules, tensors = state_of(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    for name, (identity, flag, value) in tensors.items():
        assert (identity, flag) == before[1][name][:2]
        assert torch.equal(value, before[1][name][2])


@pytest.mark.parametrize("case", UNCONVERTIBLE)
def test_what_has_no_counterpart_is_refused_and_nothing_changes(case):
    make, says = UNCONVERTIBLE[case]
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=says):
        from_peft(model)
    assert_unchanged(model, before)


def injected(**options):
    model = mlp()
    cotolora.inject(model, rank=2, **options)
    return model


def changed(name, value):
    model = injected()
    layer = adapters(model)["layers.2.0"]
    value(layer) if callable(value) else setattr(layer, name, value)
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (mlp, "Net has none"),
        (lambda: changed("merge", CoToLoRALinear.merge), "layers.2.0 .* merged; call its unmerge"),
        (lambda: changed("enabled", torch.tensor([True, False])), "layers.2.0 .* enabled by rows"),
        (lambda: changed("gate", False), "layers.2.0 .* its gate is off"),
        (lambda: changed("gate", torch.tensor(0)), "layers.2.0 .* its gate is off"),
        (lambda: changed("variant", "dora"), "layers.2.0 .* it is of variant 'dora'"),
        (lambda: changed("init", "pissa"), "layers.2.0 .* init 'pissa' computes more"),
        (lambda: changed("weight", lambda layer: layer.weight.requires_grad_()), "must not train the base"),
        (lambda: injected(trainable=()).layers[0][0], "model must hold adapters; it is one itself"),
    ],
    ids=["none", "merged", "rows", "gate", "device-gate", "variant", "init", "base-trains", "itself"],
)
def test_what_peft_cannot_hold_is_refused_and_nothing_changes(make, says):
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=says):
        to_peft(model)
    assert_unchanged(model, before)


def test_a_failure_inside_peft_leaves_our_model_as_it_was(monkeypatch):
    model = injected(trainable=["layers.3"], exclude=["layers.3.0"])
    before, expected = state_of(model), output(model)
    real = peft.get_peft_model

    def fail(*args, **kwargs):
        real(*args, **kwargs)
        raise RuntimeError("power cut")

    monkeypatch.setattr(peft, "get_peft_model", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        to_peft(model)
    assert_unchanged(model, before)
    assert torch.equal(output(model), expected)
    assert not hasattr(model, "peft_config")


def test_a_model_that_coto_drives_is_not_given_to_peft():
    model = injected()
    coto = CoTo(model, 10, initial_p=1.0)
    with pytest.raises(ValueError, match="must not be driven by a CoTo; call its finish"):
        to_peft(model)
    coto.finish()
    assert isinstance(to_peft(model), peft.PeftModel)


# CoTo on PEFT's own layers


METHODS = {
    "lora": lambda: peft.LoraConfig(target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(target_modules="all-linear", use_dora=True),
    "rslora": lambda: peft.LoraConfig(target_modules="all-linear", use_rslora=True, init_lora_weights="gaussian"),
    "parameters": lambda: peft.LoraConfig(target_modules=[], target_parameters=[f"{i}.0.weight" for i in range(4)]),
    "hira": lambda: peft.HiraConfig(target_modules="all-linear"),
    "loha": lambda: peft.LoHaConfig(target_modules="all-linear"),
    "lokr": lambda: peft.LoKrConfig(target_modules="all-linear"),
    "oft": lambda: peft.OFTConfig(target_modules="all-linear", oft_block_size=3, r=0),
    "ia3": lambda: peft.IA3Config(target_modules=r".*\.\d\.0", feedforward_modules=[]),
    "vera": lambda: peft.VeraConfig(target_modules="all-linear", r=2),
    "vblora": lambda: peft.VBLoRAConfig(target_modules="all-linear", vector_length=3, num_vectors=4),
}  # fmt: skip


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def switch_of(coto, name):
    return coto._layers[name]


def masks_of(steps=STEPS, groups=4, **options):
    return [sample_mask(groups, activation_probability(t, steps, **options), seed=SEED, step=t) for t in range(steps)]


@pytest.mark.parametrize("method", METHODS)
def test_any_method_with_a_switch_has_the_masks_and_the_meaning_of_ours(method):
    torch.manual_seed(0)
    model = shaken(peft.get_peft_model(mlp(), METHODS[method]())).train()
    untouched, all_on = state_of(model), output(model)
    with model.disable_adapter():
        base = output(model)
    for parameter in trained(model):
        parameter.grad = torch.ones_like(parameter)  # as zero_grad(set_to_none=False) leaves something there
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    coto = CoTo(model, STEPS, seed=SEED)
    coto.attach(optimizer)
    assert coto.groups == {f"layers.{i}": [f"layers.{i}.0"] for i in range(4)}
    owners = {}
    for i, (name,) in enumerate(coto.groups.values()):
        for parameter in switch_of(coto, name).adapter_parameters:
            owners.setdefault(parameter, set()).add(i)
    assert set(owners) == set(trained(model))
    for step, expected in enumerate(masks_of()):
        assert torch.equal(coto.mask, expected)
        for parameter in owners:
            parameter.grad.zero_()
        before = {parameter: parameter.detach().clone() for parameter in owners}
        output(model).square().sum().backward()
        optimizer.step()
        on = set(expected.nonzero().flatten().tolist())
        for parameter, groups in owners.items():
            assert (parameter.grad is not None) == bool(groups & on)
            if not groups & on:
                assert torch.equal(parameter, before[parameter])
                assert optimizer.state.get(parameter, {}).get("step", 0) == sum(
                    bool(m[list(groups)].any()) for m in masks_of()[:step]
                )
            parameter.grad = torch.zeros_like(parameter)
        assert any(not torch.equal(parameter, before[parameter]) for parameter in owners)
        coto.step()

    with torch.no_grad():
        for parameter, value in zip(trained(model), (v for _, f, v in untouched[1].values() if f), strict=True):
            parameter.copy_(value)
    coto = CoTo(model, STEPS, initial_p=0.0, shape="constant", at_least_one=False)
    assert not coto.mask.any()
    assert torch.equal(output(model), base)
    assert torch.equal(output(model.eval()), output(model))
    torch.testing.assert_close(output(model), all_on, rtol=1e-6, atol=1e-6)
    coto.finish()
    assert torch.equal(output(model.train()), all_on)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def run(model, optimizer=None, steps=STEPS, x=None, **options):
    """A plain loop; the final trained weights by value."""
    optimizer = optimizer or torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1)
    coto = CoTo(model.train(), steps, seed=SEED, **options)
    coto.attach(optimizer)
    masks = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        given = torch.randint(1, 63, (2, 8), generator=generator) if x is None else torch.randn(x, generator=generator)
        result = model(given)
        getattr(result, "logits", result).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.append(coto.mask)
        coto.step()
    coto.finish()
    return torch.stack(masks), [parameter.detach().clone() for parameter in trained(model)]


@pytest.mark.parametrize("case", ["patterns", "conv1d-and-tied-head", "plain-torch", "all-linear-rslora-dropout"])
@pytest.mark.parametrize("options", [{}, {"unit": "module", "tilt": 0.5}], ids=["layer", "module-tilted"])
def test_masks_and_weights_equal_those_of_our_own_layer(case, options):
    make, targets, config = CONVERSIBLE[case]
    theirs = lora(make, targets, **config)
    ours = from_peft(copy.deepcopy(theirs))
    x = (3, 6) if make is mlp else None
    torch.manual_seed(3)  # of dropout
    masks, weights = run(theirs, x=x, **options)
    torch.manual_seed(3)
    with set_backend("reference"):
        our_masks, our_weights = run(ours, x=x, **options)
    assert not masks.all()
    assert torch.equal(masks, our_masks)
    for mine, pefts in zip(our_weights, weights, strict=True):
        assert torch.equal(mine, pefts)


def test_state_goes_from_our_model_to_pefts():
    theirs = lora(mlp)
    ours = from_peft(copy.deepcopy(theirs))
    coto = CoTo(ours, 20, seed=SEED, unit="module")
    coto.set_step(7)
    other = CoTo(theirs, 3, unit="module")
    other.load_state_dict(coto.state_dict())
    assert torch.equal(other.mask, coto.mask)
    assert torch.equal(output(theirs.train()), output(theirs))


def off(model, **options):
    """A CoTo on `model` with every adapter off."""
    coto = CoTo(model.train(), 10, **{"initial_p": 0.0, "shape": "constant", "at_least_one": False, **options})
    assert not coto.mask.any()
    return coto


def hooks_of(model):
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def flags_of(model):
    return [module._disable_adapters for module in model.modules() if hasattr(module, "_disable_adapters")]


def test_evaluation_sees_every_adapter_however_it_gets_there():
    model = lora(llama, ["q_proj", "v_proj"], init_lora_weights=False).eval()
    block, hidden = model.base_model.model.model.layers[1].self_attn.q_proj, torch.ones(1, 32)
    on, inner = output(model), block(hidden)
    text = model.generate(TOKENS, max_new_tokens=3, do_sample=False)
    logits = output(model.base_model.model)
    off(model)
    assert not torch.equal(output(model), on)
    assert torch.equal(block(hidden), block.base_layer(hidden))
    model.eval()
    assert torch.equal(output(model), on)
    assert torch.equal(block(hidden), inner)
    assert torch.equal(output(model.base_model.model), logits)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=3, do_sample=False), text)
    assert model.get_model_status().enabled is True
    # partly in eval: a layer answers for itself
    model.train()
    block.eval()
    assert torch.equal(block(hidden), inner)
    assert not torch.equal(output(model), on)


def test_pefts_own_switch_keeps_its_meaning_in_the_middle_of_a_step():
    model = lora(mlp)
    with model.disable_adapter():
        base = output(model)
    coto = CoTo(model.train(), 10, seed=SEED, initial_p=0.5, shape="constant")
    assert 0 < coto.mask.sum() < 4
    partly = output(model)
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(output(model), base)
            assert torch.equal(output(model.eval()), base)
            model.train()
        assert torch.equal(output(model), partly)
        assert not torch.equal(partly, base)
    model.base_model.disable_adapter_layers()
    assert torch.equal(output(model), base)
    assert flags_of(model) == [True] * 4
    coto.step()
    assert not coto.mask.any(), "what the user disabled cannot be the one that is on"
    model.base_model.enable_adapter_layers()
    coto.step()
    assert coto.mask.any()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_raises_leaves_no_switch_behind(error):
    model = lora(mlp)
    on = output(model.eval())
    coto = off(model)

    def fail(*_):
        raise error("stop")

    handle = model.base_model.model.layers[2][0].base_layer.register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        output(model)
    handle.remove()
    # after a KeyboardInterrupt torch calls no hook: the next forward puts it right
    assert flags_of(model) == [False, False, error is KeyboardInterrupt, False]
    assert torch.equal(output(model.eval()), on)
    assert flags_of(model) == [False] * 4
    handle = model.base_model.model.layers[2][0].base_layer.register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        output(model.train())
    handle.remove()
    coto.finish()
    assert flags_of(model) == [False] * 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_recomputation_of_a_checkpoint_sees_the_same_gates(reentrant):
    plain = lora(mlp)
    checked = lora(lambda: copy.deepcopy(mlp()))
    checked.base_model.model.reentrant = reentrant
    assert isinstance(checked.base_model.model.layers[0][0], peft.tuners.lora.Linear)
    masks, expected = run(plain, x=(3, 6))
    again, weights = run(checked, x=(3, 6))
    assert not masks.all()
    assert torch.equal(again, masks)
    for one, other in zip(weights, expected, strict=True):
        assert torch.equal(one, other)


def test_modules_to_save_train_whatever_is_off():
    model = lora(mlp, ["layers.0.0", "layers.1.0", "layers.2.0"], modules_to_save=["layers.3.0"])
    coto = off(model)
    assert coto.groups == {f"layers.{i}": [f"layers.{i}.0"] for i in range(3)}
    output(model).square().sum().backward()
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    assert names == [f"base_model.model.layers.3.0.modules_to_save.default.{key}" for key in ("weight", "bias")]
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    coto.attach(optimizer)
    before = model.base_model.model.layers[3][0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.base_model.model.layers[3][0].weight, before)


def test_trainable_tokens_train_whatever_is_off():
    model = with_tokens()
    coto = off(model)
    assert list(coto.groups) == [f"model.layers.{i}" for i in range(4)]
    output(model).square().sum().backward()
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    assert [name.split(".")[-2:] for name in names] == [["trainable_tokens_delta", "default"]]


def test_what_the_user_merges_on_the_way_stays_merged():
    model = lora(mlp)
    on = output(model)
    coto = off(model)
    model.merge_adapter()
    weights = [layer[0].base_layer.weight.detach().clone() for layer in model.base_model.model.layers]
    torch.testing.assert_close(output(model), on)
    assert all(
        torch.equal(layer[0].base_layer.weight, weight)
        for layer, weight in zip(model.base_model.model.layers, weights, strict=True)
    )
    coto = CoTo(lora(mlp), 10, seed=SEED)
    coto._model.base_model.model.layers[0][0].merge()
    for step in range(10):
        coto.set_step(step)
        assert not coto.mask[0], "what is merged cannot be the one that is on"


def test_only_layers_with_an_active_adapter_have_gates():
    model = two_adapters()
    assert CoTo(model, 10).groups == {"layers.1": ["layers.1.0"], "layers.2": ["layers.2.0"]}
    model.set_adapter("default")
    assert CoTo(model, 10).groups == {"layers.0": ["layers.0.0"], "layers.1": ["layers.1.0"]}


def test_attention_is_one_switch_with_its_output_projection():
    base = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True))
    model = shaken(peft.get_peft_model(base, peft.LoraConfig(target_modules=["self_attn"])))
    x = torch.randn(2, 3, 8)
    with model.disable_adapter():
        plain = model(x)
    assert not torch.equal(model(x), plain)
    coto = off(model, unit="module")
    assert coto.groups == {"0.self_attn": ["0.self_attn"]}
    assert len(switch_of(coto, "0.self_attn").adapter_parameters) == len(trained(model)) == 4
    torch.testing.assert_close(model(x), plain)
    coto.finish()
    assert not torch.equal(model(x), plain)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: torch.load(pickled(m), weights_only=False)])
def test_copies_have_gates_of_their_own(way):
    model = lora(mlp)
    coto = off(model)
    plain = output(model)
    twin = way(model)
    assert torch.equal(output(twin), plain)
    coto.finish()
    assert not torch.equal(output(model), plain)
    assert torch.equal(output(twin), plain)
    CoTo(twin, 10).finish()
    assert torch.equal(output(twin), output(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_a_second_coto_takes_over_and_the_first_can_finish_late():
    model = lora(mlp)
    base = output(model.eval())
    first = off(model)
    second = off(model.base_model.model)  # past the module that holds the first one's hook
    plain = output(model)
    for coto in (second, first):
        assert torch.equal(output(model), plain)
        assert not torch.equal(plain, base)
        coto.set_step(0)
    second.load_state_dict({**second.state_dict(), "initial_p": 1.0})
    assert torch.equal(output(model), base), "the last one to set the gates decides, as with our own layers"
    second.load_state_dict({**second.state_dict(), "initial_p": 0.0})
    first.finish()
    second.step()
    assert torch.equal(output(model), plain)
    second.finish()
    assert torch.equal(output(model), base)


def test_compiled_blocks_follow_the_gates():
    model = lora(mlp)
    eager = copy.deepcopy(model)
    for block in model.base_model.model.layers:
        block.compile(backend="eager", fullgraph=True)
    masks, expected = run(eager, x=(3, 6))
    again, weights = run(model, x=(3, 6))
    assert torch.equal(again, masks)
    for one, other in zip(weights, expected, strict=True):
        assert torch.equal(one, other)
    torch.compiler.reset()


def adalora():
    return peft.get_peft_model(mlp(), peft.AdaLoraConfig(target_modules="all-linear", total_step=10))


def xlora():
    with tempfile.TemporaryDirectory() as folder:
        lora(lambda: llama(1), ["q_proj"]).save_pretrained(folder)
        base = llama(1)
        base.config.use_cache = False
        return peft.get_peft_model(base, peft.XLoraConfig(hidden_size=32, adapters={"0": folder}))


def shadow():
    return peft.get_peft_model(llama(1), peft.ShadowConfig())


def prompted():
    return peft.get_peft_model(llama(1), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (lambda: lora(mlp, init_lora_weights="pissa", r=2), {}, "'default' .*init_lora_weights='pissa' took"),
        (lambda: lora(mlp, init_lora_weights="olora", r=2), {}, "init_lora_weights='olora'"),
        (adalora, {}, "ADALORA is not: it allots ranks"),
        (xlora, {}, "XLORA is not: its layers obey one switch"),
        (shadow, {}, "SHADOW is not: its blocks hand a state"),
        (merged, {}, r"no merged adapters, which cannot train; merged: \['layers.0.0'"),
        (lambda: lora(mlp), {"gates": "device"}, "gates must be 'host' on a PEFT model"),
        (prompted, {}, "must have adapters; PeftModelForCausalLM has none"),
    ],
    ids=["pissa", "olora", "adalora", "xlora", "shadow", "merged", "device", "prompt"],
)  # fmt: skip
def test_what_coto_would_spoil_is_refused_and_nothing_changes(make, options, says):
    model = make()
    before, hooks = state_of(model), hooks_of(model)
    with pytest.raises(ValueError, match=says):
        CoTo(model, 10, **options)
    assert_unchanged(model, before)
    assert hooks_of(model) == hooks


def test_names_are_the_users_wherever_pefts_tuner_lies():
    config = peft.LoraConfig(target_modules="all-linear")
    tuned = nn.ModuleDict({"tuned": peft.LoraModel(mlp(), config, "default"), "whole": lora(mlp)})
    assert list(switches.switches(tuned)) == [f"{name}.layers.{i}.0" for name in ("tuned", "whole") for i in range(4)]
    assert list(switches.switches(tuned["tuned"])) == [f"layers.{i}.0" for i in range(4)]


def test_a_pissa_adapter_that_is_not_active_is_no_obstacle():
    model = lora(mlp, init_lora_weights="pissa", r=2)
    model.add_adapter("other", peft.LoraConfig(target_modules="all-linear"))
    model.set_adapter("other")
    assert len(CoTo(model, 10).groups) == 4


# in other people's loops


def test_trainer_gives_the_weights_of_a_plain_loop_and_of_our_own_layer_and_saves_by_itself(tmp_path):
    pytest.importorskip("accelerate")
    from cotolora.integrations.transformers import CoToCallback
    from tests.test_transformers import plain_loop, trainer_of
    from tests.test_transformers import weights as weights_of

    model = lora(llama, ["q_proj", "v_proj"])
    ours = from_peft(copy.deepcopy(model))
    expected = plain_loop(copy.deepcopy(model), seed=SEED)
    saving = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    trainer_of(model, tmp_path, callbacks=[CoToCallback(seed=SEED)], **saving).train()
    assert weights_of(model).keys() == expected.keys()
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, expected[name]), name
    with set_backend("reference"):
        for mine, theirs in zip(plain_loop(ours, seed=SEED).values(), expected.values(), strict=True):
            assert torch.equal(mine, theirs)
    assert flags_of(model) == [False] * 8
    assert not any(module._forward_pre_hooks for module in model.modules())

    folder = tmp_path / "checkpoint-6"
    assert not (folder / "adapter").exists()
    read = peft.PeftModel.from_pretrained(llama(), folder).eval()
    assert torch.equal(output(read), output(model.eval()))
    again = shaken(lora(llama, ["q_proj", "v_proj"]))  # other weights: all comes from the checkpoint
    trainer = trainer_of(again, tmp_path, callbacks=[CoToCallback(seed=SEED)], **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, weight in weights_of(again).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.filterwarnings("ignore")  # Lightning's advice
def test_lightning_gives_the_weights_of_a_plain_loop(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from cotolora.integrations.lightning import CoToLightningCallback

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = lora(mlp)

        def training_step(self, batch, index):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(trained(self), lr=1e-2, weight_decay=0.1)

    _, expected = run(lora(mlp), x=(3, 6))
    x = torch.stack([torch.randn(3, 6, generator=torch.Generator().manual_seed(step)) for step in range(STEPS)])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.flatten(0, 1)), batch_size=3)
    task, callback = Task(), CoToLightningCallback(seed=SEED)
    settings = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        callbacks=[callback], max_steps=STEPS, accelerator="cpu", devices=1, default_root_dir=tmp_path, **settings
    )
    trainer.fit(task, loader)
    assert list(callback.coto.groups) == [f"net.layers.{i}" for i in range(4)]
    for mine, theirs in zip(trained(task), expected, strict=True):
        assert torch.equal(mine, theirs)


# under DistributedDataParallel


WORLD, PER_RANK = 2, 3
DDP = {
    "default": (METHODS["lora"], {}, None),
    "static-graph": (METHODS["lora"], {"static_graph": True}, None),
    "find-unused": (METHODS["lora"], {"find_unused_parameters": True}, None),
    "checkpoint": (METHODS["lora"], {}, False),
    "checkpoint-reentrant-static": (METHODS["lora"], {"static_graph": True}, True),
    "dora": (METHODS["dora"], {}, None),
    "shared-bank": (METHODS["vblora"], {}, None),
}


def train_by_ranks(case, rank, world):
    """Eight optimizer steps on this rank's share of the joint batches: masks, weights, and what moved while off."""
    config, options, reentrant = DDP[case]
    torch.manual_seed(0)
    model = shaken(peft.get_peft_model(Net(reentrant=reentrant).double(), config())).train()
    coto = CoTo(model, 20, seed=SEED)
    network = DistributedDataParallel(model, **options) if world > 1 else model
    optimizer = torch.optim.AdamW(trained(model), lr=0.05, weight_decay=0.1)
    coto.attach(optimizer)
    masks, moved = [], []
    for step in range(8):
        x = torch.randn(WORLD * PER_RANK, 6, generator=torch.Generator().manual_seed(step), dtype=torch.double)
        network(x[rank * PER_RANK : (rank + 1) * PER_RANK] if world > 1 else x).square().mean().backward()
        layers, mask = list(coto._layers.values()), coto.mask.tolist()
        used = {p for switch, on in zip(layers, mask, strict=True) if on for p in switch.adapter_parameters}
        off = {p: p.detach().clone() for switch in layers for p in switch.adapter_parameters if p not in used}
        optimizer.step()
        moved += [step for p, value in off.items() if not torch.equal(p, value)]
        masks.append(coto.mask)
        optimizer.zero_grad()
        coto.step()
    return {"masks": torch.stack(masks), "weights": [p.detach() for p in trained(model)], "moved": moved}


def work(rank, folder):
    """Runs all cases as one of two ranks, in one process group, and writes what came of each."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=30),
    )  # fmt: skip
    for case in DDP:
        try:
            result = train_by_ranks(case, rank, WORLD)
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"{case}.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """``results[case]``: what the two ranks made of it."""
    folder = tmp_path_factory.mktemp("peft_ddp")
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    program = [sys.executable, "-W", "ignore", __file__]
    ranks = [subprocess.Popen([*program, str(rank), str(folder)], env=environment) for rank in range(WORLD)]
    try:
        for process in ranks:
            process.wait(timeout=90)
    finally:
        for process in ranks:
            process.kill()
    files = {case: [folder / f"{case}.{rank}.pt" for rank in range(WORLD)] for case in DDP}
    hung = {"error": "did not finish"}
    return {case: [torch.load(file) if file.exists() else hung for file in both] for case, both in files.items()}


@pytest.mark.parametrize("case", DDP)
def test_two_ranks_equal_one_process_and_leave_what_is_off(case, results):
    for result in results[case]:
        assert "error" not in result, result["error"]
        assert result["moved"] == []
    first, second = results[case]
    alone = train_by_ranks(case, 0, 1)
    assert not alone["masks"].all(1).any()
    assert torch.equal(first["masks"], alone["masks"])
    for mine, other, one in zip(first["weights"], second["weights"], alone["weights"], strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, one, rtol=1e-9, atol=1e-9)  # the order of summation in float64


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
