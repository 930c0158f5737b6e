"""Backbones by name, with weights from timm's hub or from a file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, load_model_config_from_hf, parse_model_name
from torch import Tensor, nn

# The import registers its networks with timm.
from cpq_lightning.backbones import cifar as cifar
from cpq_lightning.backbones.weights import plain_weights, read_weights, under_prefix

# An unusual seed: weights initialized with the same seed would look like weights that the file lacks.
_SEED = 0x5EED_5EED


def create_backbone(
    name: str, *, pretrained: bool | str = False, num_classes: int | None = None, **arguments: Any
) -> nn.Module:
    """Build a network by its name in timm, with weights from timm's hub or from a file.

    Args:
        name: Name of a timm model (``"resnet18"``, ``"hf-hub:..."``), ``"cifar_resnet20"`` or ``"cifar_vgg7"``.
        pretrained: ``True`` for timm's pretrained weights, or the path of a file with weights: safetensors, a ``.pth``
            of timm or torchvision, or a Lightning checkpoint that contains the network. A head with another number of
            classes is not loaded.
        num_classes: Number of classes; ``None`` is the number of the pretrained weights.
        arguments: Further arguments of ``timm.create_model``.

    Raises:
        ValueError: the name is unknown, or the file does not contain the network's weights.
        FileNotFoundError: there is no such file.
        ConnectionError: the hub cannot be reached.
    """
    check_name(name)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if isinstance(pretrained, bool):
        try:
            return timm.create_model(name, pretrained=pretrained, **arguments)
        except OSError as error:
            raise ConnectionError(
                f"The pretrained weights of {name!r} could not be fetched ({_first_lines(error)}). On a machine "
                "without internet give a file that holds them: pretrained=PATH (--model.pretrained PATH)."
            ) from error
    return _from_file(name, Path(pretrained), arguments)


def known_backbone(name: str) -> bool:
    """Whether :func:`create_backbone` knows a name without a hub prefix."""
    return timm.is_model(name)


def check_name(name: str) -> None:
    """Check that a name is that of a network; names with a hub prefix are not checked.

    Raises:
        ValueError: the name is unknown; the message lists close matches.
    """
    if ":" in name:
        return
    if not known_backbone(name):
        names = timm.list_models()
        matches = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        matches = matches or [known for known in names if known.startswith(name[:3])][:3]
        raise ValueError(
            f"backbone {name!r} is no timm model. Near matches: {matches}; timm.list_models() has all {len(names)}."
        )
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        architecture, _, tag = name.partition(".")
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        raise ValueError(
            f"backbone {name!r}: {architecture!r} has no weights with the tag {tag!r}, but {tags}."
        ) from None


def pretrained_config(name: str) -> PretrainedCfg:
    """timm's pretrained config of a network: how to prepare images for it, and the classes of its pretrained weights.

    Raises:
        ValueError: the name is unknown.
    """
    check_name(name)
    source, model = parse_model_name(name)
    if source == "hf-hub":
        return PretrainedCfg(**load_model_config_from_hf(model)[0])
    return timm.get_pretrained_cfg(model) or PretrainedCfg()


def _from_file(name: str, path: Path, arguments: dict[str, Any]) -> nn.Module:
    try:
        weights = plain_weights(read_weights(path))
    except ValueError as error:
        raise ValueError(f"pretrained: {error}") from None
    with torch.random.fork_rng(devices=[]):
        # Both networks start from the same random weights: a weight that loading leaves unchanged is not in the file.
        torch.default_generator.manual_seed(_SEED)
        bare = timm.create_model(name, **arguments)
        heads = tuple(f"{head}." for head in _heads(bare))
        state = under_prefix(weights, (key for key in bare.state_dict() if not key.startswith(heads))) or weights
        overlay: dict[str, Any] = {"state_dict": state, **_head(bare, state)}
        torch.default_generator.manual_seed(_SEED)
        try:
            network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"pretrained={path} does not fit {name!r}: {_first_lines(error)}") from None
    # timm keeps the overlay, weights included, in the config of the network; drop it.
    network.pretrained_cfg = network.default_cfg = bare.pretrained_cfg
    before = {key: value for key, value in bare.named_parameters() if value.dim() > 1 and not key.startswith(heads)}
    after = dict(network.named_parameters())
    missing = [key for key, value in before.items() if torch.equal(value, after[key])]
    if missing:
        raise ValueError(
            f"pretrained={path} does not fit {name!r}: {len(missing)} of its {len(before)} weights are not in the "
            f"file, such as {missing[0]!r}. Give weights of that backbone, with the same backbone_args."
        )
    return network


def _heads(network: nn.Module) -> tuple[str, ...]:
    names = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _head(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of classes of the head in the file; timm loads that head if the network has as many classes."""
    sizes = [len(state[f"{name}.weight"]) for name in _heads(network) if f"{name}.weight" in state]
    return {"num_classes": sizes[0]} if sizes else {}


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])
