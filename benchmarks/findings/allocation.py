"""Widths that are not learned: at random, or by how sensitive layers are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cpq_lightning.functional import WidthCost, adjust_widths, level_bounds
from cpq_lightning.functional.ranges import fit_step

NARROWEST, WIDEST = 2, 8
# Of the average, as BitBudget's own.
TOLERANCE = 0.02
_PROBES, _BATCH = 32, 512

Levels = dict[str, int]


def random_levels(sizes: Mapping[str, int], average: float, seed: int) -> Levels:
    """Widths drawn from 2 to 8, then moved by single bits of layers drawn at random until the average is met.

    Args:
        sizes: Weights of each layer.
        average: Bits of a weight, on average.
        seed: Of the draw.
    """
    g = torch.Generator().manual_seed(seed)
    numel = torch.tensor(list(sizes.values()), dtype=torch.float64)
    rows = len(numel)
    cost = WidthCost(numel / numel.sum(), torch.arange(rows), torch.full((rows,), rows), 0.0)
    drawn = torch.randint(NARROWEST, WIDEST + 1, (rows,), generator=g).double()
    low, high = torch.full_like(drawn, NARROWEST), torch.full_like(drawn, WIDEST)

    def any_price(widths: Tensor, by: int) -> Tensor:
        # A price for each unit of cost: so every layer comes as often as any other, whatever its size.
        return torch.rand(rows, generator=g).double() * numel

    widths, _ = adjust_widths(drawn, low, high, cost, average, TOLERANCE, any_price)
    return {name: int(bits) for name, bits in zip(sizes, widths, strict=True)}


def least_costly(costs: Mapping[str, list[float]], sizes: Mapping[str, int], average: float) -> Levels:
    """The widths with the least sum of costs whose average is at most the given one, exactly.

    Args:
        costs: By layer, of each width from 2 to 8.
        sizes: Weights of each layer.
        average: Bits of a weight, on average.
    """
    widths = range(NARROWEST, WIDEST + 1)
    count = len(widths)
    objective = torch.tensor([c for name in sizes for c in costs[name]], dtype=torch.float64)
    objective = objective / objective.max()
    one_each = torch.block_diag(*[torch.ones(1, count)] * len(sizes)).numpy()
    bits = torch.tensor([[n * k for n in sizes.values() for k in widths]], dtype=torch.float64).numpy()
    found = milp(
        objective.numpy(),
        integrality=[1] * len(objective),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(bits, 0, (average + TOLERANCE) * sum(sizes.values())),
        ],
    )
    assert found.x is not None, found.message
    chosen = torch.from_numpy(found.x).reshape(-1, count).argmax(1) + NARROWEST
    return {name: int(k) for name, k in zip(sizes, chosen, strict=True)}


def squared_errors(weight: Tensor) -> list[float]:
    """``||w - q_k(w)||^2`` of each width from 2 to 8, at the step with the least of it."""
    flat = weight.detach().reshape(1, -1)
    errors = []
    for bits in range(NARROWEST, WIDEST + 1):
        step = fit_step(flat, bits, True)[:, None]
        low, high = level_bounds(bits, True)
        errors.append(float((flat - step * (flat / step).round().clamp(low, high)).square().sum()))
    return errors


def hessian_traces(model: nn.Module, names: list[str], images: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """Average diagonal of the loss's Hessian over each layer's weight, by Hutchinson's estimate.

    ``tr(H) = E[v' H v]`` over v of random signs (Dong et al., *HAWQ-V2*, NeurIPS 2020); each probe sees a batch of its
    own.

    Args:
        model: The network in full precision.
        names: Layers.
        images: To draw batches from.
        labels: Theirs.
        seed: Of batches and probes.
    """
    g = torch.Generator().manual_seed(seed)
    weights = [model.get_submodule(name).get_parameter("weight") for name in names]
    sums = torch.zeros(len(names), dtype=torch.float64)
    model.eval()
    for _ in range(_PROBES):
        chosen = torch.randint(len(labels), (_BATCH,), generator=g)
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        signs = [torch.randint(0, 2, w.shape, generator=g).to(w) * 2 - 1 for w in weights]
        products = torch.autograd.grad(sum((a * v).sum() for a, v in zip(gradients, signs, strict=True)), weights)
        sums += torch.tensor([float((h * v).sum()) for h, v in zip(products, signs, strict=True)], dtype=torch.float64)
    return {name: float(s) / _PROBES / w.numel() for name, s, w in zip(names, sums, weights, strict=True)}
