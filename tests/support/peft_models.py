"""Models with PEFT adapters of each kind, shared by the tests of PEFT."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


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
    """Four blocks of one linear each; `reentrant` (None: no checkpoint) is the kind of checkpoint around them."""

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
    """Moves the trainable parameters away from their initial values, because zeros hide errors."""
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


CONVERSIBLE = {
    "patterns": (llama, ["q_proj", "v_proj"], {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}),
    "all-linear-rslora-dropout": (llama, "all-linear", {"use_rslora": True, "lora_dropout": 0.3}),
    "conv1d-and-tied-head": (gpt2, ["c_attn", "lm_head"], {"fan_in_fan_out": True}),
    "modules-to-save": (llama, ["q_proj"], {"modules_to_save": ["lm_head"]}),
    "plain-torch": (mlp, "all-linear", {}),
}  # fmt: skip


def two_adapters():
    model = lora(mlp, ["layers.0.0", "layers.1.0"])
    model.add_adapter("other", peft.LoraConfig(target_modules=["layers.1.0", "layers.2.0"], r=2))
    model.set_adapter("other")
    return shaken(model)


def merged():
    model = lora(mlp)
    model.merge_adapter()
    return model


def with_tokens():
    return lora(llama, ["q_proj"], trainable_token_indices=[0, 1])


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
