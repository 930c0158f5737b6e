"""The time of a training step of recurrent layers: torch's fused kernel, unrolled, and quantized.

python -m benchmarks.recurrent_step

Each ratio is the median over steps in turn, in one process with one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate
from cpq_lightning.attach.attach import set_active

# Layer, sequences in a batch, steps, and features.
CASES = {
    "LSTM": (nn.LSTM, 32, 50, 128),
    "LSTM, long": (nn.LSTM, 32, 200, 128),
    "LSTM, wide": (nn.LSTM, 32, 50, 512),
    "GRU": (nn.GRU, 32, 50, 128),
}
_ROUNDS = 7


def _step(model: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    model(x)[0].square().mean().backward()
    elapsed = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return elapsed


def measure(kind: Callable[..., nn.Module], batch: int, steps: int, features: int) -> tuple[float, float, float]:
    """Seconds of torch's step, and the ratios of the unrolled and of the quantized step to it."""
    x = torch.randn(batch, steps, features)
    models = [kind(features, features, batch_first=True) for _ in range(3)]
    for model in models[1:]:
        calibrate(attach(model, CPQConfig(first_last_bits=None)), [x])
    set_active(models[1], False)
    # Else torch's kernel would run here too.
    with patch.object(type(models[1]), "runs_fused", False):
        times = [[_step(model.train(), x) for model in models] for _ in range(_ROUNDS + 2)][2:]
    ratios = [statistics.median(row[i] / row[0] for row in times) for i in (1, 2)]
    return statistics.median(row[0] for row in times), ratios[0], ratios[1]


def main() -> None:
    torch.set_num_threads(1)
    for name, (kind, batch, steps, features) in CASES.items():
        fused, unrolled, quantized = measure(kind, batch, steps, features)
        print(
            f"{name}: {batch} sequences of {steps} steps, {features} features: {1000 * fused:.0f} ms fused, "
            f"{unrolled:.2f} of it unrolled, {quantized:.2f} quantized"
        )


if __name__ == "__main__":
    main()
