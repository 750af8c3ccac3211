"""CoTo in Lightning: masks and weights equal those of a plain loop."""

import copy

import pytest
import torch
from torch import nn

import cotolora
from cotolora import CoTo, sample_mask

lightning = pytest.importorskip("lightning.pytorch")
from cotolora.integrations.lightning import CoToLightningCallback  # noqa: E402

STEPS, BATCH, WIDTH = 6, 4, 8
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on data loaders and on future versions


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Task(lightning.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        cotolora.inject(self, "all-linear", rank=2)
        self.seen, self.validated = [], []

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.global_step, tuple(x.active is not False for x in adapters(self))))
        return self(*batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated += [x.active is not False for x in adapters(self)]

    def configure_optimizers(self):
        return torch.optim.AdamW(cotolora.adapter_parameters(self), lr=1e-2)


def adapters(model):
    return cotolora.adapters(model).values()


def loader(count=64):
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=BATCH)


def trainer_of(path, ours, **settings):
    defaults = {
        "max_steps": STEPS, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": path,
    }  # fmt: skip
    return lightning.Trainer(callbacks=[ours], **defaults | settings)


def weights(model):
    return [t.detach().clone() for layer in adapters(model) for t in (layer.lora_a, layer.lora_b)]


def plain_loop(model, *, seed=0, accumulate=1):
    optimizer = model.configure_optimizers()
    coto = CoTo(model, STEPS, seed=seed)
    coto.attach(optimizer)
    data = iter(loader())
    for _ in range(STEPS):
        for _ in range(accumulate):
            (model(*next(data)).square().mean() / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        coto.step()
    return weights(model)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("gates", ["host", "device"])
def test_masks_and_weights_equal_a_plain_loops(gates, accumulate, tmp_path):
    model = Task()
    expected = plain_loop(copy.deepcopy(model), seed=3, accumulate=accumulate)
    ours = CoToLightningCallback(cotolora.Schedule(seed=3), gates=gates)
    trainer_of(tmp_path, ours, accumulate_grad_batches=accumulate).fit(model, loader())
    assert [step for step, _ in model.seen] == [step for step in range(STEPS) for _ in range(accumulate)]
    if gates == "host":
        for step, on in model.seen:
            mask = sample_mask(4, cotolora.activation_probability(step, STEPS), seed=3, step=step)
            assert on == tuple(mask.tolist())
    for weight, wanted in zip(weights(model), expected, strict=True):
        assert torch.equal(weight, wanted) if gates == "host" else torch.allclose(weight, wanted, rtol=1e-4, atol=1e-6)


def test_off_adapters_are_not_stepped_and_all_are_on_after_training(tmp_path):
    model = Task()
    ours = CoToLightningCallback(shape="constant", initial_p=0.3)
    trainer = trainer_of(tmp_path, ours)
    trainer.fit(model, loader())
    counts = [sum(on[i] for _, on in model.seen) for i in range(4)]
    assert len(set(counts)) > 1
    (optimizer,) = trainer.optimizers
    for layer, count in zip(adapters(model), counts, strict=True):
        assert optimizer.state.get(layer.lora_b, {"step": 0})["step"] == count
    assert not all(model.seen[-1][1])
    assert all(layer.gate is True for layer in adapters(model))


@pytest.mark.parametrize("call", ["the-module", "a-part-of-it"])
def test_an_adapter_that_the_loss_does_not_use_causes_no_error(call, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.pooler = nn.ModuleList(Block() for _ in range(4)), Block()

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x, self.pooler(x)

    class Pooled(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = Net()
            cotolora.inject(self, rank=2)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return (self if call == "the-module" else self.net)(*batch)[0].square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(cotolora.adapter_parameters(self), lr=1e-2)

    model = Pooled()
    ours = CoToLightningCallback(initial_p=0.0, seed=1)
    trainer = trainer_of(tmp_path, ours, max_steps=40, max_epochs=-1)
    trainer.fit(model, loader())
    masks = [ours.coto.schedule.mask(5, step, 40).tolist() for step in range(40)]
    assert [False] * 4 + [True] in masks
    (optimizer,) = trainer.optimizers
    *layers, pooler = adapters(model)
    for layer, on in zip(layers, zip(*masks, strict=True), strict=False):
        assert optimizer.state[layer.lora_b]["step"] == sum(on)
    assert pooler.lora_b not in optimizer.state


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, first, again = Task(), Task(), Task(seed=1)  # `again` must load everything from the checkpoint
    # always the same batch, because Lightning decides where in the data it resumes
    batch = next(iter(loader()))[0].repeat(16, 1)
    same = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batch), batch_size=BATCH)

    class Cut(CoToLightningCallback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")
                raise RuntimeError("power cut")

    trainer_of(tmp_path, CoToLightningCallback()).fit(whole, same)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer_of(tmp_path, Cut()).fit(first, same)
    trainer_of(tmp_path, CoToLightningCallback()).fit(again, same, ckpt_path=tmp_path / "cut.ckpt")
    assert first.seen + again.seen == whole.seen
    for weight, wanted in zip(weights(again), weights(whole), strict=True):
        assert torch.equal(weight, wanted)


@pytest.mark.parametrize(
    ("scheduling", "settings", "steps"),
    [  # epochs of 7 batches
        ({0: 1, 1: 4}, {"max_epochs": 3}, 7 + 2 + 2),
        ({0: 4, 2: 1}, {"max_epochs": 4}, 2 + 2 + 7 + 7),
        ({1: 3, 2: 8, 9: 1}, {"max_epochs": 3}, 7 + 3 + 1),
        ({0: 1, 1: 4}, {"max_epochs": 3, "max_steps": 8}, 8),
        ({0: 1, 1: 4}, {"max_epochs": 3, "max_steps": 100}, 7 + 2 + 2),
        ({0: 1, 1: 4}, {"max_epochs": -1, "max_steps": 10}, 10),
        ({0: 2, 1: 4}, {"max_epochs": 2, "limit_train_batches": 5}, 3 + 2),
        ({0: 2, 1: 4}, {"max_epochs": 2, "limit_train_batches": 0.5}, 2 + 1),
        (None, {"max_epochs": 3}, 21),
        (None, {"max_epochs": 3, "accumulate_grad_batches": 4}, 6),
        (None, {"max_epochs": 3, "limit_train_batches": 5, "accumulate_grad_batches": 2}, 9),
        (None, {"max_steps": 11}, 11),
    ],
)
def test_the_run_ends_with_the_schedule(scheduling, settings, steps, tmp_path):
    model, ours = Task(), CoToLightningCallback(ramp=1.0)
    trainer = trainer_of(tmp_path, ours, **{"max_steps": -1} | settings)
    if scheduling:
        trainer.callbacks.append(lightning.callbacks.GradientAccumulationScheduler(scheduling))
    trainer.fit(model, loader(7 * BATCH))
    assert trainer.global_step == ours.coto.total_steps == steps
    # in the last step p is still below 1; it would be 1 in the next
    assert model.seen[-1][0] == steps - 1
    assert ours.coto.schedule.probability(steps, ours.coto.total_steps) == 1


def test_weights_equal_a_plain_loops_while_accumulation_changes(tmp_path):
    model = Task()
    expected, step = copy.deepcopy(model), 0
    optimizer = expected.configure_optimizers()
    coto = CoTo(expected, 4 + 1 + 1)
    coto.attach(optimizer)
    for accumulate in (1, 4, 4):
        for i, batch in enumerate(loader(4 * BATCH), 1):
            (expected(*batch).square().mean() / accumulate).backward()
            if i % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                coto.step()
                step += 1
    assert step == coto.total_steps
    changing = lightning.callbacks.GradientAccumulationScheduler({0: 1, 1: 4})
    trainer = trainer_of(tmp_path, CoToLightningCallback(), max_steps=-1, max_epochs=3)
    trainer.callbacks.append(changing)
    trainer.fit(model, loader(4 * BATCH))
    for weight, wanted in zip(weights(model), weights(expected), strict=True):
        assert torch.equal(weight, wanted)


def test_a_resumed_run_equals_the_whole_one_while_accumulation_changes(tmp_path):
    scheduling = {0: 1, 1: 2, 2: 4}

    class Cut(lightning.Callback):
        def on_train_epoch_end(self, trainer, *_):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    runs = []
    for resume in (None, tmp_path / "cut.ckpt"):
        model, ours = Task(), CoToLightningCallback()
        trainer = trainer_of(tmp_path, ours, max_steps=-1, max_epochs=4)
        trainer.callbacks += [lightning.callbacks.GradientAccumulationScheduler(scheduling), Cut()]
        trainer.fit(model, loader(8 * BATCH), ckpt_path=resume)
        assert ours.coto.total_steps == trainer.global_step == 8 + 4 + 2 + 2
        runs.append(model)
    assert runs[0].seen[-8:] == runs[1].seen[-8:]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights(runs[0]), weights(runs[1]), strict=True))


class Normed(Task):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return self.norm(super().forward(x))


@pytest.mark.parametrize("scheduling", [None, {0: 1, 2: 4}])
def test_lightnings_swa_updates_batch_norm_with_every_adapter_on(scheduling, tmp_path):
    model, ours = Normed(), CoToLightningCallback(ramp=1.0)
    trainer = trainer_of(tmp_path, ours, max_steps=-1, max_epochs=4)
    trainer.callbacks.append(lightning.callbacks.StochasticWeightAveraging(swa_lrs=1e-2))
    if scheduling:
        trainer.callbacks.append(lightning.callbacks.GradientAccumulationScheduler(scheduling))
    trainer.fit(model, loader(4 * BATCH))
    steps = 4 + 4 + 1 + 1 if scheduling else 16
    assert ours.coto.total_steps == steps
    # a further epoch with the averaged weights, after which Lightning counts a step without gradients
    passes = [on for step, on in model.seen if step == steps]
    assert len(passes) >= 4
    assert all(all(on) for on in passes)


def test_lightnings_weight_averaging_averages_the_adapters(tmp_path):
    averaging = getattr(lightning.callbacks, "WeightAveraging", None)
    if averaging is None:
        pytest.skip("this Lightning has no WeightAveraging")

    class Note(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            taken.append(weights(module))

    model, ours, taken = Task(), CoToLightningCallback(), []
    trainer = trainer_of(tmp_path, ours, val_check_interval=2)
    trainer.callbacks += [averaging(), Note()]
    trainer.fit(model, loader(), loader(BATCH))
    assert ours.coto.total_steps == trainer.global_step == len(taken) == STEPS
    assert all(layer.gate is True for layer in adapters(model))
    assert not all(all(on) for _, on in model.seen)
    assert all(model.validated)
    for weight, steps in zip(weights(model), zip(*taken, strict=True), strict=True):
        torch.testing.assert_close(weight, torch.stack(steps).mean(0))
    trainer = trainer_of(tmp_path, CoToLightningCallback(gates="device"))
    trainer.callbacks.append(averaging())
    with pytest.raises(ValueError, match="gates must be 'host' with a WeightAveraging"):
        trainer.fit(Task(), loader())


def test_validation_in_the_middle_sees_every_adapter(tmp_path):
    model = Task()
    trainer_of(tmp_path, CoToLightningCallback(), val_check_interval=1, num_sanity_val_steps=1).fit(
        model, loader(), loader(BATCH)
    )
    assert model.validated
    assert all(model.validated)
    assert not all(all(on) for _, on in model.seen)


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="initial_p"):
        CoToLightningCallback(initial_p=2.0)
    with pytest.raises(ValueError, match="schedule must not be combined with seed"):
        CoToLightningCallback(cotolora.Schedule(), seed=0)
    with pytest.raises(ValueError, match="max_steps, or max_epochs"):
        trainer_of(tmp_path, CoToLightningCallback(), max_steps=-1, max_epochs=-1).fit(Task(), loader())


def test_epochs_of_unknown_length_are_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(loader().dataset)

    stream = torch.utils.data.DataLoader(Stream(), batch_size=BATCH)
    with pytest.raises(ValueError, match=r"a length.* got max_steps=-1, max_epochs=2 and inf batches"):
        trainer_of(tmp_path, CoToLightningCallback(), max_steps=-1, max_epochs=2).fit(Task(), stream)
    ours = CoToLightningCallback()
    trainer_of(tmp_path, ours, max_epochs=2).fit(Task(), stream)
    assert ours.coto.total_steps == STEPS
