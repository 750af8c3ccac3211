"""A load that fails at any step leaves the model unchanged: modules, flags, and every byte."""

import importlib
import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cotolora import CoToLoRALinear, adapters, load_adapter, save_adapter
from cotolora.merging import AdapterState
from cotolora.variants import VARIANTS
from tests.support.saving import PREFIX, WEIGHTS, base, logits, picture, refused, rewrite, trained, tuned

OPTIONS = {"targets": ["fc"], "rank": 2, "trainable": ["head", "gamma", "token"]}
SURGERY = importlib.import_module("cotolora.inject")  # the package has the function under this name


@pytest.fixture
def directory(tmp_path):
    save_adapter(tuned(base(), **OPTIONS), tmp_path)
    return tmp_path


def injected():
    return tuned(base(), **OPTIONS, seed=2)


def merged():
    model = injected()
    for layer in adapters(model).values():
        layer.merge()
    return model


MODELS = {"plain": base, "injected": injected, "merged": merged}
# the functions that a load calls, with the least number of calls: writes, casts, copies, and module replacement
STEPS = {
    "copy_": (torch.Tensor, {"plain": 14, "injected": 14, "merged": 14}),
    "clone": (torch.Tensor, {"plain": 14, "injected": 14, "merged": 14}),
    "to": (torch.Tensor, {"plain": 14, "injected": 14, "merged": 14}),
    "from_spec": (CoToLoRALinear, {"plain": 3}),
    "share": (VARIANTS["lora"], {"plain": 1}),
    "move_hooks": (SURGERY, {"plain": 3}),
    "replace_module": (SURGERY, {"plain": 3}),
    "block_fast_path": (SURGERY, {"plain": 1}),
    "_merged_weight": (CoToLoRALinear, {"merged": 3}),
}


class Fails:
    """Wraps a function or method; the nth call raises, before or after it has run."""

    def __init__(self, function, at, error, after):
        self.function, self.left, self.error, self.after = function, at, error, after

    def __get__(self, instance, owner):
        return self if instance is None else lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        result = self.function(*args, **kwargs)
        if self.left == 0:
            raise self.error
        return result


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("none left"), KeyboardInterrupt()], ids=["memory", "interrupt"]
)
@pytest.mark.parametrize(("step", "model"), [(step, model) for step in STEPS for model in STEPS[step][1]])
def test_a_failure_at_any_step_changes_nothing(step, model, error, after, directory, monkeypatch):
    owner, least = STEPS[step]
    expected = logits(tuned(base(), **OPTIONS))
    model, least = MODELS[model](), least[model]
    before = picture(model)
    for at in itertools.count(1):
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, Fails(getattr(owner, step), at, error, after))
            try:
                load_adapter(model, directory)
                break
            except type(error):
                pass
        assert picture(model) == before, at
    assert at > least
    torch.testing.assert_close(logits(model), expected)  # merged weights round


def expanded(shape):
    return nn.Parameter(torch.zeros(1).expand(shape))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make", [base, injected])
def test_a_tensor_that_cannot_be_written_is_named(make, strict, directory):
    model = make()
    model.token = expanded(4)  # one of the last tensors to be written
    with refused(model, "token must be a tensor of the model that can be written; it is expanded"):
        load_adapter(model, directory, strict=strict)
    if make is injected:
        model = make()
        model.fc.lora_b = expanded((4, 2))
        with refused(model, r"fc.lora_b must be a tensor of the model that can be written; it is expanded"):
            load_adapter(model, directory, strict=strict)


@pytest.mark.parametrize("make", [base, injected])
def test_a_model_made_in_inference_mode(make, directory):
    def flags(model):
        return {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()}

    with torch.inference_mode():
        model = make()
    modules, before = dict(model.named_modules()), flags(model)
    with pytest.raises(
        ValueError, match="must be a tensor of the model that can be written; it was created in inference"
    ):
        load_adapter(model, directory)
    assert dict(model.named_modules()) == modules
    for name, (identity, flag, value) in flags(model).items():
        assert (identity, flag) == before[name][:2]
        assert torch.equal(value, before[name][2])
    with torch.inference_mode():
        load_adapter(model, directory)
        assert torch.equal(logits(model), logits(tuned(base(), **OPTIONS)))
    assert trained(model) == trained(injected())


def test_a_failed_load_does_not_modify_tensors_saved_by_autograd(directory, monkeypatch):
    model = injected()
    loss = model(torch.ones(5, 4)).square().sum()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", Fails(torch.Tensor.copy_, 12, RuntimeError("no memory"), False))
        with pytest.raises(RuntimeError, match="no memory"):
            load_adapter(model, directory)
    loss.backward()  # raises if a saved tensor was modified
    assert model.fc.lora_b.grad is not None


def test_a_state_in_memory_is_loaded_completely_or_not_at_all(directory):
    state, model = AdapterState.from_directory(directory), base()
    model.token = expanded(4)
    with refused(model, "token must be a tensor of the model that can be written"):
        state.load_into(model)


class Tied(nn.Module):
    """An embedding tied to a head, and a norm with buffers."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.last = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.last(self.norm(self.fc(self.embed(torch.arange(6))))))


@pytest.fixture
def partial(tmp_path):
    """A PEFT file with a copy of the embedding, the base of an adapter, buffers, and adapters missing in the model."""
    save_adapter(tuned(base(Tied), ["fc", "last"], rank=2, trainable=["embed", "norm"]), tmp_path)
    tensors = {key: t for key, t in load_file(tmp_path / WEIGHTS).items() if "head" not in key and "last" not in key}
    more = {f"{PREFIX}fc.base_layer.weight": torch.ones(4, 4), f"{PREFIX}nowhere.lora_A.weight": torch.ones(2, 4)}
    rewrite(tmp_path, tensors | more, modules_to_save=["embed", "norm"])
    return tmp_path


def untied_and_merged():
    model = base(Tied)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    tuned(model, ["fc", "last"], rank=2, trainable=["embed", "norm"], seed=2)
    model.fc.merge()
    return model


FILLING = importlib.import_module("cotolora.saving.filling")


@pytest.mark.parametrize(
    ("owner", "step", "make", "least"),
    [
        (FILLING, "deepcopy", base, 1),
        (FILLING, "_put", base, 1),
        (torch.Tensor, "copy_", base, 9),
        (torch.Tensor, "clone", base, 9),
        (torch.Tensor, "copy_", untied_and_merged, 9),
        (CoToLoRALinear, "_merged_weight", untied_and_merged, 1),
        (CoToLoRALinear, "__setattr__", untied_and_merged, 1),
        (SURGERY, "replace_module", base, 1),
        (SURGERY, "block_fast_path", base, 1),
    ],
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_failure_at_any_step_of_a_partial_load_changes_nothing(owner, step, make, least, after, partial, monkeypatch):
    model = make(Tied) if make is base else make()
    before = picture(model)
    for at in itertools.count(1):
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, Fails(getattr(owner, step), at, RuntimeError("no memory"), after))
            try:
                result = load_adapter(model, partial, strict=False)
                break
            except RuntimeError as error:
                if str(error) != "no memory":
                    raise
        assert picture(model) == before, at
    assert at > least
    assert result == (["last.lora_A.weight", "last.lora_B.weight"], ["nowhere.lora_A.weight"])
    stored = load_file(partial / WEIGHTS)
    assert torch.equal(model.fc._base_weight(), torch.ones(4, 4))
    assert torch.equal(model.embed.weight, stored[f"{PREFIX}embed.weight"])
    assert torch.equal(model.norm.running_var, stored[f"{PREFIX}norm.running_var"])
    assert not torch.equal(model.head.weight, model.embed.weight)


@pytest.mark.parametrize(
    ("place", "view"),
    [
        ("fc.weight", lambda: torch.zeros(1).expand(4, 4)),
        ("fc.weight", lambda: torch.zeros(7).as_strided((4, 4), (1, 1))),
        ("norm.running_mean", lambda: torch.zeros(1).expand(4)),
    ],
)
def test_tensors_with_overlapping_memory_are_refused(place, view, partial):
    model = base(Tied)
    module, _, key = place.rpartition(".")
    owner = model.get_submodule(module)
    setattr(owner, key, nn.Parameter(view()) if key == "weight" else view())
    key = place if module != "fc" else "fc.base_layer.weight"
    with refused(model, rf"^{key} must be a tensor of the model that can be written; it is expanded"):
        load_adapter(model, partial, strict=False)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64], ids=str)
def test_loading_keeps_the_dtype_of_the_model(dtype, partial):
    model = base(Tied)
    model.norm.to(dtype)
    model.fc.weight = nn.Parameter(model.fc.weight.to(dtype), requires_grad=False)
    load_adapter(model, partial, strict=False)
    stored = load_file(partial / WEIGHTS)
    for tensor, key in ((model.norm.weight, "norm.weight"), (model.fc._base_weight(), "fc.base_layer.weight")):
        assert tensor.dtype == dtype
        assert torch.equal(tensor.float(), stored[PREFIX + key].to(dtype).float())
