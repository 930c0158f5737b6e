"""QuantizedModule for Trainers of ``pytorch_lightning``, the other name of ``lightning.pytorch``.

Callbacks serve both packages. A LightningModule belongs to one of them, that of the Trainer which trains it.
"""

from __future__ import annotations

from pytorch_lightning import LightningModule

from cpq_lightning.module import QuantizedClassifier


# Pyright sees the first base as a LightningModule of the other package.
class QuantizedModule(QuantizedClassifier, LightningModule):  # pyright: ignore[reportIncompatibleVariableOverride]
    __doc__ = QuantizedClassifier.__doc__
