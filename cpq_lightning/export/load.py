"""Loading a packed file into a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cpq_lightning.attach.decompose import own_all_weights, with_own_weights
from cpq_lightning.attach.decomposed import store_weight
from cpq_lightning.attach.layer_callers import call_layers
from cpq_lightning.attach.parametrized import computing, leave_computed, weight_now
from cpq_lightning.attach.products import Operand, quantize_products
from cpq_lightning.attach.timm_layers import call_projections
from cpq_lightning.attach.weight_readers import avoid_fused_paths
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.backbones.create import create_backbone, known_backbone
from cpq_lightning.export.integer_model import InputGrid, input_of, with_input
from cpq_lightning.export.packed import PackedFile
from cpq_lightning.export.read import read_packed
from cpq_lightning.functional.grid import level_bounds
from cpq_lightning.functional.groups import scale_of_each
from cpq_lightning.packing.layout import canonical_names

# Arguments of timm.create_model that name a source of weights: with them timm would read other files or download some.
ORIGINS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def load_quantized(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Build the network of a packed file: a plain module for inference with quantized weights and activations.

    The weights equal those of the trained model to the bit, ``codes · scale``. Each layer with a quantized input has an
    ``input_grid`` that fake-quantizes the input. Lightning is not needed, and nothing is unpickled.

    Args:
        path: A file of :func:`write_packed`, ``cpq export --format packed``, or ``CPQCallback(export=["packed"])``.
        model: The network without quantization, with any weights; required where the file names no timm architecture.
            It is changed in place.

    Returns:
        The module, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFileError: the file is no packed file, is of a newer version, damaged or edited.
        ValueError: the file does not fit the network.

    Example:
        ``load_quantized("resnet18.safetensors")(images)``
    """
    return build(read_packed(path), path, model)


def build(content: PackedFile, path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Build the network from the content of a packed file; ``path`` is used in messages only."""
    if model is not None:
        network = unwrapped(model)
    else:
        network = _build(
            content.header["architecture"], path, lambda net: _check_fit(net, *_described_state(content), path)
        )
    layers, tied = content.header["layers"], content.header["tied"]
    _check_fit(network, *_described_state(content), path)
    own_all_weights(network, _decomposed(content), matrices=False)
    call_projections(network)
    weights: dict[str, nn.Parameter] = {}
    for layer in layers:
        entry = layer["weight"]
        if entry["codes"] not in weights:
            step, codes = content.tensors[entry["step"]], content.codes(layer)
            weight = codes.float() * scale_of_each(step, codes.shape, entry["channel_dim"], entry["group_size"])
            weights[entry["codes"]] = nn.Parameter(weight)
        leave_computed(network.get_submodule(layer["name"]))
        # The existing Parameter must keep its values: an embedding may share it, in full precision.
        store_weight(network.get_submodule(layer["name"]), weights[entry["codes"]])
    for name, source in tied.items():
        module, _, parameter = name.rpartition(".")
        setattr(network.get_submodule(module), parameter, network.get_submodule(source).weight)
    state = {name: content.tensors[name] for name in content.header["rest"]}
    network.load_state_dict(state, strict=False)
    for layer in layers:
        grid = _grid(layer["input"], content)
        if grid is not None:
            quantize_input(network.get_submodule(layer["name"]), grid)
    for entry in content.header["products"]:
        grids = {operand: _grid(described, content) for operand, described in entry["operands"].items()}
        module = _module(network, entry["module"], path)
        quantize_products(module, entry["plan"], entry["counts"], grids, "input_grid")
    if content.header["version"] > 4:
        call_layers(network, nn.Linear)
    avoid_fused_paths(network, nn.Linear)
    return (network if model is None else model).eval().requires_grad_(False)


def _grid(entry: Mapping[str, Any] | None, content: PackedFile) -> InputGrid | None:
    if entry is None:
        return None
    low, high = level_bounds(entry["bits"], entry["zero_point"])
    return InputGrid(content.tensors[entry["step"]], int(low), int(high))


def _module(network: nn.Module, name: str, path: str | Path) -> nn.Module:
    # Modules that loading has added compute no products.
    modules = {n: m for n, m in network.named_modules() if not isinstance(m, InputGrid | Operand)}
    if name not in modules:
        raise ValueError(f"{path} quantizes the products of {name!r}, which the network does not have.")
    return modules[name]


def quantize_input(layer: nn.Module, grid: InputGrid) -> None:
    """Add a hook to a plain layer that fake-quantizes its input."""
    layer.add_module("input_grid", grid)
    layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def _quantize_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    grid: Any = layer.input_grid
    return with_input(grid(input_of(args, kwargs)), args, kwargs)


def _build(architecture: Mapping[str, Any] | None, path: str | Path, check: Callable[[nn.Module], None]) -> nn.Module:
    if architecture is None:
        raise ValueError(
            f"{path} names no timm architecture: give the network that was trained, without quantization, as in "
            "load_quantized(path, model=network)."
        )
    name, arguments = architecture["timm"], architecture["arguments"]
    if ":" in name or any(key in arguments for key in ORIGINS):
        raise ValueError(
            f"{path} asks for {name!r} with {sorted(arguments)}, which would load other files: give the network, as in "
            "load_quantized(path, model=network)."
        )
    if not known_backbone(name):
        raise ValueError(
            f"{path} has the architecture {name!r}, which timm {timm.__version__} does not have: install the timm "
            f"version of the training ({architecture.get('version', 'unknown')}), or give the network as model=."
        )
    try:
        with torch.device("meta"):
            meta_network = create_backbone(name, **arguments)
    except TypeError as error:
        raise ValueError(f"{path} asks for {name!r} with arguments that timm does not accept: {error}") from None
    except (NotImplementedError, RuntimeError):
        # Some networks compute with values of tensors while they are built, which the meta device does not have.
        meta_network = None
    if meta_network is not None:
        # The check comes before memory is allocated, because edited arguments may ask for a huge network.
        check(meta_network)
    return create_backbone(name, **arguments)


def _decomposed(content: PackedFile) -> list[str]:
    """The quantized layers of a file whose modules are decomposed, which earlier versions did not do."""
    return [layer["name"] for layer in content.header["layers"]] if content.header["version"] > 4 else []


def _described_state(content: PackedFile) -> tuple[dict[str, Any], list[str], list[str]]:
    """Tensors with the shapes of the network's state_dict, some on the meta device, the names of the quantized layers,
    and :func:`_decomposed`.
    """
    layers = content.header["layers"]
    state: dict[str, Any] = {name: content.tensors[name] for name in content.header["rest"]}
    shapes = {layer["name"]: torch.empty(layer["weight"]["shape"], device="meta") for layer in layers}
    state |= {f"{name}.weight": shape for name, shape in shapes.items()}
    state |= {name: shapes[source] for name, source in content.header["tied"].items()}
    return state, list(shapes), _decomposed(content)


def _plain_shapes(network: nn.Module, layers: list[str], decomposed: list[str]) -> dict[str, tuple[int, ...]]:
    """The shapes in a network's state_dict; a parametrized weight stands in place of the tensors that compute it, and
    the weights of the layers of a decomposed module in place of its Parameters.
    """
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    modules = dict(network.named_modules(remove_duplicate=False))
    for name in layers:
        parts = computing(modules[name]) if name in modules else {}
        for part in parts:
            shapes.pop(f"{name}.{part}", None)
        if parts:
            shapes[f"{name}.weight"] = tuple(weight_now(modules[name]).shape)
    return with_own_weights(network, shapes, decomposed)


def _hint(name: str) -> str:
    if "_orig_mod" not in name:
        return ""
    return " A part of the exported model was compiled: compile the same part of the network with torch.compile."


def _check_fit(
    network: nn.Module, state: Mapping[str, Tensor], layers: list[str], decomposed: list[str], path: str | Path
) -> None:
    known = canonical_names(network)
    plain = _plain_shapes(network, layers, decomposed)
    expected = {known.get(name, name): shape for name, shape in plain.items()}
    actual = {known.get(name, name): tuple(value.shape) for name, value in state.items()}
    for name in layers:
        key = f"{name}.weight"
        # A shared weight is in the state_dict under each of its names.
        if key not in expected:
            raise ValueError(
                f"{path} has a quantized layer {name!r}, and the network has no weight of that name.{_hint(name)}"
            )
    wrong = [name for name in sorted(expected.keys() | actual.keys()) if expected.get(name) != actual.get(name)]
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{path} does not fit the network: {first!r} has the shape {actual.get(first, 'nothing')} in the file and "
            f"{expected.get(first, 'nothing')} in the network ({len(wrong)} differ). Was the model trained with "
            "other arguments?"
        )
