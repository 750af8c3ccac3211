"""The Triton backend: fused kernels."""
