"""Games with known values, identities of all games, and many coalitions per forward pass."""

import copy
import itertools
import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from cotolora import CoTo, adapter_mask, adapters, inject
from cotolora.pruning import best, prune
from cotolora.shapley import METHODS, PerSample, shapley_values

SAMPLERS = ("permutation", "multilinear")


def players(n):
    """A model with n adapters, which are the players of a game."""
    model = nn.Sequential(*(nn.Linear(1, 1, device="meta") for _ in range(n)))
    inject(model, rank=1)
    return model


def game(worth):
    """A score function: `worth` of the set of players that are on."""
    return lambda model: worth(frozenset(i for i, layer in enumerate(model) if layer.enabled))


GLOVES = game(lambda on: float(2 in on and len(on) > 1))
WEIGHTS = torch.randn(2**6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
ANY = game(lambda on: WEIGHTS[sum(1 << i for i in on)].item())


def by_definition(worth, n):
    """Values as the mean over all n! orders."""
    values = torch.zeros(n, dtype=torch.float64)
    for order in itertools.permutations(range(n)):
        for i, player in enumerate(order):
            values[player] += worth(frozenset(order[: i + 1])) - worth(frozenset(order[:i]))
    return values / math.factorial(n)


# games with known values


def test_exact_values():
    gloves = shapley_values(players(3), GLOVES, method="exact")
    torch.testing.assert_close(gloves.values, torch.tensor([1 / 6, 1 / 6, 2 / 3], dtype=torch.float64))
    assert gloves.errors.tolist() == [0, 0, 0]
    assert gloves.evaluations == 8
    assert gloves.groups == {"0": ["0"], "1": ["1"], "2": ["2"]}
    values = shapley_values(players(6), ANY, method="exact").values
    torch.testing.assert_close(values, by_definition(lambda on: WEIGHTS[sum(1 << i for i in on)].item(), 6))


@pytest.mark.parametrize("method", METHODS)
def test_an_additive_game_is_exact_by_every_method(method):
    worths = torch.tensor([2.0, -1.0, 0.0, 0.5], dtype=torch.float64)
    result = shapley_values(players(4), game(lambda on: 3 + sum(worths[i] for i in on)), method=method, samples=4)
    torch.testing.assert_close(result.values, worths)
    torch.testing.assert_close(result.errors, torch.zeros_like(worths))


@pytest.mark.parametrize("method", SAMPLERS)
@pytest.mark.parametrize(("score", "n"), [(GLOVES, 3), (ANY, 6)], ids=["gloves", "any"])
def test_samplers_are_within_four_errors_and_closer_with_more_samples(score, n, method):
    exact = shapley_values(players(n), score, method="exact").values
    few, many = (shapley_values(players(n), score, method=method, samples=s, seed=1) for s in (64, 1024))
    for result in (few, many):
        assert (result.errors > 0).all()
        assert ((result.values - exact).abs() <= 4 * result.errors).all()
    # 16 times the samples give a quarter of the error, which is known to about 15 %
    assert (many.errors < 0.4 * few.errors).all()


@pytest.mark.parametrize("method", SAMPLERS)
def test_standard_errors_are_the_spread_over_seeds(method):
    model = players(4)
    exact = shapley_values(model, ANY, method="exact").values
    runs = [shapley_values(model, ANY, method=method, samples=4, seed=seed) for seed in range(400)]
    values = torch.stack([run.values for run in runs])
    claimed = torch.stack([run.errors**2 for run in runs]).mean(0).sqrt()
    # with 400 runs the spread is known to 4 %, and so is the mean of the claimed errors (one or two pairs each)
    torch.testing.assert_close(values.std(0), claimed, rtol=0.2, atol=0)
    assert ((values.mean(0) - exact).abs() <= 4 * claimed / math.sqrt(400)).all()


@pytest.mark.parametrize("method", ["exact", "permutation"])
def test_values_add_up_to_all_minus_none(method):
    values = shapley_values(players(6), ANY, method=method, samples=4, seed=5).values
    assert values.sum().item() == pytest.approx((WEIGHTS[-1] - WEIGHTS[0]).item(), abs=1e-12)


def test_draws_are_stratified():
    """The gain rises with p: without strata the error would be 2 · 20 · sd(p) / √32 = 2.0, with strata it is 0.7."""
    result = shapley_values(players(20), game(lambda on: float(len(on) ** 2)), method="multilinear", samples=32)
    assert (result.errors < 1.2).all()
    assert ((result.values - 20).abs() <= 4 * result.errors).all()


def test_every_order_is_paired_with_its_reverse():
    """With two players these are all orders, so the mean is exact."""
    gloves = shapley_values(players(2), game(lambda on: float(len(on) == 2)), samples=4)
    assert (gloves.values.tolist(), gloves.errors.tolist()) == ([0.5, 0.5], [0, 0])


def test_a_useful_adapter_is_positive():
    values = shapley_values(players(2), game(lambda on: -1.0 if 0 in on else -2.0)).values
    assert values.tolist() == [1, 0]


# number of evaluations and random draws


@pytest.mark.parametrize(("method", "at_most"), [("exact", 64), ("permutation", 8 * 5 + 2), ("multilinear", 8 * 7)])
def test_no_coalition_is_scored_twice(method, at_most):
    seen = []

    def score(model):
        seen.append(tuple(layer.enabled for layer in model))
        return ANY(model)

    result = shapley_values(players(6), score, method=method, samples=8)
    assert len(set(seen)) == len(seen) == result.evaluations <= at_most


@pytest.mark.parametrize("method", SAMPLERS)
def test_results_depend_on_the_seed_and_no_random_state_changes(method):
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    one, again, other = (shapley_values(players(6), ANY, method=method, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one.values, again.values)
    assert torch.equal(one.errors, again.errors)
    assert not torch.equal(one.values, other.values)
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()


# players


@pytest.mark.parametrize("method", METHODS)
def test_one_player_and_no_player(method):
    one = shapley_values(players(1), game(lambda on: 5.0 + len(on)), method=method)
    assert (one.values.tolist(), one.errors.tolist(), one.evaluations) == ([1], [0], 2)
    model = players(2)
    with adapter_mask(model, False):
        none = shapley_values(model, game(len), method=method)
    assert none.values.shape == none.errors.shape == (0,)
    assert (none.evaluations, none.groups) == (0, {})


def test_pruned_adapters_do_not_play_and_stay_off():
    model = players(5)
    with prune(model, ["0", "2", "4"]):
        result = shapley_values(model, game(lambda on: sum(on) + 100.0 * (1 in on)), method="exact")
    assert result.values.tolist() == [0, 2, 4]
    assert list(result.groups) == ["0", "2", "4"]
    with prune(model, best(result, 2)):
        assert [layer.enabled for layer in model] == [False, False, True, False, True]


def test_a_group_is_one_player():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({k: nn.Linear(1, 1) for k in "qv"}) for _ in "ab")})
    inject(model, rank=1)

    def score(model):
        on = {name for name, layer in adapters(model).items() if layer.enabled}
        return float(len(on)) + 10 * ({"blocks.1.q", "blocks.1.v"} <= on)

    layers = shapley_values(model, score, method="exact")
    assert layers.groups == {f"blocks.{i}": [f"blocks.{i}.q", f"blocks.{i}.v"] for i in range(2)}
    assert layers.values.tolist() == pytest.approx([2, 12])
    assert shapley_values(model, score, method="exact", unit="module").values.tolist() == pytest.approx([1, 1, 6, 6])
    projections = shapley_values(model, score, method="exact", unit=lambda name: name[-1])
    assert projections.groups == {k: [f"blocks.0.{k}", f"blocks.1.{k}"] for k in "qv"}
    assert projections.values.tolist() == pytest.approx([7, 7])


# the model afterwards


class Net(nn.Module):
    """Residual blocks over ``[batch, 5, 4]`` with dropout, which is drawn only in training mode."""

    def __init__(self, depth=4, output=lambda y: y):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(depth))
        self.dropout, self.output = nn.Dropout(0.5), output

    def forward(self, x, shift=None, *, times=1):
        x = x if shift is None else x + shift[:, None]
        for block in self.blocks:
            x = x + block["v"](self.dropout(block["q"](x)).tanh())
        return self.output(times * x)


def adapted(**options):
    torch.manual_seed(0)
    model = Net(**options).double()
    inject(model, rank=2)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_b.normal_(std=0.3)
    return model.eval()


X = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SHIFT = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_modes_switches_and_gates_are_restored_and_have_no_effect():
    model = adapted()
    expected = shapley_values(model, lambda m: m(X).square().mean(), samples=4)
    model.train()
    model.blocks[1].eval()
    CoTo(model, 10, initial_p=0.0)
    layers = adapters(model)
    layers["blocks.0.q"].enabled = switch = torch.tensor(True)
    modes, gates = [m.training for m in model.modules()], [layer.gate for layer in layers.values()]
    for score in (lambda m: m(X).square().mean(), PerSample(X, lambda y: y.square().mean())):
        result = shapley_values(model, score, samples=4)
        torch.testing.assert_close(result.values, expected.values)
        assert [m.training for m in model.modules()] == modes
        assert [layer.gate for layer in layers.values()] == gates
        assert layers["blocks.0.q"].enabled is switch
        assert all(layer.enabled is True for name, layer in layers.items() if name != "blocks.0.q")


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_score_that_raises_leaves_the_model_unchanged(per_sample):
    model = adapted().train()

    def fail(_):
        if len(calls) == 5:
            raise KeyError("five")
        return float(len(calls.append(0) or calls))

    calls = []
    with pytest.raises(KeyError, match="five"):
        shapley_values(model, PerSample(X, fail) if per_sample else fail)
    assert all(layer.enabled is True for layer in adapters(model).values())
    assert all(module.training for module in model.modules())


def test_no_autograd_graph_is_recorded():
    score = lambda m: m(X).requires_grad + 0.0  # noqa: E731
    assert shapley_values(adapted(), score, samples=4).values.tolist() == [0] * 4
    assert shapley_values(adapted(), PerSample(X, lambda y: float(y.requires_grad)), samples=4).values.any().item() == 0


# many coalitions per forward pass


@pytest.mark.parametrize("unit", ["layer", "module"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 4, 6, 13, 18, 1024])
def test_many_coalitions_per_forward_give_the_same_values_as_one(batch, method, unit):
    model = adapted(depth=3)
    options = {"method": method, "samples": 6, "unit": unit}
    one = shapley_values(model, lambda m: m(X).square().mean() + m(X)[0, 0, 0], **options)
    rows = []
    handle = model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    many = shapley_values(model, PerSample(X, lambda y: y.square().mean() + y[0, 0, 0], batch=batch), **options)
    handle.remove()
    torch.testing.assert_close(many.values, one.values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(many.errors, one.errors, rtol=1e-9, atol=1e-12)
    assert many.evaluations == one.evaluations
    assert max(rows) <= batch
    assert sum(rows) == 6 * one.evaluations
    assert len(rows) == (
        math.ceil(one.evaluations / (batch // 6)) if batch >= 6 else one.evaluations * math.ceil(6 / batch)
    )


INPUTS = {
    "tensor": (X, lambda m: m(X)),
    "tuple": ((X, SHIFT), lambda m: m(X, SHIFT)),
    "dict": ({"x": X, "shift": SHIFT, "times": 3}, lambda m: m(x=X, shift=SHIFT, times=3)),
}
OUTPUTS = {
    "tensor": (lambda y: y, lambda y: y.mean()),
    "tuple": (lambda y: (y, None, y.sum((1, 2))), lambda out: out[0].mean() + out[2].max()),
    "dict": (lambda y: {"logits": y, "kind": "net"}, lambda out: out["logits"].max()),
}


@pytest.mark.parametrize("batch", [4, 24])
@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_inputs_and_outputs_of_any_form(inputs, outputs, batch):
    given, call = INPUTS[inputs]
    output, fn = OUTPUTS[outputs]
    model = adapted(output=output)
    one = shapley_values(model, lambda m: fn(call(m)), method="exact")
    many = shapley_values(model, PerSample(given, fn, batch=batch), method="exact")
    torch.testing.assert_close(many.values, one.values, rtol=1e-9, atol=1e-12)


def test_transformers_outputs_and_masks():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double()
    for layer in inject(model, ["q_proj", "v_proj"], rank=2).values():
        nn.init.normal_(layer.lora_b)
    tokens = torch.randint(0, 11, (3, 5))
    inputs = {"input_ids": tokens, "attention_mask": (torch.arange(5) < torch.tensor([[5], [3], [4]])).long()}
    fn = lambda out: out.logits.log_softmax(-1)[:, 2, 1].mean()  # noqa: E731
    one = shapley_values(model, lambda m: fn(m(**inputs)), method="exact", unit="module")
    many = shapley_values(model, PerSample(inputs, fn, batch=12), method="exact", unit="module")
    torch.testing.assert_close(many.values, one.values, rtol=1e-9, atol=1e-12)
    assert one.values.abs().min() > 0


# errors


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(torch.nan), np.float32("nan")])
def test_a_score_that_is_not_finite_names_the_coalition(value):
    score = game(lambda on: value if on == {0, 2} else 0.0)
    with pytest.raises(ValueError, match=r"score must be a finite number; .* \['0', '2'\] active of \['0', '1', '2'\]"):
        shapley_values(players(3), score)


@pytest.mark.parametrize("value", ["1.0", None, torch.zeros(2), [1.0], 1j], ids=repr)
def test_a_score_that_is_no_number(value):
    with pytest.raises(TypeError, match="score must return a number; got"):
        shapley_values(players(3), lambda model: value)


@pytest.mark.parametrize("value", [torch.tensor(2.0), np.float64(2.0), 2, True, torch.ones(1, 1)], ids=repr)
def test_scores_of_any_numeric_type(value):
    assert shapley_values(players(2), game(lambda on: value if on else 0)).values.sum() == float(value)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "monte-carlo"}, ValueError, "method must be one of .* got 'monte-carlo'"),
        ({"samples": 3}, ValueError, "samples must be an even number of at least 4.* got 3"),
        ({"samples": 2}, ValueError, "got 2"),
        ({"samples": 8.0}, ValueError, "got 8.0"),
        ({"seed": -1}, ValueError, "seed must be an integer in"),
        ({"seed": 2**64}, ValueError, "seed must be an integer in"),
        ({"unit": "block"}, ValueError, "unit must be"),
        ({"score": 3}, TypeError, "score must be a callable of the model or a PerSample; got int"),
    ],
    ids=repr,
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        shapley_values(**{"model": players(2), "score": ANY, **options})


def test_exact_states_the_cost_of_too_many_players():
    with pytest.raises(ValueError, match=r"2\^21 = 2097152 evaluations .* more than 20 players"):
        shapley_values(players(21), ANY, method="exact")


def test_unsuitable_models_are_refused():
    with pytest.raises(ValueError, match="Linear has none"):
        shapley_values(nn.Linear(2, 2), ANY)
    model = adapted()
    adapters(model)["blocks.1.q"].enabled = torch.ones(6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"got row masks on \['blocks.1.q'\]"):
        shapley_values(model, ANY)
    adapters(model)["blocks.1.q"].enabled = True
    adapters(model)["blocks.2.q"].merge()
    with pytest.raises(ValueError, match=r"merged: \['blocks.2.q'\]"):
        shapley_values(model, ANY)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_nested_inputs_cannot_be_repeated():
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=layout)
        with pytest.raises(TypeError, match="inputs must hold dense tensors; got a nested one"):
            PerSample((x,), len)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([X], len), TypeError, "inputs must be a tensor, or a tuple or dict with tensors; got list"),
        (((1, None), len), TypeError, "got tuple"),
        ((X[:0], len), ValueError, r"inputs must be \[samples, ...\], of equal length; got \[\(0, 5, 4\)\]"),
        (((X, SHIFT[:5]), len), ValueError, r"\(6, 5, 4\), \(5, 4\)"),
        ((torch.tensor(1.0), len), ValueError, r"got \[\(\)\]"),
        ((X, 3), TypeError, "fn must be a callable of the model's output; got int"),
        ((X, len, 0), ValueError, "batch must be a positive integer; got 0"),
        ((X, len, 2.0), ValueError, "got 2.0"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_bad_inputs(arguments, error, match):
    with pytest.raises(error, match=match):
        PerSample(*arguments)


@pytest.mark.parametrize(
    "output", [lambda y: y.mean(), lambda y: y.transpose(0, 1), lambda y: "text"], ids=["loss", "transposed", "text"]
)
def test_outputs_without_a_sample_dimension_are_refused(output):
    model = adapted(output=output)
    with pytest.raises(ValueError, match=r"model must return tensors \[samples, ...\].*24 samples in one forward"):
        shapley_values(model, PerSample(X, float, batch=24), method="exact")
    assert all(layer.enabled is True for layer in adapters(model).values())


def test_progress_is_shown_only_on_a_terminal_and_only_if_it_takes_long(capsys, monkeypatch):
    hour = itertools.count(step=3600)
    for terminal, now, shown in [(False, hour, False), (True, itertools.repeat(0), False), (True, hour, True)]:
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr("tqdm.std.time", lambda now=now: float(next(now)))
        shapley_values(players(3), GLOVES)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("Shapley values" in err) is shown


def test_a_wrapped_model_and_copies():
    model = adapted()
    score = PerSample(X, lambda y: y.square().mean())
    expected = shapley_values(model, score).values
    assert torch.equal(shapley_values(torch.compile(model, backend="eager"), score).values, expected)
    assert torch.equal(shapley_values(copy.deepcopy(model), score).values, expected)
