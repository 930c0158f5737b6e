"""Model surgery, without Lightning: which layers, how they are switched, their ranges, and what a forward shows."""

from cpq_lightning.attach.attach import attach as attach
from cpq_lightning.attach.attach import correct_ends as correct_ends
from cpq_lightning.attach.attach import detach as detach
from cpq_lightning.attach.attach import is_attached as is_attached
from cpq_lightning.attach.attach import quantized_layers as quantized_layers
from cpq_lightning.attach.attach import quantizers as quantizers
from cpq_lightning.attach.attach import refit as refit
from cpq_lightning.attach.attach import set_active as set_active
from cpq_lightning.attach.attach import set_noise_step as set_noise_step
from cpq_lightning.attach.audit import Audit as Audit
from cpq_lightning.attach.audit import AuditReport as AuditReport
from cpq_lightning.attach.audit import forget_first_forward as forget_first_forward
from cpq_lightning.attach.audit import report_audit as report_audit
from cpq_lightning.attach.calibrate import calibrate as calibrate
from cpq_lightning.attach.calibrate import recording as recording
from cpq_lightning.attach.layers import QuantizedLayer as QuantizedLayer
from cpq_lightning.attach.select import attached_config as attached_config
from cpq_lightning.attach.select import quantizable_layers as quantizable_layers
