"""`one_pass` for few rows: computes ``[W; A] xᵀ``, with W and A as the left operand and K split over programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cotolora.kernels.dropout import keep_mask, keep_scale
from cotolora.kernels.epilogue import store_scaled
from cotolora.kernels.launching import launch
from cotolora.kernels.tiles import (
    ONE_PASS_SWAPPED,
    Stream,
    architecture,
    dot_precision,
    is_aligned,
    multiprocessors,
    row_for,
    splits,
)


@triton.jit(do_not_specialize=["M", "steps_per_split"])
def stacked_kernel(
    # [M, K], [N, K], [R, K], [] or None, [] or None, [S, N + R, M]
    x_ptr, weight_ptr, a_ptr, gate_ptr, seed_ptr, partials_ptr,
    M, N, K, R, steps_per_split,
    stride_x_m, stride_x_k,
    stride_weight_n, stride_weight_k,
    stride_a_r, stride_a_k,
    stride_partials_s,
    dropout,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,  # BLOCK_M covers M
    PRECISION: tl.constexpr,  # of tl.dot on float32 operands: "ieee" or "tf32"
):  # fmt: skip
    """One program writes BLOCK_N rows of ``[W; A] xᵀ``, summed over its steps_per_split · BLOCK_K columns of K."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # tl.where instead of two branches, each of which would need its own shared memory
    of_a = tile >= tiles_n
    tile = tl.where(of_a, tile - tiles_n, tile)
    wide_ptr = tl.where(of_a, a_ptr, weight_ptr)
    stride_n, stride_k = tl.where(of_a, stride_a_r, stride_weight_n), tl.where(of_a, stride_a_k, stride_weight_k)
    # int64: index * stride passes 2**31 for tensors beyond 2 Gi elements
    columns = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    column_ok, row_ok = columns < tl.where(of_a, R, N), rows < M
    first_step = split * steps_per_split
    last_step = tl.minimum(first_step + steps_per_split, tl.cdiv(K, BLOCK_K))
    if gate_ptr is not None:
        last_step = tl.where(of_a & (tl.load(gate_ptr) == 0), first_step, last_step)

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # splits are whole steps of BLOCK_K, so that offsets stay aligned and only the end of K is masked
    for step in range(first_step, last_step):
        ks = step * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
        k_ok = ks < K
        wide_ptrs = wide_ptr + columns[:, None] * stride_n + ks[None, :] * stride_k
        wide = tl.load(wide_ptrs, mask=column_ok[:, None] & k_ok[None, :], other=0.0)
        x_ptrs = x_ptr + rows[:, None] * stride_x_m + ks[None, :] * stride_x_k
        x = tl.load(x_ptrs, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        if seed_ptr is not None and of_a:
            x = tl.where(keep_mask(tl.load(seed_ptr), rows, step * BLOCK_K, dropout, BLOCK_K), x, 0.0)
        total = tl.dot(wide, x.T, total, input_precision=PRECISION)
    part_ptr = partials_ptr + split.to(tl.int64) * stride_partials_s
    part_ptrs = part_ptr + (columns + tl.where(of_a, N, 0))[:, None] * M + rows[None, :]
    tl.store(part_ptrs, total, mask=column_ok[:, None] & row_ok[None, :])


@triton.jit(do_not_specialize=["M", "S", "rows_per_gate"])
def finish_kernel(
    # [S, N + R, M], [N] or None, [N, R], [] or [G] or None, [N] or None, [M, N], [M, R], [M, N] or None
    partials_ptr, bias_ptr, b_ptr, gate_ptr, column_scale_ptr, y_ptr, h_ptr, u_ptr,
    S, M, N, R, rows_per_gate,
    stride_bias_n,
    stride_b_n, stride_b_r,
    stride_gate_g,
    stride_y_m, stride_y_n,
    stride_h_m, stride_h_r,
    stride_partials_s,
    scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # ranks per step, at least 16 (tl.dot)
    ROW_GATES: tl.constexpr,  # one gate for each rows_per_gate rows, instead of one for all
    PRECISION: tl.constexpr,  # of tl.dot on float32 operands: "ieee" or "tf32"
):  # fmt: skip
    """One program sums the splits in order and writes a [BLOCK_M, BLOCK_N] tile of y; the first column also h."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < M, columns < N
    on, row_on = True, row_ok
    if ROW_GATES:
        row_on = tl.load(gate_ptr + rows // rows_per_gate * stride_gate_g, mask=row_ok, other=0) != 0
        on = tl.max(row_on.to(tl.int32), axis=0) != 0
    elif gate_ptr is not None:
        on = tl.load(gate_ptr) != 0

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_r in range(0, R, BLOCK_R):
        ranks = first_r + tl.arange(0, BLOCK_R).to(tl.int64)
        rank_ok = ranks < R
        h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        if on:
            h_parts = partials_ptr + (N + ranks)[None, :] * M + rows[:, None]
            for _ in range(S):
                h += tl.load(h_parts, mask=row_on[:, None] & rank_ok[None, :], other=0.0)
                h_parts += stride_partials_s
        h = (scale * h).to(h_ptr.dtype.element_ty)
        if tl.program_id(1) == 0:
            h_ptrs = h_ptr + rows[:, None] * stride_h_m + ranks[None, :] * stride_h_r
            tl.store(h_ptrs, h, mask=row_ok[:, None] & rank_ok[None, :])
        if on:
            b_ptrs = b_ptr + ranks[:, None] * stride_b_r + columns[None, :] * stride_b_n
            b = tl.load(b_ptrs, mask=rank_ok[:, None] & column_ok[None, :], other=0.0)
            y = tl.dot(h, b, y, input_precision=PRECISION)
    # tl.where, not a product with 0, because B may hold inf
    y = tl.where(row_on[:, None], y, 0.0)
    if bias_ptr is not None and column_scale_ptr is None:
        y += tl.load(bias_ptr + columns * stride_bias_n, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    y_parts = partials_ptr + columns[None, :] * M + rows[:, None]
    for _ in range(S):
        y += tl.load(y_parts, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
        y_parts += stride_partials_s
    y_ptrs = y_ptr + rows[:, None] * stride_y_m + columns[None, :] * stride_y_n
    store_scaled(
        y, y_ptrs, u_ptr, column_scale_ptr, bias_ptr, rows, columns, row_ok, column_ok, row_on, N,
        stride_bias_n, ROW_GATES,
    )  # fmt: skip


def one_pass_swapped(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gate: Tensor | None, scale: float,
    *, seed: Tensor | None = None, dropout: float = 0.0, column_scale: Tensor | None = None, u: Tensor | None = None,
    stream: Stream | None = None, split: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches `stacked_kernel` and `finish_kernel`: ``y = x Wᵀ + bias + h Bᵀ`` with ``h = scale · δ · dropout(x) Aᵀ``.

    As `cotolora.kernels.one_pass.one_pass`, for at most 64 rows of x. A matrix instruction takes 64 rows of its left
    operand, most of which x would leave unused. Therefore W and A are the left operand and xᵀ is the right one. W is
    read once; K is divided among `split` programs.
    """
    (m, k), n, rank = x.shape, weight.shape[0], a.shape[0]
    y, h = x.new_empty(m, n), x.new_empty(m, rank)
    if m == 0:
        return y, h
    row_gates = gate if gate is not None and gate.dim() == 1 else None
    arch, precision = architecture(x.device), dot_precision(x.dtype, x.device)
    stream = stream or row_for(
        ONE_PASS_SWAPPED, arch, m, n, rank, element_size=x.element_size(), precision=precision,
        aligned=x.stride(1) == 1 and is_aligned(x) and is_aligned(weight),
    ).tile  # fmt: skip
    tiles = triton.cdiv(n, stream.rows) + triton.cdiv(rank, stream.rows)
    steps = triton.cdiv(k, stream.columns)
    split = split or splits(multiprocessors(arch, x.device), tiles, steps)
    partials = x.new_empty(split, n + rank, m, dtype=torch.float32)
    launch(
        stacked_kernel, (tiles, split),
        x, weight, a, None if row_gates is not None else gate, seed, partials,
        m, n, k, rank, triton.cdiv(steps, split),
        *x.stride(), *weight.stride(), *a.stride(), partials.stride(0), float(dropout),
        BLOCK_M=max(16, triton.next_power_of_2(m)),
        BLOCK_N=stream.rows,
        BLOCK_K=stream.columns,
        PRECISION=precision,
        **stream.meta(),
    )  # fmt: skip
    # ptxas may spill a few bytes to fit one more block on an SM, more so in full float32 and with a column scale.
    # These sizes compile without spills in Triton 3.6 and 3.9 [compiled]
    scaled, full_float32 = column_scale is not None, x.dtype == torch.float32 and precision == "ieee"
    block_n = 16 if scaled or full_float32 else 32
    # many small programs fill the GPU; tl.dot needs at least 16 rows
    launch(
        finish_kernel, (triton.cdiv(m, 16), max(1, triton.cdiv(n, block_n))),
        partials, bias, b, gate, column_scale, y, h, u,
        split, m, n, rank, m if row_gates is None else m // row_gates.shape[0],
        0 if bias is None else bias.stride(0), *b.stride(), 0 if row_gates is None else row_gates.stride(0),
        *y.stride(), *h.stride(), partials.stride(0), float(scale) * (1.0 if seed is None else keep_scale(dropout)),
        BLOCK_M=16,
        BLOCK_N=block_n,
        BLOCK_R=16,
        ROW_GATES=row_gates is not None,
        PRECISION=precision,
        enable_fp_fusion=True,
        num_warps=4 if not full_float32 else 8 if scaled else 2,
    )  # fmt: skip
    return y, h
