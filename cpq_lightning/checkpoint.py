"""Load trained LightningModules from their checkpoints."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from cpq_lightning.attach.layers import is_attached
from cpq_lightning.attach.loading import attaching
from cpq_lightning.attach.origin import attached_config, set_attached_config
from cpq_lightning.config import CPQConfig
from cpq_lightning.errors import StateDictError

# Key of this package's entry in a Lightning checkpoint.
CHECKPOINT_KEY = "cpq_lightning"
# Key of the stage in which a run with ProgressiveWidths has saved its checkpoint, before its last widths.
STAGE_KEY = "cpq_lightning_stage"
# Maximum number of characters of a value in a message.
_MAX_LENGTH = 80
M = TypeVar("M", bound=nn.Module, covariant=True)


class _Loadable(Protocol[M]):
    @property
    def __name__(self) -> str: ...

    def load_from_checkpoint(self, checkpoint_path: Any, **kwargs: Any) -> M: ...


def load_checkpoint(module_class: _Loadable[M], path: Any, **kwargs: Any) -> M:
    """Load the trained module of a checkpoint, with its quantizers, without other information about the run.

    The checkpoint has the quantization config; other arguments of the class come from its saved hyperparameters, or
    from ``kwargs``.

    Args:
        module_class: The LightningModule's class, of ``lightning`` or of ``pytorch_lightning``.
        path: The checkpoint: a path, a URL, or a file.
        kwargs: For ``load_from_checkpoint``: ``map_location``, ``strict``, ``weights_only``, and the class's arguments.

    Returns:
        The module.

    Raises:
        StateDictError: there are no quantizers in the checkpoint, or they do not fit the module.

    Example:
        ``module = cpq_lightning.load_checkpoint(Net, "last.ckpt").eval()``
    """
    with attaching():
        module = module_class.load_from_checkpoint(path, **kwargs)
    if not is_attached(module):
        raise StateDictError(
            f"The checkpoint {path} has no quantizers: it is of a run without CPQCallback. Load it with "
            f"{module_class.__name__}.load_from_checkpoint, or give a checkpoint of the run that quantizes."
        )
    content = _content(path, kwargs.get("weights_only"))
    config = saved_config(content)
    if config is not None:
        set_attached_config(module, config)
    if message := stage_message(content):
        warnings.warn(message, stacklevel=2)
    return module


def take_settings(model: nn.Module, checkpoint: Mapping[str, Any]) -> str:
    """Set an attached model's config to that of the checkpoint whose state it gets, as its quantizers come from there.

    Args:
        model: The model, attached with the requested config.
        checkpoint: The content of a Lightning checkpoint.

    Returns:
        A sentence about the settings that differ from the requested ones; empty if none differ, or if a config is not
        known.
    """
    config, asked = saved_config(checkpoint), attached_config(model)
    if config is None or asked is None:
        return ""
    different = differences(asked, config, "in the checkpoint")
    if not different:
        return ""
    set_attached_config(model, config)
    return (
        f"The checkpoint was trained with other settings than {type(model).__name__} was quantized with here, and runs "
        f"with the checkpoint's settings: {different}. Give the config of the checkpoint; to train with another one, "
        "start from its weights alone (its state_dict without the keys of quantizers) instead of resuming."
    )


def saved_config(checkpoint: Mapping[str, Any]) -> CPQConfig | None:
    """The config of the run that saved a Lightning checkpoint, from its content; ``None`` if it has none."""
    settings = checkpoint.get(CHECKPOINT_KEY, {}).get("config")
    return None if settings is None else CPQConfig(**settings)


def stage_message(checkpoint: Mapping[str, Any]) -> str:
    """A sentence about a Lightning checkpoint that was saved at wider widths than the config's; empty for others."""
    stage = checkpoint.get(STAGE_KEY)
    if stage is None:
        return ""
    return (
        f"The checkpoint was saved at step {stage['step']} of a run with ProgressiveWidths, in its stage of "
        f"{stage['bits']} bits: the module has these widths, which are wider than those of its config. Continue the "
        "run with ProgressiveWidths, or take a later checkpoint."
    )


def named_backbone(content: Any) -> dict[str, Any] | None:
    """The hyperparameters in the content of a checkpoint of a QuantizedModule with a named backbone; ``None`` for any
    other content.
    """
    settings = content.get("hyper_parameters") if isinstance(content, dict) and "state_dict" in content else None
    named = isinstance(settings, dict) and isinstance(settings.get("backbone"), str) and "backbone_args" in settings
    return settings if named else None


def differences(asked: CPQConfig, other: CPQConfig, where: str) -> str:
    """The settings in which two configs differ, with both values."""
    requested, others = asked.to_dict(), other.to_dict()
    return "; ".join(
        f"{name} {_short(others[name])} {where}, {_short(requested[name])} asked for"
        for name in requested
        if requested[name] != others[name]
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."


def _content(path: Any, weights_only: bool | None) -> dict[str, Any]:
    """The content of a checkpoint, without tensors' values; empty if it is neither a file path nor seekable."""
    if hasattr(path, "read") and not (hasattr(path, "seek") and path.seekable()):
        return {}
    if hasattr(path, "read"):
        path.seek(0)
    elif not Path(path).is_file():
        return {}
    try:
        return torch.load(path, map_location="meta", weights_only=weights_only is not False)
    except pickle.UnpicklingError:
        # load_from_checkpoint has just unpickled the same file, by a choice of the class.
        return torch.load(path, map_location="meta", weights_only=False)
