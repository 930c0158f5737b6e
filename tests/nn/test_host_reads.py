"""Layers and functional read nothing back from the device: on the meta device there is nothing to read, and it raises.

What kernels do is not seen here: there is none for that device.
"""

import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig, attach
from cpq_lightning.attach.layers import quantizers
from tests.marks import thorough

CONFIGS = {
    "fixed": CPQConfig(),
    "argmax": CPQConfig(weight_estimator="argmax", act_estimator="argmax"),
    "DropBits": CPQConfig(weight_bits=4, min_bits=2, keep_prob=0.5),
    "learned": CPQConfig(weight_bits=8, min_bits=2, learn_bits=True),
    "learned by channel": CPQConfig(weight_bits=4, min_bits=2, learn_bits=True, gate_sharing="channel"),
    "nested by range": CPQConfig(weight_bits=4, min_bits=2, keep_prob=0.5, nesting="range"),
}


@pytest.mark.parametrize(
    ("config", "training"),
    [
        *((name, True) for name in CONFIGS),
        ("learned", False),
        *thorough(*((n, False) for n in CONFIGS if n != "learned")),
    ],
)
def test_nothing_is_read_on_the_host(config, training):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    attach(model.to("meta"), CONFIGS[config]).train(training)
    for _, quantizer in quantizers(model):
        quantizer.configure(fitted=True)
    for _ in range(2):
        out = model(torch.empty(2, 3, 8, 8, device="meta"))
        out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if config == "fixed":
        with pytest.raises(RuntimeError, match="meta"):
            out.sum().item()
