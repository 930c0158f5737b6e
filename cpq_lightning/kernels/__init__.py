"""Fused kernels for :mod:`cpq_lightning.functional`, which is the readable reference and the fallback."""

from cpq_lightning.kernels.cpu_build import use_kernels as use_kernels

__all__ = ["use_kernels"]
