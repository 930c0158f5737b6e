"""The hot path of :mod:`cpq_lightning.functional`, fused; functional is the readable truth, and the fallback."""

from cpq_lightning.kernels.cpu_build import use_kernels as use_kernels

__all__ = ["use_kernels"]
