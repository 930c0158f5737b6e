"""The quantizers' parameters in a Trainer's optimizers, and the gates' beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from cpq_lightning.attach import modules_with_products, quantized_layers, quantizers, weight_parameters
from cpq_lightning.nn import Quantizer
from cpq_lightning.optim import Beside, Companion, UpdateBound, adopt, release, takes_quantizers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

# Adam's usual rate; on a logarithm of a step it is 0.1 % an update.
_COMPANION_LR = 1e-3


def train_quantizers(
    trainer: Trainer, pl_module: LightningModule, lr_factor: float, states: Sequence[dict[str, Any]]
) -> tuple[list[Companion], list[UpdateBound]]:
    """Put each quantizer's parameters, once, into the optimizer that trains its layer's weight, and bound its updates.

    Args:
        trainer: A trainer whose optimizers are made and not restored yet.
        pl_module: The attached module.
        lr_factor: Rate of the quantizers relative to the model's.
        states: Saved states of companions, in the order in which they are made.

    Returns:
        The companions of those optimizers that cannot take the parameters themselves, and the bounds of those that can.
    """
    optimizers = list(trainer.optimizers)
    if not optimizers:
        return [], []
    takers = [takes_quantizers(optimizer) for optimizer in optimizers]
    wanted = _by_optimizer(pl_module, optimizers, default=takers.index(True) if True in takers else 0)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    # Gates too: their logits are trained beside all optimizers.
    owned = [p for _, q in quantizers(pl_module) for p in q.parameters()]
    companions: list[Companion] = []
    bounds: list[UpdateBound] = []
    for index, optimizer in enumerate(optimizers):
        taken = {id(p) for p in wanted[index]} if takers[index] else set()
        release(optimizer, [p for p in owned if id(p) not in taken])
        if not wanted[index]:
            continue
        if takers[index]:
            adopt(optimizer, wanted[index], schedulers, lr_factor)
            bounds.append(UpdateBound(optimizer, wanted[index]))
            continue
        companion = Companion(
            optimizer,
            wanted[index],
            lr=_COMPANION_LR * lr_factor,
            grad_scale=_grad_scale(trainer),
            wrappers=[trainer.strategy._lightning_optimizers[index]],
            average=_average(trainer),
        )
        if len(states) > len(companions):
            companion.load_state_dict(states[len(companions)])
        companions.append(companion)
        rank_zero_info(
            f"{type(optimizer).__name__} cannot take the quantizers' parameters (one-dimensional, whole on each rank, "
            f"in a group of their own): {len(wanted[index])} of them train with Adam beside it."
        )
    return companions, bounds


def beside_optimizers(
    trainer: Trainer,
    pl_module: LightningModule,
    learners: list[Quantizer],
    take: Callable[[Quantizer, Tensor | None], None],
) -> list[Beside]:
    """Hand over the gradients of the gates' logits whenever the optimizer that trains a layer's weight steps.

    Args:
        trainer: A trainer whose optimizers are made.
        pl_module: The attached module.
        learners: Quantizers that learn their width.
        take: Called with each of them and its gradient.

    Returns:
        What has to be removed afterwards.
    """
    optimizers = list(trainer.optimizers)
    holders = _holders(pl_module, optimizers, default=0)
    # Those of an exempt layer too, which learns nothing.
    gates = [q.gates.logit for _, q in quantizers(pl_module) if q.gates.logit is not None]
    found = []
    for index, optimizer in enumerate(optimizers):
        own = [q for q in learners if holders.get(q, 0) == index]
        logits = [q.gates.logit for q in own if q.gates.logit is not None]

        def stepped(grads: list[Tensor | None], own: list[Quantizer] = own) -> None:
            for quantizer, grad in zip(own, grads, strict=True):
                take(quantizer, grad)

        if own:
            wrappers = [trainer.strategy._lightning_optimizers[index]]
            scale = _grad_scale(trainer, 2 if own[0].gates.estimator == "curvature" else 1)
            found.append(Beside(optimizer, logits, stepped, scale, wrappers, _average(trainer), kept_out=gates))
    return found


def _grad_scale(trainer: Trainer, power: int = 1) -> Callable[[], float]:
    """Reads the factor of gradients, or of what is a power of them."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return (lambda: scaler.get_scale() ** power) if scaler is not None else lambda: 1.0


def _average(trainer: Trainer) -> Callable[[Tensor], None] | None:
    """What averages gradients under FSDP2, which knows only the parameters that it has sharded."""
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    if mesh is None:
        return None
    group = mesh["data_parallel"].get_group()

    def average(gradient: Tensor) -> None:
        dist.all_reduce(gradient, group=group)
        gradient.div_(dist.get_world_size(group))

    return average


def _by_optimizer(pl_module: LightningModule, optimizers: list[Any], default: int) -> list[list[nn.Parameter]]:
    """For each optimizer the steps' and noises' parameters of the layers that it trains."""
    wanted: list[list[nn.Parameter]] = [[] for _ in optimizers]
    for quantizer, index in _holders(pl_module, optimizers, default).items():
        wanted[index].extend(quantizer.range_parameters())
    return wanted


def _holders(pl_module: LightningModule, optimizers: list[Any], default: int) -> dict[Quantizer, int]:
    """For each quantizer the optimizer that trains its layer's weight; ``default`` for a frozen layer's."""
    trained = {id(p): i for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    holders: dict[Quantizer, int] = {}
    for _, layer in quantized_layers(pl_module):
        index = next((trained[id(p)] for p in weight_parameters(layer) if id(p) in trained), default)
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer is not None:
                holders.setdefault(quantizer, index)
    for _, module in modules_with_products(pl_module):
        # Products are trained with the layers around them.
        near = next((holders[q] for _, q in quantizers(module) if q in holders), default)
        for _, quantizer in quantizers(module):
            holders.setdefault(quantizer, near)
    return holders
