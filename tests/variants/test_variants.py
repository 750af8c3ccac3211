"""DoRA, HiRA and the inits computed from W: results, gates, gradients and layers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cotolora
from cotolora import CoToLoRALinear, coto_lora_linear, inject, load_adapter, reference, save_adapter, set_backend
from cotolora.backends.addmm import dora as addmm_dora
from cotolora.backends.addmm.dora import row_norms
from cotolora.backends.types import Needs, Operands, Options
from cotolora.functional import planned
from cotolora.functional import run as run_plan
from cotolora.training import reducer
from cotolora.variants import VARIANTS
from tests import conformance
from tests.support.calls import Subject
from tests.test_functional import BACKENDS, DTYPES, PRODUCTS, SCALE, CountProducts, operands

NAMES = {
    "dora": ("x", "weight", "bias", "lora_a", "lora_b", "magnitude"),
    "hira": ("x", "weight", "bias", "lora_a", "lora_b"),
}
KINDS = [
    pytest.param({"variant": "dora"}, id="dora"),
    pytest.param({"variant": "hira"}, id="hira"),
    pytest.param({"init": "pissa"}, id="pissa"),
    pytest.param({"init": "olora"}, id="olora"),
    pytest.param({"variant": "dora", "init": "pissa"}, id="dora-pissa"),
]
variants = pytest.mark.parametrize("variant", NAMES)


def draw(variant, shape=(3, 2, 4), out=3, rank=2, dtype=torch.float64, bias=True):
    """Operands by name; m differs from the norms of all rows."""
    named = operands(shape, out, rank, dtype=dtype, bias=bias)._asdict()
    if variant == "dora":
        named["magnitude"] = (torch.arange(out) % 5 + 1.5).to(torch.promote_types(dtype, torch.float32))
    return named


def run(variant, named, dy, needs, **options):
    """y and the requested gradients, by name."""
    leaves = {k: None if t is None else t.detach().clone().requires_grad_(k in needs) for k, t in named.items()}
    y = coto_lora_linear(**leaves, scale=SCALE, variant=variant, **options)
    asked = {k: t for k, t in leaves.items() if t is not None and t.requires_grad}
    gradients = torch.autograd.grad(y, list(asked.values()), dy, allow_unused=True)
    return {"y": y.detach(), **dict(zip(asked, gradients, strict=True))}


def double(variant, named):
    """The operands in float64; A and B are first rounded to x's dtype, as in the operation."""
    via = named["x"].dtype
    return {k: t if t is None else (t if k == "magnitude" else t.to(via)).double() for k, t in named.items()}


# the definitions


@variants
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_the_reference_equals_peft(variant, dropout, bias):
    """Equal seeds also show that dropout is applied at the same place."""
    peft = pytest.importorskip("peft", reason="compares with PEFT")
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias)
    if variant == "dora":
        config = peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=dropout, use_dora=True, target_modules=["0"])
    else:
        config = peft.HiraConfig(r=2, hira_dropout=dropout, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(base)))
    layer = CoToLoRALinear.from_linear(base, 2, 3.0 if variant == "dora" else 2.0, dropout=dropout, variant=variant)
    parameters = [p for name, p in theirs.named_parameters() if "lora_" in name or "hira_" in name]
    assert len(parameters) == len(layer.adapter_parameters)
    for p in parameters:
        p.requires_grad_()
    with torch.no_grad():
        if variant == "dora":  # also the initial magnitude
            torch.testing.assert_close(layer.lora_magnitude, parameters[2], rtol=0, atol=0)
        for ours, p in zip(layer.adapter_parameters, parameters, strict=True):
            ours.copy_(p.add_(0.3 * torch.randn_like(p)))
    found = []
    for module in (layer, theirs):
        x = torch.linspace(-1, 1, 24).view(2, 2, 6).requires_grad_()
        torch.manual_seed(1)
        with set_backend("reference"):
            y = module(x)
        adapter = layer.adapter_parameters if module is layer else parameters
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *adapter])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def apply(variant, named, norm=None, *, gate=True, dropout=0.0, backend=None, scale=SCALE):
    """Calls the operation; for DoRA with `norm` as the constant norm if it is given."""
    if norm is None:
        options = {"scale": scale, "gate": gate, "dropout": dropout, "variant": variant, "backend": backend}
        return coto_lora_linear(**named, **options)
    (out_features, in_features), rank = named["weight"].shape, named["lora_a"].shape[0]
    plan = planned(VARIANTS[variant], named["x"], rank, in_features, out_features, scale, dropout, backend)
    x, weight, bias, a, b, magnitude = (named[name] for name in NAMES[variant])
    return run_plan(plan, x, weight, bias, a, b, (magnitude, norm), None if gate is True else gate)


@pytest.fixture
def merges(monkeypatch):
    """Makes DoRA merge W and its update at every size; collects the calls whose gradients used this."""
    taken, right = [], addmm_dora._backward_of_merged
    monkeypatch.setattr(addmm_dora, "MERGED_ROWS", 0)
    monkeypatch.setattr(addmm_dora, "MERGED_ENTRIES", math.inf)
    monkeypatch.setattr(addmm_dora, "_backward_of_merged", lambda *args: taken.append(args) or right(*args))
    return taken


def of_dora(check, *arguments):
    return lambda: check(Subject(VARIANTS["dora"], "addmm"), *arguments)


MERGED_DORA = {
    "gradients": of_dora(conformance.gradients_are_those_of_the_function, True, 0.0),
    "no-norm": lambda: test_a_row_without_a_norm_keeps_its_length_and_its_magnitude("addmm"),
    "output": of_dora(conformance.changing_the_output_does_not_change_the_gradients),
    "start": of_dora(conformance.a_fresh_layer_and_one_that_is_off_are_the_base, conformance.BASES["linear"], "kaiming",
                     torch.float32),
    **{
        name: of_dora(conformance.is_as_accurate_as_the_reference, shape, torch.float32, True)
        for name, shape in conformance.SHAPES.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("what", MERGED_DORA)
def test_merged_dora_passes_the_tests_of_dora(what, merges):
    MERGED_DORA[what]()
    assert merges or what == "start"  # "start" computes no gradient


@pytest.mark.parametrize("change", [{"rows": 63}, {"in_features": 257}, {"dtype": torch.bfloat16}, {"dropout": 0.1}])
def test_only_small_weights_and_many_rows_are_merged(change):
    asked = {"rows": 64, "in_features": 256, "dtype": torch.float32, "dropout": 0.0}
    needs = Needs(*[True] * 5, (True,))

    def merged(rows, in_features, dtype, dropout, gate=None, needs=needs):
        tensors = (torch.ones(*size, dtype=dtype) for size in ((rows, in_features), (64, in_features), (64,)))
        factors = (torch.ones(*size) for size in ((2, in_features), (64, 2)))
        operands = Operands(*tensors, *factors, (torch.ones(64),))
        _, saved = addmm_dora.BACKEND.forward(operands, Options(SCALE, dropout, gate), needs)
        return isinstance(saved, addmm_dora.SavedMergedDora)

    assert merged(**asked)
    assert not merged(**asked | change)
    assert not merged(**asked, gate=torch.tensor(1))
    assert not merged(**asked, needs=needs._replace(a=False))


@pytest.mark.parametrize("wide", ["magnitude", "norm"])
def test_merged_dora_takes_a_magnitude_and_a_norm_of_any_dtype(wide, merges):
    named = draw("dora", dtype=torch.float32)
    norm = row_norms(named["weight"], named["lora_a"], named["lora_b"], SCALE)
    wider = {"norm": norm, **named} | {wide: {"norm": norm, **named}[wide].double()}
    norm = wider.pop("norm")
    plain = run("dora", named, torch.ones(3, 2, 3), set(named), backend="reference")
    leaves = {name: t.clone().requires_grad_() for name, t in wider.items()}
    y = apply("dora", leaves, norm, backend="addmm")
    y.backward(torch.ones(3, 2, 3))
    torch.testing.assert_close(y, plain["y"])
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == (torch.float64 if name == wide else torch.float32)
        torch.testing.assert_close(leaf.grad.float(), plain[name])
    assert merges


def test_explain_reports_merging():
    merged, plain = (cotolora.explain((rows, 64, 64, 8), variant="dora", dtype=torch.float32) for rows in (64, 63))
    assert [len(half) for half in (merged.forward, merged.backward)] == [4, 8]
    assert merged.saved_bytes == 4 * 64 * 64 + 8 * 64
    assert len(plain.backward) == 9


# off


# DoRA's norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_norm_computed_by_blocks_equals_the_norm(dtype, monkeypatch):
    ops = operands((1, 70), 50, 4, dtype=dtype, factors=torch.float64 if dtype == torch.float64 else torch.float32)
    lora_a, lora_b = (factor.to(dtype).double() for factor in (ops.lora_a, ops.lora_b))
    exact = torch.linalg.vector_norm(ops.weight.double() + 2.5 * lora_b @ lora_a, dim=1)
    monkeypatch.setattr("cotolora.backends.addmm.dora.BLOCK_CPU", 70 * 7)
    got = row_norms(ops.weight, ops.lora_a, ops.lora_b, 2.5)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.double(), exact, rtol=8 * torch.finfo(got.dtype).eps, atol=0)
    zero = torch.zeros_like(ops.lora_b)
    assert torch.equal(
        row_norms(ops.weight, ops.lora_a, zero, 2.5), reference.row_norms(ops.weight, ops.lora_a, zero, 2.5)
    )


def test_a_row_that_the_update_cancels_has_a_small_norm_and_not_nan():
    ops = operands((1, 64), 40, 3)
    weight = -2.0 * ops.lora_b @ ops.lora_a
    norm = row_norms(weight, ops.lora_a, ops.lora_b, 2.0)
    assert norm.isfinite().all()
    assert (norm <= 8 * torch.finfo(norm.dtype).eps * torch.linalg.vector_norm(weight, dim=1)).all()


class Sizes(TorchDispatchMode):
    """Records the number of entries of every tensor that an operation creates."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        views = func._schema.returns and any(r.alias_info for r in func._schema.returns)
        if isinstance(result, torch.Tensor) and not views:
            self.made.append(result.numel())
        return result


def test_dora_never_creates_a_matrix_of_the_size_of_the_weight(monkeypatch):
    monkeypatch.setattr("cotolora.backends.addmm.dora.BLOCK_CPU", 64 * 7)
    named = draw("dora", (8, 64), 96, 3, torch.float32)
    needing = [named[name].requires_grad_() for name in ("x", "lora_a", "lora_b", "magnitude")]
    with Sizes() as sizes:
        y = coto_lora_linear(**named, scale=SCALE, variant="dora", backend="addmm")
        torch.autograd.grad(y, needing, torch.ones(8, 96))
    assert 8 * 96 <= max(sizes.made) < 64 * 96


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_a_norm_keeps_its_length_and_its_magnitude(backend):
    named = draw("dora")
    named["weight"][1] = named["lora_b"][1] = 0
    got = run("dora", named, torch.ones(3, 2, 3, dtype=torch.float64), set(named), backend=backend)
    assert all(t.isfinite().all() for t in got.values())
    assert torch.equal(got["y"][..., 1], named["bias"][1].expand(3, 2))
    assert got["magnitude"][1] == 0
    assert (got["magnitude"][[0, 2]] != 0).all()
    # c is 1 for this row, as its output shows; all entries of dy are 1
    x = named["x"].reshape(-1, 4)
    torch.testing.assert_close(got["lora_b"][1], SCALE * (x @ named["lora_a"].T).sum(0))
    torch.testing.assert_close(got["weight"][1], x.sum(0))


def test_the_reference_treats_the_norm_as_a_constant_even_if_it_computes_it():
    named = {name: t.requires_grad_() for name, t in draw("dora").items()}
    norm = reference.row_norms(named["weight"], named["lora_a"], named["lora_b"], SCALE)
    found = []
    for given in (None, norm.detach()):
        y = reference.dora_linear(**named, scale=SCALE, norm=given)
        found.append(torch.autograd.grad(y.square().sum(), list(named.values())))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_update_of_hira_is_not_rounded_away(backend, dtype):
    """W is 1, so that W ∘ (1 + 1/4096) rounds to W in bfloat16 and float16, and the base's result is 0."""
    x = torch.tensor([[1.0, -1.0]], dtype=dtype, requires_grad=True)
    weight, lora_a, lora_b = (torch.tensor(t) for t in ([[1.0, 1.0]], [[1.0, 0.0]], [[1 / 4096]]))
    y = coto_lora_linear(x, weight.to(dtype), None, lora_a, lora_b, scale=1.0, variant="hira", backend=backend)
    assert y.item() == 1 / 4096


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_update_of_dora_is_not_rounded_away_from_the_gradient_of_x(backend, dtype):
    """The rows of W are equal and cancel in dy W, so that dx consists only of B A, which is 1/4096 of W."""
    x = torch.ones(5, 1, dtype=dtype, requires_grad=True)
    weight, lora_a, lora_b = (torch.tensor(t) for t in ([[1.0], [1.0]], [[1.0]], [[1 / 4096], [0.0]]))
    named = {"weight": weight.to(dtype), "bias": None, "lora_a": lora_a, "lora_b": lora_b}
    named |= {"x": x, "magnitude": torch.ones(2)}
    y = apply("dora", named, torch.ones(2), backend=backend, scale=1.0)
    y.backward(torch.tensor([[1.0, -1.0]], dtype=dtype).expand(5, 2))
    assert torch.equal(x.grad, torch.full_like(x, 1 / 4096))


# as the plain operation


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"variant": "nola"}, ValueError, r"variant must be one of .*; got 'nola'"),
        ({"variant": ["dora"]}, ValueError, "variant must be one of"),
        ({"magnitude": None}, TypeError, "magnitude must be a tensor with variant='dora'; got NoneType"),
        ({"magnitude": [1.0] * 3}, TypeError, "magnitude must be a tensor"),
        ({"magnitude": torch.ones(4)}, ValueError, r"magnitude must be \[3\] to fit weight; got shape \(4,\)"),
        ({"magnitude": torch.ones(3, 1)}, ValueError, r"magnitude must be \[3\]"),
        ({"magnitude": torch.ones(3, dtype=torch.int64)}, TypeError, "magnitude must be of a floating dtype"),
        (
            {"magnitude": torch.ones(3, device="meta")},
            ValueError,
            "magnitude must be on the device of x, cpu; got meta",
        ),
        (
            {"magnitude": None, "extra": (torch.ones(3), torch.ones(3))},
            ValueError,
            "extra must hold .*magnitude; got 2",
        ),
        ({"extra": (torch.ones(3),)}, ValueError, "magnitude and extra must not both be given"),
        ({"variant": "hira"}, ValueError, "magnitude belongs to variant='dora'; got one with variant='hira'"),
        (
            {"variant": "lora", "magnitude": None, "extra": (torch.ones(3),)},
            ValueError,
            "extra must hold .*none; got 1",
        ),
    ],
    ids=str,
)
def test_bad_arguments(change, error, match):
    with pytest.raises(error, match=match):
        coto_lora_linear(**{**draw("dora"), "scale": SCALE, "gate": False, "variant": "dora", **change})


# the layer


def layer_of(options, dtype=torch.float32, moved=True, **more):
    torch.manual_seed(0)
    base = nn.Linear(12, 9, dtype=dtype)
    layer = CoToLoRALinear.from_linear(base, 4, 6.0, **options, **more)
    if moved:
        move(layer)
    return layer


@torch.no_grad()
def move(layer, by=0.1):
    for parameter in layer.adapter_parameters:
        parameter.add_(by * torch.randn_like(parameter))


X = torch.linspace(-1, 1, 60).view(5, 12)


@pytest.mark.parametrize("options", KINDS)
def test_a_base_checkpoint_loads_and_a_fresh_adapter_follows_it(options):
    torch.manual_seed(1)
    base = nn.Linear(12, 9)
    fresh, trained = CoToLoRALinear(12, 9, 4, 6.0, **options), layer_of(options)
    kept = [p.detach().clone() for p in trained.adapter_parameters]
    for layer in (fresh, trained):
        layer.load_state_dict(base.state_dict(), strict=True)
        assert torch.equal(layer.weight, base.weight)
    assert torch.equal(fresh(X), base(X))
    assert all(torch.equal(p, k) for p, k in zip(trained.adapter_parameters, kept, strict=True))
    if fresh.lora_a0 is not None:
        want = CoToLoRALinear.from_linear(base, 4, 6.0, **options)
        assert torch.equal(fresh.lora_a0, want.lora_a0)


def test_meta():
    layer = CoToLoRALinear(12, 9, 4, variant="dora", device="meta").to_empty(device="cpu")
    base = nn.Linear(12, 9)
    layer.load_state_dict(base.state_dict())
    layer.reset_parameters()
    assert torch.equal(layer(X), base(X))
    for init in ("pissa", "olora"):
        with pytest.raises(ValueError, match=f"init must be 'kaiming' or 'gaussian' on the meta device.*'{init}'"):
            CoToLoRALinear(12, 9, 4, init=init, device="meta")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"variant": "nola"}, r"variant must be one of .*; got 'nola'"),
        ({"init": "eva"}, "init must be one of .*; got 'eva'"),
        ({"init": "pissa", "variant": "hira"}, "init must be one of .*'gaussian'.* with variant='hira'; got 'pissa'"),
        ({"init": "pissa", "rank": 10}, "rank must be at most 9 with init='pissa'.*got 10"),
        ({"init": "olora", "rank": 10}, "rank must be at most 9 with init='olora'.*got 10"),
        ({"init": "pissa", "alpha": -1.0}, r"alpha must be positive with init='pissa'; got -1\.0"),
        ({"init": "olora", "alpha": 0}, r"alpha must be positive with init='olora'; got 0\.0"),
        ({"init": "pissa", "alpha": 1e-90}, "alpha must leave A and B finite with init='pissa'; got a scale of"),
    ],
    ids=str,
)
def test_impossible_layers_are_refused(options, match):
    model = nn.Sequential(nn.Linear(12, 9))
    for make in (
        lambda: CoToLoRALinear(12, 9, **options),
        lambda: CoToLoRALinear.from_linear(nn.Linear(12, 9), **options),
        lambda: inject(model, **options),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("alpha", [0.0, 1e-90])
@pytest.mark.parametrize(("variant", "factor"), [("hira", "lora_b"), ("vera", "vera_lambda_b")])
def test_loading_with_a_vanishing_scale_is_refused(variant, factor, alpha, tmp_path):
    def model(alpha):
        made = nn.Sequential(nn.Linear(4, 3))
        nn.init.ones_(getattr(inject(made, ["0"], rank=2, alpha=alpha, variant=variant)["0"], factor))
        return made

    save_adapter(model(2.0), tmp_path)
    tiny = model(alpha)
    before = copy.deepcopy(tiny.state_dict())
    with pytest.raises(ValueError, match="scale"):
        load_adapter(tiny, tmp_path)
    torch.testing.assert_close(tiny.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("options", KINDS[:2])
def test_an_alpha_of_zero_is_an_update_of_zero(options):
    layer, x = CoToLoRALinear(6, 4, rank=2, alpha=0, **options), torch.randn(3, 6, requires_grad=True)
    nn.init.normal_(layer.lora_b)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not layer.lora_a.grad.any()
    assert not layer.lora_b.grad.any()
    layer.merge()
    torch.testing.assert_close(layer.weight, layer._original_weight)


# DoRA's norm in eval()


def test_the_norm_follows_every_way_of_writing_the_tensors(tmp_path):
    model = nn.Sequential(layer_of({"variant": "dora"})).eval()
    layer = model[0]
    changes = {
        "an optimizer": lambda: train_a_step(model),
        "a write": lambda: move(layer),
        "data": lambda: setattr(layer.lora_b, "data", layer.lora_b.data + 0.1),
        "vector_to_parameters": lambda: nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(model.parameters()) + 0.1, model.parameters()
        ),
        "load_state_dict": lambda: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}),
        "assign": lambda: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}, assign=True),
        "to": lambda: model.double().float(),
        "merge": lambda: (layer.merge(), setattr(layer.lora_b, "data", layer.lora_b.data + 0.1), layer.unmerge()),
        "reset_parameters": lambda: layer.reset_parameters(),
    }
    for name, change in changes.items():
        with torch.no_grad():
            model(X)
        change()
        with torch.no_grad():
            got = model(X)
            with set_backend("reference"):
                torch.testing.assert_close(got, model(X), msg=name)
    # other tensors in their places, for one call
    given = {name: p.detach() + 0.2 for name, p in model.named_parameters()}
    with torch.no_grad():
        model(X)
        got = torch.func.functional_call(model, given, (X,))
        model.load_state_dict(given)
        torch.testing.assert_close(got, model(X))


def train_a_step(model):
    optimizer = torch.optim.AdamW(cotolora.adapter_parameters(model), lr=0.1, fused=True)
    model(X).sum().backward()  # in eval(), as some do
    optimizer.step()


# inits taken from W


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initial_factors_equal_pefts_and_the_weight_is_unchanged(init, rslora):
    peft = pytest.importorskip("peft", reason="compares with PEFT")
    layer = layer_of({"init": init}, moved=False, use_rslora=rslora)
    weight = layer.weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, use_rslora=rslora, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(layer.to_linear(merge=False))))[0]
    torch.testing.assert_close(layer.lora_a, theirs.lora_A["default"].weight)
    torch.testing.assert_close(layer.lora_b, theirs.lora_B["default"].weight)
    part = layer.scale * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(weight - part, theirs.base_layer.weight)
    if init == "pissa":  # the best approximation of its rank
        u, s, v = torch.linalg.svd(weight)
        torch.testing.assert_close(part, u[:, :4] @ s[:4].diag() @ v[:4])
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_small_steps_from_a_nonzero_start_are_not_lost(init):
    """In bfloat16, B A and the initial product would cancel only up to rounding, thousands of times the step."""
    layer = layer_of({"init": init}, torch.bfloat16, moved=False)
    with torch.no_grad():
        layer.lora_b.add_(1e-6)
    # the step that the float32 factors can represent
    step = layer.scale * (layer.lora_b - layer.lora_b0).double() @ layer.lora_a.double()
    torch.testing.assert_close(layer.delta_weight().double(), step, rtol=0.1, atol=1e-7)
    # also in the forward, which casts the factors; a base with zero output makes it visible
    a, b = layer.factors()
    x = X.bfloat16()
    got = coto_lora_linear(x, torch.zeros_like(layer.weight), None, a, b, scale=layer.scale)
    # rounding errors are relative to the sum of magnitudes, because the terms may cancel
    most = (x.double().abs() @ step.abs().T).max()
    assert (got.double() - x.double() @ step.T).abs().max() < 0.005 * most
    # and its gradients are those of B A for any start
    x = X.bfloat16().requires_grad_()
    got = torch.autograd.grad(layer(x).sum(), [layer.lora_a, layer.lora_b])
    plain = coto_lora_linear(x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, scale=layer.scale)
    for g, w in zip(got, torch.autograd.grad(plain.sum(), [layer.lora_a, layer.lora_b]), strict=True):
        torch.testing.assert_close(g, w, rtol=0.05, atol=0.05)


# models


@pytest.mark.parametrize("options", KINDS)
def test_a_model_with_adapters_of_a_kind(options):
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 9))
    plain = model(X)
    layers = inject(model, rank=2, **options)
    assert torch.equal(model(X), plain)
    mine = cotolora.adapter_parameters(model)
    assert [id(p) for p in mine] == [id(p) for layer in layers.values() for p in layer.adapter_parameters]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in mine}
    assert f"trainable params: {sum(p.numel() for p in mine)} " in cotolora.trainable_report(model)
    slow, fast = cotolora.lora_plus_groups(model, 1e-3)
    assert [id(p) for p in fast["params"]] == [id(layer.lora_b) for layer in layers.values()]
    assert {id(p) for p in slow["params"]} == {id(p) for p in mine} - {id(p) for p in fast["params"]}
    for layer in layers.values():
        move(layer)
    mixed = model(X)
    with cotolora.adapter_mask(model, [True, False]):
        one = model(X)
    assert not torch.allclose(one, mixed)
    with cotolora.adapter_mask(model, torch.tensor([[1, 1]] * 4 + [[1, 0]])):
        rows = model(X)
    torch.testing.assert_close(rows, torch.cat([mixed[:4], one[4:]]))
    with torch.no_grad():
        before = model(X)
        cotolora.eject(model)
        torch.testing.assert_close(model(X), before)


def test_an_adapter_that_is_off_has_no_gradient_of_its_magnitude(monkeypatch):
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 9))
    layers = list(inject(model, rank=2, variant="dora").values())
    steps = cotolora.CoTo(model, 10, unit="module", gates="device")
    optimizer = torch.optim.AdamW(cotolora.adapter_parameters(model), lr=0.1)
    steps.attach(optimizer)
    steps.set_step(next(t for t in range(10) if (steps.set_step(t), steps.mask.tolist() == [True, False])[1]))
    before = layers[1].lora_magnitude.detach().clone()
    model(X).square().sum().backward()
    assert [[p.grad is not None for p in layer.adapter_parameters] for layer in layers] == [[True] * 3] * 2
    assert not layers[1].lora_magnitude.grad.any()
    optimizer.step()
    assert [p.grad for p in layers[1].adapter_parameters] == [None] * 3
    assert torch.equal(layers[1].lora_magnitude, before)
    # and DDP's reducer sees all three where a host gate is off
    monkeypatch.setattr(reducer.dist, "is_initialized", lambda: True)
    model.zero_grad()
    layers[1]._set_switch("_gate", False)
    model(X).square().sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layers[1].adapter_parameters)


@pytest.mark.slow
@pytest.mark.parametrize("options", KINDS)
def test_compiled_whole(options):
    layer = layer_of(options)
    layer.gate = torch.tensor(1)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    for module in (layer, compiled):
        y = module(X)
        found.append([y, *torch.autograd.grad(y.square().sum(), layer.adapter_parameters)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("variant", ["lora", "dora", "hira"])
def test_a_traced_forward_writes_no_product_in_place(variant, dropout, monkeypatch):
    """The compiler of torch 2.11 takes the gradient of an output that is written in place for zero."""
    layer = layer_of({"variant": variant}, dropout=dropout)

    def forbidden(*_, **__):
        raise AssertionError("written in place")

    monkeypatch.setattr(torch.Tensor, "addmm_", forbidden)
    if variant != "hira" or dropout:
        with pytest.raises(AssertionError, match="written in place"):
            layer(X)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layer(X)


def test_explain_says_what_runs_a_variant():
    plan = cotolora.explain(layer_of({"variant": "hira"}), rows=8)
    assert plan.backend == "addmm"
    assert str(plan).startswith("hira, rows 8, 12 -> 9")
    dropping = cotolora.explain(layer_of({"variant": "dora"}, dropout=0.5), rows=8)
    assert any("DoRA with dropout" in reason for reason in dropping.others["triton"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_explain_lists_the_products_that_addmm_computes(variant, dtype):
    layer = CoToLoRALinear.from_linear(nn.Linear(96, 64).to(dtype), rank=4, variant=variant)
    plan = cotolora.explain(layer, rows=32)
    with CountProducts() as forward:
        y = layer(torch.ones(32, 96, dtype=dtype, requires_grad=True))
    with CountProducts() as backward:
        y.sum().backward()
    listed = [sum(launch.kernel in PRODUCTS for launch in half) for half in (plan.forward, plan.backward)]
    assert [forward.count, backward.count] == listed
