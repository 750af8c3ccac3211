"""Conversion of PEFT's LoRA layers to ours and back."""

import copy

import pytest
import torch
from torch import nn

import cotolora
from cotolora import CoTo, CoToLoRALinear, adapters, set_backend

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from cotolora.integrations.peft import from_peft, to_peft  # noqa: E402
from tests.support.peft_models import (  # noqa: E402
    CONVERSIBLE,
    METHODS,
    Net,
    assert_unchanged,
    llama,
    lora,
    merged,
    mlp,
    output,
    shaken,
    state_of,
    two_adapters,
    with_tokens,
)
from tests.support.tolerance import assert_as_accurate_as_torch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CONVERSIBLE)
def test_converting_both_ways_copies_nothing_and_keeps_the_logits(case, training, tmp_path):
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
    assert {p: p.requires_grad for p in ours.parameters()}.items() <= flags.items(), "the same parameters and flags"
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


def test_one_adapter_of_several_is_converted():
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
    with pytest.raises(ValueError, match=r"because 2 are active: \['default', 'other'\]"):
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


def test_a_module_under_two_names_stays_one_module_with_its_hooks(caplog):
    base = mlp()
    base.layers[2][0] = base.layers[0][0]
    plain, seen = cotolora.inject(base, rank=2), []
    assert len(plain) == 3
    shaken(base)
    handle = base.layers[0][0].register_forward_hook(lambda *_: seen.append(1))
    expected = output(base)
    back = to_peft(base)
    assert "several places of the model, but PEFT will load its files into the first only: layers.0.0" in caplog.text
    torch.testing.assert_close(output(back), expected, rtol=1e-6, atol=1e-7)
    again = from_peft(back)
    assert again.layers[2][0] is again.layers[0][0]
    assert torch.equal(output(again), expected)
    assert len(seen) == 6
    handle.remove()
    assert output(again) is not None
    assert len(seen) == 6


def test_pruned_adapters_are_skipped_and_other_trained_parameters_are_reported(caplog):
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
    added._hf_peft_config_loaded = True  # set by transformers' add_adapter
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


def test_an_encoders_fast_path_is_disabled_for_our_layers():
    base = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True))
    theirs = shaken(peft.get_peft_model(base, peft.LoraConfig(target_modules=["linear1", "linear2"])))
    x = torch.randn(2, 3, 8)
    expected = theirs(x)
    ours = from_peft(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), expected)


class FourBit(nn.Linear):
    """Stands for a quantised base, which is a subclass of nn.Linear."""


def quantised():
    model = mlp()
    model.layers[1][0].__class__ = FourBit
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


def with_hira():
    return peft.get_peft_model(mlp(), peft.HiraConfig(target_modules=["layers.1.0"]))


UNCONVERTIBLE = {
    "dora": (lambda: lora(mlp, use_dora=True), r"layers.0.0 .* a variant of LoRA, DoraLinearVariant"),
    "hira": (with_hira, r"layers.1.0 .* it is a peft.tuners.hira.layer.Linear"),
    "lora-bias": (lambda: lora(mlp, lora_bias=True), r"lora_bias"),
    "embedding": (with_embedding, r"model\.0 must .* peft.tuners.lora.layer.Embedding"),
    "quantised": (lambda: lora(quantised), r"layers.1.0 .* its base must be an nn.Linear .*; got FourBit"),
    "merged": (merged, r"layers.0.0 .* merged; call unmerge_adapter"),
    "held-by-coto": (held, r"model must not be switched by a CoTo; call the finish"),
    "hooked-base": (hooked_base, r"layers.0.0 .* base layer has hooks"),
    "disabled-module-to-save": (disabled_head, r"layers.3.0 .* modules_to_save and disabled"),
    "trainable-tokens": (with_tokens, r"embed_tokens .* TrainableTokensWrapper"),
    "no-adapters": (mlp, r"Net has none"),
    "a-layer-itself": (lambda: lora(mlp).base_model.model.layers[0][0], r"Linear is one itself"),
    "wrapped": (lambda: nn.DataParallel(lora(mlp)), r"model must not be wrapped; got a DataParallel"),
}


@pytest.mark.parametrize("case", UNCONVERTIBLE)
def test_unsupported_peft_models_are_refused_and_unchanged(case):
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
        (lambda: changed("enabled", torch.tensor([True, False])), "layers.2.0 .* its enabled is a row mask"),
        (lambda: changed("gate", False), "layers.2.0 .* its gate is off"),
        (lambda: changed("gate", torch.tensor(0)), "layers.2.0 .* its gate is off"),
        (lambda: changed("variant", "dora"), "layers.2.0 .* it is of variant 'dora'"),
        (lambda: changed("init", "pissa"), "layers.2.0 .* init 'pissa' its update is not just"),
        (lambda: changed("weight", lambda layer: layer.weight.requires_grad_()), "must not train the base"),
        (lambda: injected(trainable=()).layers[0][0], "model must hold adapters; it is one itself"),
    ],
    ids=["none", "merged", "rows", "gate", "device-gate", "variant", "init", "base-trains", "itself"],
)
def test_adapters_that_peft_cannot_represent_are_refused_and_unchanged(make, says):
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=says):
        to_peft(model)
    assert_unchanged(model, before)


def test_a_failure_inside_peft_leaves_our_model_unchanged(monkeypatch):
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


def test_a_model_driven_by_coto_is_not_converted_to_peft():
    model = injected()
    coto = CoTo(model, 10, initial_p=1.0)
    with pytest.raises(ValueError, match="must not be switched by a CoTo; call the finish"):
        to_peft(model)
    coto.finish()
    assert isinstance(to_peft(model), peft.PeftModel)


# models with PEFT modules are refused


def without_a_peft_model():
    """A model after transformers' own add_adapter."""
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), llama(2))


def with_a_prompt():
    return peft.get_peft_model(llama(2), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def with_a_saved_module():
    return lora(llama, ["q_proj"], modules_to_save=["lm_head"]).get_base_model().lm_head


def mixed():
    return peft.get_peft_model(mlp(), peft.LoHaConfig(target_modules=["layers.0.0"]), mixed=True)


OF_PEFT = {
    "lora": (lambda: lora(mlp, ["layers.0.0"]), "it is a PEFT PeftModel"),
    "inside": (lambda: lora(mlp, ["layers.0.0"]).get_base_model(), r"layers\.0\.0 is a PEFT Linear"),
    "in-a-model": (lambda: nn.ModuleDict({"body": lora(mlp), "head": nn.Linear(6, 2)}), "body is a PEFT PeftModel"),
    "wrapped": (lambda: nn.DataParallel(lora(mlp)), "module is a PEFT PeftModel"),
    "loha": (lambda: peft.get_peft_model(mlp(), METHODS["loha"]()).base_model.model, r"layers\.0\.0 is a PEFT Linear"),
    "transformers": (without_a_peft_model, r"model\.layers\.0\.self_attn\.q_proj is a PEFT Linear"),
    "modules-to-save": (with_a_saved_module, "it is a PEFT ModulesToSaveWrapper"),
    "tokens": (lambda: with_tokens().base_model.model.model.embed_tokens, "it is a PEFT TrainableTokensWrapper"),
    "prompt": (with_a_prompt, "it is a PEFT PeftModelForCausalLM"),
    "mixed": (mixed, "it is a PEFT PeftMixedModel"),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_PEFT)
def test_inject_refuses_a_peft_model_and_does_not_change_it(case, tmp_path):
    cotolora.save_adapter(injected(), tmp_path)
    make, says = OF_PEFT[case]
    model = make()
    before = state_of(model)
    for call in (cotolora.inject, lambda model: cotolora.load_adapter(model, tmp_path, strict=False)):
        with pytest.raises(ValueError, match=rf"no PEFT modules; {says}.*: call .*from_peft.*CoTo.*unload") as error:
            call(model)
        assert len(str(error.value)) < 400
    assert_unchanged(model, before)


def test_the_remedies_in_the_error_work():
    assert len(adapters(from_peft(lora(mlp)))) == 4
    assert len(CoTo(lora(mlp), 10).groups) == 4
    assert len(cotolora.inject(lora(mlp).unload())) == 4
    model = lora(mlp).merge_and_unload()
    expected = output(model)
    cotolora.inject(model)
    assert torch.equal(output(model), expected)
