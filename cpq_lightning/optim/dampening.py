"""Weights pulled to their grid, beside an optimizer that knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.sharding import full_tensor
from cpq_lightning.optim.optimizer_hook import stepping


class Dampening:
    """After each step of an optimizer moves the weights that it has updated towards their grid points.

    ``w <- w + strength · (q(w) - w)``, ``q`` as evaluation has it: decoupled from the gradient, as AdamW decouples
    weight decay. No weight changes its grid point by it. Left alone are weights without a gradient, those whose
    quantizer is inactive or still learns its width, and all of them where 16-bit precision skips the step.

    Args:
        optimizer: The optimizer.
        quantizers: Of each weight, by its ``id``: a group that is added later is pulled too.
        strength: Asked in each step; 0 to 1.
    """

    def __init__(
        self, optimizer: Optimizer, quantizers: Mapping[int, Quantizer], strength: Callable[[], float]
    ) -> None:
        self._quantizers = quantizers
        self._strength = strength
        self._handle = stepping(optimizer).register_step_post_hook(self._after)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        strength = self._strength()
        # Fused optimizers skip a step within it where 16-bit gradients overflow, and their hooks run all the same.
        overflow = getattr(optimizer, "found_inf", None)
        if strength <= 0 or (overflow is not None and bool(overflow)):
            return
        for weight in (p for group in optimizer.param_groups for p in group["params"]):
            quantizer = self._quantizers.get(id(weight))
            if quantizer is None or weight.grad is None or not quantizer.active or quantizer.learns_bits:
                continue
            weight.lerp_(_nearest(weight, quantizer), strength)

    def remove(self) -> None:
        """Leave the optimizer alone."""
        self._handle.remove()


def _nearest(weight: nn.Parameter, quantizer: Quantizer) -> Tensor:
    found = quantizer.nearest(full_tensor(weight.detach()))
    if isinstance(weight, DTensor):
        # Every process has computed all of it: each keeps its part, and nothing is sent.
        return distribute_tensor(found, weight.device_mesh, weight.placements, src_data_rank=None)
    return found
