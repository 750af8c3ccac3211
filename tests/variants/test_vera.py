"""VeRA: results, shared tensors, and PEFT's files. tests/conformance.py has the tests common to all variants."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import cotolora
from cotolora import coto_lora_linear

GATES = [True, torch.tensor(1), torch.tensor(0), torch.tensor([1, 0, 1])]
SIZES = {"x": (3, 2, 6), "weight": (5, 6), "bias": (5,), "lora_a": (4, 6), "lora_b": (5, 4), "d": (4,), "b": (5,)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.tall = nn.Linear(6, 10), nn.Linear(10, 8)

    def forward(self, x):
        return self.tall(torch.tanh(self.wide(x)))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Net()


X = torch.linspace(-1, 1, 24).view(4, 6)


@torch.no_grad()
def moved(model):
    for name, parameter in model.named_parameters():
        if "lambda" in name:
            parameter.normal_()
    return model


def injected(base):
    model = copy.deepcopy(base)
    cotolora.inject(model, ["wide", "tall"], rank=4, alpha=8.0, variant="vera")
    return model


@pytest.mark.parametrize("gate", GATES, ids=["host", "on", "off", "rows"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["reference", "addmm"])
def test_gradients_equal_those_of_the_definition(backend, dropout, gate):
    torch.manual_seed(0)
    operands = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in SIZES.values()]

    def function(x, weight, bias, lora_a, lora_b, *extra):
        torch.manual_seed(1)
        options = {"scale": 0.7, "gate": gate, "dropout": dropout, "variant": "vera", "extra": extra}
        return coto_lora_linear(x, weight, bias, lora_a, lora_b, **options, backend=backend)

    assert gradcheck(function, operands)


def test_layers_share_one_a_and_one_b_of_the_largest_sizes(base):
    layers = cotolora.adapters(injected(base))
    wide, tall = layers["wide"], layers["tall"]
    assert torch.equal(wide.lora_a, tall.lora_a[:, :6])
    assert torch.equal(tall.lora_b, wide.lora_b[:8])
    for name in ("lora_a", "lora_b"):
        one, other = (getattr(layer, name) for layer in (wide, tall))
        assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        assert not one.requires_grad
    assert [tuple(p.shape) for p in cotolora.adapter_parameters(injected(base))] == [(4,), (10,), (4,), (8,)]


def test_a_new_model_equals_the_base_and_only_the_vectors_train(base):
    model = injected(base)
    assert torch.equal(model(X), base(X))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("vera_lambda" in name for name in trained)
    assert len(trained) == 4


def test_our_files_give_the_same_logits_in_peft(base, tmp_path, peft):
    model = moved(injected(base))
    cotolora.save_adapter(model, tmp_path)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(X), model(X))
    again = copy.deepcopy(base)
    cotolora.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(X), model(X))


@pytest.mark.parametrize("saved", [True, False], ids=["projections", "seed"])
def test_pefts_files_give_the_same_logits_here(base, tmp_path, peft, saved):
    config = {"r": 4, "target_modules": ["wide", "tall"], "save_projection": saved, "projection_prng_key": 3}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save vera_A")
        theirs = moved(peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(**config)))
        theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    cotolora.load_adapter(model, tmp_path)
    torch.testing.assert_close(model(X), theirs(X))
    cotolora.eject(model)
    torch.testing.assert_close(model(X), theirs(X))


def test_layers_with_an_a_of_their_own_are_not_saved_as_shared(base, tmp_path):
    model = moved(injected(base))
    layer = cotolora.adapters(model)["wide"]
    layer.lora_a = nn.Parameter(layer.lora_a + 1, requires_grad=False)
    with pytest.raises(ValueError, match=r"must share VeRA's A and B.*wide differs"):
        cotolora.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_base_of_another_class_can_be_adapted():
    class Doubled(nn.Module):
        in_features, out_features = 6, 5

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 5)

        def forward(self, x):
            return 2 * self.inner(x)

    torch.manual_seed(0)
    layer = cotolora.CoToLoRALinear.from_linear(Doubled(), 3, 3.0, variant="vera")
    assert torch.equal(layer(X), layer.base(X))
    with torch.no_grad():
        layer.vera_lambda_b.normal_()
    y = layer(X)
    with cotolora.set_backend("reference"):
        torch.testing.assert_close(layer(X), y)
    torch.testing.assert_close(y - layer.base(X), X @ layer.delta_weight().T)
