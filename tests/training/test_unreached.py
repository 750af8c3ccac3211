"""No mask makes a step fail, even if the loss does not depend on any adapter that is on."""

import copy
import dataclasses
import io
import logging
from ast import literal_eval
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook

from cotolora import CoTo, CoToLoRALinear, adapter_parameters, adapters, eject, inject, set_backend, weights
from cotolora.hooks import HOOKS
from cotolora.training import unreached
from tests.support.training import graph_nodes

WIDTH, BLOCKS, STEPS = 6, 4, 40
Pair = namedtuple("Pair", "hidden pooled")


class Strange:
    """An output that is not a container: it has a slot beside its __dict__, and refers to itself."""

    __slots__ = ("__dict__", "slotted")

    def __init__(self, hidden, pooled):
        self.hidden, self.slotted, self.itself = hidden, pooled, self

    def __copy__(self):
        raise TypeError("only one of these")


class Ordered(OrderedDict):
    """An output whose base class is implemented in C."""


class Entries(dict):
    """A dict that also has attributes, like easydict."""

    def __init__(self, hidden, pooled):
        super().__init__(hidden=hidden, pooled=[pooled])
        self.hidden = hidden


class Several(tuple):
    """A tuple subclass that is not a namedtuple."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    hidden: torch.Tensor
    pooled: torch.Tensor


class Encoder(nn.Module):
    """Blocks and a pooler; `form` makes the output from the two results, `drop` gives the blocks that a step skips."""

    def __init__(self, form=lambda hidden, pooled: (hidden, pooled), drop=lambda step: ()):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS))
        self.pooler = nn.Linear(WIDTH, WIDTH)
        self.form, self.drop, self.step = form, drop, 0

    def forward(self, x):
        dropped = self.drop(self.step)
        self.step += 1
        for i, layer in enumerate(self.layers):
            if i not in dropped:
                x = x + layer(x)
        return self.form(x, self.pooler(x))


class Towers(nn.Module):
    """Two encoders, of which each step calls one; the model itself is never called."""

    def __init__(self):
        super().__init__()
        self.text, self.image = Encoder(lambda hidden, pooled: pooled), Encoder(lambda hidden, pooled: pooled)


class Plain(nn.Module):
    """A container of linears; neither it nor its submodules are called."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Module()
        self.parts.layers = nn.ModuleList(nn.Module() for _ in range(BLOCKS))
        for layer in self.parts.layers:
            layer.up, layer.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.parts.head = nn.Linear(WIDTH, WIDTH)


def tried_twice(module, x):
    with pytest.raises(ValueError, match="x must be"):
        module(x[:, :-1])
    return module(x)


class Experts(nn.Module):
    """A mixture of experts in which all samples of a step go to the same expert."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS))
        self.step = 0

    def forward(self, x):
        self.step += 1
        return self.experts[self.step % BLOCKS](x)


def hidden_states(hidden, pooled):
    return {"states": [hidden, {"last": hidden, "tokens": torch.ones(2, dtype=torch.int64)}], "text": "text"}


# a model and its loss at a step
CASES = {
    "tuple": (Encoder, lambda model, x, step: model(x)[0].square().mean()),
    "namedtuple": (lambda: Encoder(Pair), lambda model, x, step: model(x).hidden.square().mean()),
    "dataclass": (lambda: Encoder(Outputs), lambda model, x, step: model(x).hidden.square().mean()),
    "dataclass-in-a-tuple": (
        lambda: Encoder(lambda hidden, pooled: (Outputs(Outputs(hidden, None), pooled), torch.ones(2))),
        lambda model, x, step: model(x)[0].hidden.hidden.square().mean(),
    ),
    "object": (
        lambda: Encoder(lambda hidden, pooled: Strange({"all": [hidden]}, pooled)),
        lambda model, x, step: model(x).itself.hidden["all"][0].square().mean(),
    ),
    "slots": (
        lambda: Encoder(lambda hidden, pooled: (3, Strange(None, hidden))),
        lambda model, x, step: model(x)[1].slotted.square().mean(),
    ),
    "entries-and-attributes": (
        lambda: Encoder(Entries),
        lambda model, x, step: (model(x)["hidden"] if step % 2 else model(x).hidden).square().mean(),
    ),
    "subclass-of-an-ordered-dict": (
        lambda: Encoder(lambda hidden, pooled: Ordered(pooled=pooled, hidden=[hidden])),
        lambda model, x, step: model(x)["hidden"][0].square().mean(),
    ),
    "subclass-of-tuple": (
        lambda: Encoder(lambda hidden, pooled: Several([torch.tensor(3), hidden])),
        lambda model, x, step: model(x)[1].square().mean(),
    ),
    "distribution": (
        lambda: Encoder(lambda hidden, pooled: torch.distributions.Normal(hidden, 1.0)),
        lambda model, x, step: model(x).log_prob(x).mean(),
    ),
    "nested": (lambda: Encoder(hidden_states), lambda model, x, step: model(x)["states"][1]["last"].square().mean()),
    "loss": (
        lambda: Encoder(lambda hidden, pooled: {"loss": hidden.square().mean(), "pooled": pooled}),
        lambda model, x, step: model(x)["loss"],
    ),
    "loss-divided-in-place": (
        lambda: Encoder(lambda hidden, pooled: hidden.square().mean()),
        lambda model, x, step: model(x).div_(3),
    ),
    "pooler-every-other-step": (Encoder, lambda model, x, step: model(x)[step % 2].square().mean()),
    "layer-drop": (
        lambda: Encoder(lambda hidden, pooled: hidden, lambda step: (step % BLOCKS, (step + 1) % BLOCKS)),
        lambda model, x, step: model(x).square().mean(),
    ),
    "every-layer-dropped-at-times": (
        lambda: Encoder(lambda hidden, pooled: hidden, lambda step: range(BLOCKS) if step % 3 == 0 else ()),
        lambda model, x, step: model(x).square().mean(),
    ),
    "towers": (Towers, lambda model, x, step: (model.text if step % 2 else model.image)(x).square().mean()),
    "tower-in-a-dict": (
        lambda: nn.ModuleDict({"text": Encoder(), "image": Encoder()}),
        lambda model, x, step: model["text" if step % 2 else "image"](x)[0].square().mean(),
    ),
    "blocks-past-every-forward": (
        Encoder,
        lambda model, x, step: nn.Sequential(*model.layers[step % BLOCKS :])(x).square().mean(),
    ),
    "linears-past-every-forward": (
        lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)),
        lambda model, x, step: (model[0](x) if step % 3 else model[2](model[1](model[0](x)))).square().mean(),
    ),
    "a-projection-of-what-is-cached": (
        lambda: nn.ModuleDict({"text": Encoder(), "projection": nn.Linear(WIDTH, WIDTH)}),
        lambda model, x, step: model["projection"](x).square().mean(),
    ),
    "linears-of-modules-without-a-forward": (
        Plain,
        lambda model, x, step: (
            (model.parts.head(x) if step % 2 else model.parts.layers[0].down(model.parts.layers[0].up(x)))
            .square()
            .mean()
        ),
    ),
    "a-part-raised": (Towers, lambda model, x, step: tried_twice(model.text, x).square().mean()),
    "experts": (Experts, lambda model, x, step: model(x).square().mean()),
    "a-head-outside": (
        lambda: nn.ModuleDict({"body": Encoder(), "head": nn.Linear(WIDTH, 1)}),
        lambda model, x, step: model["body"](x)[0].mean() + 0 * model["head"](x).sum().detach(),
    ),
    "two-forwards": (Encoder, lambda model, x, step: (model(x)[0] - model(2 * x)[0]).square().mean()),
}


def with_adapters(make):
    torch.manual_seed(0)
    model = make()
    for layer in inject(model, rank=2).values():
        nn.init.normal_(layer.lora_b)
    return model.train()


def kept(optimizer, layer):
    """Everything that a step could change for an adapter."""
    values = []
    for p in (layer.lora_a, layer.lora_b):
        state = optimizer.state.get(p, {})
        values += [p.detach().clone(), *(torch.as_tensor(state[key]).clone() for key in sorted(state))]
    return values


def same(old, new):
    return len(old) == len(new) and all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize(
    ("how", "options"),
    [
        *[(how, {}) for how in ("plain", "zeroed", "scaled", "unattached", "device")],
        ("plain", {"unit": "module", "tilt": 0.5}),
        ("scaled", {"at_least_one": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_no_mask_makes_a_step_fail_and_off_adapters_are_unchanged(case, how, options):
    make, loss_of = CASES[case]
    model = with_adapters(make)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.01, weight_decay=0.1)
    gates = "device" if how == "device" else "host"
    coto = CoTo(model, 4 * STEPS, seed=3, initial_p=0.02, gates=gates, **options)
    if how != "unattached":
        coto.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=how == "scaled")
    layers, learned = adapters(model), set()
    for step in range(STEPS):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = loss_of(model, x, step)
        if how == "device" and not loss.requires_grad:  # as with ordinary LoRA if no layer has been called
            continue
        scaler.scale(loss).backward()
        groups = zip(coto.groups.values(), coto.mask.tolist(), strict=True)
        on = {name for names, is_on in groups if is_on for name in names}
        before = {name: kept(optimizer, layer) for name, layer in layers.items()}
        nn.utils.clip_grad_norm_(adapter_parameters(model), 1.0)
        scaler.step(optimizer)
        scaler.update()
        moved = {name for name, layer in layers.items() if not same(before[name], kept(optimizer, layer))}
        assert moved <= on
        learned |= moved
        optimizer.zero_grad(set_to_none=how != "zeroed")
        coto.step()
    assert learned


@pytest.mark.parametrize("at_least_one", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_grad_scaler_steps_several_optimizers_for_any_mask(case, at_least_one):
    make, loss_of = CASES[case]
    model = with_adapters(make)
    layers = adapters(model)
    head = nn.Parameter(torch.ones(()))  # trained by an optimizer that is not attached, so that every loss has a graph
    optimizers = [torch.optim.AdamW(layer.adapter_parameters, lr=0.01) for layer in layers.values()]
    coto = CoTo(model, 4 * STEPS, seed=3, initial_p=0.02, at_least_one=at_least_one)
    for optimizer in optimizers:
        coto.attach(optimizer)
    optimizers.append(torch.optim.SGD([head]))
    scaler = torch.amp.GradScaler("cpu")
    for step in range(STEPS):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step)) * head
        scaler.scale(loss_of(model, x, step)).backward()
        groups = zip(coto.groups.values(), coto.mask.tolist(), strict=True)
        on = {name for names, is_on in groups if is_on for name in names}
        before = {name: kept(o, layers[name]) for name, o in zip(layers, optimizers, strict=False)}
        for name, optimizer in zip(layers, optimizers, strict=False):
            if name not in on:  # as with ordinary LoRA, the loss may not depend on an adapter that is on
                scaler.step(optimizer)
                assert same(before[name], kept(optimizer, layers[name]))
            optimizer.zero_grad()
        scaler.step(optimizers[-1])
        scaler.update()
        coto.step()


def test_no_mask_of_an_uncalled_part_makes_a_step_fail():
    model = with_adapters(
        lambda: Encoder(lambda hidden, pooled: hidden, lambda step: (step % BLOCKS, (step + 1) % BLOCKS))
    )
    optimizer = torch.optim.AdamW(adapter_parameters(model.layers), lr=0.01, weight_decay=0.1)
    coto = CoTo(model.layers, 4 * STEPS, seed=3, initial_p=0.02)
    coto.attach(optimizer)
    layers, learned = adapters(model.layers), set()
    for _ in range(STEPS):
        before = {name: kept(optimizer, layer) for name, layer in layers.items()}
        model(torch.randn(3, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        groups = zip(coto.groups.values(), coto.mask.tolist(), strict=True)
        moved = {name for name, layer in layers.items() if not same(before[name], kept(optimizer, layer))}
        assert moved <= {name for names, is_on in groups if is_on for name in names}
        learned |= moved
        coto.step()
    assert learned


def test_outputs_get_no_graph_unless_needed():
    """Metrics beside the loss, integers, and all outputs if all adapters are on or gradients are disabled."""

    def form(hidden, pooled):
        return {"loss": hidden.mean(), "accuracy": (hidden > 0).float().mean(), "labels": torch.ones(2).long()}

    model = with_adapters(lambda: Encoder(form))
    coto = CoTo(model, 10, initial_p=0.0, shape="constant", at_least_one=False)
    output = model(torch.randn(3, WIDTH))
    assert output["loss"].requires_grad
    assert not output["accuracy"].requires_grad
    assert output["accuracy"].numpy() >= 0
    with torch.no_grad():
        assert not model(torch.randn(3, WIDTH))["loss"].requires_grad
    with torch.inference_mode():
        model(torch.randn(3, WIDTH))
    for p in adapter_parameters(model):
        p.requires_grad_(False)
    assert not model(torch.randn(3, WIDTH))["loss"].requires_grad, "nothing is trained"
    coto.finish()
    model = with_adapters(lambda: Encoder(lambda hidden, pooled: (hidden.detach(), pooled)))
    CoTo(model, 10, initial_p=1.0)
    assert not model(torch.randn(3, WIDTH))[0].requires_grad, "detached by the model"


def test_backward_of_a_part_that_a_loop_calls_still_stops_below_the_lowest_active_adapter():
    """Only the outermost call joins the graph, not each part of the model inside it."""

    class WithHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = Encoder(lambda hidden, pooled: hidden), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.head(self.body(x))

    model = nn.ModuleDict({"inner": with_adapters(WithHead)})
    model["inner"].body.pooler.enabled = False
    coto = CoTo(model, 10, initial_p=0.0, shape="constant")
    seen = set()
    for step in range(30):
        coto.set_step(step)
        lowest = coto.mask.nonzero()[0].item()
        seen.add(lowest)
        nodes = [type(node).__name__ for node in graph_nodes(model["inner"](torch.randn(3, WIDTH)))]
        assert sum("Tanh" in node for node in nodes) == max(0, BLOCKS - lowest)
        assert not any("Join" in node for node in nodes)
    assert seen == {*range(BLOCKS), BLOCKS + 1}


def test_nothing_is_logged_for_a_forward_that_raised(caplog):
    model = with_adapters(Encoder)
    CoTo(model, 100, initial_p=0.0, shape="constant", at_least_one=False)
    with caplog.at_level(logging.INFO, logger="cotolora"):
        with pytest.raises(ValueError, match="x must be"):
            model(torch.randn(3, WIDTH + 1))
        assert caplog.messages == []
        model.register_forward_hook(lambda module, args, output: None)
    assert caplog.messages == []


@pytest.mark.parametrize("others", [(), (torch.tensor(3),)], ids=["alone", "beside-an-integer"])
def test_an_output_that_hides_its_tensors_is_logged_once(others, caplog):
    model = with_adapters(lambda: Encoder(lambda hidden, pooled: (iter([hidden]), *others)))
    CoTo(model, 100, initial_p=0.0, shape="constant", at_least_one=False)
    with caplog.at_level(logging.INFO, logger="cotolora"):
        for _ in range(2):
            model(torch.randn(3, WIDTH))
    assert ["output, a tuple: " in message for message in caplog.messages] == [True]


def test_a_trace_of_masks_can_be_saved():
    model = with_adapters(lambda: Encoder(lambda hidden, pooled: hidden))
    coto = CoTo(model, 100, initial_p=0.3, seed=1)
    for layer in adapters(model).values():
        coto.attach(torch.optim.AdamW(layer.adapter_parameters))
    x = torch.randn(3, WIDTH)
    with set_backend("reference"):
        traced = torch.jit.trace(model, x)
    torch.jit.save(traced, io.BytesIO())
    assert torch.equal(traced(x), model(x))


def test_forward_mode_passes_a_mask():
    model = with_adapters(lambda: Encoder(lambda hidden, pooled: hidden))
    CoTo(model, 100, initial_p=0.0, shape="constant", at_least_one=False)
    x, v = torch.randn(3, WIDTH, dtype=torch.float64), torch.randn(3, WIDTH, dtype=torch.float64)
    model.double()
    with forward_ad.dual_level(), set_backend("reference"):
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent
    _, expected = torch.func.jvp(model, (x,), (v,))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_raised_does_not_affect_the_next_step(error):
    model = with_adapters(Towers)
    coto = CoTo(model, 100, initial_p=0.0, shape="constant", at_least_one=False)

    def fail(*_):
        raise error("stop")

    handle = model.text.layers[1].register_forward_hook(fail)
    with pytest.raises(error):
        model.text(torch.randn(3, WIDTH))
    handle.remove()
    coto.step()
    model.text(torch.randn(3, WIDTH)).mean().backward()


def test_adapters_without_a_gradient_are_named_once(caplog):
    model = with_adapters(Encoder)
    optimizer = torch.optim.AdamW(adapter_parameters(model))
    coto = CoTo(model, 100)
    coto.attach(optimizer)
    with caplog.at_level(logging.INFO, logger="cotolora"):
        optimizer.step()  # before any backward
        assert not caplog.records
        for _ in range(100):
            model(torch.randn(3, WIDTH))[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            coto.step()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "had no gradient, so they do not learn: ['pooler'] (" in message


def test_nothing_is_logged_if_every_adapter_learns(caplog):
    model = with_adapters(lambda: Encoder(lambda hidden, pooled: pooled))
    optimizer = torch.optim.AdamW(adapter_parameters(model))
    coto = CoTo(model, 30)
    coto.attach(optimizer)
    with caplog.at_level(logging.INFO, logger="cotolora"):
        for _ in range(30):
            model(torch.randn(3, WIDTH)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            coto.step()
    assert not caplog.records


# without CoTo


class Bypassed(nn.Module):
    """Passes the weight of `read` to a functional, as WavLM, Swin and Mamba do."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.called(nn.functional.linear(x, self.read.weight, self.read.bias).tanh())


def steps(model, optimizer, count=3):
    for _ in range(count):
        model(torch.randn(3, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "cotolora"]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_any_optimizer_reports_a_bypassed_adapter_after_its_first_step(make, caplog):
    model = with_adapters(Bypassed)
    optimizer = make(adapter_parameters(model), lr=0.1)
    with caplog.at_level(logging.INFO, logger="cotolora"):
        optimizer.step()  # before any backward
        steps(
            with_adapters(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH))),
            torch.optim.SGD([nn.Parameter(torch.ones(1))]),
        )
        assert not messages(caplog)
        steps(model, optimizer, 1)
        (message,) = messages(caplog)
        steps(model, optimizer)
    assert "had no gradient, so they do not learn: ['read'] (" in message
    assert messages(caplog) == [message]
    assert model.called.lora_a.grad is None


def test_a_bypassed_adapter_is_reported_once_with_and_without_coto(caplog):
    for attached in (True, False):
        caplog.clear()
        model = with_adapters(lambda: nn.Sequential(*[Bypassed() for _ in range(3)]))
        optimizer = torch.optim.AdamW(adapter_parameters(model))
        coto = CoTo(model, 60, unit="module")
        if attached:
            coto.attach(optimizer)
        for _ in range(60):
            steps(model, optimizer, 1)
            coto.step()
        told = [name for message in messages(caplog) for name in literal_eval(message.split(": ")[1].split(" (")[0])]
        assert sorted(told) == ["0.read", "1.read", "2.read"]


def test_nothing_is_reported_for_adapters_that_are_not_trained(caplog):
    model = with_adapters(Bypassed)
    layers = adapters(model)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)
    layers["read"].enabled = False
    steps(model, optimizer)
    layers["read"].enabled = True
    layers["read"].eval()
    steps(model, optimizer)
    layers["read"].train()
    for parameter in layers["read"].adapter_parameters:
        parameter.requires_grad_(False)
    steps(model, optimizer)
    steps(model, torch.optim.SGD(layers["called"].adapter_parameters, lr=0.1))
    assert not messages(caplog)
    for parameter in layers["read"].adapter_parameters:
        parameter.requires_grad_()
    steps(model, optimizer)
    assert len(messages(caplog)) == 1


def test_a_bypassed_adapter_is_reported_with_a_closure_too(caplog):
    model = with_adapters(Bypassed)
    optimizer = torch.optim.SGD(adapter_parameters(model), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(3, WIDTH)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(messages(caplog)) == 1


def test_there_is_one_global_hook_and_later_hooks_still_run():
    """If a hook removed itself while torch iterates over the hooks, torch would raise an error."""
    unreached.unwatch(list(unreached._watched))  # models of other tests
    model = with_adapters(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    before, seen = len(_global_optimizer_post_hooks), []
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(1))
    steps(model, torch.optim.SGD(adapter_parameters(model), lr=0.1), 2)
    handle.remove()
    assert seen == [1, 1]
    assert not unreached._watched
    with_adapters(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    assert len(_global_optimizer_post_hooks) == before


# merging adapters that the model has not called


@pytest.fixture
def untraced(monkeypatch):
    """Resets the state to that of a process that has not traced any layer."""
    monkeypatch.setattr(weights, "_traced", False)


def bypassed():
    model = with_adapters(Bypassed).eval()
    model(torch.randn(3, WIDTH))
    return model


def test_merging_an_adapter_that_was_never_called_is_reported(untraced, caplog):
    model = bypassed()
    for merge in (eject, lambda model: [layer.merge() for layer in adapters(model).values()]):
        caplog.clear()
        merge(copy.deepcopy(model))
        (message,) = messages(caplog)
        assert message.startswith("merging changes the weights of ['read'], whose adapters no forward has called")
    caplog.clear()
    eject(model, merge=False)
    assert not messages(caplog)


def test_merging_layers_one_by_one_is_reported_once(untraced, caplog):
    model = with_adapters(lambda: nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)]))
    for layer in adapters(model).values():
        layer.merge()
    eject(model)
    assert len(messages(caplog)) == 1


def test_the_warnings_of_many_layers_are_of_bounded_length(untraced, caplog):
    names = [f"blocks.{i}.attention.query" for i in range(1000)]
    unreached.warn_of_unreached(names)
    weights.warn_of_uncalled(names)
    for message in messages(caplog):
        assert "['blocks.0.attention.query', 'blocks.1.attention.query', " in message
        assert " more]" in message
        assert len(message) < 2000
    assert len(messages(caplog)) == 2


@pytest.mark.parametrize("case", ["called", "off", "unmerged", "fresh", "disabled", "compiled", "alone"])
def test_merging_is_not_reported_if_outputs_stay_or_no_model_is_known(case, untraced, caplog):
    model = with_adapters(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    layer, x = model[0], torch.randn(3, WIDTH)
    if case == "called":
        model(x)
    elif case == "off":
        layer.gate = False
        model(x)
    elif case == "unmerged":
        model(x)
        layer.merge()
        layer.unmerge()
    elif case == "fresh":
        nn.init.zeros_(layer.lora_b)
    elif case == "disabled":
        layer.enabled = False
    elif case == "compiled":
        torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.compiler.reset()
    else:
        CoToLoRALinear.from_linear(nn.Linear(WIDTH, WIDTH), variant="hira").merge()
        nn.init.normal_((layer := CoToLoRALinear(WIDTH, WIDTH)).lora_b)
        layer.merge()
        model(x)
    copy.deepcopy(model)[0].merge()
    eject(model)
    assert not messages(caplog)


def test_a_call_leaves_no_hook_and_no_saved_state():
    model = with_adapters(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    keys = set(model.state_dict())
    assert not any(getattr(model[0], name) for name in HOOKS)
    model(torch.randn(3, WIDTH))
    assert set(model.state_dict()) == keys
    assert not any(getattr(model[0], name) for name in HOOKS)


# models and layers of other libraries


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "pefts"])
@pytest.mark.parametrize("kind", ["bert-pooler", "wav2vec2-layer-drop", "clip-text-alone"])
def test_transformers_models(kind, ours, tf, peft):
    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    tokens = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    if kind == "bert-pooler":
        model = tf.BertModel(tf.BertConfig(vocab_size=64, **small))
        loss = lambda model: model(tokens).last_hidden_state.mean(1).square().mean()  # noqa: E731
    elif kind == "wav2vec2-layer-drop":
        sizes = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "mask_time_prob": 0.0}
        more = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.7}
        model = tf.Wav2Vec2Model(tf.Wav2Vec2Config(**small, **sizes, **more))
        loss = lambda model: model(torch.ones(1, 400)).last_hidden_state.square().mean()  # noqa: E731
    else:
        text = {"vocab_size": 64, "max_position_embeddings": 16, **small}
        image = {"image_size": 16, "patch_size": 8, **small}
        model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=image, projection_dim=8))
        loss = lambda model: model.text_model(tokens).last_hidden_state.square().mean()  # noqa: E731
    if ours:
        inject(model, rank=2)
        whole = model
    else:
        whole = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    trained = [p for p in whole.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    coto = CoTo(whole.train(), 400, initial_p=0.0, seed=1)
    coto.attach(optimizer)
    for _ in range(30):
        loss(model).backward()
        before = {p: p.detach().clone() for p in trained}
        off = {p: name for name, s in coto._layers.items() if s.masked for p in s.adapter_parameters}
        optimizer.step()
        assert not [name for p, name in off.items() if not torch.equal(p, before[p])]
        optimizer.zero_grad()
        coto.step()
