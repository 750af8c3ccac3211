"""Files of models whose experts are one parameter in transformers 5 but separate modules in PEFT's names."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from cotolora import adapters, eject, inject, load_adapter, save_adapter
from cotolora.merging import AdapterState
from cotolora.saving.peft_config import parse_config

transformers = pytest.importorskip("transformers", minversion="5")
peft = pytest.importorskip("peft")

pytestmark = [
    # PEFT uses a name that transformers 5.24 deprecates
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # PEFT applies patterns to parameters but warns that they did not match
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
IDS = torch.randint(1, 63, (2, 8), generator=torch.Generator().manual_seed(0))


def qwen2_moe():
    """Shared experts in addition to the experts, and a dense block."""
    config = transformers.Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=16, mlp_only_layers=[0]
    )
    return transformers.Qwen2MoeForCausalLM(config)


def deepseek_v3():
    """A dense block before the blocks with experts."""
    config = transformers.DeepseekV3Config(
        **SIZES, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def mixtral():
    """Only the attention has linears."""
    sizes = {key: value for key, value in SIZES.items() if key != "moe_intermediate_size"}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=4))


def llama():
    """No experts, but linears with the same names."""
    sizes = {key: value for key, value in SIZES.items() if key != "moe_intermediate_size"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


MODELS = {make.__name__: make for make in (qwen2_moe, deepseek_v3, mixtral, llama)}


@pytest.fixture(params=MODELS)
def base(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapted(base, **options):
    model = copy.deepcopy(base)
    for layer in inject(model, rank=2, **options).values():
        nn.init.normal_(layer.lora_b, std=0.2)
    return model


def read_by_peft(base, directory):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing|.*unexpected")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory).eval()


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


PATTERNS = {"rank_pattern": {"up_proj": 3, "q_proj": 1}, "alpha_pattern": {"down_proj": 5.0}}


@pytest.mark.parametrize("options", [{}, PATTERNS], ids=["one-rank", "patterns"])
def test_peft_reads_linears_that_have_the_names_of_experts(base, options, tmp_path):
    model = adapted(base, **options)
    save_adapter(model, tmp_path)
    assert (logits(model) - logits(base)).abs().max() > 0.01
    same(logits(read_by_peft(base, tmp_path)), logits(model))
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert [(n, a.rank, a.alpha) for n, a in adapters(again).items()] == [
        (n, a.rank, a.alpha) for n, a in adapters(model).items()
    ]
    assert torch.equal(logits(again), logits(model))
    load_adapter(model, tmp_path)  # a model that already has adapters


def test_a_merged_state_is_read_by_peft(base, tmp_path):
    model = adapted(base)
    state = AdapterState.from_model(model)
    state.save(tmp_path / "once")
    AdapterState.from_directory(tmp_path / "once").save(tmp_path / "twice")
    same(logits(read_by_peft(base, tmp_path / "twice")), logits(model))
    again = copy.deepcopy(base)
    state.load_into(again)
    assert torch.equal(logits(again), logits(model))


def test_weights_are_named_only_if_peft_would_mistake_the_modules(base, tmp_path):
    save_adapter(adapted(base), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    named = {name.split(".")[-2] for name in fields.get("target_parameters", ())}
    expected = {"gate_proj", "up_proj", "down_proj"} if type(base).__name__[:4] in ("Qwen", "Deep") else set()
    assert named == expected


def test_a_converted_peft_model_gives_the_same_outputs(base):
    from cotolora.integrations.peft import to_peft

    model = adapted(base)
    expected = logits(model)
    same(logits(to_peft(model).eval()), expected)


def test_peft_adapters_of_linear_weights_are_read(base, tmp_path):
    names = [name for name, module in base.named_modules() if name.endswith(("o_proj", "shared_expert.up_proj"))]
    config = peft.LoraConfig(
        target_modules=["q_proj", "q_a_proj"], target_parameters=[f"{name}.weight" for name in names[1:]],
        init_lora_weights=False, r=2, rank_pattern={r"o_proj\.weight": 3},
    )  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    load_adapter(ours, tmp_path)
    same(logits(ours), logits(model))
    assert adapters(ours)[names[1]].rank == 3  # from the pattern
    eject(ours)
    same(logits(ours), logits(model))


def test_adapters_of_experts_are_refused_by_name(tmp_path):
    base = deepseek_v3().eval()
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    before = logits(base)
    refusal = r"target_parameters must match only weights of nn\.Linear; it matches model\.layers\.1\.mlp\.\S+"
    with pytest.raises(ValueError, match=refusal):
        load_adapter(base, tmp_path)
    assert not adapters(base)
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("value", ["fc.weight", [1], {"fc": 1}], ids=repr)
def test_target_parameters_must_be_names(value):
    with pytest.raises(ValueError, match="target_parameters must be a list of names"):
        parse_config({"peft_type": "LORA", "target_modules": ["fc"], "target_parameters": value})
