"""Cluster-Promoting Quantization with DropBits, for PyTorch Lightning and timm."""

from typing import TYPE_CHECKING, Any

from cpq_lightning.attach import attach as attach
from cpq_lightning.attach import calibrate as calibrate
from cpq_lightning.attach import coverage as coverage
from cpq_lightning.attach import detach as detach
from cpq_lightning.attach import loading as loading
from cpq_lightning.checkpoint import load_checkpoint as load_checkpoint
from cpq_lightning.config import CPQConfig as CPQConfig
from cpq_lightning.errors import CPQError as CPQError
from cpq_lightning.export import export_model as export_model
from cpq_lightning.export import load_quantized as load_quantized
from cpq_lightning.report import levels as levels
from cpq_lightning.version import __version__ as __version__

if TYPE_CHECKING:
    from cpq_lightning.callbacks.cpq import CPQCallback as CPQCallback
    from cpq_lightning.module import QuantizedModule as QuantizedModule

# Without it `from cpq_lightning import *` would hand out the subpackage `nn` in place of torch's.
__all__ = [
    "CPQCallback", "CPQConfig", "CPQError", "QuantizedModule", "__version__", "attach", "calibrate", "coverage",
    "detach", "export_model", "levels", "load_checkpoint", "load_quantized", "loading",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # A machine that only runs a shipped model needs no Lightning, nor its seconds of import.
    if name == "CPQCallback":
        from cpq_lightning.callbacks.cpq import CPQCallback

        return CPQCallback
    if name == "QuantizedModule":
        from cpq_lightning.module import QuantizedModule

        return QuantizedModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
