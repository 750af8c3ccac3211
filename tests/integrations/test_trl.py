"""CoTo in TRL's SFTTrainer: masks, weights and files equal those of a plain loop."""

import copy
import logging

import pytest
import torch
from torch import nn

import cotolora
from cotolora import CoTo, sample_mask

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
trl = pytest.importorskip("trl", reason="trl is not installed")
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402

from cotolora.integrations.transformers import CoToCallback  # noqa: E402
from tests.support.trainer import BATCH, STEPS, VOCABULARY, examples, llama, weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

LAYERS = 4


def prepared(seed=0, targets="all-linear"):
    torch.manual_seed(seed)
    model = llama(LAYERS)
    for layer in cotolora.inject(model, targets, rank=2).values():
        nn.init.normal_(layer.lora_b, std=0.1)
    return model


def tokenizer():
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    of_words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=of_words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tokens():
    # at least 3, to avoid special tokens
    return [example["input_ids"].clamp(min=3) for example in examples("llama", 32)]


class InOrder(trl.SFTTrainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def trainer_of(model, path, callbacks=(), **arguments):
    settings = {
        "output_dir": str(path), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "max_grad_norm": 0.0, "disable_tqdm": True, "bf16": False,
        "logging_strategy": "no",
    }  # fmt: skip
    optimizer = optimizer_of(model)
    return InOrder(
        model, trl.SFTConfig(**settings | arguments), callbacks=list(callbacks), processing_class=tokenizer(),
        train_dataset=Dataset.from_dict({"input_ids": [row.tolist() for row in tokens()]}),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )  # fmt: skip


def own_loss(model, rows):
    """The model's own loss, which equals TRL's up to the order of summation."""
    return model(input_ids=rows, labels=rows).loss


def plain_loop(model, loss_of=own_loss, *, seed=0):
    """The training loop that the trainer must equal."""
    optimizer = optimizer_of(model)
    coto = CoTo(model, STEPS, seed=seed)
    coto.attach(optimizer)
    data = iter(tokens())
    model.train()
    for _ in range(STEPS):
        rows = torch.stack([next(data) for _ in range(BATCH)])
        loss_of(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        coto.step()
    return weights(model)


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


class Masks(transformers.TrainerCallback):
    def __init__(self, ours):
        self.ours, self.masks = ours, []

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.masks.append(self.ours.coto.mask.clone())


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
def test_weights_equal_a_plain_loops_and_the_run_ends_with_the_schedule(checkpointing, tmp_path):
    model = prepared()
    expected = plain_loop(copy.deepcopy(model), seed=5)
    ours = CoToCallback(seed=5)
    seen = Masks(ours)
    trainer_of(model, tmp_path, [ours, seen], gradient_checkpointing=checkpointing).train()
    assert_close(weights(model), expected, rtol=1e-4, atol=1e-6)
    assert ours.coto.total_steps == len(seen.masks) == STEPS
    for step, mask in enumerate(seen.masks):
        p = cotolora.activation_probability(step, STEPS)
        assert torch.equal(mask, sample_mask(LAYERS, p, seed=5, step=step))
    assert p == 1
    assert ours.coto.mask.all()


def test_a_run_by_epochs_ends_with_the_schedule(tmp_path):
    ours = CoToCallback()
    trainer = trainer_of(
        prepared(), tmp_path, [ours], max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=3, packing=True,
        max_length=16,
    )  # fmt: skip
    trainer.train()
    # 32 rows of 8 tokens are packed into 16 of 16: 8 batches, accumulated by three
    assert ours.coto.total_steps == trainer.state.global_step == 3


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 3

    whole, first, again = prepared(), prepared(), prepared(seed=1)  # `again` must load everything from the checkpoint
    trainer_of(whole, tmp_path / "whole", [CoToCallback()]).train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(first, tmp_path / "cut", [CoToCallback(), Stop()], **saving).train()
    cut = tmp_path / "cut" / "checkpoint-3"
    trainer_of(again, tmp_path / "cut", [CoToCallback()], **saving).train(resume_from_checkpoint=str(cut))
    assert_close(weights(again), weights(whole), rtol=0, atol=0)
    loaded = llama(LAYERS)
    cotolora.load_adapter(loaded, cut / "adapter")
    assert_close(weights(loaded), weights(first), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_model_trains_as_in_a_plain_loop(kind, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    llama(LAYERS).save_pretrained(tmp_path / "base")
    bits = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}[kind]

    def quantised():
        config = transformers.BitsAndBytesConfig(**bits)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
        torch.manual_seed(0)
        for layer in cotolora.inject(model, rank=2).values():
            nn.init.normal_(layer.lora_b, std=0.1)
        return model

    model, other = quantised(), quantised()
    ours = CoToCallback(seed=5)
    trainer, twin = trainer_of(model, tmp_path, [ours]), trainer_of(other, tmp_path)
    start = weights(model)
    assert {weight.dtype for weight in start.values()} == {torch.bfloat16}, "the dtype that TRL gives PEFT's adapters"

    def loss_of(model, rows):
        # TRL's own loss, because in bfloat16 the last bit of a loss can change a weight
        batch = {"input_ids": rows, "labels": rows, "attention_mask": torch.ones_like(rows)}
        return twin.compute_loss(model, batch, num_items_in_batch=torch.tensor(rows[:, 1:].numel()))

    expected = plain_loop(other, loss_of, seed=5)
    trainer.train()
    assert ours.coto.total_steps == trainer.state.global_step == STEPS
    assert all(not torch.equal(weight, start[name]) for name, weight in weights(model).items())
    assert_close(weights(model), expected, rtol=0, atol=0)


def test_an_adapter_on_a_head_that_trl_bypasses_is_named(tmp_path, caplog):
    model = prepared(targets=["q_proj", "v_proj", "lm_head"])
    with caplog.at_level(logging.WARNING, logger="cotolora"):
        trainer_of(model, tmp_path, [CoToCallback(initial_p=1.0)]).train()
    assert [record.getMessage() for record in caplog.records if "lm_head" in record.getMessage()]
