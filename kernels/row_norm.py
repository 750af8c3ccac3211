"""DoRA's column scale, ``m / ‖W + scale · B A‖`` with norms of rows, from one read of W."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cotolora.kernels.launching import launch
from cotolora.kernels.tiles import ROW_NORM, Stream, architecture, dot_precision, is_aligned, row_for


@triton.jit
def any_on(gate_ptr, G, stride_gate_g, BLOCK_G: tl.constexpr):
    """Whether any of the gates ``[G]`` is on."""
    most = 0
    for first in range(0, G, BLOCK_G):
        gates = first + tl.arange(0, BLOCK_G).to(tl.int64)
        on = tl.load(gate_ptr + gates * stride_gate_g, mask=gates < G, other=0) != 0
        most = tl.maximum(most, tl.max(on.to(tl.int32), axis=0))
    return most != 0


@triton.jit
def computed_norm(
    weight_ptr, a_ptr, b_ptr, rows, row_ok, K, R, stride_weight_n, stride_weight_k, stride_a_r, stride_a_k,
    stride_b_n, stride_b_r, scale,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, RANK_STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``‖W + scale · B A‖`` of the BLOCK_N rows `rows`."""
    # the sum of squares itself, which costs as much as ‖W‖² + 2 · scale · W·BA + ‖scale · BA‖² but does not cancel.
    # [K, N], because matrix instructions need many rows, and few rows of W per program give many programs
    squares = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for first_k in range(0, K, BLOCK_K):
        ks = first_k + tl.arange(0, BLOCK_K).to(tl.int64)
        k_ok = ks < K
        weight_ptrs = weight_ptr + rows[None, :] * stride_weight_n + ks[:, None] * stride_weight_k
        weight = tl.load(weight_ptrs, mask=k_ok[:, None] & row_ok[None, :], other=0.0)
        update = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
        for step in tl.static_range(RANK_STEPS):
            ranks = step * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
            rank_ok = ranks < R
            a_ptrs = a_ptr + ranks[None, :] * stride_a_r + ks[:, None] * stride_a_k
            a = tl.load(a_ptrs, mask=k_ok[:, None] & rank_ok[None, :], other=0.0)
            b_ptrs = b_ptr + ranks[:, None] * stride_b_r + rows[None, :] * stride_b_n
            b = tl.load(b_ptrs, mask=rank_ok[:, None] & row_ok[None, :], other=0.0)
            update = tl.dot(a, b, update, input_precision=PRECISION)
        adapted = weight.to(tl.float32) + scale * update
        squares += adapted * adapted
    return tl.sqrt_rn(tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["G"])
def row_norm_kernel(
    # [N, K], [R, K], [N, R], [N] or None, [N] or None, [] or [G] or None, [N], [N]
    weight_ptr, a_ptr, b_ptr, known_norm_ptr, magnitude_ptr, gate_ptr, norm_ptr, ratio_ptr,
    N, K, R, G,
    stride_weight_n, stride_weight_k,
    stride_a_r, stride_a_k,
    stride_b_n, stride_b_r,
    stride_known_norm_n, stride_magnitude_n, stride_gate_g,
    scale,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # ranks per step, at least 16 (tl.dot)
    RANK_STEPS: tl.constexpr,  # number of steps of BLOCK_R ranks
    PRECISION: tl.constexpr,  # of tl.dot on float32 operands: "ieee" or "tf32"
):  # fmt: skip
    """One program writes BLOCK_N norms and, given magnitudes, ``magnitude / norm``; ones if no gate is on."""
    # int64: index * stride passes 2**31 for tensors beyond 2 Gi elements
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    on = True
    if gate_ptr is not None:
        on = any_on(gate_ptr, G, stride_gate_g, 128)

    norm = tl.full((BLOCK_N,), 1.0, tl.float32)
    ratio = norm
    if on:
        if known_norm_ptr is not None:
            norm = tl.load(known_norm_ptr + rows * stride_known_norm_n, mask=row_ok, other=0.0).to(tl.float32)
        else:
            norm = computed_norm(
                weight_ptr, a_ptr, b_ptr, rows, row_ok, K, R, stride_weight_n, stride_weight_k, stride_a_r, stride_a_k,
                stride_b_n, stride_b_r, scale, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS, PRECISION,
            )  # fmt: skip
        if magnitude_ptr is not None:
            magnitude = tl.load(magnitude_ptr + rows * stride_magnitude_n, mask=row_ok, other=1.0).to(tl.float32)
            # a row of zeros has no direction, so its ratio is 1
            ratio = tl.where(norm == 0, 1.0, tl.div_rn(magnitude, tl.where(norm == 0, 1.0, norm)))
    tl.store(norm_ptr + rows, norm, mask=row_ok)
    if magnitude_ptr is not None:
        tl.store(ratio_ptr + rows, ratio, mask=row_ok)


def row_norm(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, norm: Tensor | None = None, magnitude: Tensor | None = None,
    gate: Tensor | None = None, *, stream: Stream | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches `row_norm_kernel`: ``norm = ‖W + scale · B A‖`` by rows, and ``ratio = magnitude / norm``.

    ``weight [N, K]``, ``a [R, K]``, ``b [N, R]``, of one dtype, ``norm [N]`` if it is known and ``magnitude [N]``, of
    any, all of any strides → ``norm [N]``, ``ratio [N]``, float32; without a magnitude the ratio is not written. Where
    the norm is 0, the ratio is 1. `gate` as in `shrink`: if no gate is on, both are ones and only the gate is read.
    """
    (n, k), rank = weight.shape, a.shape[0]
    out, ratio = (weight.new_empty(n, dtype=torch.float32) for _ in range(2))
    if n == 0:
        return out, ratio
    precision = dot_precision(weight.dtype, weight.device)
    stream = stream or row_for(
        ROW_NORM, architecture(weight.device), 0, n, rank, element_size=weight.element_size(), precision=precision,
        aligned=is_aligned(weight) and is_aligned(a),
    ).tile  # fmt: skip
    block_r = min(stream.max_ranks, max(16, triton.next_power_of_2(rank)))
    launch(
        row_norm_kernel, (triton.cdiv(n, stream.rows),),
        weight, a, b, norm, magnitude, gate, out, ratio,
        n, k, rank, 0 if gate is None else gate.numel(),
        *weight.stride(), *a.stride(), *b.stride(), 0 if norm is None else norm.stride(0),
        0 if magnitude is None else magnitude.stride(0), 0 if gate is None or gate.dim() == 0 else gate.stride(0),
        float(scale),
        BLOCK_N=stream.rows,
        BLOCK_K=stream.columns,
        BLOCK_R=block_r,
        RANK_STEPS=triton.cdiv(rank, block_r),
        PRECISION=precision,
        **stream.meta(),
    )  # fmt: skip
    return out, ratio
