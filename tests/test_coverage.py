"""Models most of whose weights cannot have adapters: `inject` reports which ones and their share."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from cotolora import inject


class Experts(nn.Module):
    """All experts in one parameter, as in transformers."""

    def __init__(self, count, width):
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, width, width))
        self.down = nn.Parameter(torch.randn(count, width, width))


class Block(nn.Module):
    def __init__(self, experts, width):
        super().__init__()
        self.q, self.experts, self.norm = nn.Linear(width, width), Experts(experts, width), nn.LayerNorm(width)


class Router(nn.Module):
    def __init__(self, count, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width))


class Mixture(nn.Module):
    def __init__(self, experts=3, width=4, vocabulary=100):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"q": nn.Linear(width, width), "experts": Experts(experts, width), "norm": nn.LayerNorm(width)}
            )
            for _ in range(2)
        )
        self.router = Router(experts, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight


def said(caplog):
    return [record.getMessage() for record in caplog.records if "cannot be adapted" in record.getMessage()]


@pytest.mark.parametrize("variant", ["lora", "vera"])
@pytest.mark.parametrize("targets", ["all-linear", ["q"]], ids=str)
def test_share_and_names_of_experts_are_reported_in_one_line(targets, variant, caplog):
    inject(Mixture(), targets, variant=variant)
    # weights per block: 16 + 4 in q, 2 * 3 * 16 in the experts, 8 in the norm; the router has 3 * 4
    (message,) = said(caplog)
    assert message.startswith(
        "78% of the weights outside the embeddings (204 of 260) stay frozen and cannot be adapted, because they "
        "belong to no linear module: blocks.*.experts.up, blocks.*.experts.down, router.weight; trainable"
    )


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: (Mixture(experts=0), {}), id="no-experts"),
        pytest.param(lambda: (Mixture(), {"trainable": ["experts"]}), id="trained-in-full"),
        pytest.param(lambda: (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 99)), {"targets": ["0"]}), id="not-targeted"),
        pytest.param(lambda: (nn.Sequential(nn.Linear(4, 4), nn.Embedding(99, 4)), {}), id="an-embedding"),
        pytest.param(lambda: (nn.Sequential(weight_norm(nn.Linear(9, 9))), {}), id="inside-a-base"),
        pytest.param(
            lambda: (nn.Sequential(nn.Linear(4, 4), weight_norm(nn.Linear(4, 99))), {"targets": ["0"]}),
            id="a-parametrisation",
        ),
    ],
)
def test_nothing_is_reported_for_a_small_or_intended_share(make, caplog):
    model, options = make()
    inject(model, **options)
    assert not said(caplog)


def test_many_names_are_shortened(caplog):
    model = nn.ModuleDict({f"conv_{name}": nn.Conv2d(3, 3, 3 + 2 * i) for i, name in enumerate("abcdef")})
    model["head"] = nn.Linear(3, 2)
    inject(model)
    (message,) = said(caplog)
    assert ": conv_f.weight, conv_e.weight, conv_d.weight, conv_c.weight and 2 more; trainable" in message


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "Llama"])
def test_transformers_models(kind, tf, caplog):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"Mixtral": {"num_local_experts": 4}, "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 32}}
    config = getattr(tf, f"{kind}Config")(vocab_size=64, num_hidden_layers=2, **sizes, **experts.get(kind, {}))
    inject(getattr(tf, f"{kind}ForCausalLM")(config))
    places = "model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj"
    assert [places in message for message in said(caplog)] == ([] if kind == "Llama" else [True])
