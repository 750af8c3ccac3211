"""The down-projection of an adapter, ``h = scale · δ · dropout(x) Aᵀ``, from one read of x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cotolora.kernels.dropout import keep_mask, keep_scale
from cotolora.kernels.launching import launch
from cotolora.kernels.partials import Sum, sum_partials
from cotolora.kernels.tiles import (
    SHRINK,
    Stream,
    architecture,
    dot_precision,
    is_aligned,
    multiprocessors,
    row_for,
    splits,
)


@triton.jit(do_not_specialize=["M", "rows_per_gate", "steps_per_split"])
def shrink_kernel(
    # [M, K], [R, K], [] or [G] or None, [] or None, [S, M, R]
    x_ptr, a_ptr, gate_ptr, seed_ptr, h_ptr,
    M, K, R, rows_per_gate, steps_per_split,
    stride_x_m, stride_x_k,
    stride_a_r, stride_a_k,
    stride_gate_g,
    stride_h_s, stride_h_m, stride_h_r,
    scale, dropout,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # ranks of one program, at least 16 (tl.dot)
    ROW_GATES: tl.constexpr,  # one gate for each rows_per_gate rows, instead of one for all
    PRECISION: tl.constexpr,  # of tl.dot on float32 operands: "ieee" or "tf32"
):  # fmt: skip
    """One program writes a [BLOCK_M, BLOCK_R] tile of h, summed over its steps_per_split · BLOCK_K columns of x."""
    split = tl.program_id(1)
    # int64: index * stride passes 2**31 for tensors beyond 2 Gi elements
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok, rank_ok = rows < M, ranks < R
    on, row_on = True, row_ok
    if ROW_GATES:
        row_on = tl.load(gate_ptr + rows // rows_per_gate * stride_gate_g, mask=row_ok, other=0) != 0
        on = tl.max(row_on.to(tl.int32), axis=0) != 0
    elif gate_ptr is not None:
        on = tl.load(gate_ptr) != 0

    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if on:
        # splits are whole steps of BLOCK_K, so that offsets stay aligned and only the end of K is masked
        first_step = split * steps_per_split
        for step in range(first_step, tl.minimum(first_step + steps_per_split, tl.cdiv(K, BLOCK_K))):
            first_k = step * BLOCK_K
            ks = first_k + tl.arange(0, BLOCK_K).to(tl.int64)
            k_ok = ks < K
            x_ptrs = x_ptr + rows[:, None] * stride_x_m + ks[None, :] * stride_x_k
            x = tl.load(x_ptrs, mask=row_on[:, None] & k_ok[None, :], other=0.0)
            if seed_ptr is not None:
                x = tl.where(keep_mask(tl.load(seed_ptr), rows, first_k, dropout, BLOCK_K), x, 0.0)
            a_ptrs = a_ptr + ranks[None, :] * stride_a_r + ks[:, None] * stride_a_k
            a = tl.load(a_ptrs, mask=k_ok[:, None] & rank_ok[None, :], other=0.0)
            h = tl.dot(x, a, h, input_precision=PRECISION)
    # tl.where, because rows that are off must be zero even if A holds inf or NaN
    h = tl.where(row_on[:, None], scale * h, 0.0)
    h_ptrs = h_ptr + split.to(tl.int64) * stride_h_s + rows[:, None] * stride_h_m + ranks[None, :] * stride_h_r
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=row_ok[:, None] & rank_ok[None, :])


def shrink(
    x: Tensor, a: Tensor, gate: Tensor | None, scale: float,
    *, seed: Tensor | None = None, dropout: float = 0.0, stream: Stream | None = None, split: int | None = None,
) -> Tensor:  # fmt: skip
    """Launches `shrink_kernel`: ``h = scale · δ · dropout(x) Aᵀ``, rounded once.

    ``x [M, K]``, ``a [R, K]`` → ``h [M, R]``, of one dtype and any strides. `gate`: None (on), ``[]``, or ``[G]`` with
    row i under gate ``i // (M / G)``. With `seed`, an int64 ``[]``, dropout is applied. The backward's p is
    ``shrink(dy, B.T, gate, scale)``. With few rows, K is divided among `split` programs, whose parts a second launch
    adds up in order.
    """
    (m, k), rank = x.shape, a.shape[0]
    h = x.new_empty(m, rank)
    if m == 0:
        return h
    row_gates = gate if gate is not None and gate.dim() == 1 else None
    arch, precision = architecture(x.device), dot_precision(x.dtype, x.device)
    stream = stream or row_for(
        SHRINK, arch, m, 0, rank, element_size=x.element_size(), precision=precision,
        aligned=x.stride(1) == 1 and is_aligned(x) and is_aligned(a),
    ).tile  # fmt: skip
    block_r = min(stream.max_ranks, max(16, triton.next_power_of_2(rank)))
    tiles = triton.cdiv(m, stream.rows) * triton.cdiv(rank, block_r)
    steps = triton.cdiv(k, stream.columns)
    split = split or splits(multiprocessors(arch, x.device), tiles, steps)
    partials = h[None] if split == 1 else x.new_empty(split, m, rank, dtype=torch.float32)
    launch(
        shrink_kernel, (triton.cdiv(m, stream.rows), split, triton.cdiv(rank, block_r)),
        x, a, gate, seed, partials,
        m, k, rank, m if row_gates is None else m // row_gates.shape[0],
        triton.cdiv(steps, split),
        *x.stride(), *a.stride(), 0 if row_gates is None else row_gates.stride(0), *partials.stride(),
        float(scale) * (1.0 if seed is None else keep_scale(dropout)), float(dropout),
        BLOCK_M=stream.rows,
        BLOCK_K=stream.columns,
        BLOCK_R=block_r,
        ROW_GATES=row_gates is not None,
        PRECISION=precision,
        **stream.meta(),
    )  # fmt: skip
    if split > 1:
        sum_partials(Sum(partials, h))
    return h
