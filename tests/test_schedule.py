"""The schedule's formulas and the exact distribution of the masks."""

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from cotolora import Schedule, activation_probability, sample_mask
from cotolora.schedule import SHAPES

RISING = [shape for shape in SHAPES if shape != "constant"]

FORMULAS = {
    "linear": lambda u: u,
    "exponential": lambda u: (math.exp(u) - 1) / (math.e - 1),
    "sine": lambda u: math.sin(math.pi / 2 * u),
}


@pytest.mark.parametrize("initial_p", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("ramp", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("shape", RISING)
def test_follows_its_formula(shape, ramp, initial_p):
    for step in range(201):
        u = min(1.0, step / (ramp * 200))
        expected = initial_p + (1 - initial_p) * FORMULAS[shape](u)
        got = activation_probability(step, 200, initial_p=initial_p, ramp=ramp, shape=shape)
        assert got == pytest.approx(expected, abs=1e-12)


def test_the_default_is_the_authors_ramp_from_0_1():
    got = [activation_probability(step, 100) for step in (0, 15, 30, 75, 76, 100)]
    assert got == pytest.approx([0.1, 0.28, 0.46, 1, 1, 1], abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("initial_p", [0, 0.0, 0.1, 1.0, 1])
def test_starts_exactly_at_initial_p(initial_p, shape):
    assert activation_probability(0, 100, initial_p=initial_p, shape=shape) == initial_p


@pytest.mark.parametrize("shape", SHAPES)
def test_initial_p_of_one_is_ordinary_lora(shape):
    assert {activation_probability(step, 10, initial_p=1.0, shape=shape) for step in range(12)} == {1.0}


def test_constant_is_stochastic_depth():
    assert {activation_probability(step, 10, initial_p=0.3, shape="constant") for step in range(30)} == {0.3}


@pytest.mark.parametrize("shape", RISING)
@pytest.mark.parametrize("total_steps", [1, 7, 10, 100, 1000])
def test_is_exactly_one_after_the_ramp(total_steps, shape):
    """Also if ramp · total_steps rounds up, as 0.55 · 100 does."""
    for end in range(1, total_steps + 1):
        ramp = end / total_steps
        for step in (end, end + 1, total_steps, total_steps + 5):
            assert activation_probability(step, total_steps, ramp=ramp, shape=shape) == 1.0
        assert activation_probability(end - 1, total_steps, ramp=ramp, shape="linear") < 1.0


def test_full_ramp_ends_with_the_run():
    assert activation_probability(9, 10, ramp=1) == pytest.approx(0.91)
    assert activation_probability(10, 10, ramp=1) == 1.0


def test_huge_numbers():
    assert activation_probability(10**400, 10) == 1.0
    assert activation_probability(1, 10**400) == 0.1


probabilities = st.floats(0, 1)
ramps = st.floats(0, 1, exclude_min=True)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 10**6), st.data(), probabilities, ramps, st.sampled_from(SHAPES))
def test_is_a_probability_that_never_falls(total_steps, data, initial_p, ramp, shape):
    first = data.draw(st.integers(0, 2 * total_steps))
    second = data.draw(st.integers(first, 2 * total_steps))
    low, high = (
        activation_probability(step, total_steps, initial_p=initial_p, ramp=ramp, shape=shape)
        for step in (first, second)
    )
    # rounding of sin or expm1 may make a neighbouring step slightly smaller
    assert initial_p <= low <= high + 4e-16
    assert high <= 1


@pytest.mark.parametrize(("initial_p", "mean"), [(0.1, 0.6625), (0.0, 0.625)])
def test_mean_over_a_run(initial_p, mean):
    values = [activation_probability(step, 10_000, initial_p=initial_p) for step in range(10_000)]
    assert np.mean(values) == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("step", value) for value in (-1, 1.0, True, None, "1")],
        *[("total_steps", value) for value in (0, -1, 10.0, True, None)],
        *[("initial_p", value) for value in (-0.1, 1.1, math.nan, True, None, "0.1", np.float32(1.5))],
        *[("ramp", value) for value in (0, -0.5, 1.1, math.nan, True, None, "1")],
        *[("shape", value) for value in ("cosine", "", None, ["linear"])],
    ],
)
def test_bad_arguments_are_named(argument, value):
    arguments = {"step": 1, "total_steps": 10, argument: value}
    with pytest.raises(ValueError, match=f"^{argument} must be .*; got "):
        activation_probability(**arguments)


def law(p: list[float], at_least_one: bool) -> dict[tuple[bool, ...], float]:
    """The probability of every mask, by enumeration."""
    chances = {
        mask: math.prod(q if on else 1 - q for q, on in zip(p, mask, strict=True))
        for mask in itertools.product((False, True), repeat=len(p))
    }
    if at_least_one:
        del chances[(False,) * len(p)]
        total = math.fsum(chances.values())
        return {mask: chance / total for mask, chance in chances.items()}
    return chances


def single(*shares: float) -> dict[tuple[bool, ...], float]:
    """The distribution with exactly one group on, group i with probability ``shares[i]``."""
    return {tuple(i == j for j in range(len(shares))): share for i, share in enumerate(shares)}


def counts(p, at_least_one, draws=3000, seed=11):
    return Counter(
        tuple(sample_mask(len(p), p, seed=seed, step=step, at_least_one=at_least_one).tolist()) for step in range(draws)
    )


def assert_follows(seen: Counter, expected: dict[tuple[bool, ...], float]) -> None:
    """No impossible masks; the others pass a chi-square test (the seed is fixed, so the result is deterministic)."""
    possible = {mask: chance for mask, chance in expected.items() if chance > 0}
    assert set(seen) <= set(possible), f"impossible masks drawn: {set(seen) - set(possible)}"
    if len(possible) > 1:
        drawn = sum(seen.values())
        result = chisquare([seen[mask] for mask in possible], [drawn * chance for chance in possible.values()])
        assert result.pvalue > 1e-3, f"drawn {dict(seen)}, expected {possible}"


LAWS = [
    pytest.param([0.3], id="one-group"),
    pytest.param([0.1, 0.1], id="two-equal"),
    pytest.param([0.5, 0.5], id="two-halves"),
    pytest.param([0.1, 0.6], id="two-unequal"),
    pytest.param([0.1, 0.1, 0.1], id="three-equal"),
    pytest.param([0.5, 0.5, 0.5], id="three-halves"),
    pytest.param([0.7, 0.2, 0.4], id="three-unequal"),
    pytest.param([0.2, 0.4, 0.7], id="three-unequal-rising"),
    pytest.param([0.0, 0.3, 0.3], id="first-never"),
    pytest.param([0.3, 0.0, 0.3], id="middle-never"),
    pytest.param([0.3, 0.3, 0.0], id="last-never"),
    pytest.param([0.0, 0.0, 0.4], id="only-last"),
    pytest.param([1.0, 0.3, 0.3], id="first-always"),
    pytest.param([0.3, 1.0, 0.3], id="middle-always"),
    pytest.param([0.3, 0.3, 1.0], id="last-always"),
    pytest.param([1.0, 0.0, 1.0], id="nothing-random"),
    pytest.param([1.0, 1.0, 1.0], id="all"),
]


@pytest.mark.parametrize("p", LAWS)
def test_masks_are_independent_given_at_least_one(p):
    assert_follows(counts(p, True), law(p, True))


@pytest.mark.parametrize("p", [*LAWS, pytest.param([0.0, 0.0], id="nothing")])
def test_without_the_condition_masks_are_plain_bernoulli(p):
    assert_follows(counts(p, False), law(p, False))


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        pytest.param([0.0], single(1), id="zero-one-group"),
        pytest.param([0.0, 0.0], single(1 / 2, 1 / 2), id="zero-two"),
        pytest.param([0.0, 0.0, 0.0], single(1 / 3, 1 / 3, 1 / 3), id="zero-three"),
        pytest.param([1e-12, 1e-12, 1e-12], single(1 / 3, 1 / 3, 1 / 3), id="tiny-equal"),
        pytest.param([1e-12, 3e-12, 0.0], single(1 / 4, 3 / 4, 0), id="tiny-unequal"),
        pytest.param([1e-300, 1e-300, 2e-300], single(1 / 4, 1 / 4, 1 / 2), id="nearly-underflowing"),
        pytest.param([5e-324, 5e-324, 5e-324], single(1 / 3, 1 / 3, 1 / 3), id="smallest-float"),
    ],
)
def test_the_limit_at_zero_has_one_group_on(p, expected):
    assert_follows(counts(p, True), expected)


def test_many_groups_have_the_rates_of_the_condition():
    """n = 12, p = 0.1: every group's rate is 0.1 / (1 - 0.9¹²) = 0.139, from the first to the last."""
    n, p, draws = 12, 0.1, 6000
    on = sum(sample_mask(n, p, seed=1, step=step).double() for step in range(draws))
    rate = p / (1 - (1 - p) ** n)
    deviation = (on - draws * rate) / math.sqrt(draws * rate * (1 - rate))
    assert deviation.abs().max() < 4
    assert chisquare(on.numpy(), np.full(n, on.mean())).pvalue > 1e-3


def test_a_float_equals_the_same_value_for_every_group():
    for step in range(50):
        expected = sample_mask(5, [0.3] * 5, seed=0, step=step)
        for p in (0.3, np.full(5, 0.3), torch.full((5,), 0.3, dtype=torch.float64), (0.3,) * 5):
            assert torch.equal(sample_mask(5, p, seed=0, step=step), expected)


@settings(deadline=None, max_examples=200)
@given(st.lists(probabilities, max_size=40), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_every_mask_is_possible(p, seed, step):
    mask = sample_mask(len(p), p, seed=seed, step=step)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(p),)
    assert mask.device.type == "cpu"
    assert mask.any() or not p
    for on, q in zip(mask.tolist(), p, strict=True):
        assert on or q < 1
        assert not on or q > 0 or not any(p)


def test_no_groups():
    for at_least_one in (True, False):
        for p in (0.5, []):
            mask = sample_mask(0, p, seed=0, step=0, at_least_one=at_least_one)
            assert mask.dtype == torch.bool
            assert mask.shape == (0,)


@pytest.mark.parametrize(
    ("n", "p", "seed", "step", "at_least_one", "mask"),
    [
        (12, 0.3, 2024, 7, True, "110010000010"),
        (12, 0.3, 2024, 7, False, "110010000010"),
        (12, [i / 12 for i in range(12)], 2**64 - 1, 2**63, True, "001010011110"),
        (16, 1e-9, 3, 0, True, "0000000000000010"),
    ],
)
def test_the_stream_never_changes(n, p, seed, step, at_least_one, mask):
    """Fixed values: other versions of this library, of numpy and of torch must be able to resume a run."""
    got = sample_mask(n, p, seed=seed, step=step, at_least_one=at_least_one)
    assert "".join(str(int(on)) for on in got) == mask


def draw_many() -> list[list[bool]]:
    return [sample_mask(9, 0.4, seed=3, step=step).tolist() for step in range(20)]


def test_does_not_depend_on_random_state_or_order():
    expected = draw_many()
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    assert draw_many() == expected
    backwards = [sample_mask(9, 0.4, seed=3, step=step).tolist() for step in reversed(range(20))]
    assert backwards[::-1] == expected


def test_is_the_same_in_another_process():
    code = (
        "import json, torch; from cotolora import sample_mask; torch.manual_seed(99); torch.rand(5);"
        "print(json.dumps([sample_mask(9, 0.4, seed=3, step=step).tolist() for step in range(20)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == draw_many()


def test_changes_no_random_state():
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    draw_many()
    sample_mask(4, 0.0, seed=0, step=0)
    after = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert all(np.array_equal(old, new) for old, new in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda step: {"seed": 0, "step": step + 1}, id="next-step"),
        pytest.param(lambda step: {"seed": 1, "step": step}, id="next-seed"),
        pytest.param(lambda step: {"seed": step, "step": 0}, id="seed-and-step-swapped"),
        pytest.param(lambda step: {"seed": 2**32, "step": step}, id="seed-beyond-32-bits"),
        pytest.param(lambda step: {"seed": 0, "step": step + 2**32}, id="step-beyond-32-bits"),
    ],
)
def test_other_seeds_and_steps_are_uncorrelated(other):
    steps, n = range(1, 401), 32
    ours = torch.stack([sample_mask(n, 0.5, seed=0, step=step) for step in steps])
    theirs = torch.stack([sample_mask(n, 0.5, **other(step)) for step in steps])
    for shift in (0, 1):  # each group with itself and with its neighbour
        agreeing = (ours == theirs.roll(shift, 1)).sum().item()
        assert abs(agreeing - ours.numel() / 2) < 4 * math.sqrt(ours.numel() / 4)


def test_groups_of_one_mask_are_uncorrelated():
    masks = torch.stack([sample_mask(16, 0.5, seed=0, step=step, at_least_one=False) for step in range(2000)])
    correlation = torch.corrcoef(masks.double().T) - torch.eye(16)
    assert correlation.abs().max() < 5 / math.sqrt(2000)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        *[("n", value, "n must be an integer in") for value in (-1, 2.0, True, None, "2")],
        *[("seed", value, "seed must be an integer in") for value in (-1, 2**64, 0.5, True, None, "a")],
        *[("step", value, "step must be an integer in") for value in (-1, 2**64, 0.5, True, None)],
        *[("p", value, r"p must be in \[0, 1\]") for value in (-0.1, 1.1, math.nan, None, [0.1, 2], [0.1, math.nan])],
        *[("p", value, "p must be a float, or 2 floats") for value in ([0.1], [0.1] * 3, [[0.1, 0.2]], [])],
        *[("p", value, "p must be a float, or 2 floats") for value in ("x", {}, [0.1, [0.2]], ["a", "b"])],
        ("p", torch.tensor([0.1, 0.2], requires_grad=True), "p must be a float, or 2 floats"),
    ],
)
def test_bad_arguments_of_a_mask_are_named(argument, value, message):
    arguments = {"n": 2, "p": 0.5, "seed": 0, "step": 0, argument: value}
    with pytest.raises(ValueError, match=f"^{message}.*; got "):
        sample_mask(arguments.pop("n"), arguments.pop("p"), **arguments)


# Schedule: the fields of a run in one object

OTHER = {"initial_p": 0.2, "ramp": 0.5, "shape": "sine", "tilt": -0.5, "at_least_one": False, "seed": 7}


def test_a_schedule_holds_its_fields():
    assert dataclasses.asdict(Schedule()) == {
        "initial_p": 0.1, "ramp": 0.75, "shape": "linear", "tilt": 0.0, "at_least_one": True, "seed": 0
    }  # fmt: skip
    schedule = Schedule(**OTHER)
    assert dataclasses.asdict(schedule) == OTHER
    assert schedule == Schedule(**OTHER) != Schedule()
    assert hash(schedule) == hash(Schedule(**OTHER))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.seed = 1


def test_numpy_numbers_become_python_numbers():
    given = {"initial_p": np.float32(0.5), "ramp": np.float64(0.5), "tilt": np.int8(1), "seed": np.uint64(2**64 - 1)}
    schedule = Schedule(**given)
    assert schedule == Schedule(initial_p=0.5, ramp=0.5, tilt=1.0, seed=2**64 - 1)
    assert {type(getattr(schedule, name)) for name in given} == {float, int}
    assert type(schedule.seed) is int
    assert activation_probability(np.int64(3), np.int32(10), initial_p=np.float32(0.5)) == pytest.approx(0.7)
    mask = sample_mask(np.int64(5), np.float32(0.5), seed=np.int64(3), step=np.int32(4))
    assert torch.equal(mask, sample_mask(5, 0.5, seed=3, step=4))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("initial_p", value) for value in (-0.1, 1.1, math.nan, True, None, "0.1")],
        *[("ramp", value) for value in (0, -0.5, 1.1, math.nan, math.inf, True, None, "1")],
        *[("shape", value) for value in ("cosine", "", None, ["linear"])],
        *[("tilt", value) for value in (-1.1, 1.1, math.nan, True, None, "0")],
        *[("at_least_one", value) for value in (1, None, "yes", np.True_)],
        *[("seed", value) for value in (-1, 2**64, 0.5, True, None, "a")],
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*; got "):
        Schedule(**{field: value})


@pytest.mark.parametrize("at_least_one", [True, False])
@pytest.mark.parametrize("tilt", [0.0, 0.7])
def test_a_mask_is_drawn_among_available_groups_with_their_positions(tilt, at_least_one):
    schedule = Schedule(initial_p=0.3, tilt=tilt, at_least_one=at_least_one, seed=5)
    available = [True, False, True, True, False, True]
    for step in range(40):
        p = schedule.probability(step, 60)
        assert p == activation_probability(step, 60, initial_p=0.3)
        rates = [min(1.0, p * (1 - tilt * (1 - p) * (2 * i / 5 - 1))) for i in range(6) if available[i]]
        expected = torch.zeros(6, dtype=torch.bool)
        expected[torch.tensor(available)] = sample_mask(4, rates, seed=5, step=step, at_least_one=at_least_one)
        assert torch.equal(schedule.mask(6, step, 60, available), expected)
    assert schedule.mask(6, 60, 60).all()
    assert not schedule.mask(2, 0, 60, [False, False]).any()
    assert schedule.mask(0, 0, 60).shape == (0,)
