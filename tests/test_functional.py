"""The operation: results, gradients, saved tensors, and errors."""

import contextlib
import math
import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cotolora import CoToLoRALinear, coto_lora_linear, set_backend
from cotolora.backends.autograd import autocasts
from cotolora.variants import VARIANTS
from tests.support.calls import expanded, offset, sliced, transposed

SCALE = 0.75  # neither 1 nor a power of two, so that a lost, squared or inverted scale is visible
BACKENDS = ["reference", "addmm"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# one tensor gate of each kind for inputs with three samples
GATES = [
    pytest.param(True, id="true"),
    pytest.param(torch.tensor(1, dtype=torch.int32), id="0-dim-on"),
    pytest.param(torch.tensor(0, dtype=torch.int32), id="0-dim-off"),
    pytest.param(torch.tensor([True, False, True]), id="rows-mixed"),
    pytest.param(torch.tensor([0, 1, 1]), id="rows-first-off"),
    pytest.param(torch.tensor([0, 0, 0]), id="rows-all-off"),
]

# x, out_features, rank


class Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor


ALL = frozenset(Operands._fields)
ADAPTER = frozenset(("x", "lora_a", "lora_b"))


def operands(shape, out, rank, *, dtype=torch.float32, factors=None, bias=True, seed=0) -> Operands:
    """Random operands, scaled so that base and update have similar size."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    factors = factors or dtype
    return Operands(
        draw(*shape).to(dtype),
        (draw(out, shape[-1]) / math.sqrt(shape[-1])).to(dtype),
        draw(out).to(dtype) if bias else None,
        (draw(rank, shape[-1]) / math.sqrt(shape[-1])).to(factors),
        (draw(out, rank) / math.sqrt(rank)).to(factors),
    )


def double(ops: Operands) -> Operands:
    """The operands in float64; A and B are first rounded to the dtype of x, as in the operation."""
    return Operands(*(None if t is None else t.detach().to(ops.x.dtype).double() for t in ops))


def needing(ops: Operands, names=ADAPTER) -> Operands:
    """New leaves of the same layout; those in `names` require a gradient."""
    fields = zip(Operands._fields, ops, strict=True)
    return Operands(*(None if t is None else t.detach().requires_grad_(name in names) for name, t in fields))


def run(ops: Operands, dy=None, *, needs=ADAPTER, **kwargs) -> dict[str, Tensor]:
    """The output "y" and the gradients by operand."""
    leaves = needing(ops, needs)
    y = coto_lora_linear(*leaves, scale=SCALE, **kwargs)
    asked = {name: t for name, t in leaves._asdict().items() if t is not None and t.requires_grad}
    dy = torch.ones_like(y) if dy is None else dy
    gradients = torch.autograd.grad(y, list(asked.values()), dy, allow_unused=True)
    return {"y": y.detach(), **dict(zip(asked, gradients, strict=True))}


def dy_for(ops: Operands, seed=1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*ops.x.shape[:-1], ops.weight.shape[0], generator=g).to(ops.x.dtype)


# numbers


@pytest.mark.parametrize("backend", BACKENDS)
def test_reference_is_the_formula(backend):
    # as many positions as samples, so that a row gate applied to the wrong dimension raises no error but is detected
    ops = operands((3, 3, 6), 5, 2, dtype=torch.float64)
    x, w, bias, a, b = ops
    y = coto_lora_linear(*ops, scale=SCALE, backend=backend)
    torch.testing.assert_close(y, x @ w.T + bias + SCALE * (x @ a.T @ b.T))
    gate = torch.tensor([0, 1, 0])
    y = coto_lora_linear(*ops, scale=SCALE, backend=backend, gate=gate)
    torch.testing.assert_close(y, x @ w.T + bias + gate.view(3, 1, 1) * SCALE * (x @ a.T @ b.T))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_masters_are_cast_to_x_and_get_float32_gradients(backend, dtype):
    ops = operands((3, 4, 24), 16, 4, dtype=dtype, factors=torch.float32)
    dy = dy_for(ops)
    got = run(ops, dy, backend=backend)
    cast = run(ops._replace(lora_a=ops.lora_a.to(dtype), lora_b=ops.lora_b.to(dtype)), dy, backend=backend)
    assert (got["y"].dtype, got["x"].dtype) == (dtype, dtype)
    assert got["lora_a"].dtype == got["lora_b"].dtype == torch.float32
    for name in got:
        # x is not cast up: the results equal those with factors of x's dtype
        assert torch.equal(got[name], cast[name].to(got[name].dtype)), name


# layouts


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_addmm_agrees_with_the_reference_on_random_operands(data):
    leading = data.draw(st.lists(st.integers(0, 4), max_size=3), label="leading")
    in_features, out, rank = (data.draw(st.integers(1, 9), label=n) for n in ("in", "out", "rank"))
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    factors = data.draw(st.sampled_from([dtype, torch.float32]), label="factors")
    ops = operands((*leading, in_features), out, rank, dtype=dtype, factors=factors, bias=data.draw(st.booleans()))
    layouts = st.sampled_from([None, transposed, sliced, offset, expanded])
    reshaped = {n: data.draw(layouts, label=n) for n in ("x", "weight", "lora_a", "lora_b", "dy")}
    dy = dy_for(ops)
    if reshaped["dy"] is not None and dy.numel():
        dy = reshaped["dy"](dy)
    for name, layout in reshaped.items():
        if name != "dy" and layout is not None and getattr(ops, name).numel():
            ops = ops._replace(**{name: layout(getattr(ops, name))})
    gate = data.draw(st.sampled_from(["true", "device", "rows"]), label="gate")
    if gate == "rows" and leading:
        gate = torch.tensor(data.draw(st.lists(st.booleans(), min_size=leading[0], max_size=leading[0])), dtype=bool)
    else:
        gate = True if gate == "true" else torch.tensor(data.draw(st.booleans()))
    needs = data.draw(st.sets(st.sampled_from(sorted(ALL)), min_size=1), label="needs")
    if ops.bias is None and needs == {"bias"}:
        needs = {"lora_a"}
    ours = run(ops, dy, needs=needs, gate=gate, backend="addmm")
    torchs = run(ops, dy, needs=needs, gate=gate, backend="reference")
    exact = run(double(ops), dy.double(), needs=needs, gate=gate, backend="reference")
    # the sums of absolute values, because few terms may cancel and PyTorch may be exact by chance
    bare = Operands(*(None if t is None else t.abs() for t in double(ops)))
    magnitude = run(bare, dy.double().abs(), needs=needs, gate=gate, backend="reference")
    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    assert ours.keys() == torchs.keys() == exact.keys()
    for name in exact:
        assert (ours[name].dtype, ours[name].shape) == (torchs[name].dtype, torchs[name].shape)
        assert ((ours[name].double() - exact[name]).abs() <= 4 * eps * magnitude[name] + smallest).all(), name


# dropout


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_acts_on_the_adapters_input_only(backend):
    n = 4000
    x = torch.ones(1, 1).expand(n, 8)  # one number in memory, but every entry must have its own mask
    weight, a, b = torch.full((8, 8), 3.0), torch.eye(8), torch.eye(8)
    torch.manual_seed(0)
    update = coto_lora_linear(x, weight, None, a, b, scale=1.0, dropout=0.25, backend=backend) - F.linear(x, weight)
    kept = update > 0.5
    torch.testing.assert_close(update, torch.where(kept, 1 / 0.75, 0.0), atol=1e-5, rtol=0)
    deviation = math.sqrt(0.25 * 0.75 / kept.numel())
    assert abs(kept.float().mean() - 0.75) < 5 * deviation
    assert kept.any(0).all()
    assert not kept.all(0).any()
    assert not torch.equal(kept[:, 0], kept[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_follows_torchs_generator(backend):
    ops = operands((3, 4, 8), 8, 4)

    def draw():
        return coto_lora_linear(*ops, scale=SCALE, dropout=0.5, backend=backend)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


# autocast


# off


@contextlib.contextmanager
def saved_tensors():
    """Collects the tensors that autograd saves for the backward."""
    saved: list[Tensor] = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved


def nodes(y: Tensor) -> list[str]:
    """The names of all autograd nodes that lead to y."""
    found, todo = {}, [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found[node] = node.name()
            todo += [following for following, _ in node.next_functions]
    return sorted(found.values())


@pytest.mark.parametrize("needs_x", [True, False], ids=["x-needs-grad", "x-does-not"])
def test_host_gate_off_saves_and_records_the_same_as_linear(needs_x):
    leaves = needing(operands((3, 4, 8), 8, 4), {"lora_a", "lora_b", *(["x"] if needs_x else [])})
    with saved_tensors() as by_linear:
        base = F.linear(*leaves[:3])
    with saved_tensors() as by_us:
        y = coto_lora_linear(*leaves, scale=SCALE, gate=False, dropout=0.5)
    assert [t.data_ptr() for t in by_us] == [t.data_ptr() for t in by_linear]
    assert nodes(y) == nodes(base)
    assert y.requires_grad == needs_x
    if not needs_x:
        assert (by_us, nodes(y)) == ([], [])


def test_backward_stops_below_the_lowest_active_adapter():
    layers = [needing(operands((3, 8), 8, 4, seed=seed), {"lora_a", "lora_b"}) for seed in range(4)]
    x = layers[0].x

    def chain(on):
        y = x
        for i, layer in enumerate(layers):
            y = coto_lora_linear(y, *layer[1:], scale=SCALE, gate=i == on, backend="addmm")
        return y

    y = chain(on=1)
    # A and B of the adapter that is on, and two plain linears above it; nothing of the adapter below
    assert sum("LowRankLinear" in name for name in nodes(y)) == 1
    assert sum("AccumulateGrad" in name for name in nodes(y)) == 2
    assert [len(nodes(chain(on=i))) for i in (3, 2, 1, 0)] == [3, 4, 5, 6]
    y.sum().backward()
    for i, layer in enumerate(layers):
        assert (layer.lora_a.grad is not None) == (layer.lora_b.grad is not None) == (i == 1)
    with saved_tensors() as saved:
        chain(on=None)
    assert saved == []


# saved tensors and computed products


def storages(tensors) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in tensors]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addmm_saves_x_by_reference_h_and_the_mask(dtype, dropout):
    leaves = needing(operands((3, 4, 8), 8, 4, dtype=dtype, factors=torch.float32))
    with saved_tensors() as saved:
        coto_lora_linear(*leaves, scale=SCALE, gate=torch.tensor(1), dropout=dropout, backend="addmm")
    own = [t for t in saved if t.untyped_storage().data_ptr() not in storages([*leaves]) and t.dim() > 0]
    assert set(storages([*leaves])) - set(storages(saved)) == set(storages([leaves.bias]))
    (h,) = (t for t in own if t.dtype != torch.bool)
    assert (h.shape, h.dtype) == ((12, 4), dtype)
    masks = [t for t in own if t.dtype == torch.bool]
    assert [m.shape for m in masks] == ([leaves.x.shape] if dropout else [])


@pytest.mark.parametrize(
    ("needs", "kept"),
    [
        ({"lora_a", "lora_b"}, {"x", "lora_a", "lora_b", "h"}),
        ({"lora_a"}, {"x", "lora_b"}),
        ({"lora_b"}, {"lora_a", "h"}),
        ({"x"}, {"weight", "lora_a", "lora_b"}),
        ({"weight"}, {"x"}),
        ({"bias"}, set()),
    ],
    ids=lambda names: "+".join(sorted(names)) or "nothing",
)
def test_addmm_saves_only_what_is_needed(needs, kept):
    leaves = needing(operands((3, 4, 8), 8, 4), needs)
    with saved_tensors() as saved:
        coto_lora_linear(*leaves, scale=SCALE, backend="addmm")
    known = {t.untyped_storage().data_ptr(): name for name, t in leaves._asdict().items()}
    assert {known.get(pointer, "h") for pointer in storages(saved)} == kept


PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "matmul", "linear")


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name in PRODUCTS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("needs", "products"),
    [({"lora_b"}, 1), ({"lora_a"}, 2), ({"x"}, 3), ({"lora_a", "lora_b"}, 3), (ADAPTER, 5), (ALL, 6), ({"bias"}, 0)],
    ids=lambda names: "+".join(sorted(names)) if not isinstance(names, int) else str(names),
)
def test_addmm_computes_only_what_is_needed(needs, products):
    leaves = needing(operands((3, 4, 8), 8, 4), needs)
    y = coto_lora_linear(*leaves, scale=SCALE, backend="addmm")
    with CountProducts() as counter:
        y.sum().backward()
    assert counter.count == products
    for name, leaf in leaves._asdict().items():
        assert (leaf.grad is not None) == (name in needs)


# twice


def test_a_hessian_product_is_refused_and_not_zero():
    x, weight, _, a, b = operands((3, 4, 8), 8, 4)

    def loss(a):
        return coto_lora_linear(x, weight, None, a, b, scale=SCALE).pow(2).sum()

    with pytest.raises(RuntimeError, match="has no double backward"):
        torch.autograd.functional.hvp(loss, a, a)
    with set_backend("reference"):
        assert torch.autograd.functional.hvp(loss, a, a)[1].any()


# torch.func, batched and forward-mode derivatives


def test_torch_func_takes_the_reference():
    ops = operands((3, 4, 8), 8, 4)
    want = run(ops, backend="reference")

    def loss(a, b):
        return coto_lora_linear(*ops[:3], a, b, scale=SCALE).sum()

    for got, name in zip(torch.func.grad(loss, argnums=(0, 1))(*ops[3:]), ("lora_a", "lora_b"), strict=True):
        torch.testing.assert_close(got, want[name])
    each = torch.func.vmap(lambda x: coto_lora_linear(x, *ops[1:], scale=SCALE))(ops.x)
    torch.testing.assert_close(each, want["y"])
    assert torch.func.hessian(loss)(*ops[3:]).shape == (4, 8, 4, 8)


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_torch_func_refuses_addmm_by_name(transform):
    ops = operands((3, 4, 8), 8, 4)
    with pytest.raises(RuntimeError, match=r"(?s)backend='addmm' cannot run.*torch.func transforms"):
        transform(lambda x: coto_lora_linear(x, *ops[1:], scale=SCALE, backend="addmm"))(ops.x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of checks of shapes
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_jit_trace_takes_the_reference(variant):
    model = torch.nn.Sequential(CoToLoRALinear(8, 4, rank=2, variant=variant)).eval()
    traced = torch.jit.trace(model, torch.randn(3, 8))
    # the trace must use the current values of the tensors, not those at tracing
    for p in model.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(5, 8)
    torch.testing.assert_close(traced(x), model(x))


def test_forward_mode_takes_the_reference():
    ops = operands((3, 4, 8), 8, 4)
    with torch.autograd.forward_ad.dual_level():
        a = torch.autograd.forward_ad.make_dual(ops.lora_a, torch.ones_like(ops.lora_a))
        y = coto_lora_linear(*ops._replace(lora_a=a), scale=SCALE)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
        with pytest.raises(RuntimeError, match="forward-mode"):
            coto_lora_linear(*ops._replace(lora_a=a), scale=SCALE, backend="addmm")
    torch.testing.assert_close(tangent, SCALE * ops.x.sum(-1, keepdim=True) * ops.lora_b.sum(1))


@pytest.mark.parametrize("gate", GATES)
def test_addmm_takes_batched_gradients(gate):
    ops = operands((3, 2, 4), 3, 2)

    def outputs(x, a, b):
        return coto_lora_linear(x, *ops[1:3], a, b, scale=SCALE, gate=gate, backend="addmm").sum((0, 1))

    inputs = (ops.x, ops.lora_a, ops.lora_b)
    one_by_one = torch.autograd.functional.jacobian(outputs, inputs)
    at_once = torch.autograd.functional.jacobian(outputs, inputs, vectorize=True)
    for got, want in zip(at_once, one_by_one, strict=True):
        torch.testing.assert_close(got, want)


# devices without numbers


@pytest.mark.parametrize("gate", [False, *(p.values[0] for p in GATES)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_tensors_give_shapes(backend, gate):
    ops = needing(Operands(*(t.to("meta") for t in operands((3, 4, 8), 5, 2))))
    gate = gate.to("meta") if isinstance(gate, Tensor) else gate
    y = coto_lora_linear(*ops, scale=SCALE, gate=gate, backend=backend)
    assert (y.shape, y.device.type) == ((3, 4, 5), "meta")
    y.sum().backward()
    assert ops.x.grad.shape == ops.x.shape


# compilation and checkpointing


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "gates",
    [
        pytest.param([False], id="host-off"),
        pytest.param([True], id="host-on"),
        pytest.param([torch.tensor(on, dtype=torch.int32) for on in (1, 0)], id="0-dim"),
        pytest.param([torch.tensor([True, False, True])], id="bool-rows"),
        pytest.param([torch.tensor(on) for on in ([0, 1, 1], [0, 0, 0])], id="rows"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_and_equals_eager(backend, gates):
    ops = operands((3, 4, 8), 8, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, weight, bias, a, b, gate):
        return coto_lora_linear(x, weight, bias, a, b, scale=SCALE, gate=gate, backend=backend)

    for gate in gates:
        want, leaves = run(ops, gate=gate, backend=backend), needing(ops)
        y = compiled(*leaves, gate)
        torch.testing.assert_close(y, want["y"])
        y.sum().backward()
        for name in ADAPTER:
            got = getattr(leaves, name).grad
            assert (got is None) == (want[name] is None)
            if got is not None:
                torch.testing.assert_close(got, want[name])


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("rows", [False, True], ids=["0-dim", "rows"])
def test_one_graph_serves_every_value_of_a_tensor_gate(rows):
    ops, counter = operands((2, 4, 8), 8, 4), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(coto_lora_linear, fullgraph=True, backend=counter)
    for pattern in ((1, 0), (0, 0), (1, 1), (0, 1)):
        gate = torch.tensor(pattern if rows else pattern[0], dtype=torch.int32)
        got = compiled(*ops, scale=SCALE, gate=gate)
        torch.testing.assert_close(got, coto_lora_linear(*ops, scale=SCALE, gate=gate))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_with_a_changing_scale_and_dropout():
    ops = operands((3, 4, 8), 8, 4)
    compiled = torch.compile(coto_lora_linear, fullgraph=True, backend="aot_eager")
    for scale in (0.5, 0.7, 0.9):
        torch.testing.assert_close(compiled(*ops, scale=scale), coto_lora_linear(*ops, scale=scale))
        assert compiled(*ops, scale=scale, dropout=1 - scale).isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("gate", [False, *(p.values[0] for p in GATES)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_gives_the_same_gradients(backend, gate, reentrant):
    ops = operands((3, 4, 8), 8, 4)
    gradients = []
    for checkpointed in (False, True):
        leaves = needing(ops)

        def block(x, leaves=leaves):
            return coto_lora_linear(x, *leaves[1:], scale=SCALE, gate=gate, dropout=0.3, backend=backend).tanh()

        torch.manual_seed(0)
        y = checkpoint(block, leaves.x, use_reentrant=reentrant) if checkpointed else block(leaves.x)
        y.sum().backward()
        gradients.append([y.detach(), leaves.x.grad, leaves.lora_a.grad, leaves.lora_b.grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None and recomputed is None) or torch.equal(plain, recomputed)


# bad arguments

HALF = torch.ones(4, 6, dtype=torch.float16)
BAD = [
    ("x", [1.0], TypeError, r"x must be a tensor; got list"),
    ("weight", None, TypeError, r"weight must be a tensor; got NoneType"),
    ("bias", 0.0, TypeError, r"bias must be a tensor; got float"),
    ("lora_a", None, TypeError, r"lora_a must be a tensor; got NoneType"),
    ("lora_b", "b", TypeError, r"lora_b must be a tensor; got str"),
    ("x", torch.ones(3, 6, dtype=torch.int64), TypeError, r"x must be of a floating dtype; got torch.int64"),
    ("x", torch.ones(3, 6, dtype=torch.cfloat), TypeError, r"x must be of a floating dtype; got torch.complex64"),
    ("lora_b", torch.ones(4, 2, dtype=torch.int8), TypeError, r"lora_b must be of a floating dtype; got torch.int8"),
    ("weight", HALF, TypeError, r"weight must be of the dtype of x, torch.float32; got torch.float16"),
    ("bias", HALF[:, 0], TypeError, r"bias must be of the dtype of x, torch.float32; got torch.float16"),
    ("weight", torch.ones(4, 6, device="meta"), ValueError, r"weight must be on the device of x, cpu; got meta"),
    ("lora_a", torch.ones(2, 6, device="meta"), ValueError, r"lora_a must be on the device of x, cpu; got meta"),
    ("weight", torch.ones(6), ValueError, r"weight must be \[out_features, in_features\]; got shape \(6,\)"),
    ("x", torch.ones(3, 5), ValueError, r"x must be \[..., 6\] to fit weight; got shape \(3, 5\)"),
    ("x", torch.ones(()), ValueError, r"x must be \[..., 6\] to fit weight; got shape \(\)"),
    ("bias", torch.ones(5), ValueError, r"bias must be \[4\] to fit weight; got shape \(5,\)"),
    ("bias", torch.ones(4, 1), ValueError, r"bias must be \[4\] to fit weight; got shape \(4, 1\)"),
    ("lora_a", torch.ones(2, 5), ValueError, r"lora_a must be \[rank, 6\] with rank at least 1; got shape \(2, 5\)"),
    ("lora_a", torch.ones(0, 6), ValueError, r"lora_a must be \[rank, 6\] with rank at least 1; got shape \(0, 6\)"),
    ("lora_a", torch.ones(6), ValueError, r"lora_a must be \[rank, 6\] with rank at least 1; got shape \(6,\)"),
    ("lora_b", torch.ones(4, 3), ValueError, r"lora_b must be \[4, 2\] to fit weight and lora_a; got shape \(4, 3\)"),
    ("lora_b", torch.ones(2, 4), ValueError, r"lora_b must be \[4, 2\] to fit weight and lora_a; got shape \(2, 4\)"),
    ("gate", 1, TypeError, r"gate must be a bool or a bool or integer tensor; got int 1"),
    ("gate", None, TypeError, r"gate must be a bool or a bool or integer tensor; got NoneType"),
    ("gate", [True], TypeError, r"gate must be a bool or a bool or integer tensor; got list \[True\]"),
    ("gate", torch.tensor(1.0), TypeError, r"gate must be .* integer tensor; got a tensor of torch.float32"),
    ("gate", torch.tensor(1j), TypeError, r"gate must be .* integer tensor; got a tensor of torch.complex64"),
    ("gate", torch.ones(3, 1, dtype=torch.int), ValueError, r"gate must be 0-dim or \[batch\]; got .* \(3, 1\)"),
    ("gate", torch.ones(4, dtype=torch.int), ValueError, r"row gate .* same batch; got gate of shape \(4,\), x of .*3"),
    ("gate", torch.ones(1, dtype=torch.int), ValueError, r"row gate .* same batch; got gate of shape \(1,\)"),
    (
        "gate",
        torch.ones((), dtype=torch.int, device="meta"),
        ValueError,
        r"gate must be on the device of x, cpu; got m",
    ),
    ("scale", "1", TypeError, r"scale must be a number; got str '1'"),
    ("scale", True, TypeError, r"scale must be a number; got bool True"),
    ("scale", torch.tensor(1.0), TypeError, r"scale must be a number; got Tensor"),
    ("scale", float("inf"), ValueError, r"scale must be finite in float32; got inf"),
    ("scale", float("nan"), ValueError, r"scale must be finite in float32; got nan"),
    ("scale", 1e39, ValueError, r"scale must be finite in float32; got 1e\+39"),
    ("dropout", None, TypeError, r"dropout must be a number; got NoneType None"),
    ("dropout", -0.1, ValueError, r"dropout must be a probability in \[0, 1\]; got -0.1"),
    ("dropout", 1.5, ValueError, r"dropout must be a probability in \[0, 1\]; got 1.5"),
    ("dropout", float("nan"), ValueError, r"dropout must be a probability in \[0, 1\]; got nan"),
    ("backend", "cuda", ValueError, r"'triton:pre_expand', 'triton:hira'; got 'cuda'"),
    ("backend", 3, ValueError, r"'triton:pre_expand', 'triton:hira'; got 3"),
]


@pytest.mark.parametrize("gate", [True, False], ids=["on", "off"])
@pytest.mark.parametrize(("argument", "value", "error", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_arguments_are_named(argument, value, error, message, gate):
    good = {**operands((3, 6), 4, 2)._asdict(), "scale": SCALE, "gate": gate}
    with pytest.raises(error) as raised:
        coto_lora_linear(**{**good, argument: value})
    assert re.search(message, str(raised.value)), str(raised.value)


def test_a_row_gate_needs_a_batch():
    ops = operands((6,), 4, 2)
    with pytest.raises(ValueError, match=r"row gate .* x of shape \(6,\)"):
        coto_lora_linear(*ops, scale=SCALE, gate=torch.ones(6, dtype=torch.int))


def test_other_number_types_are_accepted():
    ops = operands((3, 6), 4, 2)
    for scale in (0, 1, -2.5):
        y = coto_lora_linear(*ops, scale=scale, dropout=0)
        torch.testing.assert_close(y, F.linear(*ops[:3]) + scale * (ops.x @ ops.lora_a.T @ ops.lora_b.T))


def test_zero_features_are_accepted():
    x, weight, bias, a, b = operands((3, 6), 4, 2)
    for backend in BACKENDS:
        y = coto_lora_linear(x[:, :0], weight[:, :0], bias, a[:, :0], b, scale=SCALE, backend=backend)
        assert torch.equal(y, bias.expand(3, 4))
        assert coto_lora_linear(x, weight[:0], bias[:0], a, b[:0], scale=SCALE, backend=backend).shape == (3, 0)


# through the layer


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_layers_take_every_gate():
    layer = CoToLoRALinear(8, 8, rank=2)
    torch.nn.init.normal_(layer.lora_b)
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(3, 8)
    for gate in (True, False, torch.tensor(1), torch.tensor(0), torch.tensor([1, 0, 1])):
        layer.gate = gate
        torch.testing.assert_close(compiled(x), layer(x))
        grads = []
        for forward in (compiled, layer):
            forward(x.requires_grad_()).sum().backward()
            grads.append([p.grad for p in (x, layer.lora_a, layer.lora_b)])
            x.grad = layer.lora_a.grad = layer.lora_b.grad = None
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_serves_a_layer_whose_gate_is_filled():
    layer, counter = CoToLoRALinear(8, 8, rank=2), CompileCounterWithBackend("aot_eager")
    torch.nn.init.normal_(layer.lora_b)
    layer.gate = torch.tensor(1, dtype=torch.int32)
    compiled, x = torch.compile(layer, fullgraph=True, backend=counter), torch.randn(3, 8)
    for gate in (True, False, True, False):
        layer.gate = gate
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_saved_tensors_do_not_keep_copies_of_x():
    """Three projections of one x save it once."""
    x = operands((3, 4, 8), 8, 4).x.requires_grad_()
    with saved_tensors() as saved:
        for seed in range(3):
            leaves = needing(operands((3, 4, 8), 8, 4, seed=seed))
            coto_lora_linear(x, *leaves[1:], scale=SCALE, backend="addmm")
    kept = [t for t in saved if t.shape == x.shape]
    assert len(kept) == 3
    assert set(storages(kept)) == set(storages([x]))


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_autocast_is_detected_on_every_device(device):
    assert not autocasts(torch.device(device))
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, True)
    try:
        assert autocasts(torch.device(device))
    finally:
        torch.set_autocast_enabled(device, before)
