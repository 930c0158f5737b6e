"""A LightningModule's layers, quantized before Lightning builds anything on them."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from cpq_lightning.attach.attach import attach
from cpq_lightning.attach.layers import is_attached
from cpq_lightning.attach.levels_file import with_levels_read
from cpq_lightning.attach.origin import attached_config, late_layers, quantizable_layers
from cpq_lightning.checkpoint import differences
from cpq_lightning.config import CPQConfig
from cpq_lightning.trainer.lightning_names import MisconfigurationException
from cpq_lightning.trainer.progress import overrides


def attach_module(trainer: Trainer, pl_module: LightningModule, config: CPQConfig) -> bool:
    """Quantize a module that is not quantized yet, in a callback's ``setup``; of one that is, the layers that have come
    since, such as a new head.

    Returns:
        Whether it has been done now.

    Raises:
        MisconfigurationException: nothing in it can be quantized so, or ``configure_model`` failed here.
    """
    if is_attached(pl_module):
        _warn_of_other_settings(pl_module, config)
        _attach_late(pl_module, config)
        return False
    if overrides(pl_module, "configure_model"):
        # Layers that are born or sharded there must be so before they can be switched.
        try:
            with trainer.strategy.tensor_init_context(), trainer.precision_plugin.module_init_context():
                pl_module.configure_model()
        except (AttributeError, TypeError) as error:
            raise MisconfigurationException(
                f"configure_model failed ({error}). CPQCallback calls it before the module's setup, since the layers "
                "that it makes must exist to be quantized: let it need nothing that setup makes."
            ) from error
        # Lightning calls the hook in a moment, and not everybody's may be called twice.
        pl_module.__dict__["configure_model"] = _configured
    try:
        attach(pl_module, config)
    except ValueError as error:
        raise MisconfigurationException(f"CPQCallback cannot quantize {type(pl_module).__name__}: {error}") from error
    return True


def _warn_of_other_settings(pl_module: LightningModule, config: CPQConfig) -> None:
    known = attached_config(pl_module)
    # The default is no wish.
    if known is None or config == CPQConfig():
        return
    different = differences(with_levels_read(config), known, "there")
    if different:
        rank_zero_warn(
            f"{type(pl_module).__name__} is quantized already and stays as it is, whatever CPQCallback's config says: "
            f"{different}. Call detach(module) first to quantize it anew."
        )


def _attach_late(pl_module: LightningModule, config: CPQConfig) -> None:
    late = late_layers(pl_module)
    if not late:
        return
    try:
        attach(pl_module, None if attached_config(pl_module) is not None else config)
    except ValueError as error:
        raise MisconfigurationException(f"CPQCallback cannot quantize {', '.join(late)}: {error}") from error
    rank_zero_warn(
        f"{len(late)} layers have come since {type(pl_module).__name__} was quantized, and are quantized now, like the "
        f"others: {', '.join(late)}."
    )


def check_layers(pl_module: LightningModule, known: set[str]) -> None:
    """Refuse layers that were made after the module was quantized.

    Raises:
        MisconfigurationException: with what to do.
    """
    if not is_attached(pl_module):
        raise MisconfigurationException(
            "configure_model has built the layers anew after CPQCallback had quantized them: let it return at once "
            "where they exist, as Lightning asks of it."
        )
    late = sorted(set(quantizable_layers(pl_module)) - known)
    if late:
        raise MisconfigurationException(
            f"{len(late)} layers, such as {late[0]!r}, were made after CPQCallback had quantized the module, in its "
            "setup or later: make them in __init__ or configure_model."
        )


def forget_configured(pl_module: LightningModule) -> None:
    """Give the module its own ``configure_model`` back."""
    if pl_module.__dict__.get("configure_model") is _configured:
        del pl_module.__dict__["configure_model"]


def _configured() -> None:
    """Stands for a module's ``configure_model`` once it has run."""
