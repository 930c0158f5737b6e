"""Quantizers as modules, with their state in one tensor. May import config and below."""

from cpq_lightning.nn.quantizer import Quantizer as Quantizer

__all__ = ["Quantizer"]
