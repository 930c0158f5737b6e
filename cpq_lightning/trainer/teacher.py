"""Teachers for knowledge distillation: frozen networks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import safe_open
from torch import Tensor, nn

from cpq_lightning.attach.attach import attach, full_precision_copy
from cpq_lightning.attach.audit import unaudited
from cpq_lightning.backbones.create import create_backbone, known_backbone
from cpq_lightning.backbones.weights import plain_weights, read_weights, under_prefix
from cpq_lightning.checkpoint import named_backbone
from cpq_lightning.config import CPQConfig
from cpq_lightning.export.load import load_quantized
from cpq_lightning.export.packed import KEY as PACKED_KEY
from cpq_lightning.files import replacing
from cpq_lightning.nn.sharding import is_sharded
from cpq_lightning.trainer.lightning_names import MisconfigurationException, NotResumable

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

TEACHER_FILE = "teacher.pt"
# Share of the maximal entropy above which a teacher counts as untrained.
_UNTRAINED_ENTROPY = 0.97
_FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


class Teacher:
    """A network in evaluation mode, without gradients, that is part of no module.

    Args:
        network: The network; it is frozen in place.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def follow(self, network: nn.Module, device: torch.device) -> None:
        """Move to the device and the floating-point type of the trained network (for example under "bf16-true")."""
        dtypes = (p.dtype for p in network.parameters() if p.is_floating_point())
        self.network.to(device=device, dtype=next(dtypes, None))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), unaudited():
            return self.network(*args, **kwargs)


def copied_teacher(network: nn.Module) -> Teacher:
    """A full-precision copy of the network.

    Raises:
        MisconfigurationException: the network cannot be copied.
    """
    if any(is_sharded(p) for p in network.parameters()):
        raise MisconfigurationException(
            "teacher='self' copies the network, and its parameters are sharded (FSDP2): give a checkpoint or a timm "
            "name as teacher."
        )
    try:
        return Teacher(full_precision_copy(network))
    except Exception as error:
        raise MisconfigurationException(
            f"teacher='self' copies the network, and {type(network).__name__} cannot be copied "
            f"({type(error).__name__}: {error}): give a checkpoint or a module as teacher."
        ) from error


def share_buffers(trainer: Trainer, teacher: Teacher) -> None:
    """Copy the buffers of the first rank to all ranks: batch norm statistics differ until the next forward."""
    buffers = dict(teacher.network.named_buffers())
    first = trainer.strategy.broadcast({name: value.cpu() for name, value in buffers.items()})
    for name, value in buffers.items():
        value.copy_(first[name])


def warn_of_the_untrained(logits: Tensor) -> None:
    """Warn if the teacher predicts all classes with almost equal probability, as an untrained network does."""
    probabilities = logits.float().movedim(1, -1).softmax(-1)
    share = float(torch.special.entr(probabilities).sum(-1).mean()) / math.log(max(2, logits.shape[1]))
    if share > _UNTRAINED_ENTROPY:
        rank_zero_warn(
            f"The teacher predicts all {logits.shape[1]} classes with almost equal probability ({share:.0%} of the "
            "maximal entropy): is it trained? 'self' is the network at the start of quantization: train it in full "
            "precision first, CPQCallback(quantize_from=...), or give it pretrained weights; or give another teacher."
        )


def loaded_teacher(teacher: str | nn.Module, network: nn.Module) -> Teacher:
    """Load a teacher from a module, the name of a timm model, or the path of a file.

    Args:
        teacher: A module, name or path.
        network: The trained network; its architecture is used for weights without an architecture.

    Raises:
        MisconfigurationException: there is no such model or file, or the file contains no network.
    """
    if isinstance(teacher, nn.Module):
        return Teacher(teacher)
    path = Path(teacher)
    try:
        if path.is_file():
            return Teacher(_from_file(path, network))
        if ":" in teacher or known_backbone(teacher):
            return Teacher(create_backbone(teacher, pretrained=True))
        if path.suffix in _FILES or len(path.parts) > 1:
            raise FileNotFoundError(f"{path} is not a file.")
        raise ValueError(
            f"{teacher!r} is neither 'self', nor the name of a timm model, nor a file: expected one of these."
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise MisconfigurationException(f"teacher={teacher}: {error}") from error


def _from_file(path: Path, network: nn.Module) -> nn.Module:
    settings = _settings(path)
    if settings is not None:
        return _from_quantized_module(path, settings)
    if path.suffix == ".safetensors" and _is_packed(path):
        return load_quantized(path)
    copied = full_precision_copy(network)
    weights = under_prefix(plain_weights(read_weights(path)), copied.state_dict())
    if weights is None:
        raise ValueError(
            f"it does not contain weights for the architecture of the trained {type(copied).__name__}. For another "
            "architecture, give a checkpoint of a QuantizedModule, or the module itself."
        )
    copied.load_state_dict(weights)
    return copied


def _is_packed(path: Path) -> bool:
    with safe_open(path, "pt") as file:
        return PACKED_KEY in (file.metadata() or {})


def _settings(path: Path) -> dict[str, Any] | None:
    """The hyperparameters of a checkpoint of a QuantizedModule with a named backbone; ``None`` for other files."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception:
        # The file may be of another type: reading its weights raises an error if it is not.
        return None
    return named_backbone(content)


def _from_quantized_module(path: Path, settings: dict[str, Any]) -> nn.Module:
    network = create_backbone(settings["backbone"], num_classes=settings["num_classes"], **settings["backbone_args"])
    if settings.get("quantization") is not None:
        attach(network, CPQConfig(**settings["quantization"]))
    weights = under_prefix(read_weights(path), network.state_dict())
    if weights is None:
        raise ValueError(f"it does not contain the weights of its backbone {settings['backbone']!r}.")
    network.load_state_dict(weights)
    return network


def save_teacher(teacher: Teacher, folder: Path, mark: str) -> None:
    """Write a teacher's weights atomically, with an identifier that a resumed run checks.

    Raises:
        OSError: the folder cannot be made or written.
    """
    with replacing(folder / TEACHER_FILE) as temporary:
        torch.save({"mark": mark, "state_dict": teacher.network.state_dict()}, temporary)


def restored_teacher(network: nn.Module, saved: Path, mark: str, checkpoint: str | None) -> Teacher:
    """Read the teacher of a resumed run from its file.

    Args:
        network: The trained network.
        saved: Path that the file was written to.
        mark: Identifier in the file.
        checkpoint: The checkpoint that the run resumes from: the run's folder may have been moved with it, and another
            run may have a file at the old path.

    Raises:
        MisconfigurationException: the file is missing, or cannot be read.
    """
    folders = [] if not checkpoint else Path(checkpoint).resolve().parents[:2]
    # In the folder of the run's checkpoints, or in cpq_runs/version_* there, for a run without a logger.
    relative = Path(*saved.parts[-3:])
    places = [folder / file for folder in folders for file in (saved.name, relative)]
    for place in (*places, saved):
        if not place.is_file():
            continue
        try:
            content = torch.load(place, map_location="cpu", weights_only=True)
            if content["mark"] != mark:
                continue
            teacher = Teacher(full_precision_copy(network))
            teacher.network.load_state_dict(content["state_dict"])
            return teacher
        except Exception as error:
            raise NotResumable(f"{place} cannot be read ({type(error).__name__}: {error}).") from error
    raise NotResumable(
        f"The teacher of this run is a copy of its network, and the file of the copy is neither next to {checkpoint} "
        f"nor at {saved}: restore the file, or give another teacher."
    )
