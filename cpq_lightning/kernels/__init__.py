"""The hot path of :mod:`cpq_lightning.functional`, fused; functional is the readable truth, and the fallback."""

from cpq_lightning.kernels.cpu import chain as chain
from cpq_lightning.kernels.fused import quantize as quantize
from cpq_lightning.kernels.library import use_kernels as use_kernels
from cpq_lightning.kernels.product import Convolution as Convolution
from cpq_lightning.kernels.product import Operand as Operand
from cpq_lightning.kernels.product import product as product
from cpq_lightning.kernels.ring import Ring as Ring
from cpq_lightning.kernels.ring import describe as describe
from cpq_lightning.kernels.ring import has_kernel as has_kernel
from cpq_lightning.kernels.widths import quantize_widths as quantize_widths
