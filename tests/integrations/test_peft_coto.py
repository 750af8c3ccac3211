"""CoTo on PEFT's own layers with PEFT's own switch, and in training loops of other libraries."""

import copy
import io
import tempfile

import pytest
import torch
from torch import nn

from cotolora import CoTo, activation_probability, sample_mask, set_backend
from cotolora.training import switches

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from cotolora.integrations.peft import from_peft  # noqa: E402
from tests.support.peft_models import (  # noqa: E402
    CONVERSIBLE,
    METHODS,
    SEED,
    STEPS,
    TOKENS,
    assert_unchanged,
    llama,
    lora,
    merged,
    mlp,
    output,
    shaken,
    state_of,
    trained,
    two_adapters,
    with_tokens,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def switch_of(coto, name):
    return coto._layers[name]


def masks_of(steps=STEPS, groups=4, **options):
    return [sample_mask(groups, activation_probability(t, steps, **options), seed=SEED, step=t) for t in range(steps)]


@pytest.mark.parametrize("method", METHODS)
def test_any_method_with_a_switch_has_the_same_masks_and_semantics(method):
    torch.manual_seed(0)
    model = shaken(peft.get_peft_model(mlp(), METHODS[method]())).train()
    untouched, all_on = state_of(model), output(model)
    with model.disable_adapter():
        base = output(model)
    for parameter in trained(model):
        parameter.grad = torch.ones_like(parameter)  # not None, as after zero_grad(set_to_none=False)
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
    """Runs a plain loop; returns copies of the trained weights."""
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
    torch.manual_seed(3)  # for dropout
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


def test_evaluation_uses_every_adapter_for_any_way_of_entering_it():
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
    # partly in eval mode: every layer follows its own mode
    model.train()
    block.eval()
    assert torch.equal(block(hidden), inner)
    assert not torch.equal(output(model), on)


def test_pefts_own_switch_works_during_a_step():
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
    assert not coto.mask.any(), "an adapter that the user disabled must not be chosen as the one that is on"
    model.base_model.enable_adapter_layers()
    coto.step()
    assert coto.mask.any()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_raises_restores_the_switches(error):
    model = lora(mlp)
    on = output(model.eval())
    coto = off(model)

    def fail(*_):
        raise error("stop")

    handle = model.base_model.model.layers[2][0].base_layer.register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        output(model)
    handle.remove()
    # torch calls no hook after a KeyboardInterrupt; the next forward restores the switch
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


def test_modules_to_save_always_train():
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


def test_trainable_tokens_always_train():
    model = with_tokens()
    coto = off(model)
    assert list(coto.groups) == [f"model.layers.{i}" for i in range(4)]
    output(model).square().sum().backward()
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    assert [name.split(".")[-2:] for name in names] == [["trainable_tokens_delta", "default"]]


def test_adapters_merged_during_a_run_stay_merged():
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
        assert not coto.mask[0], "a merged adapter must not be chosen as the one that is on"


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
def test_copies_have_their_own_gates(way):
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
    second = off(model.base_model.model)  # not on the module that has the first one's hook
    plain = output(model)
    for coto in (second, first):
        assert torch.equal(output(model), plain)
        assert not torch.equal(plain, base)
        coto.set_step(0)
    second.load_state_dict({**second.state_dict(), "initial_p": 1.0})
    assert torch.equal(output(model), base), "the last run to set the gates applies, as with our own layers"
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
        (lambda: lora(mlp, init_lora_weights="pissa", r=2), {}, "'default' .*init_lora_weights='pissa' moved"),
        (lambda: lora(mlp, init_lora_weights="olora", r=2), {}, "init_lora_weights='olora'"),
        (adalora, {}, "ADALORA has none: it allocates ranks"),
        (xlora, {}, "XLORA has none: its layers have one switch"),
        (shadow, {}, "SHADOW has none: its blocks pass a state"),
        (merged, {}, r"no merged adapters, which cannot train; merged: \['layers.0.0'"),
        (lambda: lora(mlp), {"gates": "device"}, "gates must be 'host' on a PEFT model"),
        (prompted, {}, "must have adapters; PeftModelForCausalLM has none"),
    ],
    ids=["pissa", "olora", "adalora", "xlora", "shadow", "merged", "device", "prompt"],
)  # fmt: skip
def test_unsupported_peft_methods_are_refused_and_unchanged(make, options, says):
    model = make()
    before, hooks = state_of(model), hooks_of(model)
    with pytest.raises(ValueError, match=says):
        CoTo(model, 10, **options)
    assert_unchanged(model, before)
    assert hooks_of(model) == hooks


def test_names_are_those_of_the_users_model():
    config = peft.LoraConfig(target_modules="all-linear")
    tuned = nn.ModuleDict({"tuned": peft.LoraModel(mlp(), config, "default"), "whole": lora(mlp)})
    assert list(switches.switches(tuned)) == [f"{name}.layers.{i}.0" for name in ("tuned", "whole") for i in range(4)]
    assert list(switches.switches(tuned["tuned"])) == [f"layers.{i}.0" for i in range(4)]


def test_an_inactive_pissa_adapter_is_accepted():
    model = lora(mlp, init_lora_weights="pissa", r=2)
    model.add_adapter("other", peft.LoraConfig(target_modules="all-linear"))
    model.set_adapter("other")
    assert len(CoTo(model, 10).groups) == 4


# in training loops of other libraries


def test_trainer_gives_the_weights_of_a_plain_loop_and_of_our_own_layer_and_saves_by_itself(tmp_path):
    pytest.importorskip("accelerate")
    from cotolora.integrations.transformers import CoToCallback
    from tests.integrations.test_transformers import plain_loop, trainer_of
    from tests.integrations.test_transformers import weights as weights_of

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
    again = shaken(lora(llama, ["q_proj", "v_proj"]))  # other weights, so that all must come from the checkpoint
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
