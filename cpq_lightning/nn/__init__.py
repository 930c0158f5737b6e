"""Quantizers as modules: they hold the state, the mathematics is in :mod:`cpq_lightning.functional`."""

from cpq_lightning.nn.quantizer import Quantizer as Quantizer

__all__ = ["Quantizer"]
