"""The public callbacks, one per file; none imports another. May import trainer and below."""

from cpq_lightning.callbacks.batch_norm import BatchNormReestimation as BatchNormReestimation
from cpq_lightning.callbacks.bit_budget import BitBudget as BitBudget
from cpq_lightning.callbacks.cluster_pull import ClusterPull as ClusterPull
from cpq_lightning.callbacks.cpq import CPQCallback as CPQCallback
from cpq_lightning.callbacks.distillation import DistillationCallback as DistillationCallback
from cpq_lightning.callbacks.dropbits import DropBitsSchedule as DropBitsSchedule
from cpq_lightning.callbacks.oscillation import OscillationFreezing as OscillationFreezing
from cpq_lightning.callbacks.oscillation import OscillationMonitor as OscillationMonitor
from cpq_lightning.callbacks.progressive_widths import ProgressiveWidths as ProgressiveWidths
from cpq_lightning.callbacks.temperature import TemperatureSchedule as TemperatureSchedule

__all__ = [
    "BatchNormReestimation",
    "BitBudget",
    "CPQCallback",
    "ClusterPull",
    "DistillationCallback",
    "DropBitsSchedule",
    "OscillationFreezing",
    "OscillationMonitor",
    "ProgressiveWidths",
    "TemperatureSchedule",
]
