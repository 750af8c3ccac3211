"""The layer: results, switches, merging, and module operations such as copying, casting and loading."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from cotolora import CoToLoRALinear, coto_lora_linear, inject


def trained(layer: CoToLoRALinear, seed: int = 0) -> CoToLoRALinear:
    """The layer with a nonzero B."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=g))
    return layer


def layer_of(dtype=torch.float32, **kwargs) -> CoToLoRALinear:
    torch.manual_seed(0)
    return trained(CoToLoRALinear(12, 10, rank=4, alpha=6.0, dtype=dtype, **kwargs))


def inputs(dtype=torch.float32, *leading) -> Tensor:
    return torch.randn(*(leading or (3, 5)), 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def base_of(layer: CoToLoRALinear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def saved(obj) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return buffer


# the map and its guarantees


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_layer_computes_its_formula(use_rslora):
    layer, x = layer_of(torch.float64, use_rslora=use_rslora), inputs(torch.float64)
    scale = 6 / math.sqrt(4) if use_rslora else 6 / 4
    assert layer.scale == scale
    torch.testing.assert_close(layer(x), base_of(layer, x) + scale * (x @ layer.lora_a.T @ layer.lora_b.T))
    torch.testing.assert_close(layer.delta_weight(), scale * (layer.lora_b @ layer.lora_a))


def test_alpha_can_change_during_training():
    layer, x = layer_of(), inputs()
    full, base = layer(x), base_of(layer, x)
    layer.alpha = 3.0
    torch.testing.assert_close(layer(x) - base, (full - base) / 2)


@pytest.mark.parametrize("gate", [False, torch.tensor(0), torch.tensor([0, 0, 0])], ids=["host", "0-dim", "rows"])
@pytest.mark.parametrize("switch", ["gate", "enabled"])
def test_a_layer_that_is_off_computes_what_the_linear_computes(switch, gate):
    layer, x = layer_of(dropout=0.5), inputs()
    setattr(layer, switch, gate)
    assert torch.equal(layer(x), base_of(layer, x))


def test_only_the_adapter_trains():
    layer, x = layer_of(), inputs().requires_grad_()
    layer(x).pow(2).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"lora_a", "lora_b"}
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_factors_are_float32_masters_unless_the_base_is_float64(dtype):
    layer = layer_of(dtype)
    master = torch.float64 if dtype == torch.float64 else torch.float32
    assert (layer.weight.dtype, layer.bias.dtype) == (dtype, dtype)
    assert layer.lora_a.dtype == layer.lora_b.dtype == master
    y = layer(inputs(dtype))
    y.sum().backward()
    assert y.dtype == dtype
    assert layer.lora_a.grad.dtype == layer.lora_b.grad.dtype == master


def test_shapes_and_starting_values():
    layer = CoToLoRALinear(64, 48, rank=16)
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((16, 64), (48, 16))
    assert not layer.lora_b.any()
    bound = 1 / math.sqrt(64)  # kaiming's bound with a = √5
    assert layer.lora_a.abs().max() <= bound
    assert layer.lora_a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    gaussian = CoToLoRALinear(64, 48, rank=16, init="gaussian").lora_a
    assert gaussian.std().item() == pytest.approx(1 / 16, rel=0.1)
    assert not CoToLoRALinear(64, 48, init="gaussian").lora_b.any()


def test_the_base_starts_as_linear_does():
    torch.manual_seed(0)
    layer = CoToLoRALinear(12, 10)
    torch.manual_seed(0)
    linear = nn.Linear(12, 10)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)


def test_dropout_acts_while_training_only():
    layer, x = layer_of(dropout=0.5), inputs()
    plain = layer_of()
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(4)
    dropped = layer(x)
    torch.manual_seed(4)
    factors = (layer.lora_a, layer.lora_b)
    direct = coto_lora_linear(x, layer.weight, layer.bias, *factors, scale=layer.scale, dropout=0.5)
    assert torch.equal(dropped, direct)
    before = torch.get_rng_state()
    assert torch.equal(layer.eval()(x), plain(x))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("in_features", 0, r"in_features must be a positive integer; got 0"),
        ("out_features", -1, r"out_features must be a positive integer; got -1"),
        ("rank", 0, r"rank must be a positive integer; got 0"),
        ("rank", 2.0, r"rank must be a positive integer; got 2.0"),
        ("rank", True, r"rank must be a positive integer; got True"),
        ("alpha", float("nan"), r"alpha must be a finite number; got nan"),
        ("alpha", "16", r"alpha must be a finite number; got '16'"),
        ("alpha", -1e39, r"alpha must be a number that float32 can hold; got -1e\+39"),
        ("dropout", 1.5, r"dropout must be a probability in \[0, 1\]; got 1.5"),
        ("dropout", None, r"dropout must be a probability in \[0, 1\]; got None"),
        ("variant", "LoRA", r"variant must be one of .*'lora'.*; got 'LoRA'"),
        ("init", "zeros", r"init must be one of .*'kaiming'.*; got 'zeros'"),
    ],
)
def test_bad_arguments_are_named(argument, value, message):
    with pytest.raises(ValueError, match=message):
        CoToLoRALinear(**{"in_features": 12, "out_features": 10, argument: value})


@pytest.mark.parametrize("name", ["lora_a", "lora_b", "lora_magnitude"])
def test_a_parametrisation_of_one_tensor_is_applied(name):
    layer = CoToLoRALinear(12, 10, rank=3, variant="dora")
    nn.init.normal_(layer.lora_b)
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        getattr(doubled, name).mul_(2)
    nn.utils.parametrize.register_parametrization(layer, name, Doubled())
    x = torch.randn(2, 12)
    torch.testing.assert_close(layer(x), doubled(x))


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64], ids=str)
def test_the_dtype_is_floating(dtype):
    with pytest.raises(TypeError, match=f"dtype must be a floating dtype; got {dtype}"):
        CoToLoRALinear(12, 10, dtype=dtype)


@pytest.mark.parametrize(("rank", "sizes"), [(1, (12, 10)), (30, (12, 10)), (3, (1, 1))], ids=str)
def test_any_positive_rank_is_accepted(rank, sizes):
    layer = trained(CoToLoRALinear(*sizes, rank=rank))
    x = torch.randn(3, sizes[0])
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + layer.delta_weight(), layer.bias))


# switches

ON = {True: True, False: False, "dev-on": torch.tensor(1), "dev-off": torch.tensor(0, dtype=torch.int32)}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("enabled", ON, ids=str)
@pytest.mark.parametrize("gate", ON, ids=str)
def test_active_is_enabled_and_gate_or_not_training(gate, enabled, training):
    layer, x = layer_of().train(training), inputs()
    on, off = layer(x), base_of(layer, x)
    layer.gate, layer.enabled = ON[gate], ON[enabled]
    counts = bool(ON[enabled]) and (bool(ON[gate]) or not training)
    assert bool(layer.active) == counts
    torch.testing.assert_close(layer(x), on if counts else off, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), off) == (not counts)


def test_one_host_switch_off_gives_a_host_gate():
    layer = layer_of()
    layer.gate, layer.enabled = torch.tensor(1), False
    assert layer.active is False
    layer = layer_of()
    layer.gate, layer.enabled = False, torch.tensor([1, 0, 1])
    assert layer.active is False
    assert layer.eval().active is layer.enabled


@pytest.mark.parametrize("other", [True, torch.tensor(1), torch.tensor([1, 1, 0])], ids=["bool", "0-dim", "rows"])
@pytest.mark.parametrize("switch", ["gate", "enabled"])
def test_row_switches_combine_with_other_switches(switch, other):
    layer, x = layer_of(), inputs()
    on, off = layer(x), base_of(layer, x)
    rows = torch.tensor([1, 0, 1])
    setattr(layer, switch, rows)
    setattr(layer, "enabled" if switch == "gate" else "gate", other)
    for i, counts in enumerate((rows * other).tolist()):
        torch.testing.assert_close(layer(x)[i], (on if counts else off)[i], rtol=1e-5, atol=1e-5)


def test_eval_ignores_row_gates_and_train_brings_them_back():
    layer, x = layer_of(), inputs()
    on = layer(x)
    layer.gate = torch.tensor([0, 0, 0])
    torch.testing.assert_close(layer.eval()(x), on)
    assert torch.equal(layer.train()(x), base_of(layer, x))


@pytest.mark.parametrize("switch", ["gate", "enabled"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1, TypeError, "must be a bool or a bool or integer tensor; got int 1"),
        (None, TypeError, "must be a bool or a bool or integer tensor; got NoneType None"),
        ([True, False], TypeError, "must be a bool or a bool or integer tensor; got list"),
        (1.0, TypeError, "must be a bool or a bool or integer tensor; got float 1.0"),
        (torch.tensor(1.0), TypeError, "must be a bool or a bool or integer tensor; got a tensor of torch.float32"),
        (torch.tensor(1j), TypeError, "must be a bool or a bool or integer tensor; got a tensor of torch.complex64"),
        (torch.ones(2, 2, dtype=torch.int), ValueError, r"must be 0-dim or \[batch\]; got a tensor of shape \(2, 2\)"),
    ],
    ids=["int", "none", "list", "float", "float-tensor", "complex-tensor", "two-dimensions"],
)
def test_switches_refuse_other_values_and_keep_their_state(switch, value, error, message):
    refuses(switch, value, error, message)


@pytest.mark.parametrize("switch", ["gate", "enabled"])
@pytest.mark.filterwarnings("ignore:.*(nested tensors is in prototype|quantized tensor creation):UserWarning")
def test_switches_refuse_tensors_of_another_make(switch):
    must = "must be a bool or a bool or integer tensor; got a tensor of torch."
    nested = torch.nested.nested_tensor([torch.ones(2, dtype=torch.bool)])
    refuses(switch, torch.ones(2, dtype=torch.bool).to_sparse(), TypeError, f"{must}bool that is not dense")
    refuses(switch, nested, TypeError, f"{must}bool that is not dense")
    refuses(switch, torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), TypeError, f"{must}qint8")


def refuses(switch, value, error, message):
    layer = layer_of()
    for before in (False, torch.tensor(0)):
        setattr(layer, switch, before)
        with pytest.raises(error, match=f"^{switch} {message}"):
            setattr(layer, switch, value)
        assert getattr(layer, switch) is before or torch.equal(getattr(layer, switch), before)


def test_assigning_a_bool_fills_a_device_gate():
    layer, x = layer_of(), inputs()
    on = layer(x)
    layer.gate = torch.tensor(1, dtype=torch.int32)
    gate, address = layer.gate, layer.gate.data_ptr()
    for value in (False, True, False):
        layer.gate = value
        assert layer.gate is gate
        assert (layer.gate.data_ptr(), layer.gate.dtype, bool(layer.gate)) == (address, torch.int32, value)
        torch.testing.assert_close(layer(x), on if value else base_of(layer, x))
    layer.gate = torch.tensor([1, 0, 1])
    layer.gate = True  # replaces a row gate, which is only for one batch
    assert layer.gate is True


def test_assigning_a_bool_replaces_an_enabled_tensor():
    layer, switch = layer_of(), torch.tensor(1)
    layer.enabled = switch
    layer.enabled = False
    assert layer.enabled is False
    assert switch == 1


def test_switches_are_buffers_outside_of_the_state_dict():
    layer = layer_of()
    names = list(layer.state_dict())
    layer.gate, layer.enabled = torch.tensor(1, dtype=torch.int32), torch.tensor([1, 0])
    assert {name for name, _ in layer.named_buffers()} == {"_gate", "_enabled"}
    assert list(layer.state_dict()) == names == ["weight", "bias", "lora_a", "lora_b"]
    layer.gate = torch.tensor([0])
    layer.enabled = True
    assert {name for name, _ in layer.named_buffers()} == {"_gate"}


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casting_keeps_an_integer_gate_and_keeps_working(cast):
    layer = layer_of()
    layer.gate, layer.enabled = torch.tensor(1, dtype=torch.int32), torch.tensor(True)
    getattr(layer, cast)()
    assert (layer.gate.dtype, layer.enabled.dtype) == (torch.int32, torch.bool)
    dtype = layer.weight.dtype
    assert layer.lora_a.dtype == layer.lora_b.dtype == layer.bias.dtype == dtype
    x = inputs(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    want = base_of(layer, x).double() + inputs(dtype).double() @ layer.delta_weight().double().T
    torch.testing.assert_close(y.double(), want, rtol=0, atol=16 * torch.finfo(dtype).eps * want.abs().max().item())
    y.sum().backward()
    assert layer.lora_b.grad.dtype == dtype


# from_linear


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_the_objects_and_freezes_them(bias):
    linear = nn.Linear(12, 10, bias=bias).eval()
    weight, bias_ = linear.weight, linear.bias
    layer = CoToLoRALinear.from_linear(linear, rank=3, alpha=5.0, dropout=0.25, use_rslora=True, init="gaussian")
    assert layer.weight is weight
    assert layer.bias is bias_
    assert not any(p.requires_grad for p in linear.parameters())
    assert not layer.training
    assert (layer.rank, layer.alpha, layer.dropout, layer.use_rslora, layer.init) == (3, 5.0, 0.25, True, "gaussian")
    assert CoToLoRALinear.from_linear(linear.train()).training


def test_from_linear_draws_random_numbers_only_for_a():
    linear = nn.Linear(12, 10)
    torch.manual_seed(0)
    layer = CoToLoRALinear.from_linear(linear, rank=3)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    nn.init.kaiming_uniform_(expected := torch.empty(3, 12), a=math.sqrt(5))
    assert torch.equal(layer.lora_a, expected)
    assert torch.equal(torch.get_rng_state(), after)


def pruned_linear() -> nn.Linear:
    return prune.l1_unstructured(nn.Linear(12, 10), "weight", 0.5)


class NoForward(nn.Module):
    in_features, out_features = 12, 10


class Sizes(nn.Identity):
    def __init__(self, in_features: object, out_features: object):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda: nn.LazyLinear(10), "got LazyLinear, whose in_features", id="lazy"),
        pytest.param(pruned_linear, "weight is a Tensor, not an nn.Parameter", id="pruned"),
        pytest.param(lambda: nn.MultiheadAttention(4, 2).out_proj, "MultiheadAttention passes", id="out-proj"),
        pytest.param(lambda: nn.Conv1d(12, 10, 1), "got Conv1d", id="convolution"),
        pytest.param(NoForward, "got NoForward, which has no forward", id="no-forward"),
        pytest.param(lambda: Sizes(12, None), "out_features are not positive integers", id="no-size"),
        pytest.param(lambda: Sizes(12, 10.0), "out_features are not positive integers", id="size-a-float"),
        pytest.param(lambda: Sizes(True, 10), "out_features are not positive integers", id="size-a-bool"),
        pytest.param(lambda: CoToLoRALinear(12, 10), "got a CoToLoRALinear that is an adapter", id="itself"),
        pytest.param(lambda: "linear", "got str", id="no-module"),
    ],
)
def test_from_linear_refuses_what_it_cannot_adapt(make, reason):
    with pytest.raises(TypeError, match=f"linear must be a module that maps in_features to out_features; .*{reason}"):
        CoToLoRALinear.from_linear(make())


def test_from_linear_takes_a_lazy_linear_that_has_its_weights():
    lazy = nn.LazyLinear(10)
    lazy(inputs())
    assert CoToLoRALinear.from_linear(lazy).weight is lazy.weight


@pytest.mark.parametrize("bad", [{"rank": 0}, {"alpha": float("inf")}, {"dropout": 2}, {"variant": "x"}, {"init": "x"}])
def test_from_linear_checks_like_the_constructor_and_before_it_touches_anything(bad):
    linear = nn.Linear(12, 10)
    with pytest.raises(ValueError, match=next(iter(bad))):
        CoToLoRALinear.from_linear(linear, **bad)
    assert linear.weight.requires_grad


# transformers' Conv1D


def conv1d() -> Conv1D:
    torch.manual_seed(0)
    conv = Conv1D(10, 12)
    nn.init.normal_(conv.bias)
    return conv


def test_conv1d_keeps_its_weight_as_it_is():
    conv, x = conv1d(), inputs()
    layer = CoToLoRALinear.from_linear(conv, rank=4)
    assert layer.weight is conv.weight
    assert (layer.weight.shape, layer.in_features, layer.out_features) == ((12, 10), 12, 10)
    torch.testing.assert_close(layer(x), conv(x))
    trained(layer)
    torch.testing.assert_close(layer(x), conv(x) + layer.scale * (x @ layer.lora_a.T @ layer.lora_b.T))
    assert layer.delta_weight().shape == (10, 12)
    layer.load_state_dict(conv.state_dict(), strict=True)


def test_conv1d_merges_and_comes_back():
    conv, x = conv1d(), inputs()
    before, layer = conv.weight.detach().clone(), trained(CoToLoRALinear.from_linear(conv, rank=4)).eval()
    y = layer(x)
    layer.merge()
    assert layer.weight.shape == (12, 10)
    torch.testing.assert_close(layer(x), y)
    back = layer.to_linear()
    assert type(back) is Conv1D
    assert (back.nf, back.nx, back.training) == (10, 12, False)
    torch.testing.assert_close(back(x), y)
    plain = layer.to_linear(merge=False)
    assert plain.weight is conv.weight
    assert torch.equal(plain(x), conv(x))
    layer.unmerge()
    assert layer.weight is conv.weight
    assert torch.equal(conv.weight, before)


# merging


@pytest.mark.parametrize("half_factors", [False, True], ids=["float32-factors", "cast-with-the-rest"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_merged_weights_are_rounded_once(dtype, half_factors):
    layer = layer_of(dtype)
    if half_factors:
        layer.to(dtype)
    exact = layer.weight.double() + layer.scale * (layer.lora_b.double() @ layer.lora_a.double())
    with torch.autocast("cpu", torch.bfloat16):  # must not round the product
        layer.merge()
    if dtype == torch.float32:
        torch.testing.assert_close(layer.weight.double(), exact, rtol=1e-6, atol=1e-6)
    else:
        once = exact.to(dtype)
        # in rare cases a float32 sum rounds a tie the other way
        assert (layer.weight != once).sum() <= 1
        torch.testing.assert_close(layer.weight, once, rtol=torch.finfo(dtype).eps, atol=0)


def test_merging_counts_enabled_and_ignores_the_gate():
    layer, x = layer_of(), inputs()
    on, off = layer(x), base_of(layer, x)
    layer.gate = False
    layer.merge()
    torch.testing.assert_close(layer(x), on)  # in train mode, with the gate off: a merged layer is a plain linear
    layer.unmerge()
    for disabled in (False, torch.tensor(0)):
        layer.enabled = disabled
        layer.merge()
        assert torch.equal(layer(x), off)
        assert torch.equal(layer.to_linear()(x), off)
        layer.unmerge()
    layer.enabled = torch.tensor(1)
    layer.merge()
    torch.testing.assert_close(layer(x), on)


def test_a_row_mask_cannot_be_merged():
    layer = layer_of()
    weight = layer.weight
    layer.enabled = torch.tensor([1, 0])
    for attempt in (layer.merge, layer.to_linear):
        with pytest.raises(RuntimeError, match=r"enabled is a row mask.*set it to a bool to merge"):
            attempt()
    assert not layer.merged
    assert layer.weight is weight


def test_merging_or_unmerging_twice_has_no_further_effect():
    layer = layer_of()
    original = layer.weight
    layer.unmerge()
    assert layer.weight is original
    layer.merge()
    merged = layer.weight
    layer.merge()
    assert layer.weight is merged
    layer.unmerge()
    layer.unmerge()
    assert layer.weight is original


def test_a_merged_layer_does_not_train():
    layer = layer_of()
    layer.merge()
    assert not layer(inputs()).requires_grad
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias", "lora_a", "lora_b"]
    assert not layer.weight.requires_grad


def test_merging_never_writes_a_tied_weight():
    embedding = nn.Embedding(10, 12)
    head = nn.Linear(12, 10, bias=False)
    head.weight = embedding.weight
    layer, before = trained(CoToLoRALinear.from_linear(head)), embedding.weight.detach().clone()
    layer.merge()
    assert torch.equal(embedding.weight, before)
    # a copy of both is tied as well
    twin = copy.deepcopy(nn.ModuleList([embedding, layer]))
    for tied, merged in ((embedding, layer), twin):
        merged.unmerge()
        assert merged.weight is tied.weight
        assert torch.equal(tied.weight, before)


def test_the_state_dict_of_a_merged_layer_holds_the_original_weight():
    layer = layer_of(torch.bfloat16)
    want = {name: t.clone() for name, t in layer.state_dict().items()}
    layer.merge()
    got = layer.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert layer.state_dict(keep_vars=True)["weight"] is layer._original_weight
    assert list(nn.Sequential(layer).state_dict()) == [f"0.{name}" for name in want]
    assert torch.equal(nn.Sequential(layer).state_dict()["0.weight"], want["weight"])


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_loading_into_a_merged_layer_merges_the_loaded_factors(assign):
    source, layer = trained(CoToLoRALinear(12, 10, rank=4, alpha=6.0), seed=7).eval(), layer_of().eval()
    layer.merge()
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert layer.merged
    torch.testing.assert_close(layer(inputs()), source(inputs()))
    layer.unmerge()
    assert torch.equal(layer.weight, source.weight)
    assert torch.equal(layer(inputs()), source(inputs()))


def test_casting_and_moving_while_merged():
    layer, x = layer_of(), inputs(torch.bfloat16)
    tied = nn.Linear(12, 10)
    tied.weight = layer.weight
    original = layer.weight
    both = nn.ModuleList([layer, tied])
    layer.merge()
    both.bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    layer(x)
    layer.unmerge()
    assert layer.weight is original is tied.weight
    assert layer.weight.dtype == torch.bfloat16
    layer(x)
    layer.merge()
    layer.to("meta")
    layer.unmerge()
    assert layer.weight.is_meta


@pytest.mark.parametrize("bias", [True, False])
def test_to_linear(bias):
    layer, x = layer_of(bias=bias).eval(), inputs()
    y, off = layer(x), base_of(layer, x)
    merged, plain = layer.to_linear(), layer.to_linear(merge=False)
    assert type(merged) is type(plain) is nn.Linear
    assert (merged.in_features, merged.out_features, merged.training) == (12, 10, False)
    torch.testing.assert_close(merged(x), y)
    assert torch.equal(plain(x), off)
    assert plain.weight is layer.weight
    assert merged.weight is not layer.weight
    assert merged.bias is plain.bias is layer.bias
    layer.merge()
    torch.testing.assert_close(layer.to_linear()(x), y)
    assert torch.equal(layer.to_linear(merge=False)(x), off)


# copies, files, devices


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize(
    "duplicate",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda layer: pickle.loads(pickle.dumps(layer)), id="pickle"),
        pytest.param(lambda layer: torch.load(saved(layer), weights_only=False), id="torch.save"),
    ],
)
def test_copies_are_whole_and_apart(duplicate, merged):
    layer, x = layer_of(use_rslora=True), inputs()
    layer.gate, layer.enabled = torch.tensor(1, dtype=torch.int32), True
    if merged:
        layer.merge()
    twin = duplicate(layer)
    assert torch.equal(twin(x), layer(x))
    assert twin.merged == merged
    assert repr(twin) == repr(layer)
    twin.unmerge()
    layer.unmerge()
    assert torch.equal(twin.weight, layer.weight)
    twin.gate = False
    with torch.no_grad():
        twin.lora_b.zero_()
        twin.weight.zero_()
    assert bool(layer.gate)
    assert layer.lora_b.any()
    assert layer.weight.any()


def test_state_dicts_load_with_weights_only():
    layer, x = layer_of(), inputs()
    twin = CoToLoRALinear(12, 10, rank=4, alpha=6.0)
    twin.load_state_dict(torch.load(saved(layer.state_dict()), weights_only=True), strict=True)
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_base_checkpoint_loads_strictly(assign):
    linear, layer, x = nn.Linear(12, 10), layer_of(), inputs()
    a, b = layer.lora_a.detach().clone(), layer.lora_b.detach().clone()
    assert layer.load_state_dict(linear.state_dict(), strict=True, assign=assign).missing_keys == []
    assert torch.equal(base_of(layer, x), linear(x))
    assert torch.equal(layer.lora_a, a)
    assert torch.equal(layer.lora_b, b)
    assert not layer.weight.requires_grad
    model = nn.Sequential(layer, nn.Linear(10, 2))
    model.load_state_dict(nn.Sequential(linear, nn.Linear(10, 2)).state_dict(), strict=True)


@pytest.mark.parametrize("half", ["lora_a", "lora_b"])
def test_half_an_adapter_is_an_error(half):
    layer = layer_of()
    state = {name: t for name, t in layer.state_dict().items() if name != half}
    with pytest.raises(RuntimeError, match=f"Missing key.*{half}"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_half_a_base_is_an_error(missing):
    layer = layer_of()
    state = {name: t for name, t in nn.Linear(12, 10).state_dict().items() if name != missing}
    with pytest.raises(RuntimeError, match=f"Missing key.*{missing}"):
        layer.load_state_dict(state)


def test_unknown_keys_and_other_ranks_are_errors():
    layer = layer_of()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**layer.state_dict(), "lora_c": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch for lora_a"):
        layer.load_state_dict(CoToLoRALinear(12, 10, rank=5).state_dict())


@pytest.mark.parametrize("way", ["constructor", "from_linear"])
def test_meta_to_empty_reset_parameters(way):
    if way == "constructor":
        layer = CoToLoRALinear(12, 10, rank=4, device="meta")
    else:
        layer = CoToLoRALinear.from_linear(nn.Linear(12, 10, device="meta"), rank=4)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.ones(3, 12, device="meta")).shape == (3, 10)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(float("nan"))
    layer.reset_parameters()
    linear, x = nn.Linear(12, 10), inputs()
    layer.load_state_dict(linear.state_dict(), strict=True)
    assert layer.lora_a.any()
    assert torch.equal(layer(x), linear(x))


VARIANTS_ALONE = ["lora", "dora", "hira"]


def on_meta(variant):
    """A model on the meta device, and the same model with memory and new adapters."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 10))
    inject(model, rank=4, variant=variant)
    return model, nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 10))


def assert_is_fresh(model, plain):
    x = inputs()
    torch.testing.assert_close(model(x), plain(x))
    for layer in model:
        assert layer.lora_a.abs().sum() > 0
        assert layer.lora_a.requires_grad
        assert not layer.lora_b.any()
        assert not layer.weight.requires_grad
    model(x).sum().backward()
    assert model[0].lora_b.grad.any()


@pytest.mark.parametrize("variant", VARIANTS_ALONE)
def test_assigning_a_base_checkpoint_to_a_meta_model_initialises_its_adapters(variant):
    model, plain = on_meta(variant)
    assert model.load_state_dict(plain.state_dict(), strict=True, assign=True) == ([], [])
    assert_is_fresh(model, plain)
    # loads the checkpoint shard by shard
    model, plain = on_meta(variant)
    state = plain.state_dict()
    for keys in (["0.bias"], ["0.weight"], ["1.weight", "1.bias"]):
        model.load_state_dict({key: state[key] for key in keys}, strict=False, assign=True)
        assert model[0].lora_a.is_meta == (keys == ["0.bias"])
    assert_is_fresh(model, plain)


@pytest.mark.parametrize("variant", VARIANTS_ALONE)
def test_a_meta_model_computes_with_an_assigned_whole_checkpoint(variant):
    model, plain = on_meta(variant)
    inject(plain, rank=4, variant=variant)
    for layer in plain:
        trained(layer)
    model.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(model(inputs()), plain(inputs()))
    half = {key: t for key, t in plain.state_dict().items() if key != "1.lora_b"}
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.lora_b"):
        on_meta(variant)[0].load_state_dict(half, assign=True)


@pytest.mark.parametrize("variant", VARIANTS_ALONE)
def test_reset_parameters_initialises_meta_factors_of_a_materialised_base(variant):
    model, plain = on_meta(variant)
    for layer, linear in zip(model, plain, strict=True):
        layer.reset_parameters()
        assert layer.lora_a.is_meta
        layer.weight, layer.bias = (nn.Parameter(t.detach(), requires_grad=False) for t in (linear.weight, linear.bias))
        layer.reset_parameters()
    assert_is_fresh(model, plain)


@pytest.mark.parametrize("variant", VARIANTS_ALONE)
def test_a_base_checkpoint_is_enough_after_to_empty(variant, monkeypatch):
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **options: empty(t, **options).fill_(7))
    model, plain = on_meta(variant)
    model[1].gate = torch.tensor(1, dtype=torch.int32, device="meta")
    model.to_empty(device="cpu")
    assert model[1].gate == 1
    model.load_state_dict(plain.state_dict())
    assert_is_fresh(model, plain)
    layer = model[0]
    layer.gate, layer.enabled = torch.tensor(0), torch.tensor([True, False, True])
    layer.to_empty(device="cpu")
    assert (layer.gate, layer.enabled.tolist()) == (0, [True, False, True])


def test_assigning_a_foreign_base_on_meta_initialises_its_adapter():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    plain = Own(12, 10)
    for way in ("assign", "to_empty"):
        layer = CoToLoRALinear.from_linear(Own(12, 10, device="meta"), rank=4)
        if way == "to_empty":
            layer.to_empty(device="cpu")
        assert layer.load_state_dict(plain.state_dict(), assign=way == "assign") == ([], [])
        assert torch.equal(layer(inputs()), plain(inputs()))
        assert layer.lora_a.abs().sum() > 0
        assert not layer.lora_b.any()


def test_shared_factors_are_missing_keys_because_no_layer_can_initialise_them():
    model, plain = on_meta("vera")
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.lora_a.*0\.vera_lambda_b"):
        model.load_state_dict(plain.state_dict(), assign=True)
    model = copy.deepcopy(plain)
    inject(model, rank=4, variant="vera")
    assert model.load_state_dict(plain.state_dict(), assign=True) == ([], [])


def test_reset_parameters_does_not_change_the_base():
    layer = layer_of()
    weight, bias, a = (p.detach().clone() for p in (layer.weight, layer.bias, layer.lora_a))
    layer.reset_parameters()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)
    assert not torch.equal(layer.lora_a, a)
    assert not layer.lora_b.any()


def test_repr_shows_the_adapter_and_its_switches():
    layer = CoToLoRALinear(8, 4, rank=2, alpha=4)
    text = "CoToLoRALinear(in_features=8, out_features=4, bias=True, rank=2, alpha=4.0, gate={}, variant=lora)"
    assert repr(layer) == text.format("True")
    layer.gate = False
    assert repr(layer) == text.format("False")
    layer.gate, layer.enabled = torch.tensor(1), torch.tensor([1, 0, 1])
    assert repr(layer) == text.format("tensor[], enabled=tensor[3]")


def test_the_layer_is_not_an_nn_linear():
    # code that looks for nn.Linear (PEFT, torchao, initialisers) must not process it again
    assert not isinstance(CoToLoRALinear(8, 4), nn.Linear)
