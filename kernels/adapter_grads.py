"""Gradients of A, B and DoRA's magnitude: one read of dy gives p = dy B and dB, one read of x gives dA."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cotolora.kernels.dropout import keep_mask, keep_scale, wide_gates
from cotolora.kernels.launching import launch
from cotolora.kernels.partials import Sum, sum_partials
from cotolora.kernels.shrink import shrink
from cotolora.kernels.tiles import (
    GRAM,
    PROJECT,
    PROJECT_MAX_RANK,
    Stream,
    architecture,
    dot_precision,
    is_aligned,
    multiprocessors,
    row_for,
    splits,
    stream_by_parts,
)


@triton.jit
def scaled_gradient(dy, u_ptr, rows, columns, row_on, column_ok, N):
    """``Σ dy ∘ u`` over the rows that are on; u is contiguous."""
    u_ptrs = u_ptr + rows[:, None] * N + columns[None, :]
    u = tl.load(u_ptrs, mask=row_on[:, None] & column_ok[None, :], other=0.0)
    return tl.sum(dy.to(tl.float32) * u.to(tl.float32), axis=0)


@triton.jit
def store_magnitude_gradient(dm, norm_ptr, dm_ptr, columns, column_ok):
    """Stores ``dm / norm``, and 0 where the norm is 0: there y does not depend on the magnitude."""
    norm = tl.load(norm_ptr + columns, mask=column_ok, other=1.0)
    dm = tl.where(norm == 0, 0.0, tl.div_rn(dm, tl.where(norm == 0, 1.0, norm)))
    tl.store(dm_ptr + columns, dm.to(dm_ptr.dtype.element_ty), mask=column_ok)


@triton.jit(do_not_specialize=["M", "rows_per_gate", "steps_per_split"])
def gram_kernel(
    # [M, N], [M, R], [] or [G] or None, [] or None, [S, N, R]; for DoRA, else None: [N], [M, N], [N] and [S, N]
    t_ptr, h_ptr, gate_ptr, seed_ptr, out_ptr, column_scale_ptr, u_ptr, norm_ptr, dm_ptr,
    M, N, R, rows_per_gate, steps_per_split,
    stride_t_m, stride_t_n,
    stride_h_m, stride_h_r,
    stride_gate_g,
    stride_out_s, stride_out_n, stride_out_r,
    scale, dropout,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # ranks of one program, at least 16 (tl.dot)
    ROW_GATES: tl.constexpr,  # one gate for each rows_per_gate rows, instead of one for all
    PRECISION: tl.constexpr,  # of tl.dot on float32 operands: "ieee" or "tf32"
    WGMMA: tl.constexpr,  # whether the GPU is sm_90, where tl.dot runs while the next tile is copied
):  # fmt: skip
    """One program writes its rows' contribution to a [BLOCK_N, BLOCK_R] tile of out = scale · tᵀ h."""
    split = tl.program_id(1)
    # int64: index * stride passes 2**31 for tensors beyond 2 Gi elements
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column_ok, rank_ok = columns < N, ranks < R
    on = True
    if gate_ptr is not None and not ROW_GATES:
        on = tl.load(gate_ptr) != 0

    out = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    dm = tl.zeros((BLOCK_N,), tl.float32)
    if on:
        first_step = split * steps_per_split
        for step in range(first_step, tl.minimum(first_step + steps_per_split, tl.cdiv(M, BLOCK_M))):
            rows = step * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
            row_on = rows < M
            if ROW_GATES:
                row_on = tl.load(gate_ptr + rows // rows_per_gate * stride_gate_g, mask=row_on, other=0) != 0
            t_ptrs = t_ptr + rows[:, None] * stride_t_m + columns[None, :] * stride_t_n
            t = tl.load(t_ptrs, mask=row_on[:, None] & column_ok[None, :], other=0.0)
            if seed_ptr is not None:
                first_column = tl.program_id(0) * BLOCK_N
                t = tl.where(keep_mask(tl.load(seed_ptr), rows, first_column, dropout, BLOCK_N), t, 0.0)
            h_ptrs = h_ptr + rows[:, None] * stride_h_m + ranks[None, :] * stride_h_r
            h = tl.load(h_ptrs, mask=row_on[:, None] & rank_ok[None, :], other=0.0)
            if WGMMA and u_ptr is not None:
                out += 0.0  # for the same reason as in project_kernel: scaled_gradient also reads t
            out = tl.dot(t.T, h, out, input_precision=PRECISION)
            if u_ptr is not None:
                dm += scaled_gradient(t, u_ptr, rows, columns, row_on, column_ok, N)
    if u_ptr is not None and tl.program_id(2) == 0:
        store_magnitude_gradient(dm, norm_ptr, dm_ptr + split.to(tl.int64) * N, columns, column_ok)
    if column_scale_ptr is not None:
        out *= tl.load(column_scale_ptr + columns, mask=column_ok, other=0.0)[:, None]
    out_ptrs = (
        out_ptr + split.to(tl.int64) * stride_out_s + columns[:, None] * stride_out_n + ranks[None, :] * stride_out_r
    )
    tl.store(out_ptrs, (scale * out).to(out_ptr.dtype.element_ty), mask=column_ok[:, None] & rank_ok[None, :])


@triton.jit(do_not_specialize=["M", "rows_per_gate", "steps_per_split"])
def project_kernel(
    # [M, N], [M, R], [N, R], [] or [G] or None, [T, M, R] with T tiles of columns, [S, N, R]; as in gram_kernel
    dy_ptr, h_ptr, b_ptr, gate_ptr, p_ptr, db_ptr, column_scale_ptr, u_ptr, norm_ptr, dm_ptr,
    M, N, R, rows_per_gate, steps_per_split,
    stride_dy_m, stride_dy_n,
    stride_h_m, stride_h_r,
    stride_b_n, stride_b_r,
    stride_gate_g,
    stride_p_t, stride_p_m, stride_p_r,
    stride_db_s, stride_db_n, stride_db_r,
    scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # R rounded up to a power of two, at least 16 (tl.dot)
    ROW_GATES: tl.constexpr,  # one gate for each rows_per_gate rows, instead of one for all
    PRECISION: tl.constexpr,  # of tl.dot on float32 operands: "ieee" or "tf32"
    WGMMA: tl.constexpr,  # whether the GPU is sm_90, where tl.dot runs while the next tile is copied
):  # fmt: skip
    """One program writes the contribution of steps_per_split tiles of dy to p = scale · dy B and to dB = dyᵀ h."""
    tile_n, split = tl.program_id(0), tl.program_id(1)
    # int64: index * stride passes 2**31 for tensors beyond 2 Gi elements
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    column_ok, rank_ok = columns < N, ranks < R
    b_ptrs = b_ptr + columns[:, None] * stride_b_n + ranks[None, :] * stride_b_r
    b = tl.load(b_ptrs, mask=column_ok[:, None] & rank_ok[None, :], other=0.0)
    if column_scale_ptr is not None:
        column_scale = tl.load(column_scale_ptr + columns, mask=column_ok, other=0.0)[:, None]
        b = (b * column_scale).to(b.dtype)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    dm = tl.zeros((BLOCK_N,), tl.float32)
    rows_on = M
    if gate_ptr is not None and not ROW_GATES:
        rows_on = tl.where(tl.load(gate_ptr) != 0, M, 0)
    first_step = split * steps_per_split
    for step in range(first_step, tl.minimum(first_step + steps_per_split, tl.cdiv(M, BLOCK_M))):
        rows = step * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        row_ok, row_on = rows < M, rows < rows_on
        if ROW_GATES:
            row_on = tl.load(gate_ptr + rows // rows_per_gate * stride_gate_g, mask=row_ok, other=0) != 0
        dy_ptrs = dy_ptr + rows[:, None] * stride_dy_m + columns[None, :] * stride_dy_n
        dy = tl.load(dy_ptrs, mask=row_on[:, None] & column_ok[None, :], other=0.0)
        h_ptrs = h_ptr + rows[:, None] * stride_h_m + ranks[None, :] * stride_h_r
        h = tl.load(h_ptrs, mask=row_on[:, None] & rank_ok[None, :], other=0.0)
        # tl.where, because rows that are off must be zero even if B holds inf or NaN
        p = tl.where(row_on[:, None], scale * tl.dot(dy, b, input_precision=PRECISION), 0.0)
        p_ptrs = p_ptr + tile_n.to(tl.int64) * stride_p_t + rows[:, None] * stride_p_m + ranks[None, :] * stride_p_r
        tl.store(p_ptrs, p.to(p_ptr.dtype.element_ty), mask=row_ok[:, None] & rank_ok[None, :])
        # Adding 0 makes this step read db, so that it waits for the wgmma of the previous step. Otherwise the next dy
        # is copied over one that a wgmma may still read [emulated PTX of 3.6 and 3.9 for sm_90]: it seems that Triton
        # reserves no extra pipeline slot for an operand with a second reader, such as dy
        if WGMMA:
            db += 0.0
        db = tl.dot(dy.T, h, db, input_precision=PRECISION)
        if u_ptr is not None:
            dm += scaled_gradient(dy, u_ptr, rows, columns, row_on, column_ok, N)
    if u_ptr is not None:
        store_magnitude_gradient(dm, norm_ptr, dm_ptr + split.to(tl.int64) * N, columns, column_ok)
    if column_scale_ptr is not None:
        db *= column_scale
    db_ptrs = db_ptr + split.to(tl.int64) * stride_db_s + columns[:, None] * stride_db_n + ranks[None, :] * stride_db_r
    tl.store(db_ptrs, db.to(db_ptr.dtype.element_ty), mask=column_ok[:, None] & rank_ok[None, :])


class Dora(NamedTuple):
    """DoRA's operands of the gradients: ``column_scale [N]`` and ``norm [N]``, float32; ``u [M, N]``, contiguous.

    The gradient of the magnitude is computed, in `dtype`, if u is given.
    """

    column_scale: Tensor
    norm: Tensor
    u: Tensor | None
    dtype: torch.dtype

    def magnitude_sum(self, split: int) -> Sum | None:
        """The output for the gradient of the magnitude, in `split` parts."""
        if self.u is None:
            return None
        out = self.norm.new_empty(1, self.norm.shape[0], dtype=self.dtype)
        return Sum(out[None] if split == 1 else self.norm.new_empty(split, *out.shape), out)


def gram(
    t: Tensor, h: Tensor, gate: Tensor | None, scale: float, dtype: torch.dtype,
    *, seed: Tensor | None = None, dropout: float = 0.0, dora: Dora | None = None, stream: Stream | None = None,
    split: int | None = None, transposed: bool = False,
) -> tuple[Sum, Sum | None]:  # fmt: skip
    """Launches `gram_kernel`: ``out = scale · dropout(t)ᵀ h`` over the rows that are on.

    ``t [M, N]``, ``h [M, R]``, of one dtype and any strides → ``out [N, R]`` in `dtype`, contiguous, or the transpose
    of a contiguous ``[R, N]``. dB is ``gram(dy, h, gate, 1)``, dA is ``gram(x, p, gate, 1, transposed=True).T``. `gate`
    and `seed` as in `shrink`; the rows are divided among `split` programs. With `dora`, ``out = column_scale ∘ tᵀ h``
    by rows, and ``Σ δ t ∘ u / norm`` is returned too. The caller adds up the parts (`sum_partials`, two sums in one
    launch); a result with one part is complete.
    """
    (m, n), rank = t.shape, h.shape[1]
    out = t.new_empty(rank, n, dtype=dtype).T if transposed else t.new_empty(n, rank, dtype=dtype)
    if n == 0:
        return Sum(out[None], out), None if dora is None else dora.magnitude_sum(1)
    arch, precision = architecture(t.device), dot_precision(t.dtype, t.device)
    gate = wide_gates(gate, seed, precision)
    row_gates = gate if gate is not None and gate.dim() == 1 else None
    stream = stream or row_for(
        GRAM, arch, m, n, rank, element_size=t.element_size(), precision=precision, scaled=dora is not None
    ).tile  # fmt: skip
    block_r = min(stream.max_ranks, max(16, triton.next_power_of_2(rank)))
    tiles = triton.cdiv(n, stream.columns) * triton.cdiv(rank, block_r)
    steps = triton.cdiv(m, stream.rows)
    split = split or splits(multiprocessors(arch, t.device), tiles, steps)
    partials = out[None] if split == 1 else parts_like(out, split)
    dm = None if dora is None else dora.magnitude_sum(split)
    launch(
        gram_kernel, (triton.cdiv(n, stream.columns), split, triton.cdiv(rank, block_r)),
        t, h, gate, seed, partials, *scaling(dora, dm),
        m, n, rank, max(1, m if row_gates is None else m // max(1, row_gates.shape[0])),
        triton.cdiv(steps, split),
        *t.stride(), *h.stride(), 0 if row_gates is None else row_gates.stride(0), *partials.stride(),
        float(scale) * (1.0 if seed is None else keep_scale(dropout)), float(dropout),
        BLOCK_M=stream.rows,
        BLOCK_N=stream.columns,
        BLOCK_R=block_r,
        ROW_GATES=row_gates is not None,
        PRECISION=precision,
        WGMMA=arch == "sm_90",
        **stream.meta(),
    )  # fmt: skip
    return Sum(partials, out), dm


def parts_like(out: Tensor, split: int) -> Tensor:
    """Memory for `split` parts of a matrix, each laid out as it is."""
    if out.is_contiguous():
        return out.new_empty(split, *out.shape, dtype=torch.float32)
    return out.new_empty(split, *out.T.shape, dtype=torch.float32).transpose(1, 2)


def scaling(dora: Dora | None, dm: Sum | None) -> tuple[Tensor | None, ...]:
    """The kernels' arguments for DoRA: column scale, u, norm, and the output for the magnitude's gradient."""
    if dora is None:
        return None, None, None, None
    return dora.column_scale, dora.u, dora.norm, None if dm is None else dm.partials


def project(
    dy: Tensor, h: Tensor, b: Tensor, gate: Tensor | None, scale: float, dtype: torch.dtype,
    *, dora: Dora | None = None, stream: Stream | None = None, split: int | None = None,
) -> tuple[Sum, Sum, Sum | None]:  # fmt: skip
    """Launches `project_kernel`: ``p = scale · δ · dy B`` and ``dB = Σ δ_m dy_m ⊗ h_m`` from one read of dy.

    ``dy [M, N]``, ``h [M, R]``, ``b [N, R]``, of one dtype and any strides → ``p [M, R]`` in their dtype and ``dB
    [N, R]`` in `dtype`, both contiguous; R at most `PROJECT_MAX_RANK`. `gate` as in `shrink`, `dora` as in `gram`; with
    it p is computed from ``column_scale ∘ dy``. The caller adds up the parts.
    """
    (m, n), rank = dy.shape, h.shape[1]
    row_gates = gate if gate is not None and gate.dim() == 1 else None
    arch, precision = architecture(dy.device), dot_precision(dy.dtype, dy.device)
    row = row_for(
        PROJECT, arch, m, n, rank, element_size=dy.element_size(), precision=precision,
        aligned=dy.stride(1) == 1 and is_aligned(dy), scaled=dora is not None,
    )  # fmt: skip
    processors = multiprocessors(arch, dy.device)
    stream = stream or stream_by_parts(row, m, n, processors)
    p, db = dy.new_empty(m, rank), dy.new_empty(n, rank, dtype=dtype)
    tiles, steps = triton.cdiv(n, stream.columns), triton.cdiv(m, stream.rows)
    split = split or splits(processors, tiles, steps)
    p_parts = p[None] if tiles == 1 else dy.new_empty(tiles, m, rank, dtype=torch.float32)
    db_parts = db[None] if split == 1 else dy.new_empty(split, n, rank, dtype=torch.float32)
    dm = None if dora is None else dora.magnitude_sum(split)
    launch(
        project_kernel, (tiles, split),
        dy, h, b, gate, p_parts, db_parts, *scaling(dora, dm),
        m, n, rank, m if row_gates is None else m // row_gates.shape[0], triton.cdiv(steps, split),
        *dy.stride(), *h.stride(), *b.stride(), 0 if row_gates is None else row_gates.stride(0),
        *p_parts.stride(), *db_parts.stride(), float(scale),
        BLOCK_M=stream.rows,
        BLOCK_N=stream.columns,
        BLOCK_R=max(16, triton.next_power_of_2(rank)),
        ROW_GATES=row_gates is not None,
        PRECISION=precision,
        WGMMA=arch == "sm_90",
        **stream.meta(),
    )  # fmt: skip
    return Sum(p_parts, p), Sum(db_parts, db), dm


def adapter_grads(
    dy: Tensor, x: Tensor | None, h: Tensor | None, b: Tensor | None, gate: Tensor | None, scale: float,
    dtype_a: torch.dtype, dtype_b: torch.dtype,
    *, seed: Tensor | None = None, dropout: float = 0.0, dora: Dora | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """``p = scale · δ · dy B``, ``dA = pᵀ dropout(x)``, ``dB = dyᵀ h`` and DoRA's dm, each summed in a fixed order.

    ``dy [M, N]``, ``x [M, K]``, ``h [M, R]``, ``b [N, R]``, of one dtype and any strides → ``p [M, R]`` in it, dA ``[R,
    K]`` in `dtype_a`, dB ``[N, R]`` in `dtype_b`. p needs b, dA needs b and x, dB needs h; a result whose operands are
    missing is None. With `dora`, dy is replaced by ``column_scale ∘ dy``; if its u is given, which requires h, the
    result includes ``dm [N] = Σ δ dy ∘ u / norm``. Reads dy once up to rank `PROJECT_MAX_RANK`. 2 to 5 launches.
    """
    p = da = db_sum = dm_sum = None
    pending: list[Sum] = []
    if h is not None and b is not None and h.shape[1] <= PROJECT_MAX_RANK and dy.numel():
        p_sum, db_sum, dm_sum = project(dy, h, b, gate, scale, dtype_b, dora=dora)
        p, pending = p_sum.out, unfinished(p_sum, dm_sum)
        if x is not None and unfinished(p_sum):
            sum_partials(*pending)  # now, because dA reads p
            pending = []
    else:
        if b is not None:
            if dora is not None:
                b = torch.mul(b, dora.column_scale[:, None], out=torch.empty_like(b))
            p = shrink(dy, b.T, gate, scale)
        if h is not None:
            db_sum, dm_sum = gram(dy, h, gate, 1.0, dtype_b, dora=dora)
            pending = unfinished(dm_sum)
    pending += unfinished(db_sum)
    if x is not None and p is not None:
        da_sum, _ = gram(x, p, gate, 1.0, dtype_a, seed=seed, dropout=dropout, transposed=True)
        da, pending = da_sum.out.T, pending + unfinished(da_sum)
    for first in range(0, len(pending), 2):
        sum_partials(*pending[first : first + 2])
    return p, da, None if db_sum is None else db_sum.out, None if dm_sum is None else dm_sum.out[0]


def factor_grad(x: Tensor, p: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``dA = pᵀ x`` alone, over the rows that are on: ``x [M, K]``, ``p [M, R]`` → ``[R, K]`` in `dtype`, contiguous.

    R may be any number; 1 or 2 launches.
    """
    da, _ = gram(x, p, gate, 1.0, dtype, transposed=True)
    for one in unfinished(da):
        sum_partials(one)
    return da.out.T


def unfinished(*sums: Sum | None) -> list[Sum]:
    """The sums that still have several parts to add up."""
    return [one for one in sums if one is not None and one.partials.shape[0] > 1]
