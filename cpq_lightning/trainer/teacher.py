"""Teachers: frozen networks beside the one that trains."""

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
from cpq_lightning.config import CPQConfig
from cpq_lightning.export.load import load_quantized
from cpq_lightning.export.packed import KEY as PACKED_KEY
from cpq_lightning.files import replacing
from cpq_lightning.nn.sharding import is_sharded
from cpq_lightning.trainer.lightning_names import MisconfigurationException

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

TEACHER_FILE = "teacher.pt"
# Share of the greatest entropy beyond which a teacher knows nothing.
_EVEN = 0.97
_FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


class Teacher:
    """A network that only answers: in evaluation mode, without gradients, part of no module.

    Args:
        network: It is frozen in place.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def follow(self, network: nn.Module, device: torch.device) -> None:
        """Go where the network that trains is, and take its type where the run's precision is a true one."""
        own = (p.dtype for p in network.parameters() if p.is_floating_point())
        self.network.to(device=device, dtype=next(own, None))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), unaudited():
            return self.network(*args, **kwargs)


def copied_teacher(network: nn.Module) -> Teacher:
    """The network as it is now, in full precision.

    Raises:
        MisconfigurationException: it cannot be copied.
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
    """Give all ranks the first one's: statistics of batch norms are each rank's own until the next forward."""
    buffers = dict(teacher.network.named_buffers())
    first = trainer.strategy.broadcast({name: value.cpu() for name, value in buffers.items()})
    for name, value in buffers.items():
        value.copy_(first[name])


def warn_of_the_untrained(logits: Tensor) -> None:
    """A network that nobody has trained takes all classes for equally likely."""
    probabilities = logits.float().movedim(1, -1).softmax(-1)
    share = float(torch.special.entr(probabilities).sum(-1).mean()) / math.log(max(2, logits.shape[1]))
    if share > _EVEN:
        rank_zero_warn(
            f"The teacher takes all {logits.shape[1]} classes for almost equally likely ({share:.0%} of the greatest "
            "entropy): is it trained? 'self' is the network as it is when quantization begins: give it a start in full "
            "precision, CPQCallback(quantize_from=...), or pretrained weights; or give another teacher."
        )


def loaded_teacher(teacher: str | nn.Module, network: nn.Module) -> Teacher:
    """A teacher that was given as a module, or by the name of a timm model or the path of a file.

    Args:
        teacher: What was given.
        network: The one that trains; weights without an architecture of their own are of a network like it.

    Raises:
        MisconfigurationException: there is no such model or file, or the file holds no network.
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
            raise FileNotFoundError(f"{path} is no file.")
        raise ValueError(
            f"{teacher!r} is neither 'self', nor the name of a timm model, nor a file: expected one of them."
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise MisconfigurationException(f"teacher={teacher}: {error}") from error


def _from_file(path: Path, network: nn.Module) -> nn.Module:
    settings = _settings(path)
    if settings is not None:
        return _of_quantized_module(path, settings)
    if path.suffix == ".safetensors" and _is_packed(path):
        return load_quantized(path)
    copied = full_precision_copy(network)
    own = under_prefix(plain_weights(read_weights(path)), copied.state_dict())
    if own is None:
        raise ValueError(
            f"it does not hold the weights of a {type(copied).__name__} as the one that trains. Of a network of "
            "another architecture, give a checkpoint of a QuantizedModule, or the module itself."
        )
    copied.load_state_dict(own)
    return copied


def _is_packed(path: Path) -> bool:
    with safe_open(path, "pt") as file:
        return PACKED_KEY in (file.metadata() or {})


def _settings(path: Path) -> dict[str, Any] | None:
    """The settings of a checkpoint of a QuantizedModule with a named backbone."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception:
        # What it is instead is said where its weights are read.
        return None
    found = content.get("hyper_parameters") if isinstance(content, dict) and "state_dict" in content else None
    known = isinstance(found, dict) and isinstance(found.get("backbone"), str) and "backbone_args" in found
    return found if known else None


def _of_quantized_module(path: Path, settings: dict[str, Any]) -> nn.Module:
    network = create_backbone(settings["backbone"], num_classes=settings["num_classes"], **settings["backbone_args"])
    if settings.get("quantization") is not None:
        attach(network, CPQConfig(**settings["quantization"]))
    own = under_prefix(read_weights(path), network.state_dict())
    if own is None:
        raise ValueError(f"it does not hold the weights of the {settings['backbone']!r} that its settings name.")
    network.load_state_dict(own)
    return network


def save_teacher(teacher: Teacher, folder: Path, mark: str) -> Path:
    """Write a teacher's weights, whole or not at all, with a mark by which a resumed run knows them.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path = folder / TEACHER_FILE
    with replacing(path) as temporary:
        torch.save({"mark": mark, "state_dict": teacher.network.state_dict()}, temporary)
    return path


def restored_teacher(network: nn.Module, saved: Path, mark: str, checkpoint: str | None) -> Teacher:
    """The teacher of a run that is resumed, from the file that it was written to.

    Args:
        network: The one that trains.
        saved: Where the file was written.
        mark: What was written with it.
        checkpoint: The checkpoint that is resumed: its run's folder may have been moved, and another run may have
            taken its place.

    Raises:
        MisconfigurationException: the file is gone, or cannot be read.
    """
    folders = [] if not checkpoint else Path(checkpoint).resolve().parents[:2]
    # Beside a run's checkpoints, or in its own folder there, as of one without a logger.
    own = Path(*saved.parts[-3:])
    places = [folder / file for folder in folders for file in (saved.name, own)]
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
            raise MisconfigurationException(f"{place} cannot be read ({type(error).__name__}: {error}).") from error
    raise MisconfigurationException(
        f"The run learned from a copy of itself, and the file that holds it is neither beside {checkpoint} nor "
        f"{saved}: put it back, or give another teacher."
    )
