"""Fused computations of what functional defines, for the CPU and CUDA. May import functional and below."""

from cpq_lightning.kernels.cpu_build import use_kernels as use_kernels

__all__ = ["use_kernels"]
