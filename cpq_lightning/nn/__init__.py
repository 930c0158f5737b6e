"""Quantizers as modules with their state. The mathematics is in :mod:`cpq_lightning.functional`."""

from cpq_lightning.nn.quantizer import Quantizer as Quantizer

__all__ = ["Quantizer"]
