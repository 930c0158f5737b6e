"""QuantizedModule for Trainers of ``pytorch_lightning``, the other name of ``lightning.pytorch``.

Callbacks are of both names; a LightningModule is of one, that of the Trainer which trains it.
"""

from __future__ import annotations

from pytorch_lightning import LightningModule

from cpq_lightning.module import QuantizedClassifier


# To pyright the first base is a LightningModule of the other package.
class QuantizedModule(QuantizedClassifier, LightningModule):  # pyright: ignore[reportIncompatibleVariableOverride]
    __doc__ = QuantizedClassifier.__doc__
