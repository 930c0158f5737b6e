"""The parameters of quantizers and gates, beside a Trainer's optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.attach.products import modules_with_products
from cpq_lightning.attach.timm_layers import weight_parameters
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.optim.auxiliary import AuxiliaryOptimizer
from cpq_lightning.optim.optimizer_hook import OptimizerHook
from cpq_lightning.optim.param_groups import holds_parameters, release

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def train_quantizers(
    trainer: Trainer, pl_module: LightningModule, lr_factor: float, states: Sequence[dict[str, Any]]
) -> tuple[list[AuxiliaryOptimizer], list[OptimizerHook]]:
    """Train each quantizer's parameters beside the optimizer that trains its layer's weight, and in no optimizer of
    the trainer.

    Args:
        trainer: A trainer whose optimizers are made and not restored yet.
        pl_module: The attached module.
        lr_factor: Rate of the quantizers relative to the model's.
        states: Saved states of companions, in the order in which they are made.

    Returns:
        The companions, and what keeps the parameters out of optimizers without one.

    Raises:
        MisconfigurationException: a saved state does not fit.
    """
    optimizers = list(trainer.optimizers)
    if not any(holds_parameters(optimizer) for optimizer in optimizers):
        rank_zero_warn(
            f"No optimizer of {type(pl_module).__name__} holds a parameter: no weight of it is trained by gradient. "
            "Ranges are calibrated, and the network is quantized by them."
        )
    wanted = _by_optimizer(pl_module, optimizers)
    # Gates too: their logits are trained beside all optimizers.
    owned = [p for _, q in quantizers(pl_module) for p in q.parameters()]
    companions: list[AuxiliaryOptimizer] = []
    others: list[OptimizerHook] = []
    for index, optimizer in enumerate(optimizers):
        if not optimizer.param_groups:
            # Lightning's stand-in where there is no optimizer.
            continue
        release(optimizer, owned)
        wrappers = [trainer.strategy._lightning_optimizers[index]]
        if not wanted[index]:
            others.append(OptimizerHook(optimizer, [], _ignore, wrappers=wrappers, kept_out=owned))
            continue
        companion = AuxiliaryOptimizer(
            optimizer,
            wanted[index],
            lr_factor,
            grad_scale=_grad_scale(trainer),
            wrappers=wrappers,
            average=_average(trainer),
            kept_out=owned,
        )
        companions.append(companion)
        if not companion.has_users_class:
            rank_zero_info(
                f"No second {type(optimizer).__name__} can be made for the quantizers' parameters (one-dimensional, "
                f"whole on each rank): {len(wanted[index])} of them train with Adam beside the first."
            )
    restore_auxiliary(companions, states)
    return companions, others


def restore_auxiliary(companions: Sequence[AuxiliaryOptimizer], states: Sequence[dict[str, Any]]) -> None:
    """Restore the companions of a run from a checkpoint, if it has any.

    Raises:
        MisconfigurationException: it is of a run with other optimizers.
    """
    if not states or not companions:
        return
    if len(states) != len(companions):
        raise MisconfigurationException(
            f"The checkpoint has the state of {len(states)} optimizers of quantizers, and this run has "
            f"{len(companions)}, one beside each optimizer that trains quantized layers: resume with the optimizers of "
            "the run that saved it."
        )
    for companion, state in zip(companions, states, strict=True):
        try:
            companion.load_state_dict(state)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error


def warn_of_left_out(companions: Sequence[AuxiliaryOptimizer], optimizers: Sequence[Any]) -> None:
    """Warn where quantizers have gradients and are never updated."""
    if any(companion.is_left_out for companion in companions):
        names = " or ".join(sorted({type(optimizer).__name__ for optimizer in optimizers}))
        rank_zero_warn(
            f"Quantizers have gradients and have never been updated: {names} does not run the step hooks of torch's "
            "Optimizer, by which they are trained. Let its step be called through torch.optim.Optimizer, or wrap an "
            "optimizer whose step is."
        )


def _ignore(gradients: list[Tensor | None]) -> None:
    """Take nothing over."""


def hook_optimizers(
    trainer: Trainer,
    pl_module: LightningModule,
    learners: list[Quantizer],
    take: Callable[[Quantizer, Tensor | None], None],
) -> list[OptimizerHook]:
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
    holders = _holders(pl_module, optimizers)
    found = []
    for index, optimizer in enumerate(optimizers):
        own = [q for q in learners if holders.get(q) == index]
        logits = [q.gates.logit for q in own if q.gates.logit is not None]

        def stepped(grads: list[Tensor | None], own: list[Quantizer] = own) -> None:
            for quantizer, grad in zip(own, grads, strict=True):
                take(quantizer, grad)

        if own:
            wrappers = [trainer.strategy._lightning_optimizers[index]]
            scale = _grad_scale(trainer, 2 if own[0].gates.estimator == "curvature" else 1)
            found.append(OptimizerHook(optimizer, logits, stepped, scale, wrappers, _average(trainer)))
    return found


def _grad_scale(trainer: Trainer, power: int = 1) -> Callable[[], float] | None:
    """Reads the factor of gradients, or of what is a power of them; ``None`` where nothing scales them."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else lambda: scaler.get_scale() ** power


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


def _by_optimizer(pl_module: LightningModule, optimizers: list[Any]) -> list[list[nn.Parameter]]:
    """For each optimizer the steps' and noises' parameters of the layers that it trains."""
    holders = _holders(pl_module, optimizers)
    return [
        [p for quantizer, holder in holders.items() if holder == index for p in quantizer.range_parameters()]
        for index in range(len(optimizers))
    ]


def _holders(pl_module: LightningModule, optimizers: list[Any]) -> dict[Quantizer, int]:
    """For each quantizer the optimizer that trains its layer's weight; for a frozen layer's, the first with a group."""
    trained = {id(p): i for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    default = next((i for i, o in enumerate(optimizers) if o.param_groups), -1)
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
