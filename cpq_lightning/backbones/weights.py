"""Weights from a file, and the part of them that belongs to a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor

from cpq_lightning.errors import UnreadableFileError
from cpq_lightning.nn.state import read

# Parts of names in the state of a quantized module that a plain module does not have.
_QUANTIZER_PARTS = {"weight_quantizer", "input_quantizer", "product_operands", "product_state"}
_STATE_SUFFIXES = ("weight_quantizer.state", "input_quantizer.state")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name: safetensors, or a file of ``torch.save``, read without unpickling code.

    A checkpoint gives the tensors of its network (the averaged ones, if it contains an average). Prefixes that
    DistributedDataParallel and ``torch.compile`` add to names are removed.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFileError: the file cannot be read, or holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: expected weights, such as resnet18.safetensors or last.ckpt.")
    try:
        weights = load_state_dict(str(path), weights_only=True)
    except (OSError, SafetensorError):
        raise UnreadableFileError(f"{path} is no safetensors file that can be read: is it complete?") from None
    except AttributeError:
        # The file holds another object than a mapping.
        weights = {}
    except Exception as error:
        raise UnreadableFileError(
            f"{path} cannot be read without unpickling code ({type(error).__name__}). Expected weights alone: "
            "torch.save(network.state_dict(), path), or safetensors."
        ) from None
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UnreadableFileError(
            f"{path} holds no tensors by name: expected a file of torch.save(network.state_dict(), path)."
        )
    return tensors


def plain_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ``state_dict`` without the entries of quantizers, which must be inactive: the weights are in full precision.

    Raises:
        ValueError: a quantizer is active.
    """
    of_quantizers = {key for key in state if not _QUANTIZER_PARTS.isdisjoint(key.split("."))}
    if any(key.endswith(_STATE_SUFFIXES) and read(state[key])[0].active for key in of_quantizers):
        raise ValueError(
            "the weights were saved of a network that is quantized: give weights in full precision, such as a run's "
            "teacher.pt, or a checkpoint from before quantization began."
        )
    return {key: value for key, value in state.items() if key not in of_quantizers}


def under_prefix(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor] | None:
    """The entries of a ``state_dict`` that belong to a submodule, with the prefix removed from their names.

    Args:
        state: Tensors of a module by name.
        keys: Names of tensors within the submodule.

    Returns:
        The entries under the first prefix that has all of these names, ``None`` if no prefix has.

    Example:
        >>> import torch
        >>> under_prefix({"net.weight": torch.ones(1), "loss.weight": torch.zeros(1)}, ["weight"])
        {'weight': tensor([1.])}
    """
    keys = list(keys)
    for key in state if keys else ():
        if key.endswith(keys[0]):
            prefix = key[: len(key) - len(keys[0])]
            if (not prefix or prefix.endswith(".")) and all(prefix + name in state for name in keys):
                return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    return None
