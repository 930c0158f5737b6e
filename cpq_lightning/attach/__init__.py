"""Model surgery: selects layers, attaches quantizers, calibrates, audits. May import nn and below."""

from cpq_lightning.attach.attach import attach as attach
from cpq_lightning.attach.attach import detach as detach
from cpq_lightning.attach.attach import full_precision_copy as full_precision_copy
from cpq_lightning.attach.attach import set_active as set_active
from cpq_lightning.attach.calibrate import calibrate as calibrate
from cpq_lightning.attach.calibrate import recording as recording
from cpq_lightning.attach.coverage import Coverage as Coverage
from cpq_lightning.attach.coverage import coverage as coverage
from cpq_lightning.attach.layers import is_attached as is_attached
from cpq_lightning.attach.layers import quantized_layers as quantized_layers
from cpq_lightning.attach.layers import quantizers as quantizers
from cpq_lightning.attach.loading import loading as loading
from cpq_lightning.attach.range_tracking import RangeTracker as RangeTracker
from cpq_lightning.attach.range_tracking import refit_rewritten as refit_rewritten

__all__ = [
    "Coverage", "RangeTracker", "attach", "calibrate", "coverage", "detach", "full_precision_copy", "is_attached",
    "loading", "quantized_layers", "quantizers", "recording", "refit_rewritten", "set_active",
]  # fmt: skip
