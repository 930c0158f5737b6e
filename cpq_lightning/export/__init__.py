"""Export to files, each verified in its runtime; reading them back. May import report and below."""

from cpq_lightning.export.export import Export as Export
from cpq_lightning.export.export import export_model as export_model
from cpq_lightning.export.formats import Container as Container
from cpq_lightning.export.formats import Format as Format
from cpq_lightning.export.load import load_quantized as load_quantized
from cpq_lightning.export.sample_file import read_samples as read_samples
from cpq_lightning.export.sample_file import write_samples as write_samples
from cpq_lightning.export.samples import Samples as Samples
from cpq_lightning.export.verify import MismatchError as MismatchError
from cpq_lightning.export.verify import Verification as Verification

__all__ = [
    "Container", "Export", "Format", "MismatchError", "Samples", "Verification", "export_model", "load_quantized",
    "read_samples", "write_samples",
]  # fmt: skip
