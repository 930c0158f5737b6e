"""The quantizers' parameters in a Trainer's optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from cpq_lightning.attach import quantized_layers
from cpq_lightning.optim import Companion, adopt, release, takes_quantizers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

# Adam's usual rate; on a logarithm of a step it is 0.1 % an update.
_COMPANION_LR = 1e-3


def train_quantizers(
    trainer: Trainer, pl_module: LightningModule, lr_factor: float, states: Sequence[dict[str, Any]]
) -> list[Companion]:
    """Put each quantizer's parameters, once, into the optimizer that trains its layer's weight.

    Args:
        trainer: A trainer whose optimizers are made and not restored yet.
        pl_module: The attached module.
        lr_factor: Rate of the quantizers relative to the model's.
        states: Saved states of companions, in the order in which they are made.

    Returns:
        The companions of those optimizers that cannot take the parameters themselves.
    """
    optimizers = list(trainer.optimizers)
    if not optimizers:
        return []
    takers = [takes_quantizers(optimizer) for optimizer in optimizers]
    wanted = _by_optimizer(pl_module, optimizers, default=takers.index(True) if True in takers else 0)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    companions: list[Companion] = []
    for index, optimizer in enumerate(optimizers):
        release(optimizer, [p for parameters in wanted for p in parameters])
        if not wanted[index]:
            continue
        if takers[index]:
            adopt(optimizer, wanted[index], schedulers, lr_factor)
            continue
        companion = Companion(
            optimizer,
            wanted[index],
            lr=_COMPANION_LR * lr_factor,
            grad_scale=scaler.get_scale if scaler is not None else lambda: 1.0,
            wrappers=[trainer.strategy._lightning_optimizers[index]],
        )
        if len(states) > len(companions):
            companion.load_state_dict(states[len(companions)])
        companions.append(companion)
        rank_zero_info(
            f"{type(optimizer).__name__} cannot take the quantizers' parameters (one-dimensional, in a group of their "
            f"own): {len(wanted[index])} of them train with Adam beside it."
        )
    return companions


def _by_optimizer(pl_module: LightningModule, optimizers: list[Any], default: int) -> list[list[nn.Parameter]]:
    """For each optimizer the quantizer parameters of the layers that it trains; frozen layers' go to ``default``."""
    holders = {id(p): i for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    wanted: list[list[nn.Parameter]] = [[] for _ in optimizers]
    placed: set[int] = set()
    for _, layer in quantized_layers(pl_module):
        index = holders.get(id(layer.full_precision_weight()), default)
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer is not None and id(quantizer) not in placed:
                placed.add(id(quantizer))
                wanted[index].extend(quantizer.parameters())
    return wanted
