"""CoTo in transformers' Trainer: masks, weights and files equal those of a plain loop."""

import copy
import functools

import pytest
import torch
from torch import _dynamo as dynamo

import cotolora
from cotolora import sample_mask

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from cotolora.integrations.transformers import CoToCallback, leave_out_base  # noqa: E402
from tests.support.trainer import (  # noqa: E402
    SMALL,
    STEPS,
    VOCABULARY,
    InOrder,
    collate,
    examples,
    llama,
    plain_loop,
    trainer_of,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=16, **dropouts)
    )


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SMALL, num_hidden_layers=3))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {name: size for name, size in SMALL.items() if name != "vocab_size"}
    return ViTForImageClassification(
        ViTConfig(**sizes, num_hidden_layers=3, image_size=16, patch_size=8, num_channels=1, num_labels=4)
    )


def clip():
    from transformers import CLIPConfig, CLIPModel

    tower = {name: size for name, size in SMALL.items() if name != "vocab_size"} | {"num_hidden_layers": 2}
    text = tower | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": VOCABULARY - 1}
    vision = tower | {"image_size": 16, "patch_size": 8, "num_channels": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


class Watch(TrainerCallback):
    """Records each step's mask and checks that adapters that are off do not change."""

    def __init__(self, ours):
        self.ours, self.masks, self.moved = ours, [], []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.masks.append((state.global_step, self.ours.coto.mask.clone()))
        self.before = {name: layer.lora_b.detach().clone() for name, layer in cotolora.adapters(model).items()}

    def on_optimizer_step(self, args, state, control, model, **_):
        on = dict(zip(self.ours.coto.groups, self.masks[-1][1].tolist(), strict=True))
        groups = {name: key for key, names in self.ours.coto.groups.items() for name in names}
        for name, layer in cotolora.adapters(model).items():
            self.moved.append((on[groups[name]], not torch.equal(layer.lora_b, self.before[name])))


def prepared(make, seed=0, rank=2):
    torch.manual_seed(seed)
    model = make()
    cotolora.inject(model, rank=rank)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "vit", "clip"])
def test_masks_follow_the_steps_and_off_adapters_are_unchanged(kind, tmp_path):
    model = prepared(globals()[kind])
    ours = CoToCallback(seed=3)
    watch = Watch(ours)
    trainer_of(model, tmp_path, kind, [ours, watch]).train()
    groups = len(ours.coto.groups)
    assert groups >= 3
    assert [step for step, _ in watch.masks] == list(range(STEPS))
    for step, mask in watch.masks:
        p = cotolora.activation_probability(step, STEPS)
        assert torch.equal(mask, sample_mask(groups, p, seed=3, step=step))
    assert {(on, moved) for on, moved in watch.moved if not on} == {(False, False)}
    assert any(on and moved for on, moved in watch.moved)
    assert ours.coto.mask.all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_equal_a_plain_loops(kind, tmp_path):
    model = prepared(globals()[kind])
    expected = plain_loop(copy.deepcopy(model), kind=kind, seed=5)
    trainer_of(model, tmp_path, kind, [CoToCallback(cotolora.Schedule(seed=5))]).train()
    for name, weight in weights(model).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "pefts"])
def test_a_pooler_that_the_loss_does_not_use_causes_no_error(ours, tmp_path):
    from transformers import BertConfig, BertModel

    class Pooled(InOrder):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            return model(inputs["input_ids"]).last_hidden_state.mean(1).square().mean()

    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL, num_hidden_layers=4))
    if ours:
        cotolora.inject(model, rank=2)
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    start = weights(model)
    coto = CoToCallback(initial_p=0.0, seed=1)
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 40,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**settings, save_strategy="no", weight_decay=0.1, remove_unused_columns=False)
    Pooled(model, arguments, train_dataset=examples("bert", 64), data_collator=collate, callbacks=[coto]).train()
    masks = [coto.coto.schedule.mask(5, step, 40).tolist() for step in range(40)]
    assert list(coto.coto.groups)[-1] == "pooler.dense"
    assert [False] * 4 + [True] in masks
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, start[name])}
    assert moved
    assert not any("pooler" in name for name in moved)


@pytest.mark.parametrize("gates", ["host", "device"])
def test_off_adapters_are_neither_changed_nor_stepped(gates, tmp_path):
    model = prepared(llama)
    ours = CoToCallback(gates=gates, shape="constant", initial_p=0.3)
    watch = Watch(ours)
    trainer = trainer_of(model, tmp_path, callbacks=[ours, watch], weight_decay=0.1)
    trainer.train()
    assert {(on, moved) for on, moved in watch.moved if not on} == {(False, False)}
    steps_on = {key: sum(mask[i].item() for _, mask in watch.masks) for i, key in enumerate(ours.coto.groups)}
    assert len(set(steps_on.values())) > 1
    for key, names in ours.coto.groups.items():
        for name in names:
            state = trainer.optimizer.state.get(cotolora.adapters(model)[name].lora_b, {"step": 0})
            assert state["step"] == steps_on[key]


def test_after_training_every_adapter_is_on_for_good(tmp_path):
    model = prepared(llama)
    ours = CoToCallback(shape="constant", initial_p=0.3)
    watch = Watch(ours)
    trainer_of(model, tmp_path, callbacks=[ours, watch]).train()
    assert not watch.masks[-1][1].all()
    assert all(layer.gate is True for layer in cotolora.adapters(model).values())
    assert not model._forward_hooks


def test_gradient_accumulation_has_one_mask_per_step(tmp_path):
    model = prepared(llama)
    ours = CoToCallback()
    watch = Watch(ours)
    trainer_of(model, tmp_path, callbacks=[ours, watch], gradient_accumulation_steps=3).train()
    assert [step for step, _ in watch.masks] == list(range(STEPS))
    assert {(on, moved) for on, moved in watch.moved if not on} == {(False, False)}


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, tmp_path):
    model = prepared(llama)
    expected = plain_loop(copy.deepcopy(model))
    if reentrant:
        model.enable_input_require_grads()
    trainer_of(
        model, tmp_path, callbacks=[CoToCallback()], gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    ).train()  # fmt: skip
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("gates", "regional"), [("device", False), ("host", True)], ids=["whole-model", "by-block"])
def test_torch_compile_needs_few_graphs_and_changes_nothing(gates, regional, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(regional))
    dynamo.reset()
    counted = dynamo.utils.counters["stats"]
    counted.clear()
    compiled, eager = prepared(llama), prepared(llama)
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 12}
    trainer_of(compiled, tmp_path, callbacks=[CoToCallback(gates=gates)], **options).train()
    graphs = counted["unique_graphs"]
    trainer_of(eager, tmp_path, callbacks=[CoToCallback()], max_steps=12).train()
    # a block is on or off and passes a gradient down or not; the other graphs are embedding, norm, head and rope
    assert graphs <= 4 + 4 if regional else graphs == 1
    torch.testing.assert_close(weights(compiled), weights(eager))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "package"),
    [("", "torch"), ("schedule_free_adamw", "schedulefree"), ("adamw_bnb_8bit", "bitsandbytes")],
)
def test_a_resumed_run_equals_an_uninterrupted_one(optim, package, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed")
    # with this rank most factors have at least the 4096 entries from which bitsandbytes uses 8-bit states
    prepared = functools.partial(globals()["prepared"], rank=128 if optim else 2)
    own = {"optim": optim, "learning_rate": 1e-2} if optim else {}
    whole = prepared(llama)
    trainer_of(whole, tmp_path / "whole", callbacks=[CoToCallback()], **own).train()
    saving = {"save_strategy": "steps", "save_steps": 3} | own
    first = prepared(llama)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 3

    trainer_of(first, tmp_path / "cut", callbacks=[CoToCallback(), Stop()], **saving).train()
    again = prepared(llama, seed=1)  # must load everything from the checkpoint
    trainer = trainer_of(again, tmp_path / "cut", callbacks=[CoToCallback()], **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    states = trainer.optimizer.state.values()
    assert states
    if package == "bitsandbytes":
        assert torch.uint8 in {state["state1"].dtype for state in states if state}
    for name, weight in weights(again).items():
        assert torch.equal(weight, weights(whole)[name]), name


@pytest.mark.parametrize("shards", [False, True])
def test_a_checkpoint_without_its_base_resumes_the_run(shards, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    if shards:
        save = transformers.PreTrainedModel.save_pretrained
        monkeypatch.setattr(
            transformers.PreTrainedModel, "save_pretrained", functools.partialmethod(save, max_shard_size="20KB")
        )
    whole = prepared(llama)
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(whole, tmp_path, callbacks=[CoToCallback(save_base=False)], **saving).train()
    checkpoint = tmp_path / "checkpoint-3"
    assert sorted(path.name for path in checkpoint.glob("*model*")) == ["model.safetensors"]
    kept = load_file(checkpoint / "model.safetensors")
    assert set(kept) == set(weights(whole))
    again = prepared(llama)  # the same base with new adapters
    trainer = trainer_of(again, tmp_path / "again", callbacks=[CoToCallback()], **saving)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for name, weight in weights(again).items():
        assert torch.equal(weight, weights(whole)[name]), name


def test_a_checkpoint_without_safetensors_is_unchanged(tmp_path, caplog):
    model = prepared(llama)
    (tmp_path / "pytorch_model.bin").write_bytes(b"as it is")
    leave_out_base(tmp_path, model)
    assert "found no model.safetensors" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_evaluation_in_the_middle_sees_every_adapter(tmp_path):
    model, seen = prepared(llama), []
    layers = cotolora.adapters(model).values()
    model.register_forward_hook(lambda *_: seen.append((model.training, all(x.active is not False for x in layers))))
    trainer_of(
        model, tmp_path, callbacks=[CoToCallback()], eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2
    ).train()
    assert {on for training, on in seen if not training} == {True}
    assert False in {on for training, on in seen if training}


def test_checkpoints_hold_the_adapter_in_pefts_format(tmp_path):
    peft = pytest.importorskip("peft")
    model = prepared(llama)
    trainer_of(model, tmp_path, callbacks=[CoToCallback()], save_strategy="steps", save_steps=STEPS).train()
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / f"checkpoint-{STEPS}" / "adapter").eval()
    tokens = examples("llama", 1)[0]["input_ids"][None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=1e-5)
    other = prepared(llama)
    trainer_of(
        other, tmp_path / "none", callbacks=[CoToCallback(save=False)], save_strategy="steps", save_steps=STEPS
    ).train()
    assert not (tmp_path / "none" / f"checkpoint-{STEPS}" / "adapter").exists()


def test_a_callback_can_be_used_twice(tmp_path):
    ours = CoToCallback()
    for seed in (0, 1):
        model = prepared(llama, seed)
        expected = plain_loop(copy.deepcopy(model))
        trainer_of(model, tmp_path, callbacks=[ours]).train()
        assert all(torch.equal(weight, expected[name]) for name, weight in weights(model).items())


def test_a_failed_run_leaves_no_hooks_or_gates_behind(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise RuntimeError("power cut")

    ours, model = CoToCallback(), prepared(llama)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer_of(model, tmp_path, callbacks=[ours, Fail()]).train()
    model = prepared(llama)
    expected = plain_loop(copy.deepcopy(model))
    trainer_of(model, tmp_path, callbacks=[ours]).train()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(model).items())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"initial_p": 2.0}, "initial_p"),
        ({"tilt": 3.0}, r"tilt must be in \[-1, 1\]; got 3.0"),
        ({"shape": "cubic"}, "shape"),
        ({"seed": -1}, "seed"),
        ({"schedule": cotolora.Schedule(), "tilt": 0.0}, "schedule must not be combined with tilt"),
    ],
)
def test_bad_settings_are_named_at_once(settings, says):
    with pytest.raises(ValueError, match=says):
        CoToCallback(**settings)


def test_a_model_without_adapters_is_named(tmp_path):
    torch.manual_seed(0)
    trainer = Trainer(
        llama(),
        TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none"),
        train_dataset=examples("llama", 2),
        callbacks=[CoToCallback()],
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has none"):
        trainer.train()
