"""Tests of the one-pass kernel beyond those that tests/kernels/test_kernels.py runs for every kernel."""

import pytest
import torch

pytest.importorskip("triton")

from cotolora.kernels.one_pass import one_pass
from cotolora.kernels.tiles import ONE_PASS, Tile, architecture, dot_precision, is_aligned
from tests.support.tolerance import assert_as_accurate_as_torch

pytestmark = pytest.mark.usefixtures("poison_empty")
# numpy, which the interpreter uses, warns about infinities
invalid_values = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

# several tiles in each direction and several steps, but small enough for the interpreter
SMALL = Tile(16, 32, 16, group_m=2)
SCALE = -0.75

SHAPES = [  # M, N, K, R
    pytest.param(32, 64, 32, 16, id="exact-tiles"),
    pytest.param(37, 70, 45, 8, id="ragged-m-n-k"),
    pytest.param(1, 40, 48, 8, id="one-row"),
    pytest.param(90, 33, 20, 8, id="last-group-of-tiles-not-full"),
    pytest.param(20, 40, 5, 8, id="k-below-one-step"),
    pytest.param(20, 1, 32, 8, id="one-column"),
    pytest.param(20, 40, 32, 1, id="rank-1"),
    pytest.param(20, 40, 32, 3, id="rank-below-16"),
    pytest.param(20, 40, 32, 17, id="rank-just-above-16"),
    pytest.param(20, 40, 32, 100, id="rank-no-power-of-two"),
    pytest.param(20, 40, 32, 128, id="rank-largest"),
]
EMPTY = [
    pytest.param(0, 40, 32, 8, id="no-rows"),
    pytest.param(20, 0, 32, 8, id="no-columns"),
    pytest.param(20, 40, 0, 8, id="no-k"),
]


def operands(m, n, k, r, dtype, device):
    """x, weight, bias, a, b; the low-rank part is about as large as the base, so that errors in it are visible."""
    torch.manual_seed(m + 2 * n + 3 * k + 4 * r)
    x, weight, a = torch.randn(m, k), torch.randn(n, k), torch.randn(r, k)
    bias, b = torch.randn(n), torch.randn(n, r) / r**0.5
    return [tensor.to(device, dtype) for tensor in (x, weight, bias, a, b)]


def plain(x, weight, bias, a, b, rows_on, scale):
    """y and h computed by torch in the operands' dtype; `rows_on` is a bool or a mask of rows."""
    on = torch.as_tensor(rows_on, device=x.device).expand(x.shape[0])[:, None]
    h = torch.where(on, scale * (x @ a.T), 0)
    base = torch.nn.functional.linear(x, weight, bias)
    return torch.where(on, base + h @ b.T, base), h


def check(tensors, gate=None, rows_on=True, scale=SCALE, **options):
    """Checks y and h against torch's own error, and returns them."""
    y, h = one_pass(*tensors, gate, scale, **options)
    y_torch, h_torch = plain(*tensors, rows_on, scale)
    y_exact, h_exact = plain(*[None if t is None else t.double() for t in tensors], rows_on, scale)
    assert_as_accurate_as_torch(y, y_torch, y_exact)
    assert_as_accurate_as_torch(h, h_torch, h_exact)
    return y, h


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("m", "n", "k", "r"), [*SHAPES, *EMPTY])
def test_as_accurate_as_torch(m, n, k, r, with_bias, dtype, device):
    x, weight, bias, a, b = operands(m, n, k, r, dtype, device)
    check((x, weight, bias if with_bias else None, a, b), tile=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tile", sorted({row.tile for rows in ONE_PASS.values() for row in rows}, key=str), ids=lambda tile: str(tile)[5:-1]
)
def test_every_tile_in_the_table(tile, device):
    if device.type == "cuda":
        pytest.skip("a tile for another GPU need not fit this one")
    check(operands(70, 100, 70, 8, torch.float16, device), torch.arange(70) % 3, torch.arange(70) % 3 != 0, tile=tile)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("value", [0, 1], ids=["off", "on"])
def test_device_gate(value, kind, device):
    tensors = operands(37, 70, 45, 8, torch.float32, device)
    check(tensors, torch.tensor(value, dtype=kind, device=device), bool(value), tile=SMALL)


def test_device_gate_is_on_unless_zero(device):
    tensors = operands(20, 40, 32, 8, torch.float32, device)
    for value in (2, -1, 256):
        check(tensors, torch.tensor(value, dtype=torch.int32, device=device), True, tile=SMALL)


ROW_GATES = [  # for 48 rows, in tiles of 16
    pytest.param([1, 0, 1], id="tiles-all-on-or-off"),
    pytest.param([0, 1, 1, 0, 1, 0], id="mixed-tiles"),
    pytest.param([0, 0, 0, 0], id="all-off"),
    pytest.param([1, 1], id="all-on"),
    pytest.param([0], id="one-gate-off"),
    pytest.param([int(i % 5 > 1) for i in range(48)], id="a-gate-for-each-row"),
]


@pytest.mark.parametrize("gates", ROW_GATES)
def test_row_gates(gates, dtype, device):
    tensors = operands(48, 33, 17, 8, dtype, device)
    gate = torch.tensor(gates, device=device)
    rows_on = gate.bool().repeat_interleave(48 // len(gates))
    _, h = check(tensors, gate, rows_on, tile=SMALL)
    assert (h[~rows_on] == 0).all()
    check(tensors, gate.bool(), rows_on, tile=SMALL)


def test_row_gates_with_groups_that_do_not_match_tiles(device):
    gate = torch.tensor([1, 0, 1, 1, 0], dtype=torch.int32, device=device)
    tensors = operands(35, 40, 32, 8, torch.float32, device)
    check(tensors, gate, gate.bool().repeat_interleave(7), tile=SMALL)


@invalid_values
@pytest.mark.parametrize("poison", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize(
    "gate",
    [torch.tensor(0), torch.tensor([0, 0, 0]), torch.tensor([0, 1, 0, 0, 1, 0, 0, 0])],
    ids=["device", "rows-off", "rows-mixed"],
)
@pytest.mark.parametrize("where", ["a", "b"])
@pytest.mark.parametrize("rank", [8, 40])
def test_off_gives_the_base_for_any_a_and_b(rank, where, gate, poison, dtype, device):
    x, weight, bias, a, b = operands(48, 33, 17, rank, dtype, device)
    base, _ = one_pass(x, weight, bias, torch.zeros_like(a), torch.zeros_like(b), None, SCALE, tile=SMALL)
    (a[1] if where == "a" else b[:, 2]).fill_(poison)
    y, h = one_pass(x, weight, bias, a, b, gate.to(device), SCALE, tile=SMALL)
    off = gate.expand(48) == 0 if gate.dim() == 0 else (gate == 0).repeat_interleave(48 // len(gate))
    assert torch.equal(y[off], base[off])
    assert (h[off] == 0).all()
    assert not torch.isfinite(y[~off]).any()


@invalid_values
def test_an_infinite_x_affects_only_its_row_as_in_torch(device):
    tensors = operands(48, 70, 45, 1, torch.float32, device)  # rank 1: its 15 padding rows must not turn inf into NaN
    clean, _ = one_pass(*tensors, None, SCALE, tile=SMALL)
    tensors[0][20, 3] = float("inf")
    y, h = one_pass(*tensors, None, SCALE, tile=SMALL)
    y_torch, h_torch = plain(*tensors, True, SCALE)
    others = torch.arange(48) != 20
    assert torch.equal(y[others], clean[others])
    assert torch.isinf(y[20]).any()
    torch.testing.assert_close(y[20], y_torch[20], equal_nan=True)
    assert torch.equal(h[20], h_torch[20])


def test_scale_counts_once_and_may_be_an_integer(device):
    x, weight, bias, a, b = operands(20, 40, 32, 8, torch.float32, device)
    for scale in (0.0, 1, 3, 1e-3):
        check((x, weight, bias, a, b), scale=scale, tile=SMALL)


def sliced(t):
    wide = torch.full([2 * size + 3 for size in t.shape], float("nan"), dtype=t.dtype, device=t.device)
    view = wide[tuple(slice(1, 1 + 2 * size, 2) for size in t.shape)]
    return view.copy_(t)


def reversed_storage(t):
    """The values of t as the transpose of a strided slice, so that the first dimension has the smallest stride."""
    return sliced(t.mT).mT if t.dim() == 2 else sliced(t)


@pytest.mark.parametrize("which", ["x", "weight", "bias", "a", "b", "all"])
def test_strides_in_descending_order(which, device):
    tensors = dict(zip(["x", "weight", "bias", "a", "b"], operands(17, 33, 17, 8, torch.float32, device), strict=True))
    expected = one_pass(*tensors.values(), None, SCALE, tile=SMALL)
    views = {name: reversed_storage(t) if which in (name, "all") else t for name, t in tensors.items()}
    for view, contiguous in zip(one_pass(*views.values(), None, SCALE, tile=SMALL), expected, strict=True):
        assert torch.equal(view, contiguous)


def test_expanded_operands(device):
    x, weight, bias, a, b = operands(37, 70, 45, 8, torch.float32, device)
    views = (
        x[:1].expand(37, -1),
        weight[:, :1].expand(-1, 45),
        bias[:1].expand(70),
        a[:1].expand(8, -1),
        b[:1].expand(70, -1),
    )
    check(views, torch.ones(1, device=device).expand(37), tile=SMALL)
    gate = torch.tensor([[1, 5], [0, 5], [1, 5]], device=device)[:, 0]
    x, weight, bias, a, b = operands(36, 70, 45, 8, torch.float32, device)
    check((x, weight, bias, a, b), gate, gate.bool().repeat_interleave(12), tile=SMALL)


@pytest.mark.gpu
def test_output_beyond_int32():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    m, n = 2**16 + 40, 2**15 + 8
    x, weight, bias, a, b = operands(m, n, 16, 8, torch.float16, torch.device("cuda"))
    y, _ = one_pass(x, weight, bias, a, b, None, SCALE)
    y_tail, _ = one_pass(x[-100:], weight, bias, a, b, None, SCALE)
    assert torch.equal(y[-100:], y_tail)


def test_a_cpu_uses_the_generic_rows():
    assert architecture(torch.device("cpu")) == "generic"


def test_aligned_means_wide_loads_fit():
    matrix = torch.empty(32, 64, dtype=torch.float16)
    assert is_aligned(matrix)
    assert is_aligned(matrix.t())
    assert is_aligned(matrix[::2, :48])
    for view in (matrix[:, 1:], matrix[:, :40], matrix[:, ::2], matrix.flatten()[: 30 * 60].view(30, 60)):
        assert not is_aligned(view)


@pytest.fixture
def restored_switch():
    """torch's float32 precision settings, restored after the test."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    yield switch
    switch.fp32_precision = before


def test_float32_follows_torch(restored_switch):
    cpu = torch.device("cpu")
    for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("highest", "ieee")):
        torch.set_float32_matmul_precision(setting)
        assert dot_precision(torch.float32, cpu) == expected
        assert dot_precision(torch.bfloat16, cpu) == "ieee"
    for allowed in (True, False):
        restored_switch.allow_tf32 = allowed
        assert dot_precision(torch.float32, cpu) == ("tf32" if allowed else "ieee")
    for setting in ("tf32", "ieee"):
        restored_switch.fp32_precision = setting  # from now on torch refuses to read allow_tf32
        assert dot_precision(torch.float32, cpu) == setting
