"""Quantizes the layers of a LightningModule before Lightning builds optimizers and strategies on them."""

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
    """Quantize a module in a callback's ``setup``. If it is quantized already, quantize only layers that were added
    since, such as a new head.

    Returns:
        Whether the module was not quantized before.

    Raises:
        MisconfigurationException: nothing in the module can be quantized with this config, or ``configure_model``
            failed.
    """
    if is_attached(pl_module):
        _warn_of_other_settings(pl_module, config)
        _attach_late(pl_module, config)
        return False
    if overrides(pl_module, "configure_model"):
        # Layers that configure_model makes or shards must exist, or be sharded, before they are quantized.
        try:
            with trainer.strategy.tensor_init_context(), trainer.precision_plugin.module_init_context():
                pl_module.configure_model()
        except (AttributeError, TypeError) as error:
            raise MisconfigurationException(
                f"configure_model failed ({error}). CPQCallback calls it before the module's setup, because its layers "
                "must exist to be quantized: let configure_model need nothing that setup makes."
            ) from error
        # Lightning calls the hook soon after, and some implementations must not run twice.
        pl_module.__dict__["configure_model"] = _already_configured
    try:
        attach(pl_module, config)
    except ValueError as error:
        raise MisconfigurationException(f"CPQCallback cannot quantize {type(pl_module).__name__}: {error}") from error
    return True


def _warn_of_other_settings(pl_module: LightningModule, config: CPQConfig) -> None:
    attached = attached_config(pl_module)
    # The default config does not ask for anything.
    if attached is None or config == CPQConfig():
        return
    difference = differences(with_levels_read(config), attached, "there")
    if difference:
        rank_zero_warn(
            f"{type(pl_module).__name__} is quantized already and stays as it is, whatever CPQCallback's config says: "
            f"{difference}. Call detach(module) first to quantize it again."
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
        f"{len(late)} layers were added since {type(pl_module).__name__} was quantized, and are quantized now, like "
        f"the others: {', '.join(late)}."
    )


def check_layers(pl_module: LightningModule, known: set[str]) -> None:
    """Refuse layers that were made after the module was quantized.

    Raises:
        MisconfigurationException: the message says what to change.
    """
    if not is_attached(pl_module):
        raise MisconfigurationException(
            "configure_model has built the layers again after CPQCallback had quantized them: let it return at once "
            "if they exist, as Lightning requires."
        )
    late = sorted(set(quantizable_layers(pl_module)) - known)
    if late:
        raise MisconfigurationException(
            f"{len(late)} layers, such as {late[0]!r}, were made after CPQCallback had quantized the module, in its "
            "setup or later: make them in __init__ or configure_model."
        )


def forget_configured(pl_module: LightningModule) -> None:
    """Restore the module's ``configure_model``."""
    if pl_module.__dict__.get("configure_model") is _already_configured:
        del pl_module.__dict__["configure_model"]


def _already_configured() -> None:
    """Replaces a module's ``configure_model`` after it has run."""
