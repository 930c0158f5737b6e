"""Training of the parameters of quantizers and gates, through hooks on the Trainer's optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.attach.products import modules_with_products
from cpq_lightning.attach.timm_layers import weight_parameters
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.optim.auxiliary import AuxiliaryOptimizer
from cpq_lightning.optim.optimizer_hook import OptimizerHook
from cpq_lightning.optim.param_groups import holds_parameters, release
from cpq_lightning.trainer import private
from cpq_lightning.trainer.lightning_names import NotResumable

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def train_quantizers(
    trainer: Trainer, pl_module: LightningModule, lr_factor: float, states: Sequence[dict[str, Any]]
) -> tuple[list[AuxiliaryOptimizer], list[OptimizerHook]]:
    """Train each quantizer's parameters in an auxiliary optimizer, hooked to the optimizer that trains its layer's
    weight, and in no optimizer of the trainer.

    Args:
        trainer: A trainer whose optimizers are made and not restored yet.
        pl_module: The attached module.
        lr_factor: Learning rate of the quantizers, relative to the model's.
        states: Saved states of the auxiliary optimizers, in the order in which they are made.

    Returns:
        The auxiliary optimizers, and the hooks that keep the parameters out of the optimizers without one.

    Raises:
        MisconfigurationException: a saved state does not fit.
    """
    optimizers = list(trainer.optimizers)
    if not any(holds_parameters(optimizer) for optimizer in optimizers):
        rank_zero_warn(
            f"No optimizer of {type(pl_module).__name__} holds a parameter: no weight of it is trained by gradient. "
            "Ranges are calibrated, and the network is quantized by them."
        )
    range_parameters = _by_optimizer(pl_module, optimizers)
    # Gates included: their logits are in no optimizer.
    quantizer_parameters = [p for _, q in quantizers(pl_module) for p in q.parameters()]
    auxiliary_optimizers: list[AuxiliaryOptimizer] = []
    other_hooks: list[OptimizerHook] = []
    for index, optimizer in enumerate(optimizers):
        if not optimizer.param_groups:
            # Lightning's placeholder for a module without an optimizer.
            continue
        release(optimizer, quantizer_parameters)
        wrappers = [private.optimizer_wrappers(trainer)[index]]
        if not range_parameters[index]:
            other_hooks.append(
                OptimizerHook(optimizer, [], lambda _: None, wrappers=wrappers, kept_out=quantizer_parameters)
            )
            continue
        auxiliary = AuxiliaryOptimizer(
            optimizer,
            range_parameters[index],
            lr_factor,
            grad_scale=_grad_scale(trainer),
            wrappers=wrappers,
            average=_average(trainer),
            kept_out=quantizer_parameters,
        )
        auxiliary_optimizers.append(auxiliary)
        if not auxiliary.has_users_class:
            rank_zero_info(
                f"No second {type(optimizer).__name__} can be made for the quantizers' parameters (one-dimensional, "
                f"not sharded): {len(range_parameters[index])} of them train with Adam instead."
            )
    restore_auxiliary(auxiliary_optimizers, states)
    return auxiliary_optimizers, other_hooks


def restore_auxiliary(companions: Sequence[AuxiliaryOptimizer], states: Sequence[dict[str, Any]]) -> None:
    """Restore the auxiliary optimizers of a run from a checkpoint, if the checkpoint has their states.

    Raises:
        ResumeError: the checkpoint is of a run with other optimizers.
    """
    if not states or not companions:
        return
    if len(states) != len(companions):
        raise NotResumable(
            f"The checkpoint has the state of {len(states)} optimizers of quantizers, and this run has "
            f"{len(companions)}, one for each optimizer that trains quantized layers: resume with the optimizers of "
            "the run that saved the checkpoint."
        )
    for auxiliary, state in zip(companions, states, strict=True):
        try:
            auxiliary.load_state_dict(state)
        except ValueError as error:
            raise NotResumable(str(error)) from error


def warn_of_left_out(companions: Sequence[AuxiliaryOptimizer], optimizers: Sequence[Any]) -> None:
    """Warn if quantizers have gradients and were never updated."""
    if any(auxiliary.is_left_out for auxiliary in companions):
        names = " or ".join(sorted({type(optimizer).__name__ for optimizer in optimizers}))
        rank_zero_warn(
            f"Quantizers have gradients and have never been updated: {names} does not run the step hooks of torch's "
            "Optimizer, which train the quantizers. Let its step be called through torch.optim.Optimizer, or wrap an "
            "optimizer whose step is."
        )


def hook_optimizers(
    trainer: Trainer,
    pl_module: LightningModule,
    learners: list[Quantizer],
    take: Callable[[Quantizer, Tensor | None], None],
) -> list[OptimizerHook]:
    """Pass on the gradients of the gates' logits whenever the optimizer that trains a layer's weight steps.

    Args:
        trainer: A trainer whose optimizers are made.
        pl_module: The attached module.
        learners: Quantizers that learn their width.
        take: Called with each of these quantizers and its gradient.

    Returns:
        The hooks, to be removed afterwards.
    """
    optimizers = list(trainer.optimizers)
    holders = _holders(pl_module, optimizers)
    hooks = []
    for index, optimizer in enumerate(optimizers):
        trained = [q for q in learners if holders.get(q) == index]
        logits = [q.gates.logit for q in trained if q.gates.logit is not None]

        def pass_on(grads: list[Tensor | None], trained: list[Quantizer] = trained) -> None:
            for quantizer, grad in zip(trained, grads, strict=True):
                take(quantizer, grad)

        if trained:
            wrappers = [private.optimizer_wrappers(trainer)[index]]
            scale = _grad_scale(trainer, 2 if trained[0].gates.estimator == "curvature" else 1)
            hooks.append(OptimizerHook(optimizer, logits, pass_on, scale, wrappers, _average(trainer)))
    return hooks


def _grad_scale(trainer: Trainer, power: int = 1) -> Callable[[], float] | None:
    """A function that returns the gradient scale to a power; ``None`` if gradients are not scaled."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else lambda: scaler.get_scale() ** power


def _average(trainer: Trainer) -> Callable[[Tensor], None] | None:
    """A function that averages gradients over ranks under FSDP2, which averages only those of sharded parameters."""
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    if mesh is None:
        return None
    group = mesh["data_parallel"].get_group()

    def average(gradient: Tensor) -> None:
        dist.all_reduce(gradient, group=group)
        gradient.div_(dist.get_world_size(group))

    return average


def _by_optimizer(pl_module: LightningModule, optimizers: list[Any]) -> list[list[nn.Parameter]]:
    """For each optimizer, the scale and noise parameters of the layers that it trains."""
    holders = _holders(pl_module, optimizers)
    return [
        [p for quantizer, holder in holders.items() if holder == index for p in quantizer.range_parameters()]
        for index in range(len(optimizers))
    ]


def _holders(pl_module: LightningModule, optimizers: list[Any]) -> dict[Quantizer, int]:
    """For each quantizer, the index of the optimizer of its layer's weight; of the first optimizer if it is frozen."""
    optimizer_of = {id(p): i for i, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
    default = next((i for i, o in enumerate(optimizers) if o.param_groups), -1)
    holders: dict[Quantizer, int] = {}
    for _, layer in quantized_layers(pl_module):
        index = next((optimizer_of[id(p)] for p in weight_parameters(layer) if id(p) in optimizer_of), default)
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer is not None:
                holders.setdefault(quantizer, index)
    for _, module in modules_with_products(pl_module):
        # The quantizers of a product are trained with the layers of the same module.
        nearby = next((holders[q] for _, q in quantizers(module) if q in holders), default)
        for _, quantizer in quantizers(module):
            holders.setdefault(quantizer, nearby)
    return holders
