"""A linear layer and its gated low-rank update in one launch."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from cotolora.kernels.dropout import VERSION, keep_mask, keep_scale
from cotolora.kernels.epilogue import store_scaled
from cotolora.kernels.launching import launch
from cotolora.kernels.tiles import ONE_PASS, Tile, architecture, dot_precision, is_aligned, multiprocessors, tile_for


@triton.jit
def swizzled(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of the tile-th tile, in an order that visits `GROUP_M` row tiles together."""
    group_size = GROUP_M * tiles_n
    first_m = tile // group_size * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + tile % group_size % group_m, tile % group_size // group_m


@triton.jit
def accumulate(
    # [BLOCK_M, BLOCK_N], to which x Wᵀ is added; then the addresses of the rows of x, W and A
    y, x_rows, weight_rows, a_rows,
    rows, row_ok, column_ok, rank_ok,
    K,
    stride_x_k, stride_weight_k, stride_a_k,
    seed_ptr, dropout,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    LOW_RANK: tl.constexpr,  # if False, A is not read and h is zero
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds x Wᵀ to y and computes h = dropout(x) Aᵀ, in float32, from one read of x."""
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first_k in range(0, K, BLOCK_K):
        ks = first_k + tl.arange(0, BLOCK_K).to(tl.int64)
        k_ok = ks < K
        x = tl.load(x_rows[:, None] + ks[None, :] * stride_x_k, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        weight_ptrs = weight_rows[None, :] + ks[:, None] * stride_weight_k
        weight = tl.load(weight_ptrs, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
        y = tl.dot(x, weight, y, input_precision=PRECISION)
        if LOW_RANK:
            a_ptrs = a_rows[None, :] + ks[:, None] * stride_a_k
            a = tl.load(a_ptrs, mask=k_ok[:, None] & rank_ok[None, :], other=0.0)
            if seed_ptr is not None:
                x = tl.where(keep_mask(tl.load(seed_ptr), rows, first_k, dropout, BLOCK_K), x, 0.0)
            h = tl.dot(x, a, h, input_precision=PRECISION)
    return y, h


@triton.jit
def expanded(
    # [BLOCK_M, BLOCK_N], [BLOCK_M, BLOCK_R], [N, R]
    y, h, b_ptr, ranks, columns, rank_ok, column_ok, R, stride_b_n, stride_b_r, PRECISION: tl.constexpr
):  # fmt: skip
    """Y + h Bᵀ."""
    if h.dtype == tl.float32 and PRECISION == "ieee" and h.shape[1] > 16:
        # without a matrix instruction all ranks of a product are in registers; 16 per step do not spill
        parts = tl.reshape(h, (h.shape[0], h.shape[1] // 16, 16))
        for part in range(0, h.shape[1] // 16):
            chosen = tl.arange(0, h.shape[1] // 16) == part
            h_part = tl.sum(tl.where(chosen[None, :, None], parts, 0.0), axis=1)
            part_ranks = part * 16 + tl.arange(0, 16).to(tl.int64)
            b_ptrs = b_ptr + part_ranks[:, None] * stride_b_r + columns[None, :] * stride_b_n
            b = tl.load(b_ptrs, mask=(part_ranks < R)[:, None] & column_ok[None, :], other=0.0)
            y = tl.dot(h_part, b, y, input_precision=PRECISION)
    else:
        b_ptrs = b_ptr + ranks[:, None] * stride_b_r + columns[None, :] * stride_b_n
        b = tl.load(b_ptrs, mask=rank_ok[:, None] & column_ok[None, :], other=0.0)
        y = tl.dot(h, b, y, input_precision=PRECISION)
    return y


# not specialised on M, which changes between batches and would cause up to three compilations (1, 16 n, others)
@triton.jit(do_not_specialize=["M", "rows_per_gate"])
def one_pass_kernel(
    # [M, K], [N, K], [N] or None, [R, K], [N, R], [] or [G] or None, [] or None, [N] or None; [M, N], [M, R], and
    # [M, N] or None
    x_ptr, weight_ptr, bias_ptr, a_ptr, b_ptr, gate_ptr, seed_ptr, column_scale_ptr, y_ptr, h_ptr, u_ptr,
    M, N, K, R, rows_per_gate,
    stride_x_m, stride_x_k,
    stride_weight_n, stride_weight_k,
    stride_bias_n,
    stride_a_r, stride_a_k,
    stride_b_n, stride_b_r,
    stride_gate_g,
    stride_y_m, stride_y_n,
    stride_h_m, stride_h_r,
    scale, dropout,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # R rounded up to a power of two, at least 16 (tl.dot)
    GROUP_M: tl.constexpr,
    ROW_GATES: tl.constexpr,  # one gate for each rows_per_gate rows, instead of one for all
    PRECISION: tl.constexpr,  # of tl.dot on float32 operands: "ieee" or "tf32"
):  # fmt: skip
    """One program writes a [BLOCK_M, BLOCK_N] tile of y; those of the first column of tiles also [BLOCK_M, R] of h."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.maximum(tl.cdiv(N, BLOCK_N), 1)
    tile_m, tile_n = swizzled(tl.program_id(0), tiles_m, tiles_n, GROUP_M)

    # int64: index * stride passes 2**31 for tensors beyond 2 Gi elements
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    row_ok, column_ok, rank_ok = rows < M, columns < N, ranks < R

    on, row_on = True, row_ok
    if ROW_GATES:
        row_on = tl.load(gate_ptr + rows // rows_per_gate * stride_gate_g, mask=row_ok, other=0) != 0
        on = tl.max(row_on.to(tl.int32), axis=0) != 0
    elif gate_ptr is not None:
        on = tl.load(gate_ptr) != 0

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bias_ptr is not None and column_scale_ptr is None:
        # before the K loop: after it, its 256 columns cost each thread 40 more registers [compiled, sm_90]
        bias = tl.load(bias_ptr + columns * stride_bias_n, mask=column_ok, other=0.0)
        y += bias.to(tl.float32)[None, :]
    x_rows = x_ptr + rows * stride_x_m
    weight_rows, a_rows = weight_ptr + columns * stride_weight_n, a_ptr + ranks * stride_a_r
    # two loops, because a branch inside one loop prevents the pipelining of A
    if on:
        y, h = accumulate(
            y, x_rows, weight_rows, a_rows, rows, row_ok, column_ok, rank_ok, K, stride_x_k, stride_weight_k,
            stride_a_k, seed_ptr, dropout, BLOCK_M, BLOCK_K, BLOCK_R, True, PRECISION,
        )  # fmt: skip
    else:
        y, h = accumulate(
            y, x_rows, weight_rows, a_rows, rows, row_ok, column_ok, rank_ok, K, stride_x_k, stride_weight_k,
            stride_a_k, seed_ptr, dropout, BLOCK_M, BLOCK_K, BLOCK_R, False, PRECISION,
        )  # fmt: skip

    # rank_ok, because an inf in x times the zeros beyond rank R is NaN
    h = tl.where(row_on[:, None] & rank_ok[None, :], scale * h, 0.0).to(h_ptr.dtype.element_ty)
    if tile_n == 0:
        h_ptrs = h_ptr + rows[:, None] * stride_h_m + ranks[None, :] * stride_h_r
        tl.store(h_ptrs, h, mask=row_ok[:, None] & rank_ok[None, :])
    y_ptrs = y_ptr + rows[:, None] * stride_y_m + columns[None, :] * stride_y_n
    if ROW_GATES:
        # rows that are off are stored before B is used, because their zeros times an inf in B would be NaN
        store_scaled(
            y, y_ptrs, u_ptr, column_scale_ptr, bias_ptr, rows, columns, row_ok & ~row_on, column_ok, row_on, N,
            stride_bias_n, ROW_GATES,
        )  # fmt: skip
    if on:
        y = expanded(y, h, b_ptr, ranks, columns, rank_ok, column_ok, R, stride_b_n, stride_b_r, PRECISION)
    store_scaled(
        y, y_ptrs, u_ptr, column_scale_ptr, bias_ptr, rows, columns, row_on, column_ok, row_on, N,
        stride_bias_n, ROW_GATES,
    )  # fmt: skip


def one_pass(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gate: Tensor | None, scale: float,
    *, seed: Tensor | None = None, dropout: float = 0.0, column_scale: Tensor | None = None, u: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches `one_pass_kernel`: ``y = x Wᵀ + bias + h Bᵀ`` with ``h = scale · dropout(x) Aᵀ``, rounded once.

    ``x [M, K]``, ``weight [N, K]``, ``bias [N]`` or None, ``a [R, K]``, ``b [N, R]`` → ``y [M, N]``, ``h [M, R]``, of
    one dtype and any strides. `gate`: None (on), ``[]``, or ``[G]`` with row i under gate ``i // (M / G)``. Rows that
    are off are ``x Wᵀ + bias`` in y, whatever A and B hold, and zeros in h. With `seed`, an int64 ``[]``, dropout is
    applied. With `column_scale`, contiguous float32 ``[N]``, rows of y that are on are ``column_scale ∘ u + bias`` with
    ``u = x Wᵀ + h Bᵀ``, which is written to `u`, a contiguous ``[M, N]``, if that is given.
    """
    (m, k), n, rank = x.shape, weight.shape[0], a.shape[0]
    y, h = x.new_empty(m, n), x.new_empty(m, rank)
    if m == 0:
        return y, h
    row_gates = gate if gate is not None and gate.dim() == 1 else None
    arch, precision = architecture(x.device), dot_precision(x.dtype, x.device)
    tile = tile or tile_for(
        ONE_PASS, arch, multiprocessors(arch, x.device), m, n, rank,
        element_size=x.element_size(), precision=precision,
        # x must be contiguous along K, because the kernel is not specialised on M
        aligned=x.stride(1) == 1 and is_aligned(x) and is_aligned(weight) and is_aligned(a),
        selects=row_gates is not None or seed is not None, scaled=column_scale is not None,
    )  # fmt: skip
    if seed is not None and VERSION < (3, 9) and tile.num_warps == 8 and arch == "sm_90":
        # no pipelining, in which one warp group copies the next x over the tile to which the other still applies
        # dropout: Triton before 3.9 emits no barrier between them [PTX]
        tile = replace(tile, num_stages=1)
    # at least one program per row tile, because h must be written even without columns
    programs = triton.cdiv(m, tile.block_m) * max(1, triton.cdiv(n, tile.block_n))
    launch(
        one_pass_kernel, (programs,),
        x, weight, bias, a, b, gate, seed, column_scale, y, h, u,
        m, n, k, rank, m if row_gates is None else m // row_gates.shape[0],
        *x.stride(), *weight.stride(), 0 if bias is None else bias.stride(0), *a.stride(), *b.stride(),
        0 if row_gates is None else row_gates.stride(0), *y.stride(), *h.stride(),
        float(scale) * (1.0 if seed is None else keep_scale(dropout)), float(dropout),
        BLOCK_R=max(16, triton.next_power_of_2(rank)),
        ROW_GATES=row_gates is not None,
        PRECISION=precision,
        **tile.meta(),
    )  # fmt: skip
    return y, h
