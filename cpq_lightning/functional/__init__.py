"""The mathematics, as pure functions on tensors. May import files, extras, version, errors; and torch alone."""

from cpq_lightning.functional.attention import attention as attention
from cpq_lightning.functional.categorical import Estimator as Estimator
from cpq_lightning.functional.categorical import quantize as quantize
from cpq_lightning.functional.distill import distillation_loss as distillation_loss
from cpq_lightning.functional.dropbits import hard_concrete as hard_concrete
from cpq_lightning.functional.dropbits import masks_from_gates as masks_from_gates
from cpq_lightning.functional.ranges import max_scale as max_scale
from cpq_lightning.functional.ranges import mse_scale as mse_scale
from cpq_lightning.functional.resolution import quantize_resolution as quantize_resolution
from cpq_lightning.functional.saliency import bit_saliency as bit_saliency
from cpq_lightning.functional.schedule import anneal as anneal

__all__ = [
    "Estimator", "anneal", "attention", "bit_saliency", "distillation_loss", "hard_concrete", "masks_from_gates",
    "max_scale", "mse_scale", "quantize", "quantize_resolution",
]  # fmt: skip
