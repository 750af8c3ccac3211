"""A GEMM with a gated low-rank term in the same kernel: ``y = x Wᵀ + bias + h Bᵀ``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cotolora.kernels.dropout import keep_mask, keep_scale
from cotolora.kernels.epilogue import scale_columns, store_scaled
from cotolora.kernels.launching import launch
from cotolora.kernels.one_pass import swizzled
from cotolora.kernels.tiles import (
    LOW_RANK_GEMM,
    TMA_ARCHITECTURES,
    Tile,
    architecture,
    dot_precision,
    multiprocessors,
    tile_for,
)

# with TMA, whose K loop needs few registers, h and B of this many ranks stay in registers during the loop; twice as
# many spill [compiled]
HELD_RANKS = 32


@triton.jit
def low_rank_operands(
    # [M, R], [N, R]
    h_ptr, b_ptr,
    first_r, rows, columns, row_on, column_ok, R,
    stride_h_m, stride_h_r,
    stride_b_n, stride_b_r,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The tiles of h and of Bᵀ over BLOCK_R ranks from first_r."""
    ranks = first_r + tl.arange(0, BLOCK_R).to(tl.int64)
    rank_ok = ranks < R
    h_ptrs = h_ptr + rows[:, None] * stride_h_m + ranks[None, :] * stride_h_r
    h = tl.load(h_ptrs, mask=row_on[:, None] & rank_ok[None, :], other=0.0)
    b_ptrs = b_ptr + ranks[:, None] * stride_b_r + columns[None, :] * stride_b_n
    b = tl.load(b_ptrs, mask=rank_ok[:, None] & column_ok[None, :], other=0.0)
    return h, b


@triton.jit
def low_rank_term(
    y, h_ptr, b_ptr, rows, columns, row_on, column_ok, R, stride_h_m, stride_h_r, stride_b_n, stride_b_r,
    BLOCK_R: tl.constexpr, RANK_STEPS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y + h Bᵀ over all ranks."""
    # with TMA the loop is unrolled, because otherwise it takes 60 more registers; without TMA it takes fewer
    if TMA:
        for step in tl.static_range(RANK_STEPS):
            h, b = low_rank_operands(
                h_ptr, b_ptr, step * BLOCK_R, rows, columns, row_on, column_ok, R,
                stride_h_m, stride_h_r, stride_b_n, stride_b_r, BLOCK_R,
            )  # fmt: skip
            y = tl.dot(h, b, y, input_precision=PRECISION)
    else:
        for step in range(RANK_STEPS):
            h, b = low_rank_operands(
                h_ptr, b_ptr, step * BLOCK_R, rows, columns, row_on, column_ok, R,
                stride_h_m, stride_h_r, stride_b_n, stride_b_r, BLOCK_R,
            )  # fmt: skip
            y = tl.dot(h, b, y, input_precision=PRECISION)
    return y


@triton.jit
def scale_x(x, x_scale_ptr, first_k, row_on, K, BLOCK_K: tl.constexpr, ROW_GATES: tl.constexpr):
    """``x_scale ∘ x``, rounded; rows that are off stay unscaled."""
    ks = first_k + tl.arange(0, BLOCK_K)
    x_scale = tl.load(x_scale_ptr + ks, mask=ks < K, other=0.0)[None, :]
    if ROW_GATES:
        x_scale = tl.where(row_on[:, None], x_scale, 1.0)
    return (x * x_scale).to(x.dtype)


@triton.jit
def store_tma(y, y_ptr, first_row, first_column, STORES: tl.constexpr):
    """Stores a tile through its TMA descriptor, in one part or two."""
    if STORES == 1:
        y_ptr.store([first_row, first_column], y.to(y_ptr.dtype))
    else:
        halves = tl.permute(tl.reshape(y, (y.shape[0], 2, y.shape[1] // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        y_ptr.store([first_row, first_column], left.to(y_ptr.dtype))
        y_ptr.store([first_row, first_column + y.shape[1] // 2], right.to(y_ptr.dtype))


@triton.jit(do_not_specialize=["M", "rows_per_gate"])
def low_rank_gemm_kernel(
    # [M, K], [N, K], [N] or None, [M, R], [N, R], [] or [G] or None, [] or None, [K] or None, [N] or None, [M, N] and
    # [M, N] or None; with TMA, x, weight, y and u are descriptors, the weight's of Wᵀ [K, N] unless WEIGHT_ROWS
    x_ptr, weight_ptr, bias_ptr, h_ptr, b_ptr, gate_ptr, seed_ptr, x_scale_ptr, column_scale_ptr, y_ptr, u_ptr,
    M, N, K, R, rows_per_gate,
    stride_x_m, stride_x_k,
    stride_weight_n, stride_weight_k,
    stride_bias_n,
    stride_h_m, stride_h_r,
    stride_b_n, stride_b_r,
    stride_gate_g,
    stride_y_m, stride_y_n,
    dropout, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,  # number of steps of BLOCK_R ranks
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr, WEIGHT_ROWS: tl.constexpr,
    STORES: tl.constexpr,  # number of parts in which a tile is stored; shared memory must hold one part
    ROW_GATES: tl.constexpr,  # one gate for each rows_per_gate rows, instead of one for all
    LAST: tl.constexpr,  # adds the low-rank term after the K loop, while which h and B are loaded
    PRECISION: tl.constexpr,  # of tl.dot on float32 operands: "ieee" or "tf32"
):  # fmt: skip
    """Each program writes several [BLOCK_M, BLOCK_N] tiles of y, num_programs apart."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    gate = True
    if gate_ptr is not None and not ROW_GATES:
        gate = tl.load(gate_ptr) != 0

    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = swizzled(tile, tiles_m, tiles_n, GROUP_M)
        # int64: index * stride passes 2**31 for tensors beyond 2 Gi elements
        rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_ok, column_ok = rows < M, columns < N
        on, row_on = gate, row_ok
        if ROW_GATES:
            row_on = tl.load(gate_ptr + rows // rows_per_gate * stride_gate_g, mask=row_ok, other=0) != 0
            on = tl.max(row_on.to(tl.int32), axis=0) != 0

        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if LAST:
            h, b = low_rank_operands(
                h_ptr, b_ptr, 0, rows, columns, row_ok, column_ok, R, stride_h_m, stride_h_r, stride_b_n, stride_b_r,
                BLOCK_R,
            )  # fmt: skip
        elif on:
            # the low-rank term comes first, so that row gates and dropout need no second accumulator
            y = low_rank_term(
                y, h_ptr, b_ptr, rows, columns, row_on, column_ok, R, stride_h_m, stride_h_r, stride_b_n, stride_b_r,
                BLOCK_R, RANK_STEPS, TMA, PRECISION,
            )  # fmt: skip
        # outside of the branch, though tiles that are off do not need it: inside, ptxas serialises every later wgmma
        if ROW_GATES:
            y = tl.where(row_on[:, None], y, 0.0)
        if seed_ptr is not None:
            keep = keep_mask(tl.load(seed_ptr), rows, tile_n * BLOCK_N, dropout, BLOCK_N)
            y = tl.where(keep, y, 0.0) * keep_scale
        if bias_ptr is not None and column_scale_ptr is None:
            bias = tl.load(bias_ptr + columns * stride_bias_n, mask=column_ok, other=0.0)
            y += bias.to(tl.float32)[None, :]

        for first_k in range(0, K, BLOCK_K):
            if TMA:
                x = x_ptr.load([tile_m * BLOCK_M, first_k])
                if WEIGHT_ROWS:
                    weight = weight_ptr.load([tile_n * BLOCK_N, first_k]).T
                else:
                    weight = weight_ptr.load([first_k, tile_n * BLOCK_N])
            else:
                ks = first_k + tl.arange(0, BLOCK_K).to(tl.int64)
                k_ok = ks < K
                x_ptrs = x_ptr + rows[:, None] * stride_x_m + ks[None, :] * stride_x_k
                x = tl.load(x_ptrs, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
                weight_ptrs = weight_ptr + ks[:, None] * stride_weight_k + columns[None, :] * stride_weight_n
                weight = tl.load(weight_ptrs, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
            if x_scale_ptr is not None:
                x = scale_x(x, x_scale_ptr, first_k, row_on, K, BLOCK_K, ROW_GATES)
            y = tl.dot(x, weight, y, input_precision=PRECISION)

        if LAST:
            # masked here, not when loaded, because masking waits for the load; both h and B, because a row that is off
            # must be zero even if B holds inf or NaN
            h, b = tl.where((row_ok & gate)[:, None], h, 0.0), tl.where((column_ok & gate)[None, :], b, 0.0)
            y = tl.dot(h, b, y, input_precision=PRECISION)
        if TMA:
            if u_ptr is not None:
                store_tma(y, u_ptr, tile_m * BLOCK_M, tile_n * BLOCK_N, STORES)
            y = scale_columns(y, column_scale_ptr, bias_ptr, columns, column_ok, row_on, stride_bias_n, ROW_GATES)
            store_tma(y, y_ptr, tile_m * BLOCK_M, tile_n * BLOCK_N, STORES)
        else:
            y_ptrs = y_ptr + rows[:, None] * stride_y_m + columns[None, :] * stride_y_n
            store_scaled(
                y, y_ptrs, u_ptr, column_scale_ptr, bias_ptr, rows, columns, row_ok, column_ok, row_on, N,
                stride_bias_n, ROW_GATES,
            )  # fmt: skip


def low_rank_gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, gate: Tensor | None,
    *, seed: Tensor | None = None, dropout: float = 0.0, x_scale: Tensor | None = None,
    column_scale: Tensor | None = None, u: Tensor | None = None, tile: Tile | None = None, tma: bool | None = None,
) -> Tensor:  # fmt: skip
    """Launches `low_rank_gemm_kernel`: ``y = x Wᵀ + bias + δ · h Bᵀ``, the last term dropped out under a `seed`.

    ``x [M, K]``, ``weight [N, K]``, ``bias [N]`` or None, ``h [M, R]``, ``b [N, R]`` → ``y [M, N]``, of one dtype and
    any strides. `gate`: None (on), ``[]``, or ``[G]`` with row i under gate ``i // (M / G)``; rows that are off are
    ``x Wᵀ + bias``, whatever h and B hold. The gradient of x is ``low_rank_gemm(dy, W.T, None, p, A.T, gate)``. Uses
    TMA where the GPU has it and the strides allow it, unless `tma` says otherwise. `column_scale` and `u` as in
    `one_pass`; with `x_scale`, contiguous float32 ``[K]``, rows that are on use ``x_scale ∘ x`` in place of x.
    """
    (m, k), n, rank = x.shape, weight.shape[0], h.shape[1]
    y = x.new_empty(m, n)
    if m == 0 or n == 0:
        return y
    arch = architecture(x.device)
    if tma is None:
        tma = arch in TMA_ARCHITECTURES and x.stride(1) == 1 and all(map(fits_tma, (x, weight, y)))
    row_gates = gate if gate is not None and gate.dim() == 1 else None
    precision = dot_precision(x.dtype, x.device)
    processors = multiprocessors(arch, x.device)
    tile = tile or tile_for(
        LOW_RANK_GEMM, arch, processors, m, n, rank, element_size=x.element_size(), precision=precision, aligned=tma,
        selects=row_gates is not None or seed is not None, scaled=x_scale is not None or column_scale is not None,
    )  # fmt: skip
    weight_rows = weight.stride(1) == 1
    # 128 x 256 in one part would take as much shared memory as 1.5 pipeline stages
    stores = 2 if tile.block_n > 128 else 1
    operands: tuple = (x, weight, y, u)
    if tma:
        operands = (
            TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
            TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k])
            if weight_rows
            else TensorDescriptor.from_tensor(weight.T, [tile.block_k, tile.block_n]),
            TensorDescriptor.from_tensor(y, [tile.block_m, tile.block_n // stores]),
            None if u is None else TensorDescriptor.from_tensor(u, [tile.block_m, tile.block_n // stores]),
        )
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    # full float32 has no matrix instruction on NVIDIA GPUs, so the ranks of a product are held in registers
    block_r = min(64 if x.element_size() == 2 else 16, max(16, triton.next_power_of_2(rank)))
    launch(
        low_rank_gemm_kernel, (min(tiles, processors * tile.programs),),
        operands[0], operands[1], bias, h, b, gate, seed, x_scale, column_scale, operands[2], operands[3],
        m, n, k, rank, m if row_gates is None else m // row_gates.shape[0],
        *x.stride(), *weight.stride(), 0 if bias is None else bias.stride(0), *h.stride(), *b.stride(),
        0 if row_gates is None else row_gates.stride(0), *y.stride(),
        float(dropout), keep_scale(dropout),
        BLOCK_R=block_r,
        RANK_STEPS=triton.cdiv(rank, block_r),
        TMA=tma,
        WEIGHT_ROWS=weight_rows,
        STORES=stores,
        ROW_GATES=row_gates is not None,
        LAST=tma and rank <= min(block_r, HELD_RANKS) and row_gates is None and seed is None,
        PRECISION=precision,
        **tile.meta(),
    )  # fmt: skip
    return y


def fits_tma(matrix: Tensor) -> bool:
    """Whether a TMA descriptor can describe `matrix` or its transpose: one stride of 1, the other of whole 16 bytes."""
    if 1 not in matrix.stride() or 0 in matrix.shape or matrix.data_ptr() % 16:
        return False
    outer = matrix.stride(1 - matrix.stride().index(1))
    return outer > 0 and outer * matrix.element_size() % 16 == 0
