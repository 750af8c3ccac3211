"""The epilogue of a tile: DoRA's ``y = column_scale ∘ u + bias`` with ``u = x Wᵀ + h Bᵀ``, and the stores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_columns(
    # [BLOCK_M, BLOCK_N]; float32 [N] or None; [N] or None
    u, column_scale_ptr, bias_ptr,
    columns, column_ok, row_on, stride_bias_n,
    ROW_GATES: tl.constexpr,  # leaves rows that are off unscaled; a single gate that is off has scale 1 already
):  # fmt: skip
    """``column_scale ∘ u + bias``; without a column scale returns u, which already includes the bias."""
    if column_scale_ptr is not None:
        column_scale = tl.load(column_scale_ptr + columns, mask=column_ok, other=1.0)
        u = tl.where(row_on[:, None], u * column_scale[None, :], u) if ROW_GATES else u * column_scale[None, :]
        if bias_ptr is not None:
            u += tl.load(bias_ptr + columns * stride_bias_n, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    return u


@triton.jit
def store_scaled(
    # [BLOCK_M, BLOCK_N]; its addresses in y; contiguous [M, N] or None; float32 [N] or None; [N] or None
    u, y_ptrs, u_ptr, column_scale_ptr, bias_ptr,
    rows, columns, stored, column_ok, row_on, N,
    stride_bias_n,
    ROW_GATES: tl.constexpr,
):  # fmt: skip
    """Stores the rows `stored` of y, and of u if `u_ptr` is given."""
    if u_ptr is not None:
        u_ptrs = u_ptr + rows[:, None] * N + columns[None, :]
        tl.store(u_ptrs, u.to(u_ptr.dtype.element_ty), mask=stored[:, None] & column_ok[None, :])
    y = scale_columns(u, column_scale_ptr, bias_ptr, columns, column_ok, row_on, stride_bias_n, ROW_GATES)
    tl.store(y_ptrs, y.to(y_ptrs.dtype.element_ty), mask=stored[:, None] & column_ok[None, :])
