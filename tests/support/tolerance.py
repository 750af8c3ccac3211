"""A tolerance derived from PyTorch's own error."""

import torch
from torch import Tensor


def assert_as_accurate_as_torch(ours: Tensor, torch_same_dtype: Tensor, exact: Tensor, slack: float = 2.0) -> None:
    """Our error against the exact result is at most `slack` times PyTorch's own in this dtype.

    The bound follows the dtype, the shapes and the data, so one number serves every case. The floor
    of one ulp covers cases PyTorch happens to compute exactly.

    Args:
        ours: the result under test.
        torch_same_dtype: what plain PyTorch computes in the same dtype.
        exact: the exact result, in float64.
        slack: the allowed multiple of PyTorch's error.
    """
    assert ours.dtype == torch_same_dtype.dtype, f"dtype {ours.dtype}, PyTorch's {torch_same_dtype.dtype}"
    assert ours.shape == torch_same_dtype.shape == exact.shape
    if exact.numel() == 0:
        return
    assert torch.isfinite(ours).all(), "not finite"
    ulp = torch.finfo(torch_same_dtype.dtype).eps * exact.abs().max().item()
    allowed = slack * (torch_same_dtype.double() - exact).abs().max().item() + ulp
    error = (ours.double() - exact).abs().max().item()
    assert error <= allowed, f"max error {error:.3e} exceeds {allowed:.3e} ({slack} x PyTorch's + 1 ulp)"
