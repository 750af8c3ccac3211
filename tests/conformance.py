"""Properties that every variant must have with every backend, base, gate and dtype; each property is defined once.

A test module parametrises over `cases`. Nothing here names a variant or a backend, so that everything in the registry
is tested automatically.
"""

import copy
import functools
import itertools
import pickle
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from cotolora import CoToLoRALinear, adapters, inject, load_adapter, save_adapter, set_backend
from cotolora.variants.base import FROM_WEIGHT, Variant
from tests.support import calls
from tests.support.calls import LOW, Named, Subject, apply, base_result, constants_of, double, draw, dy_of, fits, run
from tests.support.tolerance import assert_as_accurate_as_torch

Axis = Mapping[str, Any] | Callable[[Subject], Mapping[str, Any]]
_PROPERTIES: list[tuple[Callable[..., None], Callable[[Subject], bool], dict[str, Axis]]] = []


def cases(variants: Iterable[Variant]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: each case of each property is a function without arguments.

    Our kernels are interpreted, which is slow. Therefore only the first fused backend of each variant has all cases.
    The others are marked as slow and have each value of each axis only once; kernels have tests of their own.
    """
    return list(_cases(variants))


def _cases(variants: Iterable[Variant]) -> Iterator[Any]:
    every = [subject for variant in variants for subject in calls.subjects(variant)]
    for subject in every:
        if not subject.dtypes:
            reason = "; ".join(subject.why_not(torch.float32))
            yield pytest.param(None, id=str(subject), marks=pytest.mark.skip(reason=reason))
    first = {(subject.variant.name, subject.adds): subject for subject in reversed(every) if subject.fused}
    for (check, concerned, axes), subject in itertools.product(_PROPERTIES, every):
        if not subject.dtypes or not concerned(subject):
            continue
        slow = subject.fused and subject is not first[subject.variant.name, subject.adds]
        values = {name: axis(subject) if callable(axis) else axis for name, axis in axes.items()}
        for chosen in (_each_once if slow else itertools.product)(*(axis.items() for axis in values.values())):
            options = {name: value for name, (_, value) in zip(values, chosen, strict=True)}
            label = "-".join([check.__name__, str(subject), *(key for key, _ in chosen)])
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(functools.partial(check, subject, **options), id=label, marks=marks)


def _each_once(*axes: Collection[Any]) -> Iterator[tuple[Any, ...]]:
    """The fewest combinations that contain each value of each axis."""
    for _, *values in zip(range(max(map(len, axes), default=1)), *map(itertools.cycle, axes), strict=False):
        yield tuple(values)


def holds(concerned: Callable[[Subject], bool] = lambda subject: True, **axes: Axis) -> Callable[..., Any]:
    """Registers a function as a property of the subjects `concerned`, for every combination of values of the `axes`."""

    def register(check: Callable[..., None]) -> Callable[..., None]:
        _PROPERTIES.append((check, concerned, axes))
        return check

    return register


# subjects and cases of the properties

ON = {"on": True, "0-dim-on": torch.tensor(1, dtype=torch.int32), "rows": torch.tensor([1, 1, 0])}
GATES = {
    **ON,
    "0-dim-off": torch.tensor(0, dtype=torch.int32),
    "first-row-off": torch.tensor([0, 1, 1]),
    "bool-rows": torch.tensor([True, False, False]),
    "rows-off": torch.tensor([0, 0, 0]),
}
OFF = {"0-dim": torch.tensor(0), "rows": torch.zeros(3, dtype=torch.bool)}
KINDS = {str(kind): kind for kind in (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)}
BIAS = {"bias": True, "no-bias": False}

# x, out_features, rank
SHAPES = {
    "plain": ((3, 4, 8), 8, 4),
    "no-leading-dimension": ((8,), 5, 2),
    "one-leading-dimension": ((3, 7), 5, 2),
    "many-leading-dimensions": ((3, 2, 1, 2, 7), 5, 2),
    "no-rows": ((3, 0, 7), 5, 2),
    "no-samples": ((0, 7), 5, 2),
    "no-features": ((3, 4, 0), 5, 2),
    "one-row": ((1, 7), 5, 2),
    "as-many-positions-as-samples": ((3, 3, 7), 5, 2),
    "rank-one": ((3, 5, 33), 17, 1),
    "rank-above-both-sizes": ((3, 5, 6), 4, 9),
    "odd-sizes": ((3, 11, 67), 35, 5),
    "single-features": ((3, 4, 1), 1, 1),
    "larger": ((3, 40, 96), 64, 16),
    "blocks-of-rows": ((3, 3, 700), 900, 2),
}
# small enough for the interpreter; tiles have 16 rows or more
FUSED_SHAPES = {"below-one-tile": ((3, 5, 24), 20, 4), "odd-sizes": ((3, 7, 33), 37, 3)}
FUSED_ALONE = {  # each with one gate and in one dtype
    "several-tiles": ((3, 30, 80), 70, 17),
    "rank-above-one-read-of-dy": ((3, 4, 24), 20, 40),
    "no-leading-dimension": ((9,), 7, 2),
    "one-row": ((1, 9), 7, 2),
    "many-leading-dimensions": ((3, 2, 1, 2, 9), 7, 2),
    "no-rows": ((3, 0, 16), 16, 4),
    "no-samples": ((0, 9), 7, 2),
    "rank-one": ((3, 14, 19), 36, 1),
    "rank-eight": ((3, 14, 19), 36, 8),
    "rank-sixteen": ((3, 14, 19), 36, 16),
    "rank-64": ((3, 14, 19), 36, 64),
}


def by_name(dtypes: Iterable[torch.dtype]) -> dict[str, torch.dtype]:
    return {str(dtype).removeprefix("torch."): dtype for dtype in dtypes}


def low(subject: Subject) -> dict[str, torch.dtype]:
    return by_name(dtype for dtype in subject.dtypes if dtype in LOW)


def drops(subject: Subject) -> dict[str, float]:
    return {"kept": 0.0, "dropping": 0.4} if subject.drops else {"kept": 0.0}


def bias(subject: Subject) -> dict[str, bool]:
    return {"adding": True} if subject.adds else BIAS


def in_float64(subject: Subject) -> bool:
    return torch.float64 in subject.dtypes


def by_backend(subject: Subject) -> bool:
    return subject.implementation is not None


def of_linears(subject: Subject) -> bool:
    return not subject.adds


def as_close(subject: Subject, got: Tensor, want: Tensor, name: str) -> None:
    """Bitwise equal for our kernels, which do not depend on what else is computed; close for the vendor's."""
    tolerance = {"rtol": 0.0, "atol": 0.0} if subject.fused else {}
    torch.testing.assert_close(got, want, msg=lambda text: f"{name}: {text}", **tolerance)


# numbers


@holds(
    in_float64,
    gate={name: GATES[name] for name in ("on", "0-dim-on", "0-dim-off", "rows", "first-row-off", "rows-off")},
    dropout={"kept": 0.0, "dropping": 0.4, "all-dropped": 1.0},
)
def gradients_are_those_of_the_function(subject, gate, dropout):
    named = draw(subject, (3, 1, 3), 2, 2, dtype=torch.float64)
    # given as constants, because numerical differentiation would differentiate what autograd treats as constant
    constants = constants_of(subject, named)

    def function(*tensors):
        torch.manual_seed(0)  # the same mask each time
        given = dict(zip(named, tensors, strict=True))
        return apply(subject, given, gate=gate, dropout=dropout, constants=constants)

    assert gradcheck(function, tuple(calls.leaves_of(named).values()))


@holds(lambda s: by_backend(s) and in_float64(s), gate=GATES, bias=bias)
def gradients_are_the_references_in_float64(subject, gate, bias):
    """Here the constants are computed, not given."""
    named = draw(subject, (3, 3, 7), 5, 2, dtype=torch.float64, bias=bias)
    ours, theirs = (run(s, named, gate=gate) for s in (subject, subject._replace(backend="reference")))
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want, msg=lambda text, name=name: f"{name}: {text}")


def as_accurate_as_the_reference(subject, named: Named, dy: Tensor, **options) -> dict[str, Tensor]:
    """Checks the result and every gradient against the reference's own error, and returns them."""
    reference = subject._replace(backend="reference")
    ours, theirs = run(subject, named, dy, **options), run(reference, named, dy, **options)
    exact = run(reference, double(named), dy.double(), **options)
    # the sum of absolute values: one rounding error of it is allowed in float32, because the reference may be exact by
    # chance in a sum of few terms, and for results that follow a product rounded to lower precision
    low_precision, late = named["x"].dtype != torch.float32, "lora_a" not in subject.variant.trained
    terms = run(
        reference, {k: t if t is None else t.abs() for k, t in double(named).items()}, dy.double().abs(), **options
    )
    for name, truth in exact.items():
        # gradients of extra operands may be computed from dyᵀ h, which has been rounded to the dtype of x
        rounded = low_precision and not subject.fused and name in subject.adapter[2:]
        slack = 4.0 if rounded else 2.0
        summed = not low_precision or rounded or (late and name in subject.adapter)
        if summed and not subject.fused and truth.numel():
            floor = torch.finfo(named["x"].dtype).eps * terms[name].abs().max().item()
            truth_error = (theirs[name].double() - truth).abs().max().item()
            assert (ours[name].double() - truth).abs().max().item() <= slack * truth_error + floor, name
        else:
            assert_as_accurate_as_torch(ours[name], theirs[name], truth, slack=slack)
    return ours


@holds(lambda s: by_backend(s) and not s.fused, shape=SHAPES, dtype=low, gate=GATES)
def is_as_accurate_as_the_reference(subject, shape, dtype, gate):
    named = draw(subject, *shape, dtype=dtype)
    as_accurate_as_the_reference(subject, named, dy_of(named), gate=fits(gate, named["x"]))


@holds(lambda s: s.fused, shape=FUSED_SHAPES, dtype=low)
def is_as_accurate_as_the_reference_under_every_gate(subject, shape, dtype):
    named = draw(subject, *shape, dtype=dtype, bias=shape[-1] != 3)
    rows = (torch.tensor([1, 3, 0]), torch.zeros(3, dtype=torch.bool))
    for gate in (True, torch.tensor(1), torch.tensor(False), *rows):
        as_accurate_as_the_reference(subject, named, dy_of(named), gate=fits(gate, named["x"]))


@holds(lambda s: s.fused, shape=lambda s: FUSED_ALONE | ({"no-features": SHAPES["no-features"]} if s.adds else {}))
def is_as_accurate_as_the_reference_at_every_shape(subject, shape):
    named = draw(subject, *shape)
    gate = fits(ON["rows"], named["x"]) if shape[-1] > 16 else True
    as_accurate_as_the_reference(subject, named, dy_of(named), gate=gate)


@holds(lambda s: s.adds and by_backend(s) and not s.fused, gate=GATES)
def a_base_may_answer_in_a_dtype_of_its_own(subject, gate):
    for x_dtype, y_dtype in itertools.permutations((torch.float32, torch.bfloat16)):
        named = draw(subject, (3, 4, 33), 20, 5, dtype=x_dtype, y_dtype=y_dtype, factors=torch.float32)
        ours = as_accurate_as_the_reference(subject, named, dy_of(named), gate=gate)
        assert ours["out"].dtype == y_dtype


@holds(lambda s: s.adds, gate=ON)
def the_base_gets_the_gradient_of_the_result(subject, gate):
    named = draw(subject)
    assert torch.equal(run(subject, named, dy_of(named), gate=gate)["y"], dy_of(named))


def half(subject: Subject) -> torch.dtype:
    """The lowest dtype that it supports on this machine."""
    return torch.bfloat16 if torch.bfloat16 in subject.dtypes else torch.float16


@holds(dtype=lambda s: by_name(d for d in s.dtypes if d.itemsize == 2))
def float32_masters_are_cast_to_x_and_get_float32_gradients(subject, dtype):
    named = draw(subject, (3, 4, 24), 16, 4, dtype=dtype, factors=torch.float32)
    got = as_accurate_as_the_reference(subject, named, dy_of(named))
    assert got["out"].dtype == got["x"].dtype == dtype
    assert {got[name].dtype for name in subject.adapter} == {torch.float32}


@holds()
def float64_masters_over_a_float32_base(subject):
    got = run(subject, draw(subject, factors=torch.float64))
    assert got["out"].dtype == torch.float32
    assert {got[name].dtype for name in subject.adapter} == {torch.float64}


@holds(case=lambda s: alone(s))
def each_gradient_alone_is_the_one_among_all(subject, case):
    """Operands that require no gradient get None."""
    options, bias, pairs = case
    named = draw(subject, (3, 2, 9), 7, 3, bias=bias)
    dy = dy_of(named)
    torch.manual_seed(0)
    together = run(subject, named, dy, **options)
    subsets = [(name,) for name, t in named.items() if t is not None]
    if pairs:
        subsets += [*itertools.combinations(("x", *subject.adapter), 2), ("x", *subject.adapter)]
    for asked in subsets:
        torch.manual_seed(0)
        apart = run(subject, named, dy, asked, **options)
        assert apart.keys() == {"out", *asked}
        torch.testing.assert_close(apart["out"], together["out"], rtol=0, atol=0)
        for name in asked:
            as_close(subject, apart[name], together[name], f"{name} of {asked}")


def alone(subject: Subject) -> dict[str, tuple[dict[str, Any], bool, bool]]:
    """(options, whether there is a bias, whether pairs of gradients are tested as well)."""
    dropouts = drops(subject)
    if subject.fused:
        chosen = {"on": ({}, True, True), "rows": ({"gate": ON["rows"]}, True, False)}
        return chosen | ({"dropping": ({"dropout": dropouts["dropping"]}, True, False)} if subject.drops else {})
    return {
        f"{gate}-{dropout}-{has}": ({"gate": ON[gate], "dropout": dropouts[dropout]}, bias_of[has], True)
        for bias_of in (bias(subject),)
        for gate, dropout, has in itertools.product(ON, dropouts, bias_of)
    }


@holds()
def nothing_is_recorded_if_nothing_requires_grad(subject):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert apply(subject, calls.leaves_of(draw(subject), ())).grad_fn is None
        with torch.no_grad():
            assert apply(subject, calls.leaves_of(draw(subject))).grad_fn is None
    assert saved == []


# layouts


@holds(layout=lambda s: layouts(s), gate=lambda s: {"rows": ON["rows"]} if s.fused else ON)
def takes_any_strides_of_one(subject, layout, gate):
    named = draw(subject, (3, 6, 12), 10, 4)
    dy = dy_of(named)
    for which in (*named, "dy"):
        t = dy if which == "dy" else named[which]
        if (view := layout(t)).stride() == t.stride() and not view.storage_offset():
            continue  # such a tensor has no other strides
        given = named if which == "dy" else {**named, which: view}
        as_accurate_as_the_reference(subject, given, view if which == "dy" else dy, gate=gate)


def layouts(subject: Subject) -> dict[str, Callable[[Tensor], Tensor]]:
    every = {layout.__name__: layout for layout in calls.LAYOUTS}
    return {"sliced_everywhere": every["sliced_everywhere"]} if subject.fused else every


# without operands whose columns are all equal, whose products cancel except for rounding
@holds(by_backend, layout={f.__name__: f for f in calls.LAYOUTS if f.__name__ != "expanded_features"})
def takes_any_strides_of_all(subject, layout):
    named = {name: layout(t) for name, t in draw(subject, (3, 6, 12), 10, 4).items()}
    dy = layout(dy_of(named))
    if not subject.fused:
        as_accurate_as_the_reference(subject, named, dy, gate=ON["rows"])
        return
    # the same kernels must run for any strides
    got = run(subject, named, dy, gate=ON["rows"])
    want = run(subject, {name: t.contiguous() for name, t in named.items()}, dy.contiguous(), gate=ON["rows"])
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


@holds(by_backend)
def takes_views_that_negate(subject):
    """For example the imaginary part of a conjugate: torch negates its values on reading, a kernel does not."""
    named = draw(subject)
    views = {name: torch._neg_view(-t) for name, t in (*named.items(), ("dy", dy_of(named)))}
    got = run(subject, {name: views[name] for name in named}, views["dy"])
    for name, value in run(subject, named, dy_of(named)).items():
        assert torch.equal(got[name], value), name


@holds(by_backend)
def takes_any_strides_of_float32_masters(subject):
    """As in a layer, whose masters are float32."""
    named = draw(subject, (3, 6, 24), 20, 4, dtype=half(subject), factors=torch.float32)
    strided = {name: (calls.sliced if t.dim() < 2 else calls.transposed)(t) for name, t in named.items()}
    dy = calls.expanded_features(dy_of(named))
    for gate in ON.values():
        as_accurate_as_the_reference(subject, strided, dy, gate=gate)


@holds()
def takes_a_row_gate_of_any_strides(subject):
    named = draw(subject, (4, 2, 8), 8, 4)
    gate = torch.tensor([0, 7, 1, 7, 1, 7, 0, 7])[::2]
    got, plain = run(subject, named, gate=gate), run(subject, named, gate=gate.contiguous())
    assert all(torch.equal(got[name], plain[name]) for name in got)
    all_on = run(subject, named, gate=torch.tensor([1]).expand(4))
    torch.testing.assert_close(all_on["out"], run(subject, named)["out"])


@holds(dropout=drops)
def never_writes_its_arguments(subject, dropout):
    named = draw(subject)
    dy = dy_of(named)
    before, dy_before = {name: t.clone() for name, t in named.items()}, dy.clone()
    for gate in ON.values():
        run(subject, named, dy, gate=gate, dropout=dropout)
    assert torch.equal(dy, dy_before)
    assert all(torch.equal(t, before[name]) for name, t in named.items())


@holds(dropout=drops)
def backward_twice_gives_the_same_gradients(subject, dropout):
    leaves = calls.leaves_of(draw(subject))
    out, asked = apply(subject, leaves, dropout=dropout), list(leaves.values())
    first = torch.autograd.grad(out, asked, torch.ones_like(out), retain_graph=True)
    second = torch.autograd.grad(out, asked, torch.ones_like(out))
    assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True))


@holds()
def changing_the_output_does_not_change_the_gradients(subject):
    named = draw(subject)
    want, leaves = run(subject, named, 2 * torch.ones(3, 2, 3)), calls.leaves_of(named)
    out = apply(subject, leaves)
    out.mul_(2)
    out.sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, want[name])


# dropout


@holds(lambda s: s.drops, gate=lambda s: {name: ON[name] for name in (("on", "rows") if s.fused else ON)})
def dropout_is_one_mask_forward_and_backward(subject, gate):
    """The function is affine in each operand: setting one to zero removes the contribution that its gradient states."""
    named = draw(subject, (3, 4, 24), 7, 3)
    dy, constants = dy_of(named), constants_of(subject, named)

    def drawn(seed, **changed):
        torch.manual_seed(seed)
        return run(subject, {**named, **changed}, dy, gate=gate, dropout=0.4, constants=constants)

    made = drawn(3)
    for name in ("x", *subject.adapter):
        gone = drawn(3, **{name: torch.zeros_like(named[name])})["out"]
        contributed = (made[name].double() * named[name].double()).sum()
        torch.testing.assert_close(
            ((made["out"] - gone).double() * dy.double()).sum(), contributed, rtol=1e-4, atol=1e-3
        )
    assert not torch.equal(made["out"], drawn(4)["out"])
    assert torch.equal(made["out"], drawn(3)["out"])


@holds(lambda s: s.drops, gate=GATES, dtype=low)
def dropout_with_probability_1_gives_the_base(subject, gate, dtype):
    named = draw(subject, dtype=dtype)
    got = run(subject, named, gate=gate, dropout=1.0)
    is_base(subject, got["out"], named)
    assert not any(got[name].any() for name in subject.adapter)


def is_base(subject: Subject, got: Tensor, named: Named) -> None:
    """Bitwise equal to the base; only close for our kernels, whose matmul is not the vendor's."""
    if subject.fused and not subject.adds:
        torch.testing.assert_close(got, base_result(named))
    else:
        assert torch.equal(got, base_result(named))


@holds()
def without_dropout_the_generator_is_not_used(subject):
    before = torch.get_rng_state()
    run(subject, draw(subject))
    run(subject, draw(subject), gate=False, dropout=0.5)
    assert torch.equal(torch.get_rng_state(), before)


# gates


@holds(kind=KINDS)
def every_nonzero_gate_is_on(subject, kind):
    named = draw(subject)
    on, off = run(subject, named), run(subject, named, gate=torch.zeros((), dtype=kind))
    for value in (64,) if subject.fused else (1, 2, 64):
        got = run(subject, named, gate=torch.tensor(value).to(kind))
        rows = run(subject, named, gate=torch.tensor([0, value, 0]).to(kind))
        torch.testing.assert_close(got["out"], on["out"])
        torch.testing.assert_close(rows["out"][1], on["out"][1])
        assert torch.equal(rows["out"][::2], off["out"][::2])


@holds()
def rows_have_their_own_gates(subject):
    # as many positions as samples, so that a row gate applied to the wrong dimension raises no error but is detected
    named = draw(subject, (3, 3, 4))
    dy = dy_of(named)
    mixed, on, off = (run(subject, named, dy, gate=gate) for gate in (torch.tensor([1, 1, 0]), True, torch.tensor(0)))
    assert torch.equal(mixed["out"][2], off["out"][2])
    torch.testing.assert_close(mixed["out"][:2], on["out"][:2])
    torch.testing.assert_close(mixed["x"][:2], on["x"][:2])
    torch.testing.assert_close(mixed["x"][2], or_zeros(off["x"], named, "x")[2])
    # rows that are off contribute nothing to the gradients of the adapter
    alone = {name: t[:2] if name in ("x", "y") else t for name, t in named.items()}
    for name, want in run(subject, alone, dy[:2]).items():
        if name in subject.adapter:
            torch.testing.assert_close(mixed[name], want)


def same(got: Tensor | None, want: Tensor | None) -> bool:
    return got is None if want is None else got is not None and torch.equal(got, want)


def equal(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def or_zeros(gradient: Tensor | None, named: Named, name: str) -> Tensor:
    return torch.zeros_like(named[name]) if gradient is None else gradient


POISONS = {str(poison): poison for poison in (float("inf"), float("nan"), 0.0)}


@holds(gate={"host": False, **OFF}, poison=POISONS, dropout=drops)
def off_is_the_base_whatever_the_adapter_holds(subject, gate, poison, dropout):
    named = draw(subject, (3, 4, 8), 8, 4)
    dy = dy_of(named)
    base = run(subject, named, dy, gate=False)
    assert torch.equal(base["out"], base_result(named))
    clean = run(subject, named, dy, gate=gate, dropout=dropout)
    broken = {**named, **{name: torch.full_like(named[name], poison) for name in subject.adapter}}
    got = run(subject, broken, dy, gate=gate, dropout=dropout)
    is_base(subject, got["out"], named)
    for name in ("out", *subject.base):
        assert same(got[name], clean[name]), name
        torch.testing.assert_close(or_zeros(got[name], named, name), or_zeros(base[name], named, name))
    for name in subject.adapter:
        assert base[name] is None, name
        assert same(got[name], None if gate is False else torch.zeros_like(named[name])), name


@holds(gate={"first-and-last-off": torch.tensor([0, 1, 0]), "first-off": torch.tensor([0, 1, 1])})
def rows_that_are_off_are_the_base_beside_rows_that_are_on(subject, gate):
    named = draw(subject, (3, 4, 8), 8, 4)
    dy, off = dy_of(named), gate == 0
    base, clean = run(subject, named, dy, gate=False), run(subject, named, dy, gate=gate)
    for name, poison in itertools.product(subject.adapter, (float("inf"), float("nan"))):
        got = run(subject, {**named, name: torch.full_like(named[name], poison)}, dy, gate=gate)
        assert torch.equal(got["out"][off], clean["out"][off]), name
        is_base(subject, got["out"][off], {**named, **{k: named[k][off] for k in ("x", "y") if k in named}})
        torch.testing.assert_close(got["x"][off], or_zeros(base["x"], named, "x")[off])
        assert not got["out"][~off].isfinite().any(), name


@holds(gate={"0-dim": torch.tensor(0), "rows": torch.tensor([1, 0, 1])}, where={"x": "x", "dy": "dy"})
def off_rows_add_nothing_to_the_adapter_even_if_not_finite(subject, gate, where):
    named = draw(subject, (3, 4, 8), 8, 4)
    dy = dy_of(named)
    want = run(subject, named, dy, gate=gate)
    (named["x"] if where == "x" else dy)[1].fill_(float("inf"))
    got = run(subject, named, dy, gate=gate)
    for name in subject.adapter:
        torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")


def of_the_variant(subject: Subject) -> bool:
    return subject.backend == "reference"


@holds(of_the_variant, shape=SHAPES, dtype=by_name((*LOW, torch.float64)))
def a_host_gate_that_is_off_is_the_base_bit_for_bit(subject, shape, dtype):
    named = draw(subject, *shape, dtype=dtype)
    dy = dy_of(named)
    got = run(subject, named, dy, gate=False, dropout=0.5)
    leaves = calls.leaves_of(named)
    want = base_result(leaves)
    assert torch.equal(got["out"], want)
    base = {name: leaves[name] for name in subject.base}
    for name, gradient in zip(base, torch.autograd.grad(want, list(base.values()), dy, allow_unused=True), strict=True):
        assert (got[name] is None) == (gradient is None)
        assert gradient is None or torch.equal(got[name], gradient)
    assert all(got[name] is None for name in subject.adapter)
    if subject.adds:
        assert apply(subject, named, gate=False, dropout=0.5) is named["y"]


@holds(lambda s: by_backend(s) and not s.fused)
def a_gate_changed_before_the_backward_is_detected(subject):
    gate = torch.tensor(1)
    out = apply(subject, calls.leaves_of(draw(subject)), gate=gate)
    gate.fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# autocast


@holds(gate=ON, x_dtype=by_name((torch.float32, torch.float16)))
def autocast_casts_as_linear_does(subject, gate, x_dtype):
    lower = half(subject)
    named = draw(subject, (3, 4, 8), 8, 4, y_dtype=lower if subject.fused else None)
    named["x"] = named["x"].to(x_dtype)
    cast = {name: t if name == "y" or name in subject.adapter else t.to(lower) for name, t in named.items()}
    dy = dy_of(cast)
    # computed from W before the cast
    want = run(subject, cast, dy, gate=gate, constants=constants_of(subject, named))
    region = functools.partial(torch.autocast, "cpu", lower)
    # without a weight, the autocast around the backward applies, as everywhere in torch
    inside = [] if subject.adds and not by_backend(subject) else [region()]
    for backward_in in (None, *inside):
        got = run(subject, named, dy, gate=gate, forward_in=region(), backward_in=backward_in)
        for name, value in want.items():
            assert got[name].dtype == (value.dtype if name == "out" else named[name].dtype)
            assert torch.equal(got[name], value.to(got[name].dtype)), name
    if not subject.adds:
        with region():
            assert got["out"].dtype == F.linear(named["x"], named["weight"], named["bias"]).dtype == lower


@holds(by_backend)
def a_float32_forward_keeps_its_precision_if_backward_is_called_under_autocast(subject):
    named = draw(subject, (3, 4, 8), 8, 4)
    got, want = run(subject, named, backward_in=torch.autocast("cpu", half(subject))), run(subject, named)
    assert all(torch.equal(got[name], value) for name, value in want.items())


@holds(in_float64)
def autocast_leaves_float64_alone(subject):
    named = draw(subject, (3, 4, 8), 8, 4, dtype=torch.float64)
    got, want = run(subject, named, forward_in=torch.autocast("cpu", torch.bfloat16)), run(subject, named)
    assert all(got[name].dtype == torch.float64 and torch.equal(got[name], value) for name, value in want.items())


@holds(of_the_variant)
def autocast_with_the_gate_off_is_the_base(subject):
    named = draw(subject, (3, 4, 8), 8, 4)
    for x in (named["x"], named["x"].half()):  # float16 too, because F.linear accepts it under autocast
        given = {**named, "x": x}
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(apply(subject, given, gate=False), base_result(given))


# twice


@holds(of_the_variant, gate=GATES)
def the_reference_differentiates_twice(subject, gate):
    named = draw(subject, (3, 1, 3), 2, 2, dtype=torch.float64)
    constants = constants_of(subject, named)

    def function(*tensors):
        return apply(subject, dict(zip(named, tensors, strict=True)), gate=gate, constants=constants)

    assert gradgradcheck(function, tuple(calls.leaves_of(named).values()))


@holds(
    by_backend,
    needs=lambda s: {
        "all": None,
        "factors": ("lora_a", "lora_b"),
        "last": ("x", s.adapter[-1]),
        **({} if s.adds else {"mixed": ("x", "weight", "lora_b")}),
    },
    loss={"sum": torch.sum, "square": lambda out: out.square().sum()},
)
def a_backend_refuses_to_be_differentiated_twice(subject, needs, loss):
    """Also with `autograd.grad`, which visits only the nodes that lead to the requested inputs."""
    name = subject.asked.partition(":")[0]
    leaves = calls.leaves_of(draw(subject), needs)
    out, asked = apply(subject, leaves), {name for name, t in leaves.items() if t.requires_grad}
    # without y, whose gradient is dy itself; no gradient depends on the bias
    for of in asked - {"y"}:
        (gradient,) = torch.autograd.grad(loss(out), [leaves[of]], create_graph=True)
        for towards in asked - {"y", "bias"}:
            with pytest.raises(RuntimeError, match=rf"backend='{name}' has no double backward.*backend='reference'"):
                torch.autograd.grad(
                    gradient.square().sum() + leaves[towards].square().sum(), [leaves[towards]], retain_graph=True
                )
        with pytest.raises(RuntimeError, match="has no double backward"):
            gradient.sum().backward(retain_graph=True)


@holds(by_backend, needs={"factors": 2, "all": None})
def gradients_with_a_graph_are_the_gradients(subject, needs):
    named = draw(subject)
    asked = list(named if needs is None else subject.adapter[:needs])
    want, leaves = run(subject, named, torch.ones(3, 2, 3), asked), calls.leaves_of(named, asked)
    got = torch.autograd.grad(apply(subject, leaves).sum(), [leaves[name] for name in asked], create_graph=True)
    for name, gradient in zip(asked, got, strict=True):
        assert torch.equal(gradient, want[name])


# layers


class Foreign(nn.Module):
    """A linear without a readable weight: it is assembled from two halves in each call."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.halves = nn.Parameter(plain.weight.detach() / 2, requires_grad=False)
        self.bias = nn.Parameter(plain.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.halves + self.halves).to(x.dtype), self.bias.to(x.dtype))


def conv1d(dtype: torch.dtype) -> nn.Module:
    utils = pytest.importorskip("transformers.pytorch_utils", reason="has Conv1D")
    return utils.Conv1D(9, 12).to(dtype)


BASES: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "linear": lambda dtype: nn.Linear(12, 9, dtype=dtype),
    "no-bias": lambda dtype: nn.Linear(12, 9, bias=False, dtype=dtype),
    "conv1d": conv1d,
}
FOREIGN = {"foreign": lambda dtype: Foreign(nn.Linear(12, 9, dtype=dtype))}


def bases(subject: Subject) -> Mapping[str, Callable[[torch.dtype], nn.Module]]:
    return FOREIGN if subject.adds else BASES


def inits(subject: Subject) -> dict[str, str]:
    return {init: init for init in subject.variant.inits if not (subject.adds and init in FROM_WEIGHT)}


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, 60).view(5, 12).to(dtype)


def layer_around(
    subject: Subject, base: Callable[[torch.dtype], nn.Module], dtype: torch.dtype, moved: bool = True, **options: Any
) -> CoToLoRALinear:
    """A layer whose scale is a power of two; if `moved`, its parameters differ from their initial values."""
    torch.manual_seed(0)
    options = {"rank": 4, "alpha": 8.0, "variant": subject.variant.name, **options}
    model = nn.Sequential(base(dtype))
    inject(model, ["0"], **options)
    layer = model[0]
    if moved:
        move(layer)
    return layer


@torch.no_grad()
def move(layer: CoToLoRALinear, by: float = 0.1) -> None:
    for parameter in layer.adapter_parameters:
        parameter.add_(by * torch.randn_like(parameter))


def linear_of(layer: CoToLoRALinear, x: Tensor) -> Tensor:
    """The result of the base."""
    if layer.base is not None:
        return layer.base(x)
    return F.linear(x, layer.weight.T if layer.fan_in_fan_out else layer.weight, layer.bias)


@holds(lambda s: not s.fused, base=bases, init=inits, dtype=lambda s: by_name(s.dtypes))
def a_fresh_layer_and_one_that_is_off_are_the_base(subject, base, init, dtype):
    x = inputs(dtype)
    with set_backend(subject.asked):
        for moved in (False, True):
            layer = layer_around(subject, base, dtype, moved, init=init)
            assert layer.lora_a.any()
            want = linear_of(layer, x)
            for gate in (False, torch.tensor(0), torch.zeros(5, dtype=torch.int32), True):
                layer.gate = gate
                if gate is True and not moved and layer.fan_in_fan_out:
                    torch.testing.assert_close(layer(x), want)
                else:
                    assert torch.equal(layer(x), want) == (not moved or gate is not True)
            layer.enabled = False
            assert torch.equal(layer.eval()(x), want)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(p.dtype == expected and p.requires_grad for p in layer.adapter_parameters)
        fresh = layer_around(subject, base, dtype, False, init=init)
        same_as = torch.testing.assert_close if fresh.fan_in_fan_out else equal
        for part in (x[0], x[:0], x.view(5, 1, 12)):
            same_as(fresh(part), linear_of(fresh, part))
        with torch.autocast("cpu", torch.bfloat16):
            same_as(fresh(x), linear_of(fresh, x))


def mergeable(subject: Subject) -> bool:
    return of_the_variant(subject) and of_linears(subject)


@holds(mergeable, base=BASES, init=inits, dtype=by_name((*LOW, torch.float64)))
def merging_keeps_the_output_and_unmerging_restores_the_weight_bitwise(subject, base, init, dtype):
    layer, x = layer_around(subject, base, dtype, init=init).eval(), inputs(dtype)
    weight, before, zero = layer.weight, layer.weight.clone(), torch.zeros((), dtype=torch.float64)
    matrix = weight.T if layer.fan_in_fan_out else weight
    bias = zero if layer.bias is None else layer.bias
    with torch.no_grad():
        y, delta = layer(x), layer.delta_weight()
        assert (delta.dtype, delta.shape) == (layer.lora_a.dtype, (9, 12))
        with torch.autocast("cpu", torch.bfloat16):  # must not round the merged weight
            assert torch.equal(layer.delta_weight(), delta)
        exact = x.double() @ (matrix.double() + delta.double()).T + bias.double()
        rounded = F.linear(x, (matrix.double() + delta.double()).to(dtype), layer.bias)
        for _ in range(2):
            layer.merge()
            assert layer.merged
            assert not torch.equal(layer.weight, before)
            if dtype == torch.float64:  # there is no more exact dtype to compare with
                torch.testing.assert_close(layer(x), y)
            else:
                assert_as_accurate_as_torch(layer(x), rounded, exact)
                assert_as_accurate_as_torch(y, rounded, exact, slack=3.0)
            torch.testing.assert_close(layer.delta_weight(), delta, rtol=0, atol=0)
            assert type(layer.to_linear()) is type(base(dtype))
            torch.testing.assert_close(layer.to_linear()(x), layer(x))
            layer.unmerge()
            assert not layer.merged
            assert layer.weight is weight
            assert torch.equal(weight, before)
            assert torch.equal(layer(x), y)


@holds(lambda s: of_the_variant(s) and s.adds)
def merging_into_a_missing_weight_is_refused(subject):
    layer = layer_around(subject, FOREIGN["foreign"], torch.float32)
    with pytest.raises(RuntimeError, match="no dense floating weight"):
        layer.merge()
    assert not layer.merged
    assert layer.to_linear(merge=False) is layer.base


@holds(base=bases, gate={"host": True, "off": torch.tensor(0), "rows": torch.tensor([1, 0, 1, 1, 0])})
def a_layer_trains_as_with_the_reference(subject, base, gate):
    """Trains several steps, which change the tensors that constants depend on; then eval() without gradients."""
    ends = []
    for name in ("reference", subject.asked):
        layer, x = layer_around(subject, base, torch.float32), inputs()
        layer.gate = gate
        optimizer = torch.optim.SGD(layer.adapter_parameters, lr=0.1)
        with set_backend(name):
            made = []
            for _ in range(3):
                made.append(layer(x))
                made[-1].square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            layer.eval()
            with torch.no_grad():
                made += [layer(x) for _ in range(2)]
        ends.append([*layer.adapter_parameters, *made])
    for theirs, ours in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs)


@holds(of_the_variant, base=bases, dtype=by_name((torch.float32, torch.bfloat16, torch.float64)))
def what_is_saved_is_what_is_loaded(subject, base, dtype):
    def model(seed):
        torch.manual_seed(seed)
        return nn.Sequential(base(dtype), base(dtype))[:1]

    def with_adapters(seed):
        made = model(seed)
        inject(made, ["0"], rank=4, alpha=8.0, variant=subject.variant.name)
        made.load_state_dict(model(0).state_dict())
        torch.manual_seed(seed)
        move(made[0])
        return made.eval()

    saved, plain, again, x = with_adapters(0), model(0).eval(), with_adapters(1), inputs(dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(saved, folder)
        for target in (plain, again):  # a model without adapters, and one that has them
            assert load_adapter(target, folder) == ([], [])
            assert adapters(target)["0"].variant == subject.variant.name
            assert torch.equal(target(x), saved(x))
            assert target.state_dict().keys() == saved.state_dict().keys()
            if subject.variant.peft.scaled or target is again:  # a file without a scale has it multiplied into B
                assert all(torch.equal(value, saved.state_dict()[key]) for key, value in target.state_dict().items())
    assert not torch.equal(saved(x), model(0)(x))


@holds(mergeable, base=BASES, init=inits)
def copies_and_casts_are_whole(subject, base, init):
    layer, x = layer_around(subject, base, torch.float32, init=init), inputs()
    y = layer(x)
    other = layer_around(subject, base, torch.float32, False, init=init)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
    own = {"weight", *(["bias"] if layer.bias is not None else []), *(part.attribute for part in subject.variant.parts)}
    assert set(layer.state_dict()) == own | ({"lora_a0", "lora_b0"} if init in FROM_WEIGHT else set())
    layer.half()
    torch.testing.assert_close(layer(x.half()).float(), y, rtol=0.02, atol=0.02)
    assert layer.double()(x.double()).dtype == torch.float64
