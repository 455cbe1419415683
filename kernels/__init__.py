"""Triton kernels; nothing here imports anything of `fomaml_fused`."""
