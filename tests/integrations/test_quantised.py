"""CoTo on quantised models in transformers' Trainer: results equal those of a plain loop and of PEFT."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

import cotolora

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback  # noqa: E402
from transformers.quantizers.base import HfQuantizer  # noqa: E402

from cotolora.integrations.transformers import CoToCallback  # noqa: E402
from cotolora.quantised import allow_training  # noqa: E402
from tests.support.trainer import STEPS, examples, llama, plain_loop, trainer_of, weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

CONFIGS = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
REFUSAL = "cannot perform fine-tuning on purely quantized models"


@pytest.fixture(params=["nf4", "int8", pytest.param("nf4-double", marks=pytest.mark.slow)])
def quantised(request, tmp_path):
    """A function that makes the same quantised model without adapters at every call."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    # with rows shorter than its block of 64, bitsandbytes fails in eval mode on CPUs with bfloat16 matmuls
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def make():
        try:
            return AutoModelForCausalLM.from_pretrained(
                tmp_path / "base", quantization_config=CONFIGS[request.param](), device_map="cpu"
            )
        except RuntimeError as error:
            if "available devices" not in str(error):
                raise
            return pytest.skip(f"transformers {transformers.__version__} wants a GPU for bitsandbytes")

    return make


def injected(model, seed=0):
    torch.manual_seed(seed)
    for layer in cotolora.inject(model, TARGETS, rank=2).values():
        nn.init.normal_(layer.lora_b, std=0.1)
    return model


def test_trainer_accepts_it_and_gives_the_weights_of_a_plain_loop(quantised, tmp_path):
    expected = plain_loop(injected(quantised()), seed=3)
    model = injected(quantised())
    frozen = {name: t.clone() for name, t in model.state_dict().items() if "lora_" not in name}
    trainer_of(model, tmp_path, callbacks=[CoToCallback(seed=3)]).train()
    assert weights(model).keys() == expected.keys() == {n for n, _ in model.named_parameters() if "lora_" in n}
    for name, weight in weights(model).items():
        assert torch.equal(weight, expected[name]), name
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in frozen.items())


class Losses(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **_):
        self.losses += [logs["loss"]] if "loss" in logs else []


def test_with_every_adapter_on_it_equals_peft(quantised, tmp_path):
    peft = pytest.importorskip("peft", reason="compares with PEFT")
    ours = injected(quantised())
    theirs = peft.get_peft_model(
        quantised(), peft.LoraConfig(r=2, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    names = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}

    def pefts(name):
        place, _, factor = name.rpartition(".")
        return theirs.get_parameter(f"base_model.model.{place}.{names[factor]}")

    start = weights(ours)
    for name, weight in start.items():
        pefts(name).data.copy_(weight)
    runs = []
    for model, callbacks in ((ours, [CoToCallback(initial_p=1.0)]), (theirs, [])):
        runs.append(Losses())
        trainer_of(model, tmp_path, callbacks=[*callbacks, runs[-1]], logging_strategy="steps", logging_steps=1).train()
    assert len(runs[0].losses) == STEPS
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)
    for name, weight in weights(ours).items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(weight, pefts(name).detach(), rtol=1e-3, atol=1e-5, msg=name)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 3


def test_a_resumed_run_equals_an_uninterrupted_one(quantised, tmp_path):
    whole, first, again = injected(quantised()), injected(quantised()), injected(quantised(), seed=1)
    trainer_of(whole, tmp_path / "whole", callbacks=[CoToCallback()]).train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(first, tmp_path / "cut", callbacks=[CoToCallback(), Stop()], **saving).train()
    trainer = trainer_of(again, tmp_path / "cut", callbacks=[CoToCallback()], **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    for name, weight in weights(again).items():
        assert torch.equal(weight, weights(whole)[name]), name


def test_checkpoints_hold_the_adapter_and_a_loaded_one_trains_on(quantised, tmp_path):
    model = injected(quantised())
    trainer_of(model, tmp_path, callbacks=[CoToCallback()], save_strategy="steps", save_steps=STEPS).train()
    loaded = quantised()
    cotolora.load_adapter(loaded, tmp_path / f"checkpoint-{STEPS}" / "adapter")
    tokens = examples("llama", 1)[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)
    before = weights(loaded)
    trainer_of(loaded, tmp_path / "more", callbacks=[CoToCallback()]).train()
    assert not all(torch.equal(weight, before[name]) for name, weight in weights(loaded).items())


def test_saving_is_unchanged(quantised, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    plain, model = quantised(), injected(quantised())
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "ours")
    wanted, found = (safetensors.load_file(tmp_path / name / "model.safetensors") for name in ("plain", "ours"))
    assert {key for key in found if "lora_" not in key} == wanted.keys()
    assert all(torch.equal(found[key], t) for key, t in wanted.items())
    configs = [(tmp_path / name / "config.json").read_text() for name in ("plain", "ours")]
    assert configs[0] == configs[1]


def test_after_eject_trainer_refuses_the_model_again(quantised, tmp_path):
    model = injected(quantised())
    cotolora.eject(model, merge=False)
    with pytest.raises(ValueError, match=REFUSAL):
        Trainer(model)


@pytest.mark.parametrize("prepare", [False, True], ids=["as-it-is", "prepared-by-peft"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(quantised, reentrant, prepare, tmp_path):
    def make(checkpointing):
        model = quantised()
        if prepare:
            peft = pytest.importorskip("peft", reason="prepares the model with PEFT")
            peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        return injected(model)

    expected = plain_loop(make(False))
    model = make(True)
    if reentrant:
        model.enable_input_require_grads()
    trainer_of(
        model, tmp_path, callbacks=[CoToCallback()], gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    ).train()  # fmt: skip
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7, msg=name)


# without bitsandbytes: Trainer only needs a quantizer, of any method


class Quantizer(HfQuantizer):
    """The quantizer of a method that does not change the weights."""

    trainable = True
    requires_calibration = False

    def __init__(self):
        self.quantization_config, self.pre_quantized, self.settings = None, False, {"bits": 8}

    def is_serializable(self):
        return True

    # required by transformers 4

    def _process_model_before_weight_loading(self, model, **kwargs):
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        return model

    @property
    def is_trainable(self):
        return self.trainable


class Untrainable(Quantizer):
    trainable = False

    def __init__(self):
        super().__init__()
        self.quantization_config = BitsAndBytesConfig(load_in_8bit=True)


def said_to_be_quantised(quantizer=Quantizer):
    torch.manual_seed(0)
    model = llama()
    model.is_quantized, model.hf_quantizer = True, quantizer()
    return model


def test_only_a_model_with_adapters_is_declared_trainable():
    model, other = said_to_be_quantised(), said_to_be_quantised()
    flag = HfQuantizer.is_qat_trainable
    with pytest.raises(ValueError, match=REFUSAL):
        Trainer(model)
    cotolora.inject(model)
    Trainer(model)
    assert isinstance(model.hf_quantizer, Quantizer)
    assert type(model.hf_quantizer).__name__ == "Quantizer"
    assert model.hf_quantizer.settings == {"bits": 8}
    with pytest.raises(ValueError, match=REFUSAL):
        Trainer(other)
    cotolora.eject(model)
    assert type(model.hf_quantizer) is Quantizer
    assert HfQuantizer.is_qat_trainable is flag
    with pytest.raises(ValueError, match=REFUSAL):
        Trainer(model)


def test_a_method_that_cannot_train_is_still_refused():
    model = said_to_be_quantised(Untrainable)
    cotolora.inject(model)
    with pytest.raises(ValueError, match="that quantization method do not support training"):
        Trainer(model)


def test_a_failed_injection_leaves_the_quantizer_unchanged(monkeypatch):
    def fail(model):
        allow_training(model)
        assert type(model.hf_quantizer) is not Quantizer
        raise RuntimeError("power cut")

    model = said_to_be_quantised()
    monkeypatch.setattr(importlib.import_module("cotolora.inject"), "allow_training", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        cotolora.inject(model)
    assert type(model.hf_quantizer) is Quantizer
    assert not cotolora.adapters(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_and_can_be_ejected(copied):
    model = said_to_be_quantised()
    cotolora.inject(model)
    twin = copied(model)
    cotolora.eject(model)
    Trainer(twin)
    assert twin.hf_quantizer.settings == {"bits": 8}
    assert twin.hf_quantizer is not model.hf_quantizer
    cotolora.eject(twin)
    assert type(twin.hf_quantizer) is Quantizer


def test_a_model_converted_from_peft_trains_and_converting_back_restores_pefts_check():
    peft = pytest.importorskip("peft")
    from cotolora.integrations.peft import from_peft, to_peft

    model = from_peft(peft.get_peft_model(said_to_be_quantised(), peft.LoraConfig(target_modules=["q_proj"])))
    Trainer(model)
    theirs = to_peft(model)
    Trainer(theirs)
    with pytest.raises(ValueError, match=REFUSAL):
        Trainer(theirs.unload())
