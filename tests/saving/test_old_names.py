"""Adapter files with the module names of older versions of transformers."""

import warnings
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cotolora import adapters, load_adapter, save_adapter
from tests.support.saving import (
    PREFIX,
    WEIGHTS,
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

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = {"input_ids": torch.tensor([[1, 5, 2, 7], [3, 4, 8, 6]])}


def llava(tf):
    torch.manual_seed(0)
    vision = tf.CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    text = tf.LlamaConfig(**SIZES, vocab_size=32)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
    ).eval()


def by_peft(peft, model, directory, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = train(peft.get_peft_model(model, peft.LoraConfig(r=2, **config))).eval()
        theirs.save_pretrained(directory)
    return theirs


def rename(directory, *replacements):
    tensors = load_file(directory / WEIGHTS)
    for old, new in replacements:
        tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    rewrite(directory, tensors)


VERSION_4 = (
    ("model.model.language_model.", "model.language_model.model."),
    ("model.model.vision_tower.", "model.vision_tower.vision_model."),
    ("model.lm_head.", "model.language_model.lm_head."),
)


@pytest.mark.parametrize("onto", ["base", "adapters"])
def test_names_of_transformers_4_are_resolved_as_in_peft(onto, peft, tf, tmp_path):
    theirs = by_peft(peft, llava(tf), tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    rename(tmp_path, *VERSION_4[:2])
    assert any("language_model.model.layers" in key for key in keys(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = peft.PeftModel.from_pretrained(llava(tf), tmp_path).eval()
    assert not [w for w in caught if "language_model" in str(w.message)]
    assert torch.equal(logits(again, IDS), logits(theirs, IDS))
    rename(tmp_path, *VERSION_4[2:])
    ours = llava(tf)
    if onto == "adapters":
        tuned(ours, ["q_proj"], rank=2, alpha=8.0, trainable=["lm_head"], seed=2)
    assert load_adapter(ours, tmp_path) == ([], [])
    assert_few_ulps(logits(ours, IDS), logits(theirs, IDS))
    assert trained(ours) == {"lm_head.weight"} | {f"{name}.lora_{x}" for name in adapters(ours) for x in "ab"}
    theirs = dict(theirs.base_model.model.named_modules())
    for name, layer in adapters(ours).items():  # including the image tower
        assert torch.equal(layer.lora_b, theirs[name].lora_B["default"].weight)
    save_adapter(ours, tmp_path)
    assert f"{PREFIX}model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in keys(tmp_path)


class Stating(nn.Module):
    """Declares its old names as classes of transformers 4.52 to 4.57 do; the first rule that matches applies."""

    _checkpoint_conversion_mapping: ClassVar = {
        r"^(old|elder)\.": "new.",
        r"^old": "never",
        r"fc": "fc",
    }

    def __init__(self):
        super().__init__()
        self.new, self.fc = nn.ModuleDict({"fc": nn.Linear(4, 4)}), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.new["fc"](x))


def test_names_declared_by_a_class_are_resolved_as_in_peft(peft, tmp_path):
    theirs = by_peft(peft, base(Stating), tmp_path, target_modules=["fc"])
    rename(tmp_path, ("model.new.", "model.old."))
    again = peft.PeftModel.from_pretrained(base(Stating), tmp_path).eval()
    assert torch.equal(logits(again), logits(theirs))
    ours = base(Stating)
    assert load_adapter(ours, tmp_path) == ([], [])
    assert_few_ulps(logits(ours), logits(theirs))


def test_keys_that_match_or_have_no_rule_keep_their_names(tmp_path):
    save_adapter(tuned(base(Stating), ["fc"], rank=2), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    strange = {f"{PREFIX}old.fc.lora_A.weight": torch.ones(2, 4), f"{PREFIX}older.lora_A.weight": torch.ones(2, 4)}
    rewrite(tmp_path, tensors | strange)
    model = base(Stating)
    with refused(model, r"unexpected keys \['old.fc.lora_A.weight', 'older.lora_A.weight'\]; strict=False"):
        load_adapter(model, tmp_path)
    assert load_adapter(model, tmp_path, strict=False).unexpected_keys == [
        "old.fc.lora_A.weight",
        "older.lora_A.weight",
    ]
    assert torch.equal(model.new["fc"].lora_a, tensors[f"{PREFIX}new.fc.lora_A.weight"])


def test_two_old_names_of_one_tensor_are_passed_over(tmp_path):
    save_adapter(tuned(base(Stating), ["fc"], rank=2), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    value = tensors.pop(f"{PREFIX}new.fc.lora_A.weight")
    rewrite(tmp_path, tensors | {f"{PREFIX}{name}.fc.lora_A.weight": value.clone() for name in ("old", "elder")})
    model = base(Stating)
    with refused(model, r"unexpected keys \['elder.fc.lora_A.weight', 'old.fc.lora_A.weight'\]"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("targets", [["w1", "w2"], ["q_proj", "w1", "w2"]])
def test_a_module_that_is_now_part_of_one_parameter_is_refused_with_the_reason(targets, tf, tmp_path):
    torch.manual_seed(0)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_key_value_heads=2, vocab_size=32, num_local_experts=2))
    save_adapter(tuned(model, ["q_proj"], rank=2), tmp_path)
    name = f"{PREFIX}model.layers.0.block_sparse_moe.experts.0.w1"
    experts = {f"{name}.lora_A.weight": torch.zeros(2, 16), f"{name}.lora_B.weight": torch.zeros(24, 2)}
    attention = load_file(tmp_path / WEIGHTS) if "q_proj" in targets else {}
    rewrite(tmp_path, attention | experts, target_modules=targets)
    model = tf.MixtralForCausalLM(model.config)
    with refused(model, r"has no linear for .*experts.0.w1.lora_A.weight: .* stores it fused"):
        load_adapter(model, tmp_path)
