"""A load that fails, wherever it fails, leaves the model as it was: modules, flags, and every byte."""

import importlib
import itertools

import pytest
import torch
from torch import nn

from cotolora import CoToLoRALinear, adapters, load_adapter, save_adapter
from cotolora.merging import AdapterState
from cotolora.variants import VARIANTS
from tests.support.saving import base, logits, picture, refused, trained, tuned

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
# what a load calls, and how often at least: writes, casts, copies, and the surgery of a plain model
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
    """A function or method that raises in its nth call, before it acts or after."""

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
def test_no_step_that_fails_changes_anything(step, model, error, after, directory, monkeypatch):
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
    model.token = expanded(4)  # among the last that are written
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
    with pytest.raises(ValueError, match="must be a tensor of the model that can be written; it was made in inference"):
        load_adapter(model, directory)
    assert dict(model.named_modules()) == modules
    for name, (identity, flag, value) in flags(model).items():
        assert (identity, flag) == before[name][:2]
        assert torch.equal(value, before[name][2])
    with torch.inference_mode():
        load_adapter(model, directory)
        assert torch.equal(logits(model), logits(tuned(base(), **OPTIONS)))
    assert trained(model) == trained(injected())


def test_a_failed_load_leaves_what_autograd_has_saved(directory, monkeypatch):
    model = injected()
    loss = model(torch.ones(5, 4)).square().sum()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", Fails(torch.Tensor.copy_, 12, RuntimeError("no memory"), False))
        with pytest.raises(RuntimeError, match="no memory"):
            load_adapter(model, directory)
    loss.backward()  # raises if a tensor that it needs was written to
    assert model.fc.lora_b.grad is not None


def test_a_state_without_a_disk_is_put_in_whole_or_not_at_all(directory):
    state, model = AdapterState.from_directory(directory), base()
    model.token = expanded(4)
    with refused(model, "token must be a tensor of the model that can be written"):
        state.load_into(model)
