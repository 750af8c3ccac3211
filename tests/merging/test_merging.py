"""Merging: each operator against its definition in float64 and against PEFT, and errors."""

import copy
import itertools
import json
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cotolora import adapters, inject, load_adapter, save_adapter
from cotolora.merging import AdapterState, Factors, align, dare, ensemble, fuse, lego, mix, ties
from cotolora.merging.alignment import Misfit, best_basis
from cotolora.merging.kmeans import kmeans
from tests.support.tolerance import assert_as_accurate_as_torch

SIZES = {"q": (7, 9), "blocks.0.up": (12, 5)}  # out, in


def random_state(seed, rank=3, alpha=6.0, use_rslora=False, sizes=SIZES, **other_tensors):
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: Factors(
            torch.randn(rank, n_in, generator=generator),
            torch.randn(n_out, rank, generator=generator),
            alpha,
            use_rslora,
        )
        for name, (n_out, n_in) in sizes.items()
    }
    return AdapterState(factors, other_tensors)


def delta(state, name, dtype=torch.float64):
    """The update, computed directly."""
    part = state.factors[name]
    rank = part.lora_a.shape[0]
    scale = part.alpha / (rank**0.5 if part.use_rslora else rank)
    return scale * (part.lora_b.to(dtype) @ part.lora_a.to(dtype))


def mixture(states, weights, name, dtype=torch.float64):
    return sum(weight * delta(state, name, dtype) for state, weight in zip(states, weights, strict=True))


def assert_same_update(state, states, weights):
    for name in SIZES:
        ours = state.factors[name].delta()
        assert_as_accurate_as_torch(
            ours, mixture(states, weights, name, torch.float32), mixture(states, weights, name), slack=4
        )


@pytest.fixture
def rng_untouched():
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(self.norm(x))


X = torch.linspace(-1, 1, 24).reshape(4, 6)
TRAINABLE = {"targets": ["blocks.0", "blocks.1"], "trainable": ["head", "norm"]}


def base():
    torch.manual_seed(0)
    return Net().eval()


@torch.no_grad()
def tuned(seed=1, model=None, **options):
    model = base() if model is None else model
    inject(model, **{**TRAINABLE, "rank": 2, **options})
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    if model.norm.weight.requires_grad:
        model.norm.running_mean += seed / 10
        model.norm.num_batches_tracked += seed
    return model


@torch.no_grad()
def out(model):
    return model(X)


def same(one, two):
    assert list(one.factors) == list(two.factors)
    for name, part in one.factors.items():
        other = two.factors[name]
        assert torch.equal(part.lora_a, other.lora_a)
        assert torch.equal(part.lora_b, other.lora_b)
        assert (part.alpha, part.use_rslora) == (other.alpha, other.use_rslora)
    assert one.other_tensors.keys() == two.other_tensors.keys()
    assert all(torch.equal(tensor, two.other_tensors[key]) for key, tensor in one.other_tensors.items())
    assert one.kept == two.kept
    return True


# states


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"blocks.1": 3}, "alpha_pattern": {"blocks.0": 1.7}, "dropout": 0.1},
        {"use_rslora": True, "rank": 3},
        {"trainable": ()},
    ],
    ids=["head", "patterns", "rslora", "adapters-alone"],
)
def test_a_state_equals_the_saved_files(options, tmp_path):
    model = tuned(**options)
    state = AdapterState.from_model(model)
    save_adapter(model, tmp_path / "ours")
    state.save(tmp_path / "state")
    assert same(AdapterState.from_directory(tmp_path / "ours"), state)
    assert same(AdapterState.from_directory(tmp_path / "state"), state)
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "state"))
    del ours["target_modules"], theirs["target_modules"]  # a list in one, an expression in the other
    assert ours == theirs

    loaded, placed, onto = base(), base(), tuned(seed=9, **options)
    load_adapter(loaded, tmp_path / "state")
    for other in (placed, onto):
        assert state.load_into(other) == ([], [])
    for other in (loaded, placed, onto):
        assert torch.equal(out(other), out(model))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_a_state_is_a_copy_and_can_be_loaded_elsewhere():
    model = tuned()
    expected = out(model)
    state = AdapterState.from_model(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.running_mean.zero_()
    for other in (state, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        fresh = base()
        other.load_into(fresh)
        assert torch.equal(out(fresh), expected)
    with pytest.raises(AttributeError):
        state.factors = {}


def test_half_precision_becomes_float32():
    tensors = {"q.lora_A.weight": torch.ones(1, 3).half(), "q.lora_B.weight": torch.ones(2, 1).bfloat16()}
    part = AdapterState.from_tensors(tensors, alpha=1).factors["q"]
    assert part.lora_a.dtype == part.lora_b.dtype == torch.float32
    double = AdapterState.from_tensors({k: t.double() for k, t in tensors.items()}, alpha=1)
    for pair in itertools.permutations([double, random_state(0, sizes={"q": (2, 3)})]):
        assert mix(pair).factors["q"].lora_a.dtype == torch.float64


def test_tensors_get_their_scale_from_alpha_or_a_model():
    model = tuned(alpha=5.0, use_rslora=True)
    state = AdapterState.from_model(model)
    tensors = {"base_model.model." + key: tensor for key, tensor in state._saved().tensors.items()}
    for given in ({"alpha": 5.0, "use_rslora": True}, {"like": model}):
        other = AdapterState.from_tensors(tensors, **given)
        assert all(torch.equal(part.delta(), state.factors[name].delta()) for name, part in other.factors.items())
        assert other.other_tensors.keys() == state.other_tensors.keys()


A, B = "q.lora_A.weight", "q.lora_B.weight"
BAD_TENSORS = {
    "nothing": ({}, r"at least one adapter; got \{\}"),
    "half": ({A: torch.ones(2, 3)}, "lora_A and lora_B of q; got only lora_A"),
    "ranks": (
        {A: torch.ones(2, 3), B: torch.ones(4, 1)},
        r"factors of q; .*\[rank, in.*\(2, 3\) and \(4, 1\)",
    ),
    "vector": ({A: torch.ones(2), B: torch.ones(4, 2)}, r"lora_a of q must be a floating matrix; got .*\(2,\)"),
    "integers": ({A: torch.ones(2, 3).long(), B: torch.ones(4, 2)}, "lora_a of q must be a floating .*int64"),
    "nan": ({A: torch.ones(2, 3), B: torch.full((4, 2), math.nan)}, "lora_b of q must be finite"),
    "inf-head": (
        {A: torch.ones(2, 3), B: torch.ones(4, 2), "head.bias": torch.tensor([math.inf])},
        "head.bias must be finite",
    ),
    "dora": ({A: torch.ones(2, 3), "q.lora_magnitude_vector": torch.ones(4)}, "plain LoRA.*q.lora_magnitude_vector"),
    "hira": ({"q.hira_A": torch.ones(2, 3)}, "plain LoRA.*q.hira_A"),
    "embedding": ({"q.lora_embedding_A": torch.ones(2, 3)}, "plain LoRA.*q.lora_embedding_A"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused(case):
    tensors, match = BAD_TENSORS[case]
    with pytest.raises(ValueError, match=match):
        AdapterState.from_tensors(tensors, alpha=1)


def test_bad_scales_are_refused():
    tensors = {A: torch.ones(2, 3), B: torch.ones(4, 2)}
    for given, match in (
        ({}, "exactly one of alpha and like must be given, for the scale; got neither"),
        ({"alpha": 1, "like": base()}, "got both"),
        ({"alpha": math.inf}, "alpha must be a finite number; got inf"),
        ({"like": tuned()}, "of adapters that like has; got q"),
    ):
        with pytest.raises(ValueError, match=match):
            AdapterState.from_tensors(tensors, **given)
    ours = {key.replace("q", "blocks.0"): tensor for key, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"rank of its tensors for blocks.0; got 3, the tensors have 2"):
        AdapterState.from_tensors(ours, like=tuned(rank=3))


@pytest.mark.parametrize("merged", [False, True])
def test_applied_to_restores_everything(merged):
    model, other = tuned(), tuned(seed=2, rank=3, alpha=1.0)
    expected, after = out(other), None
    if merged:
        for layer in adapters(model).values():
            layer.merge()
    before = out(model)
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    values = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), AdapterState.from_model(other).applied_to(model):  # noqa: PT012
        after = out(model)
        assert [layer.rank for layer in adapters(model).values()] == [3, 3]
        raise RuntimeError("inside")
    assert torch.equal(after, expected)
    assert torch.equal(out(model), before)
    assert all(layer.merged is merged and layer.rank == 2 for layer in adapters(model).values())
    if not merged:  # a merged weight is computed again, with rounding
        assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == parameters
    assert all(torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())


def test_a_state_that_does_not_fit_is_refused():
    model, state = tuned(), AdapterState.from_model(tuned(seed=2))
    less = AdapterState({"blocks.0": state.factors["blocks.0"]}, state.other_tensors)
    more = AdapterState({**state.factors, "q": state.factors["blocks.0"]})
    wide = random_state(0, sizes={"blocks.0": (6, 7), "blocks.1": (6, 6)})
    head = AdapterState(state.factors, {"head.bias": torch.ones(4)})
    before = out(model)
    for bad, match in (
        (less, r"only the model has \['blocks.1'\]"),
        (more, r"only the state has \['q'\]"),
        (wide, r"blocks.0 must be 6 x 6 as in the model; the state's is \(6, 7\)"),
        (head, r"head.bias must be in the model, of shape \(4,\); it is of shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=match), bad.applied_to(model):
            pass
        with pytest.raises(ValueError):
            bad.load_into(model)
        assert torch.equal(out(model), before)
    with pytest.raises(ValueError, match="rank and scale of the file, 4 and 1; the model's are 2"):
        mix([state, state]).load_into(model)


# fuse and mix


def test_fuse_adds_factors():
    states, weights = [random_state(i) for i in range(3)], [0.5, -1.0, 2.0]
    fused = fuse(states, weights)
    for name in SIZES:
        for factor in ("lora_a", "lora_b"):
            terms = [getattr(state.factors[name], factor) for state in states]
            exact = sum(w * t.double() for w, t in zip(weights, terms, strict=True))
            torch_own = sum(w * t for w, t in zip(weights, terms, strict=True))
            assert_as_accurate_as_torch(getattr(fused.factors[name], factor), torch_own, exact)
        assert fused.factors[name].scale == states[0].factors[name].scale
    assert same(fuse(states[:1], [1]), states[0])
    assert same(fuse([states[0]] * 2), fuse([states[0]] * 2, [0.5, 0.5]))


ANY = [random_state(0, rank=2, alpha=3.0), random_state(1, rank=4, use_rslora=True), random_state(2, rank=1, alpha=-1)]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -2.0, 0.0]])
def test_mix_is_exact(weights):
    mixed = mix(ANY, weights)
    assert [part.rank for part in mixed.factors.values()] == [7, 7]
    assert_same_update(mixed, ANY, weights)
    assert_same_update(mix(ANY, weights, rank=7), ANY, weights)
    assert_same_update(mix(ANY), ANY, [1 / 3] * 3)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_mix_is_truncated_to_the_best_approximation_of_its_rank(rank):
    cut = mix(ANY, [1.0, 0.5, -1.0], rank=rank)
    for name in SIZES:
        exact = mixture(ANY, [1.0, 0.5, -1.0], name)
        tail = torch.linalg.svdvals(exact)[rank:].square().sum().sqrt()
        assert cut.factors[name].rank == min(rank, *SIZES[name])
        error = (cut.factors[name].delta().double() - exact).norm()
        assert error <= tail + 1e-6 * exact.norm()  # the optimum by the Eckart-Young theorem


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize(
    "merge", [lambda s: mix(s, rank=2), lambda s: align(*s), lambda s: lego(s, 3), fuse, ties, dare]
)
def test_no_product_is_formed(merge):
    states = [random_state(seed, sizes={"q": (300, 200)}) for seed in range(2)]
    with Largest() as largest:
        merge(states)
    assert 0 < largest.numel < 300 * 200 / 5


def test_other_trained_tensors_are_averaged(tmp_path):
    models = [tuned(seed=1), tuned(seed=2)]
    save_adapter(models[1], tmp_path)
    for merge in (fuse, mix):
        merged = merge([models[0], tmp_path], [3.0, 1.0])
        one, two = (AdapterState.from_model(model).other_tensors for model in models)
        for key, tensor in merged.other_tensors.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, 0.75 * one[key] + 0.25 * two[key])
        assert merged.other_tensors["norm.num_batches_tracked"] == 1  # the first's
        fresh = base()
        merged.load_into(fresh)
        assert torch.equal(fresh.head.bias, merged.other_tensors["head.bias"])
    with pytest.raises(ValueError, match="must not sum to 0"):
        mix(models, [1, -1])
    assert_same_update(mix(ANY[:2], [1, -1]), ANY[:2], [1, -1])


# align


def misfit(one, two, name):
    p, q = one.factors[name], two.factors[name]
    return ((p.lora_b - q.lora_b).double() @ (p.lora_a - q.lora_a).double()).norm().item()


def turned(state, p):
    """The same products in another basis."""
    return AdapterState(
        {
            name: Factors(torch.linalg.solve(p, part.lora_a), part.lora_b @ p, part.alpha)
            for name, part in state.factors.items()
        }
    )


PERMUTATION = torch.eye(3)[[2, 0, 1]]
BASES = {
    "permuted": PERMUTATION,
    "signs": torch.diag(torch.tensor([1.0, -1.0, -1.0])),
    "scaled": 10 * torch.eye(3),
    "any": torch.tensor([[2.0, 1.0, 0.0], [-1.0, 0.5, 0.3], [0.2, 0.0, -1.5]]),
}


@pytest.mark.parametrize("case", BASES)
def test_align_finds_the_basis(case, rng_untouched):
    state = random_state(0)
    other = turned(state, BASES[case])
    aligned = align(other, state)
    for name in SIZES:
        assert misfit(state, aligned, name) < 1e-9 * misfit(state, other, name)
    assert_same_update(fuse([state, aligned]), [state], [1])


@pytest.mark.parametrize(("case", "exact"), [("permuted", [1, 2, 3]), ("any", [1, 2])])
def test_the_initial_basis_of_align(case, exact):
    one, two = random_state(0).factors["q"], turned(random_state(0), BASES[case]).factors["q"]
    found = Misfit(one.lora_a, one.lora_b, two.lora_a, two.lora_b)
    untouched, *others = (found(p) for p in found.starts())
    assert [i for i, value in enumerate(others, 1) if value < 1e-9 * untouched] == exact


def test_align_keeps_the_product_and_reduces_the_distance(rng_untouched):
    state, other = random_state(0), random_state(1, head=torch.ones(2))
    with torch.inference_mode():
        aligned = align(other, AdapterState(state.factors, {"head": torch.zeros(2)}))
    assert torch.equal(aligned.other_tensors["head"], torch.ones(2))
    assert_same_update(aligned, [other], [1])
    aligned = AdapterState(aligned.factors)
    for name in SIZES:
        assert misfit(state, aligned, name) < 0.9 * misfit(state, other, name)
        # align minimises the distance between fusing and mixing, for any λ
        for weight in (0.5, 0.2):
            pair, weights = [state, aligned], [weight, 1 - weight]
            apart = (delta(fuse(pair, weights), name) - mixture(pair, weights, name)).norm().item()
            scale = state.factors[name].scale * weight * (1 - weight)
            assert math.isclose(apart, scale * misfit(state, aligned, name), rel_tol=1e-4)


def test_align_is_never_worse_than_no_change():
    assert same(align(random_state(0), random_state(0)), random_state(0))
    zero = AdapterState({n: Factors(p.lora_a, 0 * p.lora_b, p.alpha) for n, p in random_state(1).factors.items()})
    for one, two in itertools.product([random_state(0), zero, random_state(2, sizes=SIZES)], repeat=2):
        for name in SIZES:
            assert misfit(one, align(two, one), name) <= misfit(one, two, name) * (1 + 1e-6)


def test_align_bounds_the_condition_of_the_basis():
    state, other = random_state(0), turned(random_state(0), torch.diag(torch.tensor([100.0, 1.0, 1.0])))
    for limit in (1.0, 3.0, 1e3):
        aligned = align(other, state, max_condition=limit)
        for name in SIZES:
            p = torch.linalg.pinv(other.factors[name].lora_b.double()) @ aligned.factors[name].lora_b.double()
            assert torch.linalg.cond(p) <= limit * (1 + 1e-3)
            assert misfit(state, aligned, name) <= misfit(state, other, name)


def test_the_misfit_and_its_gradient():
    state, other = random_state(0).factors["q"], random_state(1).factors["q"]
    f = Misfit(state.lora_a, state.lora_b, other.lora_a, other.lora_b)
    p = BASES["any"].double().requires_grad_()
    b, a = other.lora_b.double() @ p, torch.linalg.solve(p, other.lora_a.double())
    exact = ((state.lora_b - b) @ (state.lora_a - a)).square().sum()
    exact.backward()
    value, gradient = f.gradient(p.detach())
    torch.testing.assert_close(value, exact.detach())
    assert math.isclose(f(p.detach()), exact.item(), rel_tol=1e-9)
    torch.testing.assert_close(gradient, p.grad)
    # L-BFGS returns a stationary point
    best = best_basis(f, 500, 1e6)
    assert f.gradient(best)[1].norm() < 1e-3 * gradient.norm()


# lego


def test_lego_with_every_unit_is_the_concatenation(rng_untouched):
    whole = lego(ANY, 7, reweight=False)
    assert_same_update(whole, ANY, [1, 1, 1])
    assert_same_update(lego(ANY, 100, reweight=False), ANY, [1, 1, 1])
    # the paper's scale: √(mean rank / rank)
    assert_same_update(lego(ANY, 7), ANY, [math.sqrt(7 / 3 / 7)] * 3)


def test_lego_does_not_depend_on_the_order_of_units():
    state = random_state(0, rank=3)
    copies = [state, turned(state, PERMUTATION), turned(state, PERMUTATION.T)]
    for seed in range(5):
        assert_same_update(lego(copies, 3, seed=seed), [state], [1])
        assert not torch.allclose(fuse(copies).factors["q"].delta(), state.factors["q"].delta())


def test_lego_stretches_its_centres():
    # two separate pairs of units: (1, 0) and (0.6, 0.8) in both B and A, and a distant one with its copy
    states = [
        AdapterState({"q": Factors(torch.tensor([[1.0, 0.0], [0.0, 9.0]]), torch.tensor([[1.0, 9], [0, 0]]), 2.0)}),
        AdapterState({"q": Factors(torch.tensor([[0.6, 0.8], [0.0, 9.0]]), torch.tensor([[0.6, 9], [0.8, 0]]), 2.0)}),
    ]
    plain, stretched = (lego(states, 2, reweight=reweight).factors["q"].delta() for reweight in (False, True))
    near, far = torch.tensor([0.8, 0.4]), 81 * torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(plain, torch.outer(near, near) + far)
    # each unit has norm √2, their mean √(2 · 0.8)
    torch.testing.assert_close(stretched, torch.outer(near, near) / 0.8 + far)


def test_lego_is_determined_by_its_seed(rng_untouched):
    states = [random_state(i, rank=8) for i in range(3)]
    assert same(lego(states, 5, seed=3), lego(states, 5, seed=3))
    others = [lego(states, 5, seed=seed).factors["q"].lora_a for seed in range(5)]
    assert any(not torch.equal(others[0], other) for other in others[1:])
    assert all(part.rank == 5 for part in lego(states, 5).factors.values())
    opposite = AdapterState({n: Factors(-p.lora_a, -p.lora_b, p.alpha) for n, p in states[0].factors.items()})
    lego([states[0], opposite], 1)  # the only centre is zero and must not give NaN


@pytest.mark.parametrize("copies", [1, 3])
def test_kmeans_converges_without_empty_clusters(copies):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(6, 2, generator=generator).double().repeat(copies, 1)
    for clusters in range(1, len(points) + 2):
        labels = kmeans(points, clusters, generator)
        clusters = min(clusters, len(points))
        assert sorted(set(labels.tolist())) == list(range(clusters))
        centres = torch.stack([points[labels == i].mean(0) for i in range(clusters)])
        distances = torch.cdist(points, centres)
        if clusters <= 6:  # with more clusters, copies of a point must be separated
            own = distances.gather(1, labels[:, None])[:, 0]
            assert (own <= distances.min(1).values + 1e-12).all()


# PEFT


WEIGHTS = [0.7, -0.4]
PEFTS = {
    # PEFT multiplies A and B by the square root of each weight
    "linear": (lambda s: fuse(s, [0.7, 0.4]), {"weights": [0.7**2, 0.4**2]}),
    "cat": (lambda s: mix(s, WEIGHTS), {}),
    "svd": (lambda s: mix(s, WEIGHTS, rank=2), {"svd_rank": 2}),
    "ties": (lambda s: ties(s, WEIGHTS, 0.4), {"density": 0.4}),
    "ties_svd": (lambda s: ties(s, WEIGHTS, 0.4, of="products"), {"density": 0.4}),
    "dare_linear": (lambda s: dare(s, WEIGHTS, 0.3, seed=5), {"density": 0.7}),
    "dare_linear_svd": (
        lambda s: dare(s, WEIGHTS, 0.3, seed=5, of="products", rank=2),
        {"density": 0.7, "svd_rank": 2},
    ),
}


@pytest.mark.parametrize("kind", PEFTS)
@pytest.mark.filterwarnings("ignore")
def test_equals_peft(kind, peft, monkeypatch):
    merge, options = PEFTS[kind]
    model = nn.ModuleDict({name: nn.Linear(n_in, n_out) for name, (n_out, n_in) in {"q": (7, 9), "k": (5, 6)}.items()})
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q", "k"])
    states = [random_state(seed, sizes={"q": (7, 9), "k": (5, 6)}) for seed in range(2)]
    wrapped = peft.PeftModel(model, config, adapter_name="0")
    wrapped.add_adapter("1", config)
    for i, state in enumerate(states):
        tensors = {f"base_model.model.{key}": tensor for key, tensor in state._saved().tensors.items()}
        peft.set_peft_model_state_dict(wrapped, tensors, adapter_name=str(i))
    if kind.startswith("dare"):  # makes PEFT draw in our order: one stream over modules, factors and adapters
        from peft.tuners.lora import model as lora_model

        draws = torch.Generator().manual_seed(5)
        theirs = lora_model.dare_linear

        def seeded(*args):
            with torch.random.fork_rng():
                torch.set_rng_state(draws.get_state())
                result = theirs(*args)
                draws.set_state(torch.get_rng_state())
            return result

        monkeypatch.setattr(lora_model, "dare_linear", seeded)
    wrapped.add_weighted_adapter(
        ["0", "1"], adapter_name="merged", combination_type=kind, **{"weights": WEIGHTS, **options}
    )
    merged = merge(states)
    for name in ("q", "k"):
        layer = wrapped.base_model.model[name]
        theirs, part = layer.get_delta_weight("merged"), merged.factors[name]
        torch.testing.assert_close(part.delta(), theirs, rtol=1e-5, atol=1e-5)
        if kind == "cat":
            assert torch.equal(part.lora_a, layer.lora_A["merged"].weight)
            assert torch.equal(part.lora_b, layer.lora_B["merged"].weight)


RESULTS = {
    "fuse": lambda s: fuse(s, [0.5, 0.5]),
    "mix": lambda s: mix([s[0], s[1], mix(s, rank=1)]),  # of ranks 3, 3 and 1
    "mix-rank": lambda s: mix(s, rank=2),
    "align": lambda s: align(*s),
    "lego": lambda s: lego(s, 4),
    "ties": lambda s: ties(s, of="products"),
    "dare": dare,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_what_is_saved(use_rslora, tf, peft, tmp_path):
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    torch.manual_seed(0)
    llama, tokens = tf.LlamaForCausalLM(config).eval(), torch.arange(12).reshape(2, 6)
    options = {"targets": ["q_proj", "up_proj"], "rank": 3, "rank_pattern": {"layers.1.self_attn.q_proj": 3}}
    states = []
    for seed in range(2):
        model = copy.deepcopy(llama)
        inject(model, use_rslora=use_rslora, alpha_pattern={"layers.0.mlp.up_proj": 5.0}, **options)
        generator = torch.Generator().manual_seed(seed)
        for layer in adapters(model).values():
            nn.init.normal_(layer.lora_b, generator=generator)
        states.append(AdapterState.from_model(model))
    plain = llama(tokens).logits
    for name, merge in RESULTS.items():
        merged = merge(states)
        merged.save(tmp_path / name)
        ours = copy.deepcopy(llama)
        load_adapter(ours, tmp_path / name)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / name).eval()
        with torch.no_grad():
            logits = ours(tokens).logits
            torch.testing.assert_close(theirs(tokens).logits, logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits, plain, atol=1e-2), name


# ties and dare


def one_layer(*values):
    """B is 1, so that A is the update."""
    return AdapterState({"q": Factors(torch.tensor([values]), torch.ones(1, 1), 1.0)})


@pytest.mark.parametrize("of", ["factors", "products"])
def test_ties_by_hand(of):
    states = [one_layer(4.0, -1.0, 0.5, 3.0), one_layer(2.0, 5.0, 0.1, -4.0)]
    # trimmed to the larger half: (4, 0, 0, 3) and (0, 5, 0, -4); signs of the sum: +, +, +, -
    merged = ties(states, density=0.5, of=of)
    torch.testing.assert_close(merged.factors["q"].delta(), torch.tensor([[4.0, 5.0, 0.0, -4.0]]))
    # untrimmed: (4 + 2) / 2, 5, 0.3, -4
    merged = ties(states, [1, 1], 1, of=of)
    torch.testing.assert_close(merged.factors["q"].delta(), torch.tensor([[3.0, 5.0, 0.3, -4.0]]))


def test_dare_drops_and_rescales(rng_untouched):
    states = [random_state(0), random_state(1, rank=2, alpha=1.0)]
    undropped = dare(states, [1, 1], 0, of="products", rank=5)
    for name, part in undropped.factors.items():
        u, s, vh = torch.linalg.svd(mixture(states, [1, 1], name, torch.float32), full_matrices=False)
        assert_as_accurate_as_torch(part.delta(), u @ s.diag() @ vh, mixture(states, [1, 1], name))
    ones = AdapterState({"q": Factors(torch.ones(1, 10_000), torch.ones(1, 1), 1.0)})
    delta = dare([ones], [1.0], 0.75, of="products", seed=1).factors["q"].delta()
    assert ((delta < 1e-3) | ((delta - 4).abs() < 1e-3)).all()
    assert abs(delta.mean() - 1) < 5 * math.sqrt(0.75 / 0.25 / 10_000)  # five standard errors
    again, other = (dare([ones], [1.0], 0.75, of="products", seed=seed).factors["q"].delta() for seed in (1, 2))
    assert torch.equal(again, delta)
    assert not torch.equal(other, delta)


# ensemble


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Returns(nn.Module):
    def __init__(self, factor, make):
        super().__init__()
        self.factor, self.make = factor, make

    def forward(self, x):
        return self.make(self.factor * x)


@pytest.mark.parametrize("kind", ["tensor", "dict", "dataclass", "transformers"])
def test_ensemble_averages_outputs(kind, request):
    def transformers_output(x):
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=x, loss=x.sum())

    if kind == "transformers":
        request.getfixturevalue("tf")
    makes = {
        "tensor": lambda x: x,
        "dict": lambda x: {"logits": x, "loss": x.sum()},
        "dataclass": lambda x: Output(x, x.sum()),
        "transformers": transformers_output,
    }
    make = makes[kind]
    both = ensemble([Returns(1.0, make), Returns(3.0, make)], [0.5, 1.0])
    x = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    output = both(x)
    assert type(output) is type(make(x))
    logits = output if kind == "tensor" else output["logits"] if kind == "dict" else output.logits
    assert torch.equal(logits, torch.tensor([[3.5, -7.0]], dtype=torch.bfloat16))
    if kind == "dict":
        assert set(output) == {"logits"}
    elif kind != "tensor":
        assert output.loss is None
    assert torch.equal(ensemble([nn.Identity(), nn.Identity()])(X), X)
    # in bfloat16, 256 + 1 rounds to 256
    many = ensemble([Returns(factor, makes["tensor"]) for factor in (256.0, 1.0, 1.0)], [1, 1, 1])
    assert many(torch.ones(1, dtype=torch.bfloat16)) == 258


def test_ensemble_refuses():
    for models, weights, error, match in (
        ([], None, ValueError, "models must hold at least one"),
        ([abs], None, TypeError, "models must be nn.Modules; got builtin_function"),
        ([nn.Identity()], [math.nan], ValueError, "1 finite numbers, one for each of models"),
    ):
        with pytest.raises(error, match=match):
            ensemble(models, weights)
    with pytest.raises(ValueError, match=r"of one shape; got \[\(4, 3\), \(4, 6\)\]"):
        ensemble([nn.Identity(), nn.Linear(6, 3)])(X)
    with pytest.raises(TypeError, match="tensors or have logits; got list"):
        ensemble([Returns(1, lambda x: [x])])(X)


# errors

ONE, TWO = random_state(0), random_state(1)
REFUSED = {
    "none": (lambda: fuse([]), ValueError, r"states must hold at least one entry; got \[\]"),
    "not-a-list": (lambda: mix("directory"), TypeError, "sequence of states; got a single str"),
    "a-state": (lambda: mix(ONE), TypeError, "sequence of states; got a single AdapterState"),
    "mapping": (lambda: fuse([{A: torch.ones(1, 2)}]), ValueError, "does not; use AdapterState.from_tensors"),
    "number": (lambda: mix([1]), TypeError, "AdapterState, a directory or a model; got int"),
    "no-adapters": (lambda: mix([nn.Linear(2, 2)]), ValueError, "must have enabled adapters"),
    "no-directory": (lambda: mix(["nowhere"]), FileNotFoundError, "nowhere"),
    "weights": (lambda: mix([ONE, TWO], [1]), ValueError, r"2 finite numbers, one for each of states; got \[1\]"),
    "nan": (lambda: fuse([ONE, TWO], [1, math.nan]), ValueError, "2 finite numbers.*nan"),
    "words": (lambda: fuse([ONE], ["x"]), ValueError, "1 finite numbers"),
    "modules": (
        lambda: fuse([ONE, AdapterState({"q": TWO.factors["q"], "v": TWO.factors["q"]})]),
        ValueError,
        r"only states\[0\] has \['blocks.0.up'\], only states\[1\] has \['v'\]",
    ),
    "other": (lambda: mix([ONE, AdapterState(TWO.factors, {"h": X})]), ValueError, r"only states\[1\] has \['h'\]"),
    "base": (
        lambda: mix([ONE, random_state(0, sizes={**SIZES, "q": (7, 8)})]),
        ValueError,
        r"must fit one base model; q is \(7, 9\) in states\[0\] and \(7, 8\) in states\[1\]",
    ),
    "ranks": (lambda: fuse([ONE, random_state(1, rank=2)]), ValueError, r"ranks .* q has \[3, 2\]"),
    "scales": (lambda: align(ONE, random_state(1, alpha=1)), ValueError, r"scales .* q has \["),
    "ties-ranks": (lambda: ties([ONE, random_state(1, rank=2)]), ValueError, r"ranks .* q has \[3, 2\]"),
    "rank": (lambda: mix([ONE], rank=0), ValueError, "rank must be a positive integer; got 0"),
    "lego-rank": (lambda: lego([ONE], 2.0), ValueError, "rank must be a positive integer; got 2.0"),
    "density": (lambda: ties([ONE], density=0), ValueError, r"density must be a number in \(0, 1\]; got 0"),
    "drop": (lambda: dare([ONE], drop=1), ValueError, r"drop must be a probability in \[0, 1\); got 1"),
    "of": (lambda: ties([ONE], of="x"), ValueError, "of must be one of .*'factors', 'products'.*; got 'x'"),
    "of-rank": (lambda: dare([ONE], rank=2), ValueError, "rank must be None with of='factors'"),
    "iterations": (lambda: align(ONE, TWO, iterations=0), ValueError, "iterations must be a positive"),
    "condition": (lambda: align(ONE, TWO, max_condition=0.5), ValueError, "max_condition must be a finite number of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        call()
