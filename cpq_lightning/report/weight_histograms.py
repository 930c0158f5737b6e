"""Weight histograms before and after training, which show how the weights cluster around the levels of their grid."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpq_lightning.attach.layers import quantized_layers
from cpq_lightning.files import write_atomically
from cpq_lightning.functional.ranges import histogram
from cpq_lightning.nn.sharding import full_tensor

# About 40 bins per level of a 4-bit grid.
_BINS = 720


@torch.no_grad()
def weight_histograms(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Histograms of the layers' full-precision weights divided by their scales, by layer name.

    Each has the range ``low`` to ``high``, one level wider at both ends than the grid, the mean ``scale``, and the
    ``counts`` in 720 bins of equal width; weights beyond the range are counted in the outermost bins.
    """
    histograms = {}
    for name, layer in quantized_layers(model):
        quantizer, weight = layer.weight_quantizer, full_tensor(layer.read_weight().detach())
        step, low, high = quantizer.grid()
        levels = weight.float() / quantizer.along_channels(step, weight)
        bottom, top = (limit.float() for limit in (low.min() - 1, high.max() + 1))
        counts = histogram(levels.clamp(bottom, top), bottom, top, _BINS)
        histograms[name] = {
            "low": float(bottom),
            "high": float(top),
            "scale": float(step.mean()),
            "counts": counts.tolist(),
        }
    return histograms


def write_weight_histograms(before: Mapping[str, Any], after: Mapping[str, Any], path: Path) -> None:
    """Write histograms before and after training as JSON."""
    layers = {name: {"before": before.get(name), "after": counts} for name, counts in after.items()}
    write_atomically(path, json.dumps({"format": "cpq-weight-histograms", "version": 1, "layers": layers}) + "\n")
