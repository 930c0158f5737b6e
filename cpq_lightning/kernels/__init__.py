"""The hot path of :mod:`cpq_lightning.functional`, fused; functional is the readable truth, and the fallback."""

from cpq_lightning.kernels.fused import quantize as quantize
from cpq_lightning.kernels.library import describe as describe
from cpq_lightning.kernels.library import use_kernels as use_kernels
