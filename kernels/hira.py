"""HiRA, ``y = x (W ∘ (1 + scale · B A))ᵀ + bias``: computes the high-rank weight tile by tile, never stores it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cotolora.kernels.dropout import keep_mask, keep_scale
from cotolora.kernels.launching import launch
from cotolora.kernels.one_pass import swizzled
from cotolora.kernels.tiles import HIRA, Tile, architecture, dot_precision, is_aligned, multiprocessors, tile_for


@triton.jit
def tile_product(
    a_ptr, b_ptr, columns, ks, column_ok, k_ok, R, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, RANK_STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows `columns` and the columns `ks` of ``B A``, float32."""
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for step in tl.static_range(RANK_STEPS):
        ranks = step * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        rank_ok = ranks < R
        b_ptrs = b_ptr + columns[:, None] * stride_b_n + ranks[None, :] * stride_b_r
        b = tl.load(b_ptrs, mask=column_ok[:, None] & rank_ok[None, :], other=0.0)
        a_ptrs = a_ptr + ranks[:, None] * stride_a_r + ks[None, :] * stride_a_k
        a = tl.load(a_ptrs, mask=rank_ok[:, None] & k_ok[None, :], other=0.0)
        product = tl.dot(b, a, product, input_precision=PRECISION)
    return product


@triton.jit
def accumulate(
    # [BLOCK_N, BLOCK_M] accumulators
    base, update,
    x_ptr, weight_ptr, a_ptr, b_ptr, seed_ptr,
    rows, columns, row_ok, column_ok, K, R,
    stride_x_m, stride_x_k, stride_weight_n, stride_weight_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
    scale, dropout,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, RANK_STEPS: tl.constexpr,
    ON: tl.constexpr,  # if False, A and B are not read
    SELECTED: tl.constexpr, DROPS_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds ``W xᵀ`` to base and ``(W ∘ scale · B A) xᵀ`` to update (to base unless SELECTED); reads x and W once."""
    for first_k in range(0, K, BLOCK_K):
        ks = first_k + tl.arange(0, BLOCK_K).to(tl.int64)
        k_ok = ks < K
        x_ptrs = x_ptr + rows[:, None] * stride_x_m + ks[None, :] * stride_x_k
        x = tl.load(x_ptrs, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        weight_ptrs = weight_ptr + columns[:, None] * stride_weight_n + ks[None, :] * stride_weight_k
        weight = tl.load(weight_ptrs, mask=column_ok[:, None] & k_ok[None, :], other=0.0)
        base = tl.dot(weight, x.T, base, input_precision=PRECISION)
        if ON:
            # a separate product, because 1 + scale · B A rounded to low precision would lose a small update
            update_weight = weight.to(tl.float32) * scale * tile_product(
                a_ptr, b_ptr, columns, ks, column_ok, k_ok, R, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
                BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS, PRECISION,
            )  # fmt: skip
            if DROPS_INPUT:
                x = tl.where(keep_mask(tl.load(seed_ptr), rows, first_k, dropout, BLOCK_K), x, 0.0)
            if SELECTED:
                update = tl.dot(update_weight.to(weight.dtype), x.T, update, input_precision=PRECISION)
            else:
                base = tl.dot(update_weight.to(weight.dtype), x.T, base, input_precision=PRECISION)
    return base, update


@triton.jit(do_not_specialize=["M", "rows_per_gate"])
def hira_kernel(
    # [M, K], [N, K], [N] or None, [R, K], [N, R], [] or [G] or None, [] or None, [M, N]
    x_ptr, weight_ptr, bias_ptr, a_ptr, b_ptr, gate_ptr, seed_ptr, y_ptr,
    M, N, K, R, rows_per_gate,
    stride_x_m, stride_x_k,
    stride_weight_n, stride_weight_k,
    stride_bias_n,
    stride_a_r, stride_a_k,
    stride_b_n, stride_b_r,
    stride_gate_g,
    stride_y_m, stride_y_n,
    scale, dropout,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # ranks taken at a time, at least 16 (tl.dot)
    RANK_STEPS: tl.constexpr,  # number of steps of BLOCK_R ranks
    GROUP_M: tl.constexpr,
    ROW_GATES: tl.constexpr,  # one gate for each rows_per_gate rows, instead of one for all
    DROPS_INPUT: tl.constexpr,  # with a seed, dropout applies to the update's input x; if False, to the update itself
    PRECISION: tl.constexpr,  # of tl.dot on float32 operands: "ieee" or "tf32"
):  # fmt: skip
    """One program writes a [BLOCK_M, BLOCK_N] tile of y."""
    tile_m, tile_n = swizzled(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    # int64: index * stride passes 2**31 for tensors beyond 2 Gi elements
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < M, columns < N
    on, row_on = True, row_ok
    if ROW_GATES:
        row_on = tl.load(gate_ptr + rows // rows_per_gate * stride_gate_g, mask=row_ok, other=0) != 0
        on = tl.max(row_on.to(tl.int32), axis=0) != 0
    elif gate_ptr is not None:
        on = tl.load(gate_ptr) != 0

    SELECTED: tl.constexpr = ROW_GATES or seed_ptr is not None
    # y is transposed: W ∘ scale · B A is computed in registers, where only the left operand of a product may be
    base = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    update = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if on:
        base, update = accumulate(
            base, update, x_ptr, weight_ptr, a_ptr, b_ptr, seed_ptr, rows, columns, row_ok, column_ok, K, R,
            stride_x_m, stride_x_k, stride_weight_n, stride_weight_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
            scale, dropout, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS, True, SELECTED, DROPS_INPUT, PRECISION,
        )  # fmt: skip
    else:
        base, update = accumulate(
            base, update, x_ptr, weight_ptr, a_ptr, b_ptr, seed_ptr, rows, columns, row_ok, column_ok, K, R,
            stride_x_m, stride_x_k, stride_weight_n, stride_weight_k, stride_a_r, stride_a_k, stride_b_n, stride_b_r,
            scale, dropout, BLOCK_N, BLOCK_K, BLOCK_R, RANK_STEPS, False, SELECTED, DROPS_INPUT, PRECISION,
        )  # fmt: skip
    if SELECTED:
        chosen = row_on[:, None] & column_ok[None, :]
        if seed_ptr is not None and not DROPS_INPUT:
            chosen &= keep_mask(tl.load(seed_ptr), rows, tile_n * BLOCK_N, dropout, BLOCK_N)
        # tl.where, not a product with 0, because A and B may hold inf
        base += tl.where(chosen.T, update, 0.0)
    if bias_ptr is not None:
        base += tl.load(bias_ptr + columns * stride_bias_n, mask=column_ok, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + rows[None, :] * stride_y_m + columns[:, None] * stride_y_n
    tl.store(y_ptrs, base.to(y_ptr.dtype.element_ty), mask=column_ok[:, None] & row_ok[None, :])


def hira(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gate: Tensor | None, scale: float,
    *, seed: Tensor | None = None, dropout: float = 0.0, drops_input: bool = True, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Launches `hira_kernel`: ``y = x Wᵀ + δ · dropout(x) (W ∘ scale · B A)ᵀ + bias``.

    ``x [M, K]``, ``weight [N, K]``, ``bias [N]`` or None, ``a [R, K]``, ``b [N, R]`` → ``y [M, N]``, of one dtype and
    any strides; ``W ∘ scale · B A`` is rounded to that dtype. `gate` and `seed` as in `one_pass`; rows that are off get
    the base's output, whatever A and B hold. The gradient of x is ``hira(dy, W.T, None, B.T, A.T, gate, scale,
    drops_input=False)``, in which dropout applies to the second term instead of its input.
    """
    (m, k), n, rank = x.shape, weight.shape[0], a.shape[0]
    y = x.new_empty(m, n)
    if m == 0 or n == 0:
        return y
    row_gates = gate if gate is not None and gate.dim() == 1 else None
    arch, precision = architecture(x.device), dot_precision(x.dtype, x.device)
    tile = tile or tile_for(
        HIRA, arch, multiprocessors(arch, x.device), m, n, rank,
        element_size=x.element_size(), precision=precision,
        # x must be contiguous along K, because the kernel is not specialised on M
        aligned=x.stride(1) == 1 and is_aligned(x) and is_aligned(weight),
        selects=row_gates is not None or seed is not None,
    )  # fmt: skip
    block_r = rank_block(rank, x.element_size())
    launch(
        hira_kernel, (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),),
        x, weight, bias, a, b, gate, seed, y,
        m, n, k, rank, m if row_gates is None else m // row_gates.shape[0],
        *x.stride(), *weight.stride(), 0 if bias is None else bias.stride(0), *a.stride(), *b.stride(),
        0 if row_gates is None else row_gates.stride(0), *y.stride(),
        float(scale) * (1.0 if seed is None else keep_scale(dropout)), float(dropout),
        BLOCK_R=block_r,
        RANK_STEPS=triton.cdiv(rank, block_r),
        ROW_GATES=row_gates is not None,
        DROPS_INPUT=seed is not None and drops_input,
        PRECISION=precision,
        **tile.meta(),
    )  # fmt: skip
    return y


def rank_block(rank: int, element_size: int) -> int:
    """Ranks per step; few for full float32, which has no matrix instruction and keeps them in registers."""
    return min(64 if element_size == 2 else 16, max(16, triton.next_power_of_2(rank)))
