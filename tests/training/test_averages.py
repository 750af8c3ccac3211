"""Moving averages (torch's and timm's) of a model that CoTo trains: the averages must have every adapter on."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

import cotolora
from cotolora import CoTo, adapter_parameters, adapters

WIDTH, BLOCKS, STEPS = 8, 4, 12
DECAY = 0.75


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.norm(self.linear(x)))


def make():
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    for layer in cotolora.inject(model, rank=2).values():
        nn.init.normal_(layer.lora_b)
    return model


def batch(step):
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(step))


def timms(name, **options):
    def make_average(model):
        if (package := importlib.util.find_spec("timm")) is None:
            pytest.skip("timm is not installed")
        # loads only this file, because the package imports torchvision, which may not fit the installed torch
        path = Path(package.submodule_search_locations[0], "utils", "model_ema.py")
        spec = importlib.util.spec_from_file_location("timm.utils.model_ema", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)(model, **options)

    return make_average


# how to make the average, and its update of (mean so far, number of values in it, new value)
AVERAGES = {
    "mean": (AveragedModel, lambda mean, n, new: mean + (new - mean) / (n + 1)),
    "mean-with-buffers": (
        lambda model: AveragedModel(model, use_buffers=True),
        lambda mean, n, new: mean + (new - mean) / (n + 1),
    ),
    "ema": (
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY)),
        lambda mean, n, new: mean.lerp(new, 1 - DECAY) if n else new,
    ),
    "ema-with-buffers": (
        lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY), use_buffers=True),
        lambda mean, n, new: mean.lerp(new, 1 - DECAY) if n else new,
    ),
    "timm-v2": (timms("ModelEmaV2", decay=DECAY), lambda mean, n, new: mean.lerp(new, 1 - DECAY)),
    "timm-v3": (timms("ModelEmaV3", decay=DECAY), lambda mean, n, new: mean.lerp(new, 1 - DECAY)),
}
GATES = ["host", "device"]


def train(model, coto, average=None, after=lambda: None):
    """Trains; returns the adapter weights after each step, and the masks."""
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.05, weight_decay=0.1)
    coto.attach(optimizer)
    weights, masks = [], []
    for step in range(STEPS):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        weights.append([p.detach().clone() for p in adapter_parameters(model)])
        masks.append([bool(layer.gate) for layer in adapters(model).values()])
        if average is not None:
            (getattr(average, "update_parameters", None) or average.update)(model)
            after()
        coto.step()
    return weights, masks


def all_on(average, weights):
    """A model with the weights and buffers of an average, without a CoTo run."""
    twin = make()
    twin.load_state_dict(average.module.state_dict())
    for p, weight in zip(adapter_parameters(twin), weights, strict=True):
        p.data.copy_(weight)
    return twin


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_holds_the_mean_of_the_adapters_and_has_them_all_on(kind, gates, tmp_path):
    make_average, mean_of = AVERAGES[kind]
    model = make()
    coto = CoTo(model, STEPS, seed=1, gates=gates)
    average = make_average(model)
    mean = [p.detach().clone() for p in adapter_parameters(model)]
    on = []
    weights, masks = train(
        model, coto, average, lambda: on.append([layer.gate for layer in adapters(average).values()])
    )
    for n, new in enumerate(weights):
        mean = [mean_of(old, n, w) for old, w in zip(mean, new, strict=True)]
    for p, wanted in zip(adapter_parameters(average), mean, strict=True):
        torch.testing.assert_close(p.detach(), wanted)
    # the average does not follow the model's masks
    assert on == [[True] * BLOCKS] * STEPS
    alone = make()
    other, masks_alone = train(alone, CoTo(alone, STEPS, seed=1, gates=gates))
    assert masks == masks_alone
    assert not all(map(all, masks))
    assert all(torch.equal(a, b) for a, b in zip(other[-1], weights[-1], strict=True))
    # evaluation and saving
    twin, x = all_on(average, [p.detach() for p in adapter_parameters(average)]), batch(99)
    assert torch.equal(average.eval()(x), twin.eval()(x))
    cotolora.save_adapter(average, tmp_path)
    loaded = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    cotolora.load_adapter(loaded, tmp_path)
    assert all(torch.equal(*pair) for pair in zip(adapter_parameters(loaded), adapter_parameters(twin), strict=True))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("kind", AVERAGES)
def test_batch_norm_is_updated_with_every_adapter_on(kind, gates):
    model = make()
    coto = CoTo(model, STEPS, seed=1, gates=gates)
    average = AVERAGES[kind][0](model)
    train(model, coto, average)
    twin = all_on(average, [p.detach() for p in adapter_parameters(average)])
    for one in (average, twin):
        update_bn([batch(100), batch(101)], one)
    assert not torch.equal(average.module[-1].norm.running_mean, model[-1].norm.running_mean)
    for (name, found), (_, wanted) in zip(norms(average.module), norms(twin), strict=True):
        assert torch.equal(found, wanted), name


def norms(model):
    return [(name, t) for name, t in model.state_dict().items() if "running" in name]


@pytest.mark.parametrize("gates", GATES)
def test_an_average_can_be_ejected_and_the_run_continues(gates):
    model = make()
    coto = CoTo(model, STEPS, seed=1, gates=gates)
    average = AveragedModel(model)
    train(model, coto, average)
    twin = copy.deepcopy(average).eval()
    merged = [layer.weight + layer.delta_weight() for layer in adapters(average).values()]
    cotolora.eject(average)
    assert not adapters(average)
    for block, weight in zip(average.module, merged, strict=True):
        assert torch.equal(block.linear.weight, weight)
    x = batch(99)
    torch.testing.assert_close(average.eval()(x), twin(x))
    coto.set_step(0)
    assert [bool(layer.gate) for layer in adapters(model).values()] == coto.mask.tolist()
    assert len(adapters(model)) == BLOCKS


@pytest.mark.parametrize("gates", GATES)
def test_swapping_weights_for_an_evaluation_changes_nothing(gates):
    """Swaps parameters and buffers, including device gates, as Lightning's WeightAveraging does."""

    def swap():
        pairs = [(model.parameters(), average.module.parameters()), (model.buffers(), average.module.buffers())]
        for ours, theirs in (pair for both in pairs for pair in zip(*both, strict=True)):
            kept = ours.detach().clone()
            ours.detach().copy_(theirs)
            theirs.detach().copy_(kept)

    def evaluate():
        swap()
        found = model.eval()(batch(99))
        swap()
        assert torch.equal(found, average.eval()(batch(99)))
        model.train()

    model, alone = make(), make()
    coto = CoTo(model, STEPS, seed=1, gates=gates)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY), use_buffers=True)
    found = train(model, coto, average, evaluate)
    wanted = train(alone, CoTo(alone, STEPS, seed=1, gates=gates))
    assert found[1] == wanted[1]
    assert all(torch.equal(*pair) for pair in zip(found[0][-1], wanted[0][-1], strict=True))


def test_an_average_that_is_trained_gets_its_own_gates():
    model = make()
    coto = CoTo(model, STEPS, seed=1, gates="device")
    average = AveragedModel(model)
    for gates in ("device", "host"):
        own = CoTo(average, STEPS, seed=2, gates=gates)
        assert [bool(layer.gate) for layer in adapters(average).values()] == own.mask.tolist()
        assert [bool(layer.gate) for layer in adapters(model).values()] == coto.mask.tolist()
        assert not own.mask.all()


def test_averages_of_peft_models_have_every_adapter_on_too():
    peft = pytest.importorskip("peft", reason="averages a PEFT model")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(*(Block() for _ in range(BLOCKS))),
        peft.LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False),
    )
    expected = copy.deepcopy(model).train()(batch(1))
    coto = CoTo(model, STEPS, seed=1)
    assert not coto.mask.all()
    average = AveragedModel(model)
    assert torch.equal(average.train()(batch(1)), expected)
    assert not torch.equal(model.train()(batch(1)), expected)
