"""Ranges of activations, as batches show them."""

import pytest
import torch

from cpq_lightning.functional.grid import level_bounds
from cpq_lightning.nn.observer import RangeObserver

WHOLE = {
    "halves": (torch.tensor([[0.5, 1.0, 2.0]]), 8),
    "pixels": (torch.arange(256.0)[None], 8),
    "one-hot": (torch.eye(5), 2),
    "a mask": (torch.tensor([[0.0, 1.0, 1.0]]), 1),
    "counts with a sign": (torch.tensor([[-3.0, 0.0, 5.0, 2.0]]), 5),
    "negative ones": (torch.tensor([[-4.0, -2.0, -1.0]]), 4),
}


@pytest.mark.parametrize(("x", "bits"), WHOLE.values(), ids=WHOLE)
def test_values_on_a_grid_of_a_power_of_two_stay_exact(x, bits):
    observer = RangeObserver()
    observer.update(x)
    observer.close_range(x.device)
    observer.update(x)
    [(scale, z)] = observer.fit([bits], "mse")
    low, high = level_bounds(bits, z)
    assert torch.equal((x / scale).round().clamp(low, high) * scale, x)


@pytest.mark.parametrize("bits", [3, 8])
def test_one_value_off_that_grid_is_not_overlooked(bits):
    x = torch.cat([torch.arange(2.0**bits), torch.full((1000,), 0.3)])[None]
    observer = RangeObserver()
    observer.update(x)
    observer.close_range(x.device)
    observer.update(x)
    [(scale, _)] = observer.fit([bits], "mse")
    assert scale.item() != 1.0
