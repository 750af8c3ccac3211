"""Number and name arguments of the analyses: numpy's numbers are accepted, bools are refused."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from cotolora import checks, connectivity, inject, merging, pruning, shapley


def state(seed, alpha=2.0):
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(2, 4, generator=generator), torch.randn(4, 2, generator=generator)
    return merging.AdapterState({"0": merging.Factors(*factors, alpha, False)})


def model():
    torch.manual_seed(0)
    made = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    for layer in inject(made, rank=2).values():
        nn.init.normal_(layer.lora_b)
    return made


def score(m):
    return m(torch.ones(2, 4)).sum().item()


def values(**given):
    return shapley.shapley_values(model(), score, **given)


# by argument: a call, and a valid number
ARGUMENTS = {
    "samples": (lambda n: values(samples=n).values, 8),
    "seed": (lambda n: values(samples=4, seed=n).values, 3),
    "batch": (lambda n: values(method="exact") and shapley.PerSample(torch.ones(2, 4), len, n).batch, 16),
    "count": (lambda n: [pruning.best(values(method="exact"), n)(name) for name in "012"], 2),
    "sparsity": (lambda x: pruning.magnitude(model(), x).removed, 0.5),
    "points": (lambda n: connectivity.interpolation_curve(one(), state(0), state(1), score, n).scores, 3),
    "iterations": (lambda n: merging.align(state(0), state(1), iterations=n).factors["0"].lora_a, 5),
    "max_condition": (lambda x: merging.align(state(0), state(1), max_condition=x).factors["0"].lora_a, 2.0),
    "rank": (lambda n: merging.lego([state(0), state(1)], n).factors["0"].lora_a, 3),
    "density": (lambda x: merging.ties([state(0), state(1)], density=x).factors["0"].lora_a, 0.5),
    "drop": (lambda x: merging.dare([state(0), state(1)], drop=x).factors["0"].lora_a, 0.5),
    "alpha": (lambda x: state(0, x).factors["0"].scale, 4.0),
}
SEEDED = {
    "lego": lambda n: merging.lego([state(0), state(1)], 3, seed=n).factors["0"].lora_a,
    "dare": lambda n: merging.dare([state(0)], seed=n).factors["0"].lora_a,
    "dropout_stability": lambda n: connectivity.dropout_stability(model(), score, samples=2, seed=n).scores,
}


def one():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 4))
    inject(made, rank=2)
    return made


def numpys(value):
    return np.int64(value) if isinstance(value, int) else np.float64(value)


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_numpy_numbers_are_accepted(argument):
    call, value = ARGUMENTS[argument]
    torch.testing.assert_close(call(numpys(value)), call(value), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        (argument, bad)
        for argument in ARGUMENTS
        for bad in (True, np.True_, "4", None, float("nan"), -1.5)
        if (argument, bad) != ("alpha", -1.5)
    ],
)
def test_bools_strings_and_numbers_out_of_range_are_refused(argument, bad):
    call, _ = ARGUMENTS[argument]
    with pytest.raises(ValueError, match=re.escape(f"{argument} must be ") + ".*" + re.escape(f"got {bad!r}")):
        call(bad)


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_may_be_a_numpy_integer(name):
    torch.testing.assert_close(SEEDED[name](np.int64(5)), SEEDED[name](5), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"seed must be an integer in .* got 0\.5"):
        SEEDED[name](0.5)


def test_an_integer_may_be_described_by_more_than_its_bounds():
    assert checks.integer("n", np.int8(4), 4, must="an even number") == 4
    with pytest.raises(ValueError, match="n must be an even number; got 3"):
        checks.integer("n", 3, 4, must="an even number")
    with pytest.raises(ValueError, match=r"n must be an integer in \[0, 3\); got 3"):
        checks.integer("n", 3, 0, 3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: values(method=["exact"]),
            "method must be one of ('permutation', 'exact', 'multilinear'); got ['exact']",
        ),
        (lambda: pruning.magnitude(model(), 0.5, "all"), "scope must be one of ('global', 'layer'); got 'all'"),
    ],
)
def test_unknown_names_are_refused(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call()


class Huge:
    def __repr__(self):
        return "x" * 10**6


@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param("x" * 1000, "'xxx", id="long-text"),
        pytest.param(list(range(1000)), "[0, 1, 2", id="long-list"),
        pytest.param({"a": torch.ones(2, 3)}, "{'a': <Tensor of torch.float32, shape (2, 3)>}", id="tensor"),
        pytest.param(np.ones(3, dtype=np.int8), "<ndarray of int8, shape (3,)>", id="array"),
        pytest.param(nn.Sequential(nn.Linear(2, 2)), "<Sequential>", id="module"),
        pytest.param(10**5000, "", id="more-digits-than-python-prints"),
        pytest.param(Huge(), "xxx", id="long-repr"),
        pytest.param(1.5, "1.5", id="number"),
    ],
)
def test_an_error_shows_a_value_briefly(value, words):
    shown = checks.shown(value)
    assert shown.startswith(words)
    assert 0 < len(shown) <= 200


def test_a_module_is_refused_as_a_score():
    assert checks.function("score", len, "a callable") is len
    for call, got in ((3, "int 3"), (nn.Linear(2, 2), "Linear <Linear>")):
        with pytest.raises(TypeError, match=f"score must be a callable; got {got}"):
            checks.function("score", call, "a callable")
