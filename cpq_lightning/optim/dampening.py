"""Dampening: moves weights towards their grid points after each optimizer step (cf. Nagel et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.sharding import full_tensor, sharded_like
from cpq_lightning.optim.optimizer_hook import has_skipped, stepping


class Dampening:
    """Moves the weights of an optimizer towards their grid points after each of its steps.

    ``w <- w + strength · (q(w) - w)``, with ``q`` the quantizer in evaluation. The update is decoupled from the
    gradient, as AdamW decouples weight decay, and moves no weight to another grid point. Unchanged are weights without
    a gradient, weights whose quantizer is inactive or still learns its width, and all weights if 16-bit precision skips
    the step.

    Args:
        optimizer: The optimizer.
        quantizers: The quantizer of each weight, by the weight's ``id``, also for groups that are added later.
        strength: Returns the strength, 0 to 1; called in each step.
        scale_by_lr: Whether the strength is multiplied by the learning rate of the weight's group, up to 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        quantizers: Mapping[int, Quantizer],
        strength: Callable[[], float],
        scale_by_lr: bool = False,
    ) -> None:
        self._quantizers = quantizers
        self._strength, self._scale_by_lr = strength, scale_by_lr
        self._handle = stepping(optimizer).register_step_post_hook(self._after)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        strength = self._strength()
        if strength <= 0:
            return
        for group, weight, quantizer in updated_weights(optimizer, self._quantizers):
            part = min(1.0, strength * float(group["lr"])) if self._scale_by_lr else strength
            nearest = quantizer.nearest(full_tensor(weight.detach()))
            weight.lerp_(sharded_like(nearest, weight), part)

    def remove(self) -> None:
        """Remove the hook from the optimizer."""
        self._handle.remove()


def updated_weights(
    optimizer: Optimizer, quantizers: Mapping[int, Quantizer]
) -> Iterator[tuple[dict[str, Any], nn.Parameter, Quantizer]]:
    """The weights that a step of the optimizer has changed at a fixed width, each with its group and its quantizer.

    Left out are weights without a gradient, weights whose quantizer is inactive or still learns its width, and all
    weights if 16-bit precision skips the step.

    Args:
        optimizer: The optimizer, after its step.
        quantizers: The quantizer of each weight, by the weight's ``id``.
    """
    if has_skipped(optimizer):
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            quantizer = quantizers.get(id(weight))
            if quantizer is not None and weight.grad is not None and quantizer.active and not quantizer.learns_bits:
                yield group, weight, quantizer
