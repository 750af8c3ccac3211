"""Curves and dropout stability on toy models with known results; the model is unchanged afterwards."""

import itertools
import math
import statistics

import pytest
import torch
from torch import nn

from cotolora import CoTo, adapter_mask, adapters, inject
from cotolora.connectivity import DropoutStability, InterpolationCurve, dropout_stability, interpolation_curve
from cotolora.merging import AdapterState, Factors


@pytest.fixture(autouse=True)
def rng_untouched():
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def scalar(a, b, **other_tensors):
    """The update a · b of a 1 x 1 linear."""
    return AdapterState({"0": Factors(torch.tensor([[float(a)]]), torch.tensor([[float(b)]]), 1.0)}, other_tensors)


def scalar_model():
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(1, 1, bias=False))
        inject(model, rank=2)
    nn.init.zeros_(model[0].weight)
    return model


def value(model):
    return model(torch.ones(1, 1)).item()


# factors λa + (1-λ)b on either side; by hand, from (-1, 1) at λ = 0 to (1, 3) at λ = 1: (2λ-1) (2λ+1) = 4λ² - 1
CURVES = {
    "factors": ((1, 3), (-1, 1), "factors", [-1.0, -0.75, 0.0, 1.25, 3.0], 1.0),
    "products": ((1, 3), (-1, 1), "products", [-1.0, 0.0, 1.0, 2.0, 3.0], 0.0),
    "opposite-signs": ((1, 1), (-1, -1), "factors", [1.0, 0.25, 0.0, 0.25, 1.0], 1.0),
    "better-between": ((1, 0), (0, 1), "factors", [0.0, 0.1875, 0.25, 0.1875, 0.0], 0.0),
}


@pytest.mark.parametrize("case", CURVES)
def test_a_curve_known_by_hand(case):
    state_a, state_b, of, scores, barrier = CURVES[case]
    curve = interpolation_curve(scalar_model(), scalar(*state_a), scalar(*state_b), value, points=5, of=of)
    assert curve.lambdas == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert curve.scores == pytest.approx(scores)
    assert curve.barrier == pytest.approx(barrier)


def test_a_curve_of_only_its_ends_has_no_barrier():
    curve = interpolation_curve(scalar_model(), scalar(1, 1), scalar(-1, -1), value, points=2)
    assert (curve.lambdas, curve.scores, curve.barrier) == ((0.0, 1.0), (1.0, 1.0), 0.0)
    with pytest.raises(AttributeError):
        curve.scores = ()
    assert len(interpolation_curve(scalar_model(), scalar(1, 1), scalar(1, 1), value).lambdas) == 11


def test_mappings_get_the_scale_of_the_model():
    model = scalar_model()  # rank 2, alpha 16
    one = {"0.lora_A.weight": torch.eye(2)[:, :1], "base_model.model.0.lora_B.weight": torch.tensor([[3.0, 0.0]])}
    curve = interpolation_curve(model, one, {key: 0 * tensor for key, tensor in one.items()}, value, points=2)
    assert curve.scores == (0.0, 24.0)


class Net(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(3, 3), "v": nn.Linear(3, 3)}) for _ in range(depth))
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.register_buffer("nothing", None)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["v"](layer["q"](x).tanh())
        return self.head(self.norm(x))


X = torch.linspace(-1, 1, 15).reshape(5, 3)


@torch.no_grad()
def tuned(seed=0, depth=4):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = Net(depth)
        torch.manual_seed(seed)
        inject(model, ["q", "v"], rank=2, trainable=["head"])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def picture(model):
    return (
        {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: (id(b), b.tolist()) for name, b in model.named_buffers()},
        {key: tensor.tolist() for key, tensor in model.state_dict().items()},
        {name: module.training for name, module in model.named_modules()},
        {name: (la.gate, la.enabled, la.merged, la.rank, la.alpha) for name, la in adapters(model).items()},
    )  # fmt: skip


def careless(model):
    """A score function that leaves the model in train mode, with changed statistics and another buffer."""
    assert not any(module.training for module in model.modules())
    assert not torch.is_grad_enabled()
    model.train()
    result = model(X).square().mean().item()
    model.norm.running_mean = torch.full((3,), 5.0)
    return -result


@pytest.mark.parametrize("measure", [interpolation_curve, dropout_stability])
def test_the_model_is_unchanged(measure):
    model = tuned()
    model.eval()
    model.layers[1].train()
    CoTo(model, 10)
    model.layers[0]["q"].enabled = False
    model.layers[2]["v"].enabled = torch.tensor(1)
    states = [] if measure is dropout_stability else [AdapterState.from_model(model), AdapterState.from_model(tuned(1))]
    states[1:] = [AdapterState({n: s.factors[n] for n in states[0].factors}, s.other_tensors) for s in states[1:]]
    before = picture(model)
    measure(model, *states, careless)
    assert picture(model) == before

    calls = itertools.count()

    def breaks(model):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return careless(model)

    with pytest.raises(KeyboardInterrupt):
        measure(model, *states, breaks)
    assert picture(model) == before
    with pytest.raises(ValueError, match="score must be finite; got nan at"):
        measure(model, *states, lambda _: math.nan)
    assert picture(model) == before


def test_the_ends_are_the_models_themselves():
    one, two = tuned(1).eval(), tuned(2).eval()

    def score(model):
        return model(X).sum()  # a 0-dim tensor is accepted

    model = tuned(3)
    curve = interpolation_curve(model, one, two, score, points=3)
    assert curve.scores[0] == pytest.approx(score(two).item(), rel=1e-5)
    assert curve.scores[2] == pytest.approx(score(one).item(), rel=1e-5)  # the head included
    assert interpolation_curve(one, one, one, score, points=3).scores == pytest.approx(
        [score(one).item()] * 3, rel=1e-5
    )


def test_bad_curves_are_refused():
    model, state = scalar_model(), scalar(1, 1)
    for arguments, options, match in (
        ((state, state), {"points": 1}, "points must be an integer of at least 2; got 1"),
        ((state, state), {"of": "x"}, "of must be one of .*'factors', 'products'.*; got 'x'"),
        ((state, scalar(1, 1, h=torch.ones(1))), {}, r"only states\[1\] has \['h'\]"),
        ((tuned(), tuned()), {}, "only the model has"),
    ):
        with pytest.raises(ValueError, match=match):
            interpolation_curve(model, *arguments, value, **options)


# dropout


def weighed(model):
    """Group i contributes 2^i, so that the score identifies the subset that is on."""
    layers = adapters(model)
    return sum(2 ** int(name.split(".")[1]) for name, layer in layers.items() if layer.enabled and name.endswith("q"))


@pytest.mark.parametrize("samples", [2, 5, 20])
def test_dropout_by_hand(samples):
    n, everything = 5, 2**5 - 1
    stability = dropout_stability(tuned(depth=n), weighed, samples=samples)
    assert stability.dropped == (0, 1, 2, 3, 4, 5)
    for count, scores in enumerate(stability.scores):
        subsets = [everything - sum(2**i for i in dropped) for dropped in itertools.combinations(range(n), count)]
        assert len(set(scores)) == len(scores) == min(samples, len(subsets))  # no subset twice
        assert set(scores) <= set(subsets)
        exact = len(subsets) <= samples
        assert stability.exact[count] is exact
        assert stability.means[count] == pytest.approx(statistics.fmean(scores))
        m = len(scores)
        error = 0.0 if exact else statistics.stdev(scores) * math.sqrt((1 / m) * (1 - m / len(subsets)))
        assert stability.errors[count] == pytest.approx(error)
        if exact:  # by symmetry, the mean of the remaining share
            assert stability.means[count] == pytest.approx(everything * (1 - count / n))


def test_the_error_is_the_standard_error_of_the_mean():
    model = tuned(depth=6)
    runs = [dropout_stability(model, weighed, samples=6, seed=seed) for seed in range(100)]
    for count in (2, 3):
        spread = statistics.stdev(run.means[count] for run in runs)
        claimed = math.sqrt(statistics.fmean(run.errors[count] ** 2 for run in runs))
        assert claimed == pytest.approx(spread, rel=0.25)
        assert statistics.fmean(run.means[count] for run in runs) == pytest.approx(63 * (1 - count / 6), rel=0.05)


def test_dropout_is_determined_by_its_seed():
    model = tuned(depth=6)
    runs = [dropout_stability(model, weighed, samples=4, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_pruned_adapters_stay_off_and_do_not_count():
    model = tuned(depth=3)
    layers = adapters(model)
    for name in ("layers.1.q", "layers.1.v", "layers.2.v"):
        layers[name].enabled = False
    seen = set()

    def score(model):
        seen.add(tuple(name for name, layer in layers.items() if layer.enabled))
        return 0.0

    assert dropout_stability(model, score).dropped == (0, 1, 2)
    assert seen == {("layers.0.q", "layers.0.v", "layers.2.q"), ("layers.0.q", "layers.0.v"), ("layers.2.q",), ()}
    assert dropout_stability(model, score, unit="module").dropped == (0, 1, 2, 3)
    assert dropout_stability(model, score, unit=lambda name: name[-1]).dropped == (0, 1, 2)


def test_bad_dropout_is_refused():
    model = tuned(depth=1)
    with pytest.raises(ValueError, match="samples must be an integer of at least 2; got 1"):
        dropout_stability(model, weighed, samples=1)
    with pytest.raises(ValueError, match="seed must be an integer in"):
        dropout_stability(model, weighed, seed=-1)
    with (
        adapter_mask(model, [[True, False]]),
        pytest.raises(ValueError, match=r"enabled of layers.0.q must be a bool.*; got a row mask"),
    ):
        dropout_stability(model, weighed)
    with adapter_mask(model, False), pytest.raises(ValueError, match="must have enabled adapters; Net has none"):
        dropout_stability(model, weighed)
    model.layers[0]["q"].merge()
    with pytest.raises(ValueError, match=r"no merged adapters.*\['layers\.0\.q'\]"):
        dropout_stability(model, weighed)


def test_results_are_frozen_values():
    assert InterpolationCurve((0.0, 1.0), (1.0, 2.0)) == InterpolationCurve((0.0, 1.0), (1.0, 2.0))
    assert hash(DropoutStability((0, 1), ((1.0,), (0.0,)))) == hash(DropoutStability((0, 1), ((1.0,), (0.0,))))
