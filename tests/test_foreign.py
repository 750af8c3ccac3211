"""Adapters around modules without a readable weight, which keep their own forward and weight."""

import copy
import math
import os
import pickle
import re
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import cotolora
from cotolora import CoTo, CoToLoRALinear, adapter_mask, adapters, eject, explain, inject, set_backend
from cotolora.backends import choice as dispatch
from cotolora.backends.fused.common import has_triton
from cotolora.backends.types import Sizes
from cotolora.functional import add_low_rank
from cotolora.variants import VARIANTS

SCALE = 0.75  # neither 1 nor a power of two, so that a lost, squared or inverted scale is visible
LORA = VARIANTS["lora"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and has_triton()
fused = pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1"))
BACKENDS = ["reference", "addmm", fused]
GATES = [
    pytest.param(True, id="true"),
    pytest.param(torch.tensor(1, dtype=torch.int32), id="0-dim-on"),
    pytest.param(torch.tensor(0, dtype=torch.int32), id="0-dim-off"),
    pytest.param(torch.tensor([True, False, True]), id="rows-mixed"),
]


# the operation


class Operands(NamedTuple):
    y: Tensor
    x: Tensor
    lora_a: Tensor
    lora_b: Tensor


def operands(shape=(3, 4, 33), out=20, rank=5, *, x_dtype=torch.float32, y_dtype=torch.float32, factors=None, seed=0):
    """Leaf tensors such that the output and the update have similar size."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    made = Operands(
        draw(*shape[:-1], out).to(y_dtype),
        draw(*shape).to(x_dtype),
        (draw(rank, shape[-1]) / math.sqrt(shape[-1])).to(factors or x_dtype),
        (draw(out, rank) / math.sqrt(rank)).to(factors or x_dtype),
    )
    return Operands(*(t.requires_grad_() for t in made))


BAD = [
    pytest.param({"y": (torch.zeros(3, 4, 20), None)}, TypeError, "y must be a tensor; got tuple", id="y-a-tuple"),
    pytest.param({"y": torch.zeros(3, 5, 20)}, ValueError, r"y must have the leading dimensions of x", id="y-leading"),
    pytest.param({"y": torch.zeros(4, 20)}, ValueError, r"y must have the leading dimensions of x", id="y-fewer"),
    pytest.param({"y": torch.zeros(3, 4, 20, dtype=torch.int8)}, TypeError, "y must be of a floating", id="y-integer"),
    pytest.param(
        {"y": torch.zeros(3, 4, 20, device="meta")}, ValueError, "y must be on the device of x", id="y-device"
    ),
    pytest.param({"x": torch.tensor(1.0)}, ValueError, "y must have the leading", id="x-scalar"),
    pytest.param({"lora_a": torch.zeros(5, 32)}, ValueError, r"lora_a must be \[rank, 33\]", id="a"),
    pytest.param({"lora_b": torch.zeros(21, 5)}, ValueError, r"lora_b must be \[20, 5\] to fit x and y", id="b"),
    pytest.param({"gate": 1}, TypeError, "gate must be a bool", id="gate"),
    pytest.param({"scale": math.inf}, ValueError, "scale must be finite", id="scale"),
    pytest.param({"dropout": 1.5}, ValueError, "dropout must be", id="dropout"),
    pytest.param({"backend": "cuda"}, ValueError, "backend must be", id="backend"),
]


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(("bad", "error", "match"), BAD)
def test_bad_arguments_are_named(bad, error, match, gate):
    with pytest.raises(error, match=match):
        add_low_rank(**{**operands()._asdict(), "scale": SCALE, "gate": gate, **bad})


# dispatch


def test_every_fused_name_selects_the_adding_kernel():
    call = Sizes(64, 16, 32, 8, 4).call(LORA, "cpu", adds=True)
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    for name in ("triton", *(f"triton:{form}" for form in LORA.fused)):
        assert dispatch.choose(name, call) == "triton:expand"
        assert dispatch.choose(name, call._replace(rows=None)) == "triton:expand"
    mixed = call._replace(base_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"x is torch.float32, but the output of the base is torch.bfloat16"):
        dispatch.choose("triton", mixed)
    assert dispatch.choose(None, call) == dispatch.choose(None, mixed) == "addmm"


def test_the_cost_model_chooses_the_fused_kernel_only_for_a_clear_win():
    large, tiny = (Sizes(*sizes).call(LORA, adds=True) for sizes in ((32768, 4096, 4096, 16), (64, 768, 768, 16)))
    name, reason = dispatch.fastest(large, "sm_90", captured=False)
    assert name == "triton:expand"
    assert "modelled, not measured" in reason
    assert dispatch.fastest(tiny, "sm_90", captured=False)[0] == "addmm"
    assert dispatch.fastest(large, "sm_75", captured=False)[0] == "addmm"
    row = {
        "m": 32768,
        "n": 4096,
        "k": 4096,
        "rank": 16,
        "element_size": 2,
        "captured": False,
        "seconds": {"one_pass": 1.0},
    }
    assert dispatch.fastest(large, "sm_90", captured=False, table=(row,))[0] == "triton:expand"


def test_explain_says_what_is_added():
    plan = explain(CoToLoRALinear.from_linear(Packed(linear())), rows=64)
    assert plan.backend == "addmm"
    assert str(plan).startswith("rows 64, 12 -> 10, rank 8, float32 on cpu, added to the output of a base module: ")
    assert [launch.kernel for launch in plan.forward] == ["addmm", "addmm"]
    if INTERPRETED:
        plan = explain(CoToLoRALinear.from_linear(Packed(linear())), rows=64, dtype=torch.float16, backend="triton")
        assert (plan.backend, plan.form) == ("triton", "expand")
        assert [launch.kernel for launch in plan.forward] == ["shrink", "pre_expand"]


# bases


class Packed(nn.Module):
    """A linear whose weight is stored as four-bit codes, two per byte, with a step size per row."""

    def __init__(self, plain: nn.Linear, out_dtype: torch.dtype | None = None):
        super().__init__()
        self.in_features, self.out_features, self.out_dtype = plain.in_features, plain.out_features, out_dtype
        weight = plain.weight.detach().float()
        step = weight.abs().amax(1, keepdim=True) / 7
        codes = (weight / step).round().to(torch.uint8) + 8  # wraps around: -7 becomes 1
        self.codes = nn.Parameter(codes[:, ::2] | codes[:, 1::2] << 4, requires_grad=False)
        self.register_buffer("step", step)
        self.bias = nn.Parameter(plain.bias.detach().clone())

    def unpacked(self) -> Tensor:
        codes = torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(1)
        return (codes.to(self.step.dtype) - 8) * self.step

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.unpacked().to(x.dtype), self.bias.to(x.dtype))
        return y if self.out_dtype is None else y.to(self.out_dtype)


class Squashed(nn.Linear):
    """A base whose backward needs its output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


class Same(nn.Module):
    """Returns its input; has no tensors."""

    in_features = out_features = 12

    def forward(self, x: Tensor) -> Tensor:
        return x


class Wrapped(Tensor):
    pass


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 10)


def with_weight(change) -> nn.Linear:
    module = linear()
    module.weight = nn.Parameter(change(module.weight.detach()), requires_grad=False)
    return module


def squashed() -> nn.Linear:
    torch.manual_seed(0)
    return Squashed(12, 10)


def int8_of_torchao() -> nn.Linear:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    module = linear()
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    return module


def nf4_of_bitsandbytes() -> nn.Module:
    layers = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")
    module = layers.Linear4bit(12, 10, quant_type="nf4", compute_dtype=torch.float32)
    module.load_state_dict(linear().state_dict())
    return module.to("cpu")  # quantises the weight


BASES = {
    "packed": lambda: Packed(linear()),
    "packed-bfloat16": lambda: Packed(linear(), torch.bfloat16),
    "subclass": squashed,
    "parametrized": lambda: parametrizations.weight_norm(linear()),
    "tensor-subclass": lambda: with_weight(lambda w: w.as_subclass(Wrapped)),
    "sparse": lambda: with_weight(lambda w: w.to_sparse()),
    "same": Same,
    "torchao": int8_of_torchao,
    "bitsandbytes": nf4_of_bitsandbytes,
}


@pytest.fixture(params=BASES.values(), ids=list(BASES))
def make(request):
    return request.param


def around(base, **options) -> CoToLoRALinear:
    """A layer with a nonzero update."""
    layer = CoToLoRALinear.from_linear(base, rank=3, alpha=2.0, **options)
    nn.init.normal_(layer.lora_b, generator=torch.Generator().manual_seed(1))
    return layer


def inputs(*shape, seed=2):
    return torch.randn(*(shape or (3, 4)), 12, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def test_new_and_off_layers_equal_the_base(make):
    plain, fresh, x = make(), CoToLoRALinear.from_linear(make()), inputs()
    assert torch.equal(fresh(x), plain(x))
    fresh.lora_b.data.fill_(float("inf"))
    for gate in (False, torch.tensor(0), torch.tensor([0, 0, 0])):
        fresh.gate = gate
        assert torch.equal(fresh(x), plain(x))
        assert torch.equal(torch.autograd.grad(fresh(x).sum(), x)[0], torch.autograd.grad(plain(x).sum(), x)[0])


@pytest.mark.parametrize("gate", GATES)
def test_the_layer_is_its_base_plus_the_update(gate, make):
    plain, layer, x = make(), around(make()), inputs()
    layer.gate = gate
    y = layer(x)
    expected = add_low_rank(plain(x), x, layer.lora_a, layer.lora_b, scale=2 / 3, gate=gate)
    leaves = (x, layer.lora_a, layer.lora_b)
    assert torch.equal(y, expected)
    for ours, other in zip(*(torch.autograd.grad(t.sin().sum(), leaves) for t in (y, expected)), strict=True):
        assert torch.equal(ours, other)


def dequantised(base: nn.Module) -> nn.Linear:
    """An nn.Linear with the weight that a base represents."""
    plain = linear()
    weight = base.unpacked() if isinstance(base, Packed) else base.weight.dequantize()
    plain.weight, plain.bias = nn.Parameter(weight), base.bias
    return plain


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", ["packed", "torchao"])
def test_trains_like_a_linear_with_the_dequantised_weight(kind, gate):
    base, x = BASES[kind](), inputs()
    ours, theirs = around(base), around(dequantised(base))
    for layer in (ours, theirs):
        layer.gate = gate
    torch.testing.assert_close(ours(x), theirs(x))
    found = [torch.autograd.grad(m(x).square().sum(), (x, m.lora_a, m.lora_b)) for m in (ours, theirs)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_only_the_adapter_trains_and_is_float32(make):
    base = make()
    layer = around(base)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    assert layer.base is base
    assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32
    assert (layer.in_features, layer.out_features) == (12, 12 if isinstance(base, Same) else 10)


# attributes that other code reads from a layer


def read(module, name):
    """An attribute, or the type of the error that reading it raises."""
    try:
        return getattr(module, name)
    except AttributeError as error:
        return type(error)


def test_a_layer_shows_the_attributes_of_its_base(make):
    base = make()
    base.temperature = 3.0
    layer = around(base)
    layer.to(torch.float64)
    if isinstance(base, Packed):
        base.step = base.step.clone()  # the base replaces one of its tensors
    for name in ("weight", "bias", "in_features", "out_features", "codes", "step", "temperature", "nothing"):
        found, expected = read(layer, name), read(base, name)
        assert found is expected or torch.equal(found, expected)
        assert hasattr(layer, name) is hasattr(base, name)
    base._hook_of_accelerate = 1
    assert not hasattr(layer, "_hook_of_accelerate")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickled(module)], ids=["deepcopy", "pickle"])
def test_a_copy_shows_its_own_base(duplicate):
    twin = duplicate(around(squashed()))
    assert twin.weight is twin.base.weight
    twin.half()
    state = {key: t + 1 for key, t in twin.state_dict().items()}
    twin.load_state_dict(state, assign=True)
    assert twin.weight is twin.base.weight
    assert torch.equal(twin.weight, state["weight"])
    assert twin.weight.dtype == torch.float16


def test_showing_the_base_counts_no_tensor_twice():
    layer = around(squashed())
    names = ["base.weight", "base.bias", "lora_a", "lora_b"]
    assert [name for name, _ in layer.named_parameters(remove_duplicate=False)] == names
    assert list(layer.state_dict()) == ["lora_a", "lora_b", "weight", "bias"]
    holder = nn.ModuleList([layer, layer])
    assert [name for name, _ in holder.named_parameters()] == [f"0.{name}" for name in names]
    assert len(list(holder.parameters())) == 4
    assert len(list(holder.named_parameters(remove_duplicate=False))) == 8
    assert list(dict(holder.named_modules())) == ["", "0.base", "0"]


def test_a_weight_that_is_tied_to_a_layer_is_tied_to_its_base():
    layer, embedding = around(squashed()), nn.Embedding(10, 12)
    layer.weight, layer.bias = embedding.weight, None
    assert layer.base.weight is embedding.weight
    assert layer.bias is layer.base.bias is None
    assert list(layer.state_dict()) == ["lora_a", "lora_b", "weight"]


def test_what_code_writes_to_a_base_it_writes_through_the_layer():
    class Tempered(nn.Linear):
        def __init__(self):
            super().__init__(12, 10)
            self.temperature = 1.0
            self.register_buffer("offset", torch.zeros(10))

        def forward(self, x):
            return self.temperature * super().forward(x) + self.offset

    layer = around(Tempered())
    layer.enabled = False
    x, held = inputs(), set(layer.state_dict())
    before = layer(x)
    layer.temperature, layer.offset = 2.0, torch.ones(10)
    torch.testing.assert_close(layer(x), 2 * before + 1)
    assert set(layer.state_dict()) == held
    assert (layer.base.temperature, layer.temperature) == (2.0, 2.0)
    del layer.temperature
    assert not hasattr(layer, "temperature")
    # what is the layer's own stays so, and what neither has becomes the layer's
    layer.alpha, layer.mark = 5.0, "new"
    assert not hasattr(layer.base, "alpha")
    assert not hasattr(layer.base, "mark")
    with pytest.raises(AttributeError, match="temperature"):
        del layer.temperature


class ByItsWeight(nn.Module):
    """Takes the compute dtype from the weight, like T5 and many other models."""

    def __init__(self, base):
        super().__init__()
        self.up = base

    def forward(self, x):
        assert x.dtype == torch.float32
        x = x.to(self.up.weight.dtype if hasattr(self.up, "weight") else next(self.parameters()).dtype)
        return self.up(x.to(self.up.bias.device))


@pytest.mark.parametrize("kind", ["subclass", "parametrized", "tensor-subclass"])
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_the_weight_dtype_of_a_layer_is_that_of_its_base(kind, mode):
    model, x = ByItsWeight(BASES[kind]().bfloat16()), inputs().detach()
    expected = model(x)
    inject(model, ["up"])
    if mode == "compiled":
        if kind == "tensor-subclass":
            pytest.skip("torch.compile cannot trace this base even without an adapter")
        torch.compiler.reset()
        model = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(model(x), expected)
    assert expected.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["packed", "subclass", "sparse"])
def test_the_first_parameter_of_a_model_is_its_own(kind):
    model = nn.Sequential(BASES[kind]().bfloat16(), nn.Linear(10, 2).bfloat16())
    before = [(p.dtype, p.shape) for p in model.parameters()]
    inject(model, ["0", "1"], rank=2)
    after = [(p.dtype, p.shape) for p in model.parameters()]
    assert after[0] == before[0]
    assert [p for p in after if p[0] != torch.float32] == before


def test_further_arguments_are_passed_to_the_base():
    class Scaled(nn.Linear):
        def forward(self, x, factor, *, shift=0.0):
            return super().forward(x * factor) + shift

    torch.manual_seed(0)
    base, x = Scaled(12, 10), inputs()
    expected = base(x, 2.0, shift=1.0)
    layer = CoToLoRALinear.from_linear(base)
    assert torch.equal(layer(x, 2.0, shift=1.0), expected)
    for by_name in ({"input": x}, {"x": x}):
        assert torch.equal(layer(factor=2.0, shift=1.0, **by_name), expected)
    with pytest.raises(TypeError, match="factor"):
        layer(x)
    with pytest.raises(TypeError):
        CoToLoRALinear.from_linear(squashed())()
    dense = CoToLoRALinear(12, 10)
    assert torch.equal(dense(input=x), dense(x))


def test_factors_are_float64_for_float64_bases_and_on_their_device():
    layer = CoToLoRALinear.from_linear(squashed().double())
    assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float64
    layer = CoToLoRALinear.from_linear(Packed(linear()).to("meta"))
    assert layer.lora_a.device == layer.lora_b.device == torch.device("meta")
    assert CoToLoRALinear.from_linear(Same()).lora_a.device == torch.device("cpu")


def test_host_off_saves_and_records_nothing_of_ours():
    base = squashed().requires_grad_(False)
    layer, x = around(base, dropout=0.5), inputs()
    layer.gate = False
    seen = []
    for module in (base, layer):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
            seen.append(module(x).grad_fn.name())
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert layer(x.detach()).grad_fn is None


def test_dropout_acts_while_training_only():
    layer, x = around(Packed(linear()), dropout=0.5), inputs(200)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert not layer.base.training
    assert torch.equal(layer(x), layer(x))


def test_the_output_of_a_base_is_not_overwritten():
    layer, x = around(Same()), inputs(5)
    before = x.detach().clone()
    assert not torch.equal(layer(x), before)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kept", [None, torch.float32], ids=["base-follows", "base-keeps-float32"])
def test_autocast(kept):
    class Stubborn(Packed):
        def forward(self, x: Tensor) -> Tensor:
            if kept is None:
                return super().forward(x)
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)

    layer, x = around(Stubborn(linear())), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, base = layer(x), layer.base(x)
        gradient = torch.autograd.grad(y.float().sum(), layer.lora_a)[0]
    assert y.dtype == base.dtype == (kept or torch.bfloat16)
    assert gradient.dtype == torch.float32
    expected = add_low_rank(base, x.bfloat16(), layer.lora_a, layer.lora_b, scale=layer.scale)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("kind", ["packed", "subclass", "parametrized", "tensor-subclass", "torchao"])
def test_base_checkpoints_keep_their_keys(kind):
    base = BASES[kind]
    plain, layer = base(), around(base())
    state, own = plain.state_dict(), {"lora_a", "lora_b"}
    assert set(layer.state_dict()) == set(state) | own
    other = around(base())
    for tensor in (*other.base.parameters(), *other.base.buffers()):
        if type(tensor) in (nn.Parameter, Tensor):
            tensor.data.zero_()
    assert other.load_state_dict(state) == ([], [])  # a base checkpoint, which leaves the factors unchanged
    x = inputs()
    assert torch.equal(other.base(x), plain(x))
    other.lora_b.data.zero_()
    holder = nn.ModuleDict({"a": nn.ModuleList([other])})
    whole = nn.ModuleDict({"a": nn.ModuleList([layer])})
    for assign in (False, True):
        assert holder.load_state_dict(whole.state_dict(), assign=assign) == ([], [])
        assert torch.equal(other(x), layer(x))
        other.lora_b.data.zero_()
    assert plain.load_state_dict({key: t for key, t in layer.state_dict().items() if key not in own}) == ([], [])


def test_state_dicts_are_loaded_strictly():
    layer = around(Packed(linear()))
    state = layer.state_dict()
    assert sorted(state) == ["bias", "codes", "lora_a", "lora_b", "step"]
    for key in state:
        with pytest.raises(RuntimeError, match=rf"Missing key.*{key}"):
            layer.load_state_dict({k: t for k, t in state.items() if k != key})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        layer.load_state_dict({**state, "extra": torch.ones(1)})
    assert set(state) == {"bias", "codes", "lora_a", "lora_b", "step"}


def test_versions_and_nested_state_are_kept():
    class Versioned(nn.Linear):
        _version = 7

        def __init__(self):
            super().__init__(12, 10)
            self.inner = nn.BatchNorm1d(3)

        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            self.seen = state["seen"]

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            self.loaded = local_metadata.get("version")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    plain, layer = nn.Sequential(Versioned()), nn.Sequential(around(Versioned()))
    state = layer.state_dict()
    assert {key for key in state if "lora" not in key} == set(plain.state_dict())
    assert {"0.inner.num_batches_tracked", "0._extra_state"} < set(state)
    assert {key: state._metadata[key] for key in plain.state_dict()._metadata} == plain.state_dict()._metadata
    assert layer.load_state_dict(state) == ([], [])
    assert (layer[0].base.loaded, layer[0].base.seen) == (7, 3)


def test_a_base_may_hold_something_named_base():
    base = squashed()
    base.base = nn.Linear(2, 2)
    state, layer = {key: t.clone() for key, t in base.state_dict().items()}, around(base)
    assert set(state) | {"lora_a", "lora_b"} == set(layer.state_dict())
    for tensor in base.parameters():
        tensor.data.zero_()
    assert layer.load_state_dict(state) == ([], [])
    assert all(torch.equal(t, state[key]) for key, t in base.state_dict().items())


def test_a_distributed_checkpoint_has_the_same_keys():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other = (nn.Sequential(around(Packed(linear())), nn.Linear(10, 2)) for _ in range(2))
    state = get_model_state_dict(model)
    assert set(state) == set(model.state_dict())
    other[0].base.step.zero_()
    other[0].lora_a.data.zero_()
    assert set_model_state_dict(other, state) == ([], [])
    assert torch.equal(other[0](inputs()), model[0](inputs()))


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["packed", "subclass"])
def test_copies_are_whole_and_apart(kind, duplicate):
    layer = around(BASES[kind]())
    layer.gate = torch.tensor(1)
    twin, x = duplicate(layer), inputs()
    assert torch.equal(twin(x), layer(x))
    assert set(twin.state_dict()) == set(layer.state_dict())
    twin.load_state_dict({key: torch.zeros_like(t) for key, t in layer.state_dict().items()})
    assert not torch.equal(twin.base(x), layer.base(x))
    assert twin.lora_a.any() != layer.lora_a.any()


def test_moving_and_casting():
    layer = around(Packed(linear()))
    layer.gate = torch.tensor(1, dtype=torch.int32)
    layer.to(torch.float64)
    assert layer.base.codes.dtype == torch.uint8
    assert layer.base.step.dtype == layer.lora_a.dtype == torch.float64
    assert layer(inputs().double()).dtype == torch.float64
    assert layer.to("meta").base.codes.is_meta


def test_repr_shows_the_base():
    assert repr(CoToLoRALinear.from_linear(squashed(), rank=2, alpha=4.0)) == (
        "CoToLoRALinear(\n"
        "  in_features=12, out_features=10, rank=2, alpha=4.0, gate=True, variant=lora\n"
        "  (base): Squashed(in_features=12, out_features=10, bias=True)\n"
        ")"
    )


def test_merging_is_refused_and_the_update_can_be_read(make):
    base = make()
    layer = around(base)
    kind = type(base).__name__
    why = rf"{kind}, (which has no dense floating weight|whose forward may be other than the product with its weight), "
    for merge in (layer.merge, layer.to_linear):
        with pytest.raises(RuntimeError, match=rf"the base is a [\w.<>]*{why}"):
            merge()
    assert not layer.merged
    layer.unmerge()
    torch.testing.assert_close(layer.delta_weight(), 2 / 3 * layer.lora_b @ layer.lora_a)
    assert layer.to_linear(merge=False) is base
    layer.enabled = False
    assert layer.to_linear() is base


def test_an_unsupported_input_names_the_layer():
    class Counts(nn.Module):
        in_features, out_features = 4, 4

        def forward(self, x):
            return torch.zeros(*x.shape[:-1], 4)

    model = nn.Sequential(Counts())
    inject(model, ["0"], rank=2)
    with pytest.raises(TypeError, match=r"^0: x must be of a floating dtype; got torch.int64"):
        model(torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("option", [{"variant": "dora"}, {"variant": "hira"}, {"init": "pissa"}, {"init": "olora"}])
def test_options_that_read_the_weight_are_refused(option):
    base = squashed()
    with pytest.raises(ValueError, match=rf"{next(iter(option))} must be one of .* on a .*Squashed, whose forward"):
        CoToLoRALinear.from_linear(base, **option)
    assert base.weight.requires_grad


def test_a_sharded_base_is_refused():
    base = squashed()
    base.bias.device_mesh = object()  # as a DTensor has
    with pytest.raises(TypeError, match="got a Squashed that is sharded already"):
        CoToLoRALinear.from_linear(base)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_one_graph_serves_a_device_gate():
    layer, x, graphs = around(Packed(linear())), inputs(), []
    layer.gate = torch.tensor(1, dtype=torch.int32)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=lambda module, _: graphs.append(module) or module.forward, fullgraph=True)
    for gate in (True, False, True):
        layer.gate = gate
        torch.testing.assert_close(compiled(x), layer(x))
        ours, plain = (
            torch.autograd.grad(f(x).square().sum(), (x, layer.lora_a, layer.lora_b)) for f in (compiled, layer)
        )
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other)
    assert len(graphs) == 1
    torch.compiler.reset()


# in a model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": Packed(nn.Linear(12, 12)), "sub": Affine(12, 12), "norm": nn.LayerNorm(12)})
            for _ in range(2)
        )
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["sub"](block["norm"](block["q"](x)).relu())
        return self.head(x)


class Affine(nn.Linear):
    """A linear that contains another linear."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.inside = nn.Linear(in_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inside(x))


EVERY = ["blocks.0.q", "blocks.0.sub", "blocks.1.q", "blocks.1.sub", "head"]


def trained(model):
    for i, layer in enumerate(adapters(model).values()):
        nn.init.normal_(layer.lora_b, generator=torch.Generator().manual_seed(i))
    return model


def test_all_linear_adapts_subclasses_and_names_adapt_other_modules():
    peft = pytest.importorskip("peft")
    linears = ["blocks.0.sub", "blocks.1.sub", "head"]
    assert list(inject(Net())) == linears
    assert list(inject(Net(), ["q", "sub", "head"])) == EVERY
    assert list(inject(Net(), "blocks.*|head")) == EVERY
    assert list(inject(Net(), ["blocks.1.q"])) == ["blocks.1.q"]
    mixed = nn.Sequential(squashed(), Packed(linear()), linear())
    theirs = peft.get_peft_model(copy.deepcopy(mixed), peft.LoraConfig(target_modules="all-linear", r=2))
    taken = [name.rpartition(".")[2] for name, module in theirs.named_modules() if hasattr(module, "lora_A")]
    assert list(inject(mixed)) == taken == ["0", "2"]
    with pytest.raises(ValueError, match=r"targets must match only linear modules; blocks.0.norm is a LayerNorm"):
        inject(Net(), ["norm"])
    with pytest.raises(ValueError, match=r"\['v'\] match no linear module.*end in \['head', 'inside', 'q', 'sub'\]"):
        inject(Net(), ["v"])


def test_eject_restores_the_original_module_objects():
    model = Net()
    modules, state, x = dict(model.named_modules()), copy.deepcopy(model.state_dict()), inputs()
    before = model(x)
    layers = inject(model, ["q", "sub", "head"])
    assert torch.equal(model(x), before)
    assert set(model.state_dict()) == set(state) | {f"{name}.lora_{f}" for name in EVERY for f in "ab"}
    assert model.load_state_dict(state) == ([], [])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{n}.lora_{f}" for n in EVERY for f in "ab"}
    trained(model)
    changed = model(x)
    assert not torch.equal(changed, before)
    with pytest.raises(RuntimeError, match=r"^[a-z.0-9]+: the base is a Packed, which has no dense floating weight"):
        eject(model)
    assert adapters(model) == layers
    assert torch.equal(model(x), changed)
    plain = eject(model, merge=False)
    assert torch.equal(model(x), before)
    assert all(plain[name] is modules[name] for name in EVERY if name != "head")
    assert list(model.state_dict()) == list(state)


def test_pruned_adapters_do_not_prevent_merging_the_others():
    model = trained(Net())
    layers = inject(model, ["q", "head"])
    trained(model)
    for name in ("blocks.0.q", "blocks.1.q"):
        layers[name].enabled = False
    x, expected = inputs(), model(inputs())
    eject(model)
    torch.testing.assert_close(model(x), expected)


def test_a_module_under_two_names_is_one_adapter():
    model = Net()
    model.blocks[1]["q"] = model.blocks[0]["q"]
    assert list(inject(model, ["q"])) == ["blocks.0.q"]
    assert model.blocks[1]["q"] is model.blocks[0]["q"]
    eject(model, merge=False)
    assert isinstance(model.blocks[1]["q"], Packed)


@pytest.mark.parametrize("kind", ["forward", "forward-pre", "backward", "state-dict", "load-pre"])
def test_hooks_are_called_once_and_can_be_removed(kind):
    model, calls = Net(), []
    module = model.blocks[0]["q"]

    def note(module, *args):
        calls.append(type(module).__name__)

    def exercise():
        calls.clear()
        model(inputs()).sum().backward()
        model.load_state_dict(model.state_dict())
        return calls

    handle = {
        "forward": module.register_forward_hook,
        "forward-pre": module.register_forward_pre_hook,
        "backward": module.register_full_backward_hook,
        "state-dict": module.register_state_dict_post_hook,
        "load-pre": module.register_load_state_dict_pre_hook,
    }[kind](note)
    assert exercise() == ["Packed"]
    inject(model, ["q"])
    # state-dict hooks of the base are still called with the base
    assert exercise() == ["Packed" if kind in ("state-dict", "load-pre") else "CoToLoRALinear"]
    eject(model, merge=False)
    assert exercise() == ["Packed"]
    inject(model, ["q"])
    handle.remove()
    assert exercise() == []


def test_hooks_see_and_change_inputs_and_outputs():
    model, seen = Net(), []
    model.blocks[0]["q"].register_forward_hook(lambda module, args, out: seen.append(out.detach()) or out + 1)
    layer = inject(model, ["q"])["blocks.0.q"]
    trained(model)
    x = inputs()
    assert torch.equal(layer(x), seen[0] + 1)
    assert torch.equal(seen[0], add_low_rank(layer.base(x), x, layer.lora_a, layer.lora_b, scale=layer.scale))
    late = []
    layer.base.register_forward_hook(lambda *_: late.append("base"))
    eject(model, merge=False)
    model(x)
    assert (len(seen), late) == (2, ["base"])


def test_a_replaced_forward_is_the_bases_own():
    hooks = pytest.importorskip("accelerate.hooks", reason="it replaces forward")
    model = Net()
    hooks.add_hook_to_module(model.blocks[0]["q"], hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    before = model(inputs())
    layers = inject(model, ["q"])
    assert torch.equal(model(inputs()), before)
    assert hasattr(layers["blocks.0.q"].base, "_hf_hook")
    eject(model, merge=False)
    assert torch.equal(model(inputs()), before)


def test_trainable_and_targets_must_not_overlap_in_a_base():
    with pytest.raises(ValueError, match=r"both match blocks.0.sub.inside.weight"):
        inject(Net(), ["sub"], trainable=["blocks.0.sub.inside"])


@pytest.mark.parametrize("targets", ["all-linear", ["q", "sub", "head"], "blocks.*q"], ids=str)
def test_adapters_are_saved_and_loaded(targets, tmp_path):
    model = Net()
    inject(model, targets, rank=2, trainable=["norm"])
    trained(model)
    cotolora.save_adapter(model, tmp_path)
    fresh, again = Net(), Net()
    cotolora.load_adapter(fresh, tmp_path)
    inject(again, targets, rank=2)
    cotolora.load_adapter(again, tmp_path)
    for loaded in (fresh, again):
        assert list(adapters(loaded)) == list(adapters(model))
        assert torch.equal(loaded(inputs()), model(inputs()))


def test_peft_reads_what_is_saved(tmp_path):
    peft = pytest.importorskip("peft")
    model = Net()
    inject(model, ["blocks.0.sub", "head"], rank=2)
    trained(model)
    cotolora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(theirs(inputs()), model(inputs()))


def test_a_base_that_trains_cannot_be_saved(tmp_path):
    model = Net()
    inject(model, ["sub"])
    model.blocks[1]["sub"].base.inside.bias.requires_grad_()
    with pytest.raises(
        ValueError, match=r"must not train the base of an adapter; blocks.1.sub.base.inside.bias requires"
    ):
        cotolora.save_adapter(model, tmp_path)


def test_coto_and_masks_drive_them():
    model = Net()
    layers = inject(model, ["q", "sub"])
    trained(model)
    optimizer = torch.optim.SGD(cotolora.adapter_parameters(model), lr=0.1)
    coto = CoTo(model, total_steps=8, unit="module", seed=3)
    coto.attach(optimizer)
    for _ in range(8):
        before = {name: layer.lora_b.detach().clone() for name, layer in layers.items()}
        on = {name for name, layer in layers.items() if layer.gate}
        model(inputs()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert {name for name, layer in layers.items() if not torch.equal(layer.lora_b, before[name])} == on
        coto.step()
    model.eval()
    x = inputs()
    with adapter_mask(model, [[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]):
        together = model(x)
    for i, mask in enumerate(([1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1])):
        with adapter_mask(model, mask):
            torch.testing.assert_close(together[i], model(x)[i])


# subclasses of nn.Linear that are not linear maps


class Router(nn.Linear):
    """Returns scores and the best index, as in Phimoe and Llama 4; each call changes its state and draws randomly."""

    def __init__(self, in_features=12, out_features=10):
        super().__init__(in_features, out_features)
        self.calls, self.history = 0, []
        self.register_buffer("seen", torch.zeros(out_features))

    def forward(self, hidden_states):
        self.calls += 1
        self.history.append(self.calls)
        scores = super().forward(hidden_states * torch.empty_like(hidden_states).uniform_(0.9, 1.1))
        self.seen += scores.sum(0)
        return scores, scores.topk(2, dim=-1)


class Grouped(nn.Linear):
    """Each group of the input has its own rows of the weight, as in DeepSeek-V4."""

    def forward(self, x):
        weight = self.weight.view(2, -1, self.in_features).transpose(1, 2)
        return torch.bmm(x.reshape(-1, 2, self.in_features).transpose(0, 1), weight).transpose(0, 1)


class Wider(nn.Linear):
    def forward(self, x):
        return torch.cat([super().forward(x), x], dim=-1)


class Chosen(nn.Linear):
    def forward(self, x):
        return super().forward(x).argmax(-1, keepdim=True).expand(*x.shape[:-1], self.out_features)


class Checked(nn.Linear):
    """A linear map that reads values of its input, which the meta device does not support."""

    def forward(self, x):
        return super().forward(x) if x.abs().max().item() < 1e9 else x.new_zeros(*x.shape[:-1], self.out_features)


class Sequences(nn.Linear):
    """A linear map that accepts only 3-D inputs."""

    def forward(self, x):
        batch, length, _ = x.shape
        return super().forward(x.reshape(batch * length, -1)).view(batch, length, -1)


NO_MAPS = {
    "router": (Router, r"a Router, whose forward returns a tuple, not a tensor of shape \(1, 10\)"),
    "grouped": (Grouped, r"a Grouped, whose forward raises on an input of shape \(1, 12\): RuntimeError: shape"),
    "wider": (Wider, r"a Wider, whose forward returns torch.float32 of shape \(1, 22\)"),
    "chosen": (Chosen, r"a Chosen, whose forward returns torch.int64"),
}
MAPS = {
    "squashed": Squashed,
    "affine": lambda *_: Affine(12, 10),
    "checked": Checked,
    "sequences": Sequences,
    "parametrized": lambda *sizes: parametrizations.weight_norm(Squashed(*sizes)),
}


def mixed(odd):
    torch.manual_seed(0)
    return nn.ModuleDict({"q": nn.Linear(12, 10), "odd": odd(12, 10), "more": nn.ModuleList([odd(12, 10)])})


@pytest.mark.parametrize("meta", [False, True], ids=["cpu", "meta"])
@pytest.mark.parametrize("kind", NO_MAPS)
def test_nonlinear_modules_are_skipped_or_refused_by_name(kind, meta, caplog):
    odd, says = NO_MAPS[kind]
    model = mixed(odd).to("meta") if meta else mixed(odd)
    with caplog.at_level("INFO", "cotolora"):
        assert list(inject(model)) == ["q"]
    (message,) = [record.getMessage() for record in caplog.records]
    kept = "all-linear leaves out modules that do not map in_features to out_features"
    assert re.match(rf"{kept}: 'odd', 'more.0'; the first is {says}", message)
    assert type(model["odd"]) is odd
    caplog.clear()
    assert list(inject(mixed(odd), exclude=["odd", "more.0"])) == ["q"]
    assert not caplog.records
    with pytest.raises(ValueError, match=rf"odd must be a module that maps .*; got {says}.*exclude=\['odd'\]"):
        inject(mixed(odd), ["q", "odd"])
    with pytest.raises(TypeError, match=rf"linear must be a module that maps .*; got {says}"):
        CoToLoRALinear.from_linear(mixed(odd)["odd"])


@pytest.mark.parametrize("kind", MAPS)
def test_a_linear_map_of_another_class_is_taken(kind, caplog):
    model = mixed(MAPS[kind])
    expected = {"q", "odd", "more.0"}
    assert set(inject(model)) == expected
    assert not caplog.records
    assert model["odd"](inputs()).shape == (3, 4, 10)


def test_checking_a_module_changes_neither_it_nor_random_state():
    model, seen = mixed(Router), []
    router = model["odd"]
    router.register_forward_hook(lambda *_: seen.append("hook"))
    before, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match="a Router"):
        inject(model, ["odd"])
    assert torch.equal(torch.get_rng_state(), draws)
    assert (router.calls, router.history, seen) == (0, [], [])
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("odd", [Router, Wider])
def test_a_forward_that_fails_names_the_layer(odd):
    class Late(odd):  # cannot be checked before its first call
        def forward(self, x):
            x.max().item()
            return super().forward(x)

    model = mixed(Late)
    inject(model)
    returned = "a tuple" if odd is Router else r"a tensor of shape \(2, 22\)"
    with pytest.raises(
        TypeError, match=rf"^more.0 must have a base that returns \[..., 10\]; its Late returned {returned}"
    ):
        model["more"][0](inputs(2))
    with pytest.raises(ValueError, match=r"^q: x must be \[..., 12\] to fit weight; got shape \(2, 3\)"):
        model["q"](torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"^the layer must have a base"):
        CoToLoRALinear.from_linear(Late(12, 10))(inputs(2))


def test_old_reparametrisations_inside_of_a_subclass_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        base = nn.utils.weight_norm(squashed())
    with pytest.raises(TypeError, match=r"Squashed whose weight is a Tensor, not an nn\.Parameter"):
        CoToLoRALinear.from_linear(base)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_a_backend_set_for_all_layers_works_for_these_too():
    model, x = Net(), inputs()
    inject(model, ["q", "head"])
    trained(model)
    expected = model(x)
    with set_backend("triton:one_pass"):
        torch.testing.assert_close(model(x), expected)
