"""Widths that are not learned: at random, or by how sensitive layers are."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cpq_lightning.functional.grid import level_bounds
from cpq_lightning.functional.ranges import mse_scale

WIDEST = 8
# Of the average, to either side.
TOLERANCE = 0.02
_PROBES, _BATCH = 32, 512

Levels = dict[str, int]


def narrowest(average: float) -> int:
    """The narrowest width of a layer: with 2 bits on average one bit, or there would be nothing to choose."""
    return 2 if average > 2 else 1


@lru_cache(maxsize=4)
def allocations(sizes: tuple[int, ...], average: float) -> Tensor:
    """All ways to give layers widths that meet an average: shape (ways, layers). For a handful of layers.

    Args:
        sizes: Weights of each layer.
        average: Bits of a weight, on average; met within 0.02.
    """
    widths = torch.arange(narrowest(average), WIDEST + 1, dtype=torch.int8)
    ways = torch.cartesian_prod(*[widths] * len(sizes)).reshape(-1, len(sizes))
    bits = sum(ways[:, i].double() * size for i, size in enumerate(sizes))
    assert isinstance(bits, Tensor)
    return ways[(bits / sum(sizes) - average).abs() <= TOLERANCE].long()


def random_levels(sizes: Mapping[str, int], average: float, seed: int) -> Levels:
    """One of all allocations of the average, each as likely as any other; another one for each seed."""
    widths_by_row = allocations(tuple(sizes.values()), average)
    permutation = torch.randperm(len(widths_by_row), generator=torch.Generator().manual_seed(0))
    return dict(zip(sizes, widths_by_row[permutation[seed]].tolist(), strict=True))


def least_costly(costs: Mapping[str, list[float]], sizes: Mapping[str, int], average: float) -> Levels:
    """Of all allocations of the average the one with the least sum of costs.

    Args:
        costs: By layer, of each width from the narrowest on.
        sizes: Weights of each layer.
        average: Bits of a weight, on average.
    """
    widths_by_row = allocations(tuple(sizes.values()), average)
    table = torch.tensor([costs[name] for name in sizes], dtype=torch.float64)
    total = table[torch.arange(len(sizes)), widths_by_row - narrowest(average)].sum(1)
    return dict(zip(sizes, widths_by_row[total.argmin()].tolist(), strict=True))


def squared_errors(weight: Tensor, low: int) -> list[float]:
    """``||w - q_k(w)||^2`` of each width from ``low`` to 8, at the step with the least of it."""
    flat = weight.detach().reshape(1, -1)
    errors = []
    for bits in range(low, WIDEST + 1):
        step = mse_scale(flat, bits=bits)[:, None]
        bottom, top = level_bounds(bits)
        errors.append(float((flat - step * (flat / step).round().clamp(bottom, top)).square().sum()))
    return errors


def hessian_traces(model: nn.Module, names: list[str], images: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """Average diagonal of the loss's Hessian over each layer's weight, by Hutchinson's estimate.

    ``tr(H) = E[v' H v]`` over v of random signs (Dong et al., *HAWQ-V2*, NeurIPS 2020); each probe sees a batch of its
    own. The network evaluates, as one that is trained; a copy does it, so that the one that trains on is as it was.

    Args:
        model: The network in full precision.
        names: Layers.
        images: To draw batches from.
        labels: Theirs.
        seed: Of batches and probes.
    """
    g = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).eval()
    weights = [model.get_submodule(name).get_parameter("weight") for name in names]
    sums = torch.zeros(len(names), dtype=torch.float64)
    for _ in range(_PROBES):
        chosen = torch.randint(len(labels), (_BATCH,), generator=g)
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        signs = [torch.randint(0, 2, w.shape, generator=g).to(w) * 2 - 1 for w in weights]
        products = torch.autograd.grad(sum((a * v).sum() for a, v in zip(gradients, signs, strict=True)), weights)
        sums += torch.tensor([float((h * v).sum()) for h, v in zip(products, signs, strict=True)], dtype=torch.float64)
    return {name: float(s) / _PROBES / w.numel() for name, s, w in zip(names, sums, weights, strict=True)}
