"""Gradients of HiRA's A and B, from the gradient of its high-rank weight, which is never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cotolora.kernels.dropout import keep_mask, keep_scale, wide_gates
from cotolora.kernels.hira import rank_block
from cotolora.kernels.launching import launch
from cotolora.kernels.one_pass import swizzled
from cotolora.kernels.partials import Sum, sum_partials
from cotolora.kernels.row_norm import any_on
from cotolora.kernels.tiles import (
    HIRA_GRADS,
    Row,
    Tile,
    architecture,
    dot_precision,
    is_aligned,
    multiprocessors,
    row_for,
    splits,
    tile_by_waves,
)


@triton.jit(do_not_specialize=["M", "G", "rows_per_gate", "steps_per_split"])
def hira_grads_kernel(
    # [M, N], [M, K], [N, K], [R, K], [N, R], [] or [G] or None, [] or None; for S splits [S · tiles of N, R, K] and
    # [S · tiles of K, N, R]
    dy_ptr, x_ptr, weight_ptr, a_ptr, b_ptr, gate_ptr, seed_ptr, da_ptr, db_ptr,
    M, N, K, R, G, rows_per_gate, steps_per_split,
    stride_dy_m, stride_dy_n,
    stride_x_m, stride_x_k,
    stride_weight_n, stride_weight_k,
    stride_a_r, stride_a_k,
    stride_b_n, stride_b_r,
    stride_gate_g,
    stride_da_s, stride_da_r, stride_da_k,
    stride_db_s, stride_db_n, stride_db_r,
    scale, dropout,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # ranks taken at a time, at least 16 (tl.dot)
    GROUP_M: tl.constexpr,
    ROW_GATES: tl.constexpr,  # one gate for each rows_per_gate rows, instead of one for all
    PRECISION: tl.constexpr,  # of tl.dot on float32 operands: "ieee" or "tf32"
):  # fmt: skip
    """One program writes the contribution of its rows and its tile of t = W ∘ dyᵀ x to dA = Bᵀ t and dB = t Aᵀ."""
    split, tiles_n, tiles_k = tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tile_n, tile_k = swizzled(tl.program_id(0), tiles_n, tiles_k, GROUP_M)
    # int64: index * stride passes 2**31 for tensors beyond 2 Gi elements
    ks = tile_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ok, column_ok = ks < K, columns < N
    ranks_on = R
    if gate_ptr is not None:
        ranks_on = tl.where(any_on(gate_ptr, G, stride_gate_g, 128), R, 0)

    t = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if ranks_on > 0:
        first_step = split * steps_per_split
        for step in range(first_step, tl.minimum(first_step + steps_per_split, tl.cdiv(M, BLOCK_M))):
            rows = step * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
            row_on = rows < M
            if ROW_GATES:
                row_on = tl.load(gate_ptr + rows // rows_per_gate * stride_gate_g, mask=row_on, other=0) != 0
            dy_ptrs = dy_ptr + rows[:, None] * stride_dy_m + columns[None, :] * stride_dy_n
            dy = tl.load(dy_ptrs, mask=row_on[:, None] & column_ok[None, :], other=0.0)
            x_ptrs = x_ptr + rows[:, None] * stride_x_m + ks[None, :] * stride_x_k
            x = tl.load(x_ptrs, mask=row_on[:, None] & k_ok[None, :], other=0.0)
            if seed_ptr is not None:
                x = tl.where(keep_mask(tl.load(seed_ptr), rows, tile_k * BLOCK_K, dropout, BLOCK_K), x, 0.0)
            t = tl.dot(dy.T, x, t, input_precision=PRECISION)
    weight_ptrs = weight_ptr + columns[:, None] * stride_weight_n + ks[None, :] * stride_weight_k
    weight = tl.load(weight_ptrs, mask=column_ok[:, None] & k_ok[None, :], other=0.0)
    t = (scale * t * weight.to(tl.float32)).to(weight.dtype)

    da_part = (split * tiles_n + tile_n).to(tl.int64)
    db_part = (split * tiles_k + tile_k).to(tl.int64)
    for first_r in range(0, R, BLOCK_R):
        ranks = first_r + tl.arange(0, BLOCK_R).to(tl.int64)
        # if the gate is off, A and B are not read, because their inf times zero would be NaN
        rank_ok, rank_on = ranks < R, ranks < ranks_on
        a_ptrs = a_ptr + ranks[None, :] * stride_a_r + ks[:, None] * stride_a_k
        a = tl.load(a_ptrs, mask=k_ok[:, None] & rank_on[None, :], other=0.0)
        db = tl.dot(t, a, input_precision=PRECISION)
        db_ptrs = db_ptr + db_part * stride_db_s + columns[:, None] * stride_db_n + ranks[None, :] * stride_db_r
        tl.store(db_ptrs, db.to(db_ptr.dtype.element_ty), mask=column_ok[:, None] & rank_ok[None, :])
        b_ptrs = b_ptr + columns[:, None] * stride_b_n + ranks[None, :] * stride_b_r
        b = tl.load(b_ptrs, mask=column_ok[:, None] & rank_on[None, :], other=0.0)
        da = tl.dot(t.T, b, input_precision=PRECISION)
        da_ptrs = da_ptr + da_part * stride_da_s + ks[:, None] * stride_da_k + ranks[None, :] * stride_da_r
        tl.store(da_ptrs, da.to(da_ptr.dtype.element_ty), mask=k_ok[:, None] & rank_ok[None, :])


def tiles_of(tile: Tile, m: int, n: int, k: int) -> tuple[int, int, int]:
    """The number of tiles of N and of K, and of steps over M."""
    return triton.cdiv(n, tile.block_n), triton.cdiv(k, tile.block_k), triton.cdiv(m, tile.block_m)


def tile_of_weight(row: Row[Tile], m: int, n: int, k: int, multiprocessors: int) -> Tile:
    """The row's tile by waves over W; the largest tile if M is split, which fills the GPU anyway."""
    tiles_n, tiles_k, steps = tiles_of(row.tile, m, n, k)
    if splits(multiprocessors, tiles_n * tiles_k, steps) > 1:
        return row.tile
    return tile_by_waves(row, n, k, multiprocessors, sides=("block_n", "block_k"))


def hira_grads(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, gate: Tensor | None, scale: float,
    dtype_a: torch.dtype, dtype_b: torch.dtype,
    *, seed: Tensor | None = None, dropout: float = 0.0, tile: Tile | None = None, split: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches `hira_grads_kernel`: ``dA = Bᵀ t`` and ``dB = t Aᵀ`` with ``t = scale · W ∘ Σ δ_m dy_m ⊗ dropout(x)_m``.

    ``dy [M, N]``, ``x [M, K]``, ``weight [N, K]``, ``a [R, K]``, ``b [N, R]``, of one dtype and any strides → dA ``[R,
    K]`` in `dtype_a`, dB ``[N, R]`` in `dtype_b`, contiguous, summed in an order that the sizes and the number of
    multiprocessors fix. `gate` and `seed` as in `one_pass`. The rows are divided among `split` programs. Each tile of W
    writes its own parts, so the call temporarily needs ``4 R N K (1 / BLOCK_N + 1 / BLOCK_K)`` bytes of memory.
    """
    (m, n), k, rank = dy.shape, x.shape[1], a.shape[0]
    da, db = dy.new_empty(rank, k, dtype=dtype_a), dy.new_empty(n, rank, dtype=dtype_b)
    if n == 0 or k == 0:
        return da.zero_(), db.zero_()
    arch, precision = architecture(x.device), dot_precision(x.dtype, x.device)
    gate = wide_gates(gate, seed, precision)
    row_gates = gate if gate is not None and gate.dim() == 1 else None
    row = row_for(
        HIRA_GRADS, arch, m, n, rank, element_size=x.element_size(), precision=precision,
        aligned=is_aligned(x) and is_aligned(dy) and is_aligned(weight), selects=seed is not None,
    )  # fmt: skip
    processors = multiprocessors(arch, x.device)
    tile = tile or tile_of_weight(row, m, n, k, processors)
    tiles_n, tiles_k, steps = tiles_of(tile, m, n, k)
    split = split or splits(processors, tiles_n * tiles_k, steps)
    da_parts = da[None] if split * tiles_n == 1 else dy.new_empty(split * tiles_n, rank, k, dtype=torch.float32)
    db_parts = db[None] if split * tiles_k == 1 else dy.new_empty(split * tiles_k, n, rank, dtype=torch.float32)
    launch(
        hira_grads_kernel, (tiles_n * tiles_k, split),
        dy, x, weight, a, b, gate, seed, da_parts, db_parts,
        m, n, k, rank, 0 if gate is None else gate.numel(),
        max(1, m if row_gates is None else m // max(1, row_gates.shape[0])), triton.cdiv(steps, split),
        *dy.stride(), *x.stride(), *weight.stride(), *a.stride(), *b.stride(),
        0 if row_gates is None else row_gates.stride(0), *da_parts.stride(), *db_parts.stride(),
        float(scale) * (1.0 if seed is None else keep_scale(dropout)), float(dropout),
        BLOCK_R=rank_block(rank, x.element_size()),
        ROW_GATES=row_gates is not None,
        PRECISION=precision,
        **tile.meta(),
    )  # fmt: skip
    unfinished = [Sum(parts, out) for parts, out in ((da_parts, da), (db_parts, db)) if parts.shape[0] > 1]
    if unfinished:
        sum_partials(*unfinished)
    return da, db
