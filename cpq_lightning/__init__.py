"""Cluster-Promoting Quantization with DropBits, for PyTorch Lightning and timm."""

from cpq_lightning.attach import attach as attach
from cpq_lightning.attach import calibrate as calibrate
from cpq_lightning.attach import detach as detach
from cpq_lightning.callbacks.cpq import CPQCallback as CPQCallback
from cpq_lightning.config import CPQConfig as CPQConfig
from cpq_lightning.export import levels as levels
from cpq_lightning.module import QuantizedModule as QuantizedModule
from cpq_lightning.version import __version__ as __version__

# Without it `from cpq_lightning import *` would hand out the subpackage `nn` in place of torch's.
__all__ = ["CPQCallback", "CPQConfig", "QuantizedModule", "__version__", "attach", "calibrate", "detach", "levels"]
