"""Weights from a file, and which of them are those of a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cpq_lightning.nn.state import read

_WRAPPED = ("state_dict_ema", "model_ema", "state_dict", "model")
# Parts of a quantized module that a plain one does not have.
_OF_QUANTIZERS = {"weight_quantizer", "input_quantizer", "product_operands", "product_state"}
_STATES = ("weight_quantizer.state", "input_quantizer.state")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name: safetensors, or what ``torch.save`` wrote, read without unpickling code.

    Of a checkpoint, those of the network in it (its average, where it holds one).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: expected weights, such as resnet18.safetensors or last.ckpt.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError):
        raise ValueError(f"{path} is no safetensors file that can be read: is it whole?") from None
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read without unpickling code ({type(error).__name__}). Expected weights alone: "
            "torch.save(network.state_dict(), path), or safetensors."
        ) from None
    key = next((k for k in _WRAPPED if isinstance(content, dict) and isinstance(content.get(k), Mapping)), None)
    weights = content if key is None else content[key]
    tensors = {name: v for name, v in weights.items() if isinstance(v, Tensor)} if isinstance(weights, Mapping) else {}
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors by name: expected what torch.save(network.state_dict(), path) wrote."
        )
    return tensors


def plain_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state without that of quantizers, where they had not begun to quantize.

    Raises:
        ValueError: they had.
    """
    own = {key for key in state if not _OF_QUANTIZERS.isdisjoint(key.split("."))}
    if any(key.endswith(_STATES) and read(state[key])[0].active for key in own):
        raise ValueError(
            "the weights were saved of a network that is quantized: give some in full precision, such as a run's "
            "teacher.pt, or a checkpoint from before quantization began."
        )
    return {key: value for key, value in state.items() if key not in own}


def under_prefix(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor] | None:
    """The entries of a state that belong to a part of it, under the part's own names.

    Args:
        state: Tensors of a module by name.
        keys: Names that the part has itself.

    Returns:
        Those under the first prefix that has them all, ``None`` where there is none.

    Example:
        >>> under_prefix({"net.weight": torch.ones(1), "loss.weight": torch.zeros(1)}, ["weight"])
        {'weight': tensor([1.])}
    """
    keys = list(keys)
    for key in state if keys else ():
        if key.endswith(keys[0]):
            prefix = key[: len(key) - len(keys[0])]
            if (not prefix or prefix.endswith(".")) and all(prefix + own in state for own in keys):
                return {own[len(prefix) :]: value for own, value in state.items() if own.startswith(prefix)}
    return None
