"""Results of every kernel family with every kind of gate, on a GPU if there is one, else in Triton's interpreter."""

import itertools
from dataclasses import dataclass, replace
from types import CodeType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from cotolora import reference
from cotolora.kernels.adapter_grads import Dora, gram, project
from cotolora.kernels.dropout import keep_mask
from cotolora.kernels.hira import hira
from cotolora.kernels.hira_grads import hira_grads
from cotolora.kernels.low_rank_gemm import fits_tma, low_rank_gemm
from cotolora.kernels.one_pass import one_pass
from cotolora.kernels.one_pass_swapped import one_pass_swapped
from cotolora.kernels.partials import Sum, sum_partials
from cotolora.kernels.pre_expand import expand, pre_expand
from cotolora.kernels.row_norm import row_norm
from cotolora.kernels.shrink import shrink
from cotolora.kernels.tiles import TABLES, Stream, Tile, row_for
from tests.support.tolerance import assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poison_empty")
# numpy, which the interpreter uses, warns about infinities
invalid_values = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

SCALE, DROPOUT = -0.75, 0.3
# several tiles in each direction and several steps, but small enough for the interpreter
TILE, STREAM = Tile(16, 32, 16, group_m=2), Stream(16, 32, max_ranks=16)


@dataclass(frozen=True)
class Call:
    """Operands of one layer's forward and backward; `keep` is the mask that `seed` draws, True without one."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    a: Tensor  # [R, K]
    b: Tensor  # [N, R]
    dy: Tensor  # [M, N]
    h: Tensor  # [M, R]
    p: Tensor  # [M, R]
    magnitude: Tensor  # [N]
    column_scale: Tensor  # [N], float32
    norm: Tensor  # [N], float32
    u: Tensor  # [M, N]
    gate: Tensor | None = None
    seed: Tensor | None = None
    keep: Tensor | bool = True
    probability: float = DROPOUT

    @property
    def on(self) -> Tensor:
        """[M, 1]"""
        m, device = self.x.shape[0], self.x.device
        gate = torch.ones((), device=device) if self.gate is None else self.gate
        return (gate != 0).repeat_interleave(m // gate.numel() if gate.dim() else m)[:, None]

    @property
    def scale(self) -> Tensor:
        """The column scale that `row_norm` computes: 1 if a single gate is off."""
        return torch.where(self.on.any(), self.column_scale, 1) if self.gate is not None else self.column_scale

    def dropped(self, t: Tensor) -> Tensor:
        """Applies dropout with the given mask, as torch does."""
        return t if self.seed is None else torch.where(torch.as_tensor(self.keep), t, 0) / (1 - self.probability)

    @property
    def dropout(self) -> dict:
        """Arguments of a launcher."""
        return {} if self.seed is None else {"seed": self.seed, "dropout": self.probability}


# The results of each launcher, and the same computed in torch. Rows that are off contribute nothing.
def off_is_zero(c, t):
    return torch.where(c.on, t, 0)


def plain_h(c):
    return off_is_zero(c, SCALE * (c.dropped(c.x) @ c.a.T))


def plain_y(c, base, h, b):
    return torch.where(c.on, base + h @ b.T, base)


def plain_gram(c, t, h, factor=1.0):
    return factor * (off_is_zero(c, t).T @ off_is_zero(c, h))


def base(c):
    return torch.nn.functional.linear(c.x, c.weight, c.bias)


def bias_only(c):
    zeros = c.x.new_zeros(c.x.shape[0], c.b.shape[0])
    return zeros if c.bias is None else zeros + c.bias


def scaled(c, t):
    """DoRA's scale of the columns, on the rows that are on."""
    return torch.where(c.on, c.scale * t, t).to(c.x.dtype)


def plain_scaled(c, h):
    """y and u; y is computed from u before rounding, as in the kernels."""
    u = plain_y(c, c.x @ c.weight.T, h, c.b)
    y = scaled(c, u) if c.bias is None else (torch.where(c.on, c.scale * u, u) + c.bias).to(u.dtype)
    return y, u


def with_u(c, launch):
    """The results of the launch, and the u that it fills."""
    u = torch.empty(c.x.shape[0], c.weight.shape[0], dtype=c.x.dtype, device=c.x.device)
    made = launch({"column_scale": c.scale, "u": u})
    return *(made if isinstance(made, tuple) else (made,)), u


def dora(c):
    return Dora(c.scale, c.norm, c.u, torch.float32)


def dora_sums(c, sums):
    """The finished sums, with the gradient of the magnitude as a vector."""
    *others, dm = finished(sums)
    return *others, dm[0]


def plain_dora(c):
    """dB and dm"""
    dm = torch.where(c.norm == 0, 0, (off_is_zero(c, c.dy).to(c.norm.dtype) * off_is_zero(c, c.u)).sum(0) / c.norm)
    return (c.scale[:, None] * plain_gram(c, c.dy, c.h)).to(c.x.dtype), dm


def plain_norm(c):
    norm = reference.row_norms(c.weight, c.a, c.b, SCALE)
    ratio = reference.column_scale(c.magnitude, norm)
    return tuple(torch.where(c.on.any(), t, 1) for t in (norm, ratio)) if c.gate is not None else (norm, ratio)


def update_weight(c):
    return c.weight * (SCALE * (c.b @ c.a))


def plain_hira_grads(c):
    t = SCALE * c.weight * plain_gram(c, c.dy, c.dropped(c.x))
    return c.b.T @ t, t @ c.a.T


def finished(sums):
    sums = [one for one in sums if one is not None]
    for one in sums:
        if one.partials.data_ptr() != one.out.data_ptr() and one.out.numel():
            sum_partials(one)
    return tuple(one.out for one in sums)


KERNELS = {  # name → (launch, plain): each a function of the call giving a tuple; launch takes the tile too
    "one_pass": (
        lambda c, **tile: one_pass(c.x, c.weight, c.bias, c.a, c.b, c.gate, SCALE, **c.dropout, **tile),
        lambda c: (plain_y(c, base(c), plain_h(c), c.b), plain_h(c)),
    ),
    "one_pass_swapped": (
        lambda c, **tile: one_pass_swapped(c.x, c.weight, c.bias, c.a, c.b, c.gate, SCALE, **c.dropout, **tile),
        lambda c: (plain_y(c, base(c), plain_h(c), c.b), plain_h(c)),
    ),
    "pre_expand": (
        lambda c, **tile: pre_expand(c.x, c.bias, c.a, c.b, c.gate, SCALE, **c.dropout, **tile),
        lambda c: (plain_y(c, bias_only(c), plain_h(c), c.b), plain_h(c)),
    ),
    "expand": (
        lambda c, **tile: (expand(c.p, c.a, c.gate, **c.dropout, **tile),),
        lambda c: (off_is_zero(c, c.dropped(c.p @ c.a)),),
    ),
    "expand_add": (
        lambda c, **tile: (expand(c.p, c.a, c.gate, add=c.x, **c.dropout, **tile),),
        lambda c: (c.x + off_is_zero(c, c.dropped(c.p @ c.a)),),
    ),
    "low_rank_gemm": (
        lambda c, **tile: (low_rank_gemm(c.x, c.weight, c.bias, c.h, c.b, c.gate, **tile),),
        lambda c: (plain_y(c, base(c), c.h, c.b),),
    ),
    "low_rank_gemm_dx": (
        lambda c, **tile: (low_rank_gemm(c.dy, c.weight.T, None, c.p, c.a.T, c.gate, **c.dropout, **tile),),
        lambda c: (c.dy @ c.weight + off_is_zero(c, c.dropped(c.p @ c.a)),),
    ),
    "shrink": (
        lambda c, **tile: (shrink(c.x, c.a, c.gate, SCALE, **c.dropout, **tile),),
        lambda c: (plain_h(c),),
    ),
    "gram_a": (
        lambda c, **tile: finished(gram(c.x, c.p, c.gate, SCALE, torch.float32, **c.dropout, **tile)),
        lambda c: (plain_gram(c, c.dropped(c.x), c.p, SCALE),),
    ),
    "gram_b": (
        lambda c, **tile: finished(gram(c.dy, c.h, c.gate, 1.0, c.x.dtype, **tile)),
        lambda c: (plain_gram(c, c.dy, c.h),),
    ),
    "project": (
        lambda c, **tile: finished(project(c.dy, c.h, c.b, c.gate, SCALE, c.x.dtype, **tile)),
        lambda c: (off_is_zero(c, SCALE * (c.dy @ c.b)), plain_gram(c, c.dy, c.h)),
    ),
    "row_norm": (
        lambda c, **tile: row_norm(c.weight, c.a, c.b, SCALE, None, c.magnitude, c.gate, **tile),
        plain_norm,
    ),
    "one_pass_dora": (
        lambda c, **tile: with_u(
            c, lambda scaling: one_pass(c.x, c.weight, c.bias, c.a, c.b, c.gate, SCALE, **scaling, **tile)
        ),
        lambda c: (plain_scaled(c, plain_h(c))[0], plain_h(c), plain_scaled(c, plain_h(c))[1]),
    ),
    "one_pass_swapped_dora": (
        lambda c, **tile: with_u(
            c, lambda scaling: one_pass_swapped(c.x, c.weight, c.bias, c.a, c.b, c.gate, SCALE, **scaling, **tile)
        ),
        lambda c: (plain_scaled(c, plain_h(c))[0], plain_h(c), plain_scaled(c, plain_h(c))[1]),
    ),
    "low_rank_gemm_dora": (
        lambda c, **tile: with_u(
            c, lambda scaling: low_rank_gemm(c.x, c.weight, c.bias, c.h, c.b, c.gate, **scaling, **tile)
        ),
        lambda c: plain_scaled(c, c.h),
    ),
    "low_rank_gemm_dx_dora": (
        lambda c, **tile: (low_rank_gemm(c.dy, c.weight.T, None, c.p, c.a.T, c.gate, x_scale=c.scale, **tile),),
        lambda c: (scaled(c, c.dy) @ c.weight + off_is_zero(c, c.p @ c.a),),
    ),
    "gram_dora": (
        lambda c, **tile: dora_sums(c, gram(c.dy, c.h, c.gate, 1.0, c.x.dtype, dora=dora(c), **tile)),
        plain_dora,
    ),
    "project_dora": (
        lambda c, **tile: dora_sums(c, project(c.dy, c.h, c.b, c.gate, SCALE, c.x.dtype, dora=dora(c), **tile)),
        lambda c: (off_is_zero(c, SCALE * (scaled(c, c.dy) @ c.b)), *plain_dora(c)),
    ),
    "hira": (
        lambda c, **tile: (hira(c.x, c.weight, c.bias, c.a, c.b, c.gate, SCALE, **c.dropout, **tile),),
        lambda c: (base(c) + off_is_zero(c, c.dropped(c.x) @ update_weight(c).T),),
    ),
    "hira_dx": (
        lambda c, **tile: (
            hira(c.dy, c.weight.T, None, c.b.T, c.a.T, c.gate, SCALE, **c.dropout, drops_input=False, **tile),
        ),
        lambda c: (c.dy @ c.weight + off_is_zero(c, c.dropped(c.dy @ update_weight(c))),),
    ),
    "hira_grads": (
        lambda c, **tile: hira_grads(
            c.dy, c.x, c.weight, c.a, c.b, c.gate, SCALE, torch.float32, c.x.dtype, **c.dropout, **tile
        ),
        plain_hira_grads,
    ),
}
GEMMS = ("one_pass", "low_rank_gemm", "low_rank_gemm_dx")
GEMMS += ("one_pass_dora", "low_rank_gemm_dora", "low_rank_gemm_dx_dora", "hira", "hira_dx", "hira_grads")
DROPS = ("one_pass", "one_pass_swapped", "pre_expand", "expand", "expand_add", "low_rank_gemm_dx", "shrink", "gram_a")
DROPS += ("hira", "hira_dx", "hira_grads")
# kernels that sum over rows, to which rows that are off must not contribute
SHARED = ("gram", "project", "row_norm", "hira_grads")


OPERANDS = ("x", "weight", "bias", "a", "b", "dy", "h", "p", "magnitude")


def operands_of(name):
    """The names of the operands that a kernel's launch reads."""
    codes, names = [KERNELS[name][0].__code__], set()
    for code in codes:
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [operand for operand in OPERANDS if operand in names]


def small(name, **more):
    """Keyword arguments that give a kernel its small tile."""
    if name not in GEMMS:
        return {"stream": STREAM, **more}
    return {"tile": TILE, **more, **({"tma": False} if name.startswith("low_rank") and "tma" not in more else {})}


def operands(m, n, k, r, dtype, device, *, bias=True):
    """A call whose low-rank part is about as large as the base, so that errors in it are visible."""
    torch.manual_seed(m + 2 * n + 3 * k + 4 * r)
    sizes = {"x": (m, k), "weight": (n, k), "bias": (n,), "a": (r, k), "b": (n, r), "dy": (m, n), "h": (m, r)}
    sizes |= {"p": (m, r), "magnitude": (n,), "column_scale": (n,), "norm": (n,), "u": (m, n)}
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    tensors["b"] /= r**0.5
    tensors["p"] *= (n / r) ** 0.5
    tensors["norm"] = tensors["norm"].abs() + 0.5
    tensors["norm"][:1] = 0
    float32 = ("column_scale", "norm", "magnitude")
    tensors = {name: t.to(device, torch.float32 if name in float32 else dtype) for name, t in tensors.items()}
    return Call(**tensors if bias else tensors | {"bias": None})


def check(name, call, **tile):
    """Checks a kernel's results against torch's own error, and returns them."""
    launch, plain = KERNELS[name]
    ours = launch(call, **tile)
    double = {key: t.double() for key, t in vars(call).items() if isinstance(t, Tensor) and t.is_floating_point()}
    for one, torchs, exact in zip(ours, plain(call), plain(replace(call, **double)), strict=True):
        # a gradient may be float32, which is more accurate than torch's dtype
        assert_as_accurate_as_torch(one.to(torchs.dtype), torchs, exact)
    return ours


SHAPES = [  # M, N, K, R
    pytest.param(32, 64, 32, 16, id="exact-tiles"),
    pytest.param(37, 70, 45, 8, id="ragged-m-n-k"),
    pytest.param(1, 40, 48, 8, id="one-row"),
    pytest.param(20, 40, 5, 3, id="k-and-rank-below-one-step"),
    pytest.param(20, 1, 32, 17, id="one-column-rank-just-above-16"),
    pytest.param(20, 40, 3, 1, id="k-3-rank-1"),
    pytest.param(20, 40, 32, 100, id="rank-no-power-of-two"),
    pytest.param(20, 40, 32, 256, id="rank-largest"),
    pytest.param(0, 40, 32, 8, id="no-rows"),
    pytest.param(20, 0, 32, 8, id="no-columns"),
    pytest.param(20, 40, 0, 8, id="no-k"),
]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("m", "n", "k", "r"), SHAPES)
def test_as_accurate_as_torch(m, n, k, r, name, dtype, device):
    check(name, operands(m, n, k, r, dtype, device), **small(name))
    if "bias" in operands_of(name):
        check(name, operands(m, n, k, r, dtype, device, bias=False), **small(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("m", "n", "k", "r"), [(1, 70, 100, 8), (50, 140, 100, 20), (40, 70, 70, 256)])
def test_chooses_a_tile_itself(m, n, k, r, name, dtype, device):
    check(name, operands(m, n, k, r, dtype, device))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("value", [0, 1, -2], ids=["off", "on", "on-unless-zero"])
@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.int64], ids=str)
def test_device_gate(kind, value, name, device):
    call = operands(17, 33, 17, 8, torch.float32, device)
    check(name, replace(call, gate=torch.tensor(value, dtype=kind, device=device)), **small(name))


ROW_GATES = [  # for 48 rows, in tiles of 16
    pytest.param([1, 0, 1], id="tiles-all-on-or-off"),
    pytest.param([0, 1, 1, 0, 1, 0], id="mixed-tiles"),
    pytest.param([0, 0], id="all-off"),
    pytest.param([int(i % 5 > 1) for i in range(48)], id="a-gate-for-each-row"),
]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("gates", ROW_GATES)
def test_row_gates(gates, name, device):
    call = operands(48, 33, 17, 8, torch.float32, device)
    check(name, replace(call, gate=torch.tensor(gates, device=device)), **small(name))
    strided = torch.tensor([[gate, 7] for gate in gates], dtype=torch.int32, device=device)[:, 0]
    check(name, replace(call, gate=strided), **small(name))


@invalid_values
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("gate", [torch.tensor(0), torch.tensor([0, 1, 0, 0, 1, 0])], ids=["device", "rows"])
@pytest.mark.parametrize("poison", [float("inf"), float("nan")], ids=str)
def test_values_that_are_off_have_no_effect(poison, gate, name, device):
    """A, B and the low-rank part of rows that are off may hold inf or NaN; for dA and dB so may their x and dy."""
    call = replace(operands(48, 33, 17, 40, torch.float32, device), gate=gate.to(device))
    off = ~call.on[:, 0]
    poisoned = {key: getattr(call, key).clone() for key in ("a", "b", "h", "p", "x", "dy")}
    poisoned["h"][off], poisoned["p"][off] = poison, poison
    if name.startswith((*SHARED, "shrink")):
        poisoned["x"][off, 3], poisoned["dy"][off, 5] = poison, poison
    poisoned["a"][1], poisoned["b"][:, 2] = poison, poison
    if gate.dim() and name.startswith(("one_pass", "low_rank")):
        poisoned["column_scale"] = call.column_scale.clone()
        poisoned["column_scale"][4] = poison  # only for row gates: a single gate that is off makes it 1
    spoiled = replace(call, **poisoned)
    if name.startswith(SHARED) and gate.dim():
        # all rows share A and B, so keep these; check only that rows that are off do not contribute
        spoiled = replace(spoiled, a=call.a, b=call.b)
    launch, _ = KERNELS[name]
    for ours, expected in zip(launch(spoiled, **small(name)), launch(call, **small(name)), strict=True):
        rows = off if ours.shape[0] == 48 else slice(None)
        assert torch.isfinite(ours[rows]).all()
        assert torch.equal(ours[rows], expected[rows])


@triton.jit
def mask_kernel(
    seed_ptr, out_ptr, M, N, stride_out_m, dropout, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    keep = keep_mask(tl.load(seed_ptr), rows, first, dropout, BLOCK_N)
    out_ptrs = out_ptr + rows[:, None] * stride_out_m + columns[None, :]
    tl.store(out_ptrs, keep, mask=(rows < M)[:, None] & (columns < N)[None, :])


def mask(seed, m, n, dropout=DROPOUT, block_m=16, block_n=64):
    out = torch.zeros(m, n, dtype=torch.bool, device=seed.device)
    mask_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
        seed, out, m, n, n, dropout, block_m, block_n, enable_fp_fusion=True
    )
    return out


def test_the_mask_does_not_depend_on_the_tile(device):
    seed = torch.tensor(2**40 + 12345, device=device)
    expected = mask(seed, 20, 70)  # more than one tile in each direction
    for block_m, block_n in ((32, 16), (1, 8), (64, 128)):
        assert torch.equal(mask(seed, 20, 70, block_m=block_m, block_n=block_n), expected)
    assert torch.equal(mask(seed, 9, 50), expected[:9, :50])


@pytest.mark.slow
def test_the_mask_is_random(device):
    seed = torch.tensor(-3, device=device)
    rows, columns = 200, 512
    keep = mask(seed, rows, columns).double()
    deviation = (DROPOUT * (1 - DROPOUT)) ** 0.5
    assert abs(keep.mean() - (1 - DROPOUT)) < 4 * deviation / (rows * columns) ** 0.5
    # the rate in each row and column, and between neighbours, where wrong offsets would be visible
    assert (keep.mean(1) - (1 - DROPOUT)).abs().max() < 5 * deviation / columns**0.5
    assert (keep.mean(0) - (1 - DROPOUT)).abs().max() < 5 * deviation / rows**0.5
    centred = keep - keep.mean()
    for distance in (1, 2, 3, 4, 8, 16):
        for one, other in (
            (centred[:, :-distance], centred[:, distance:]),
            (centred[:-distance], centred[distance:]),
        ):
            assert abs((one * other).mean()) < 5 * deviation**2 / one.numel() ** 0.5
    for other in (torch.tensor(-2, device=device), torch.tensor(2**32 - 3, device=device)):
        assert (
            abs((centred * (mask(other, rows, columns).double() - 0.7)).mean()) < 5 * deviation**2 / keep.numel() ** 0.5
        )


@pytest.mark.parametrize("name", DROPS)
@pytest.mark.parametrize("gate", [None, torch.tensor(1), torch.tensor([1, 0, 1])], ids=["none", "device", "rows"])
def test_dropout(gate, name, device):
    seed = torch.tensor(2**35 + 7, device=device)
    call = operands(48, 33, 37, 20, torch.float32, device)
    call = replace(call, seed=seed, keep=mask(seed, 48, 37), gate=None if gate is None else gate.to(device))
    check(name, call, **small(name))
    check(name, call)


@pytest.mark.parametrize("name", DROPS)
def test_dropout_with_probability_1_is_off_and_with_0_is_identity(name, device):
    seed = torch.tensor(5, device=device)
    call = operands(20, 40, 32, 8, torch.float32, device)
    launch = KERNELS[name][0]
    off = launch(replace(call, gate=torch.tensor(0, device=device)), **small(name))
    # with dropout HiRA sums the update separately, as it does with row gates
    on = replace(call, gate=torch.ones(20, dtype=torch.bool, device=device)) if name.startswith("hira") else call
    for probability, expected in ((0.0, launch(on, **small(name))), (1.0, off)):
        dropped = replace(call, seed=seed, probability=probability)
        for ours, plain in zip(launch(dropped, **small(name)), expected, strict=True):
            assert torch.equal(ours, plain)


def transposed(t):
    return t.mT.contiguous().mT if t.dim() == 2 else t


def sliced(t):
    wide = torch.full([2 * size + 3 for size in t.shape], float("nan"), dtype=t.dtype, device=t.device)
    view = wide[tuple(slice(1, 1 + 2 * size, 2) for size in t.shape)]
    return view.copy_(t)


def offset(t):
    wide = torch.full([size + 5 for size in t.shape], float("nan"), dtype=t.dtype, device=t.device)
    view = wide[tuple(slice(3, 3 + size) for size in t.shape)]
    return view.copy_(t)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [transposed, sliced, offset])
@pytest.mark.parametrize("name", KERNELS)
def test_any_strides(name, layout, device):
    call = operands(17, 33, 17, 8, torch.float32, device)
    names = operands_of(name)
    expected = KERNELS[name][0](call, **small(name))
    for which in (*((one,) for one in names), names):
        views = {one: layout(getattr(call, one)) for one in which}
        for ours, plain in zip(KERNELS[name][0](replace(call, **views), **small(name)), expected, strict=True):
            assert torch.equal(ours, plain), which


FAR = 2**30 + 16


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize(
    ("name", "which"), [(n, which) for n in KERNELS for which in operands_of(n) if which not in ("bias", "magnitude")]
)
def test_offsets_beyond_int32(name, which, dimension, device):
    call = operands(3, 3, 3, 3, torch.float16, device)
    # four gigabytes of which only three rows are written; on a CPU the rest is never committed
    storage = torch.UntypedStorage(2 * (2 * FAR + 16), device=device)
    view = torch.tensor([], dtype=torch.float16, device=device)
    view.set_(storage, 0, (3, 3), (FAR, 1) if dimension == 0 else (1, FAR))
    check(name, replace(call, **{which: view.copy_(getattr(call, which))}), **small(name))


FAMILIES = {
    "one_pass_swapped": ("one_pass_swapped", "one_pass_swapped_dora"),
    "low_rank_gemm": ("low_rank_gemm", "low_rank_gemm_dx", "low_rank_gemm_dora", "low_rank_gemm_dx_dora"),
    "shrink": ("shrink",),
    "gram": ("gram_a", "gram_b", "gram_dora"),
    "project": ("project", "project_dora"),
    "pre_expand": ("pre_expand", "expand", "expand_add"),
    "row_norm": ("row_norm",),
    "hira": ("hira", "hira_dx"),
    "hira_grads": ("hira_grads",),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tile"),
    [(f, t) for f in FAMILIES for t in sorted({r.tile for rows in TABLES[f].values() for r in rows}, key=str)],
    ids=str,
)
def test_every_tile_in_the_tables(family, tile, device):
    if device.type == "cuda":
        pytest.skip("a tile for another GPU need not fit this one")
    call = operands(40, 70, 50, 20, torch.float16, device)
    call = replace(call, gate=torch.tensor([1, 0, 1, 1], device=device))
    for name in FAMILIES[family]:
        check(name, call, **small(name, **{"tile" if isinstance(tile, Tile) else "stream": tile}))


SPLITS = ["one_pass_swapped", "shrink", "gram_a", "gram_b", "project", "gram_dora", "project_dora", "hira_grads"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("split", [1, 2, 3, 5])
def test_split(split, name, device):
    """Splits over K or over rows: into equal parts, into unequal parts, and into more parts than steps."""
    for m, n, k in ((96, 70, 96), (45, 70, 45)):
        call = operands(min(m, 64) if name == "one_pass_swapped" else m, n, k, 8, torch.float32, device)
        check(name, call, **small(name, split=split))


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_the_same_bits_every_time(name, device):
    call = operands(61, 200, 150, 12, torch.float16, device)
    first = KERNELS[name][0](call)
    for _ in range(1 if device.type == "cpu" else 3):  # once in the interpreter, which runs programs sequentially
        assert all(map(torch.equal, KERNELS[name][0](call), first))


@pytest.mark.parametrize("name", KERNELS)
def test_leaves_its_arguments_alone(name, device):
    call = replace(operands(17, 33, 17, 8, torch.float32, device), gate=torch.tensor(1, device=device))
    before = {key: t.clone() for key, t in vars(call).items() if isinstance(t, Tensor)}
    KERNELS[name][0](call, **small(name))
    assert all(torch.equal(getattr(call, key), t) for key, t in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES["low_rank_gemm"])
@pytest.mark.parametrize("gate", [None, torch.tensor(0), torch.tensor([1, 0, 1])], ids=["none", "off", "rows"])
# the second tile is stored in halves; n is larger than one half, so that the other half is partly inside
@pytest.mark.parametrize(("block_n", "n"), [(32, 80), (256, 208)], ids=["stored-whole", "stored-in-halves"])
def test_tma(block_n, n, gate, name, device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no TMA")
    for r in (8, 13, 100):
        call = operands(48, n, n, r, torch.float16, device)
        call = replace(call, gate=None if gate is None else gate.to(device))
        check(name, call, **small(name, tma=True, tile=replace(TILE, block_n=block_n)))
    # the weight of a Conv1D is the transpose of a row-major matrix
    check(name, replace(call, weight=transposed(call.weight)), **small(name, tma=True))


def test_fits_tma():
    matrix = torch.empty(32, 64, dtype=torch.float16)
    for view in (matrix, matrix.T, matrix[:, 8:40], matrix[::2]):
        assert fits_tma(view)
    for view in (
        matrix[:, 1:],
        matrix[:, ::2],
        matrix[:0],
        matrix.flatten()[:300].view(20, 15),
        matrix[:1].expand(4, 64),
    ):
        assert not fits_tma(view)


@pytest.mark.parametrize("kernel", TABLES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "generic"])
def test_every_row_of_the_tables_can_be_chosen(arch, kernel):
    table = TABLES[kernel]
    bounds = {(row.max_m, row.max_n, row.max_rank, row.min_rank - 1) for row in table[arch]}
    sizes = {1, *(size for row in bounds for bound in row if bound for size in (bound, bound + 1))}
    kinds = [
        {"element_size": size, "precision": precision, "aligned": aligned, "selects": selects, "scaled": scaled}
        for size, precision in ((2, "ieee"), (4, "ieee"), (4, "tf32"))
        for aligned in (True, False)
        for selects in (True, False)
        for scaled in (True, False)
    ]
    chosen = {row_for(table, arch, *mnr, **kind) for mnr in itertools.product(sizes, repeat=3) for kind in kinds}
    rows = table[arch]
    assert chosen == set(rows)


def test_two_sums_in_one_launch(device):
    torch.manual_seed(0)
    one, two = torch.randn(3, 20, 70, device=device), torch.randn(21, 9, 33, device=device).mT
    out = [torch.empty(20, 70, device=device), torch.empty(9, 33, device=device, dtype=torch.float16).T]
    sum_partials(Sum(one, out[0]), Sum(two, out[1]))
    assert torch.equal(out[0], (one[0] + one[1]) + one[2])
    in_order = two[0].clone()
    for part in two[1:]:
        in_order += part
    assert torch.equal(out[1], in_order.half())
