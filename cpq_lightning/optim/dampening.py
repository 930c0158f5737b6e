"""Dampening: moves weights towards their grid points after each optimizer step (cf. Nagel et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.sharding import View, full_tensor, write_part
from cpq_lightning.optim.optimizer_hook import has_skipped, stepping


class Dampening:
    """Moves the weights of an optimizer towards their grid points after each of its steps.

    ``w <- w + strength · (q(w) - w)``, with ``q`` the quantizer in evaluation. The update is decoupled from the
    gradient, as AdamW decouples weight decay, and moves no weight to another grid point. Unchanged are weights without
    a gradient, weights whose quantizer is inactive or still learns its width, and all weights if 16-bit precision skips
    the step.

    Args:
        optimizer: The optimizer.
        quantizers: The quantizers of each Parameter, by its ``id``, each with the view of it that is the weight; also
            for groups that are added later.
        strength: Returns the strength, 0 to 1; called in each step.
        scale_by_lr: Whether the strength is multiplied by the learning rate of the weight's group, up to 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        quantizers: Mapping[int, Sequence[tuple[View, Quantizer]]],
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
        for group, parameter, view, quantizer in updated_weights(optimizer, self._quantizers):
            part = min(1.0, strength * float(group["lr"])) if self._scale_by_lr else strength
            weight = view(full_tensor(parameter.detach()))
            write_part(parameter, view, weight.lerp(quantizer.nearest(weight), part))

    def remove(self) -> None:
        """Remove the hook from the optimizer."""
        self._handle.remove()


def updated_weights(
    optimizer: Optimizer, quantizers: Mapping[int, Sequence[tuple[View, Quantizer]]]
) -> Iterator[tuple[dict[str, Any], nn.Parameter, View, Quantizer]]:
    """The weights that a step of the optimizer has changed at a fixed width: the group, the Parameter, the view of it
    that is the weight, and the quantizer.

    Left out are weights without a gradient, weights whose quantizer is inactive or still learns its width, and all
    weights if 16-bit precision skips the step.

    Args:
        optimizer: The optimizer, after its step.
        quantizers: The quantizers of each Parameter, by its ``id``.
    """
    if has_skipped(optimizer):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for view, quantizer in quantizers.get(id(parameter), ()):
                if parameter.grad is not None and quantizer.active and not quantizer.learns_bits:
                    yield group, parameter, view, quantizer
