"""The low-rank term and the bias, ``y0 = h Bᵀ + bias``, to which the vendor's GEMM then adds ``x Wᵀ``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cotolora.kernels.dropout import keep_mask, keep_scale, wide_gates
from cotolora.kernels.launching import launch
from cotolora.kernels.tiles import PRE_EXPAND, Stream, architecture, dot_precision, multiprocessors, row_for


@triton.jit(do_not_specialize=["M", "rows_per_gate", "steps_per_program"])
def pre_expand_kernel(
    # [M, K] or None, [R, K] or None, [N] or None, [N, R], [M, N] or None, [] or [G] or None, [] or None, [M, R], [M, N]
    x_ptr, a_ptr, bias_ptr, b_ptr, add_ptr, gate_ptr, seed_ptr, h_ptr, y_ptr,
    M, N, K, R, rows_per_gate, steps_per_program,
    stride_x_m, stride_x_k,
    stride_a_r, stride_a_k,
    stride_bias_n,
    stride_b_n, stride_b_r,
    stride_add_m, stride_add_n,
    stride_gate_g,
    stride_h_m, stride_h_r,
    stride_y_m, stride_y_n,
    scale, dropout, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,  # BLOCK_N also along K
    BLOCK_R: tl.constexpr,  # ranks per step, at least 16 (tl.dot)
    ROW_GATES: tl.constexpr,  # one gate for each rows_per_gate rows, instead of one for all
    PRECISION: tl.constexpr,  # of tl.dot on float32 operands: "ieee" or "tf32"
):  # fmt: skip
    """One program writes BLOCK_M rows of y, in steps_per_program · BLOCK_N columns, from the same rows of h.

    With x it first computes and stores these rows of h, and is the only program for them.
    """
    # int64: index * stride passes 2**31 for tensors beyond 2 Gi elements
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < M
    on, row_on = True, row_ok
    if ROW_GATES:
        row_on = tl.load(gate_ptr + rows // rows_per_gate * stride_gate_g, mask=row_ok, other=0) != 0
        on = tl.max(row_on.to(tl.int32), axis=0) != 0
    elif gate_ptr is not None:
        on = tl.load(gate_ptr) != 0

    if x_ptr is not None:
        for first_r in range(0, R, BLOCK_R):
            ranks = first_r + tl.arange(0, BLOCK_R).to(tl.int64)
            rank_ok = ranks < R
            h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            if on:
                for first_k in range(0, K, BLOCK_N):
                    ks = first_k + tl.arange(0, BLOCK_N).to(tl.int64)
                    k_ok = ks < K
                    x_ptrs = x_ptr + rows[:, None] * stride_x_m + ks[None, :] * stride_x_k
                    x = tl.load(x_ptrs, mask=row_on[:, None] & k_ok[None, :], other=0.0)
                    if seed_ptr is not None:
                        x = tl.where(keep_mask(tl.load(seed_ptr), rows, first_k, dropout, BLOCK_N), x, 0.0)
                    a_ptrs = a_ptr + ranks[None, :] * stride_a_r + ks[:, None] * stride_a_k
                    a = tl.load(a_ptrs, mask=k_ok[:, None] & rank_ok[None, :], other=0.0)
                    h = tl.dot(x, a, h, input_precision=PRECISION)
            # tl.where, because rows that are off must be zero even if A holds inf or NaN
            h = tl.where(row_on[:, None], scale * h, 0.0)
            h_ptrs = h_ptr + rows[:, None] * stride_h_m + ranks[None, :] * stride_h_r
            tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=row_ok[:, None] & rank_ok[None, :])
        # threads of this program read values of h that other threads have written
        tl.debug_barrier()

    first_step = tl.program_id(1) * steps_per_program
    for step in range(first_step, tl.minimum(first_step + steps_per_program, tl.cdiv(N, BLOCK_N))):
        first_n = step * BLOCK_N
        columns = first_n + tl.arange(0, BLOCK_N).to(tl.int64)
        column_ok = columns < N
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if on:
            for first_r in range(0, R, BLOCK_R):
                ranks = first_r + tl.arange(0, BLOCK_R).to(tl.int64)
                rank_ok = ranks < R
                h_ptrs = h_ptr + rows[:, None] * stride_h_m + ranks[None, :] * stride_h_r
                h_again = tl.load(h_ptrs, mask=row_on[:, None] & rank_ok[None, :], other=0.0)
                b_ptrs = b_ptr + ranks[:, None] * stride_b_r + columns[None, :] * stride_b_n
                b = tl.load(b_ptrs, mask=rank_ok[:, None] & column_ok[None, :], other=0.0)
                y = tl.dot(h_again, b, y, input_precision=PRECISION)
            if x_ptr is None and seed_ptr is not None:
                y = tl.where(keep_mask(tl.load(seed_ptr), rows, first_n, dropout, BLOCK_N), y * keep_scale, 0.0)
            # tl.where, because rows that are off must be zero even if B holds inf or NaN
            y = tl.where(row_on[:, None], y, 0.0)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + columns * stride_bias_n, mask=column_ok, other=0.0).to(tl.float32)[None, :]
        if add_ptr is not None:
            add_ptrs = add_ptr + rows[:, None] * stride_add_m + columns[None, :] * stride_add_n
            y += tl.load(add_ptrs, mask=row_ok[:, None] & column_ok[None, :], other=0.0).to(tl.float32)
        y_ptrs = y_ptr + rows[:, None] * stride_y_m + columns[None, :] * stride_y_n
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


def pre_expand(
    x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gate: Tensor | None, scale: float,
    *, seed: Tensor | None = None, dropout: float = 0.0, stream: Stream | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches `pre_expand_kernel`: ``y0 = h Bᵀ + bias`` with ``h = scale · δ · dropout(x) Aᵀ``, each rounded once.

    ``x [M, K]``, ``bias [N]`` or None, ``a [R, K]``, ``b [N, R]`` → ``y0 [M, N]``, ``h [M, R]``, of one dtype and any
    strides. `gate` and `seed` as in `shrink`. ``y0.addmm_(x, W.T)`` is then the layer's output, at the vendor's speed.
    """
    h = x.new_empty(x.shape[0], a.shape[0])
    return _launch(x, bias, a, b, None, gate, scale, h, seed, dropout, stream), h


def expand(
    p: Tensor, a: Tensor, gate: Tensor | None,
    *, add: Tensor | None = None, seed: Tensor | None = None, dropout: float = 0.0, stream: Stream | None = None,
) -> Tensor:  # fmt: skip
    """Launches `pre_expand_kernel` with a known p: ``dx0 = δ · dropout(p A)``, plus `add` if given.

    ``p [M, R]``, ``a [R, K]``, ``add [M, K]`` → ``dx0 [M, K]``, rounded once; ``dx0.addmm_(dy, W)`` is the gradient of
    x. With a `seed`, ``p A`` is dropped out by the same mask as x was. ``expand(h, B.T, gate, add=y)`` adds the
    low-rank part to a base's own output y.
    """
    return _launch(None, None, None, a.T, add, gate, 1.0, p, seed, dropout, stream)


def _launch(
    x: Tensor | None, bias: Tensor | None, a: Tensor | None, b: Tensor, add: Tensor | None, gate: Tensor | None,
    scale: float, h: Tensor, seed: Tensor | None, dropout: float, stream: Stream | None,
) -> Tensor:  # fmt: skip
    (m, rank), n = h.shape, b.shape[0]
    y = h.new_empty(m, n)
    if m == 0:
        return y
    arch, precision = architecture(h.device), dot_precision(h.dtype, h.device)
    gate = wide_gates(gate, seed, precision)
    row_gates = gate if gate is not None and gate.dim() == 1 else None
    stream = stream or row_for(PRE_EXPAND, arch, m, n, rank, element_size=h.element_size(), precision=precision).tile
    factor = 1.0 if seed is None else keep_scale(dropout)
    tiles, steps = triton.cdiv(m, stream.rows), triton.cdiv(n, stream.columns)
    # two programs per multiprocessor, if the columns of a row may be divided
    across = 1 if x is not None else max(1, min(steps, 2 * multiprocessors(arch, h.device) // tiles))
    launch(
        pre_expand_kernel, (tiles, across),
        x, a, bias, b, add, gate, seed, h, y,
        m, n, 0 if x is None else x.shape[1], rank, m if row_gates is None else m // row_gates.shape[0],
        triton.cdiv(steps, across),
        *((0, 0) if x is None else x.stride()), *((0, 0) if a is None else a.stride()),
        0 if bias is None else bias.stride(0), *b.stride(), *((0, 0) if add is None else add.stride()),
        0 if row_gates is None else row_gates.stride(0), *h.stride(), *y.stride(),
        float(scale) * (1.0 if x is None else factor), float(dropout), factor,
        BLOCK_M=stream.rows,
        BLOCK_N=stream.columns,
        BLOCK_R=min(stream.max_ranks, max(16, triton.next_power_of_2(rank))),
        ROW_GATES=row_gates is not None,
        PRECISION=precision,
        **stream.meta(),
    )  # fmt: skip
    return y
