"""The layout of a packed file, and the contents of its header.

A packed file (version 5) is a safetensors file of a few flat tensors:

- ``codes`` (bytes): the codes of each quantized weight (:func:`~cpq_lightning.functional.packing.pack_codes`; rows are
  the output channels), one after the other, each starting at a byte boundary.
- ``float32``: first for each layer in order the scales of its weight and, if its input is quantized, the scale of the
  input; then the scales of the operands of products without a weight; then all tensors that are not quantized, in the
  order of ``rest``.
- Unquantized tensors of other types lie in one tensor for each type, named after it, such as ``int64``.

The file's metadata has one entry, :data:`KEY`: the SHA-256 of a JSON text, a newline, and that text, with the keys

- ``format``, ``version``, ``written_by``; ``sha256`` of all tensors (:func:`digest_of_all`);
- ``architecture``, if timm builds the network;
- ``layers``: each with its ``name``, the ``bits`` of its weight (one width, or one for each channel), ``shape``,
  ``channel_dim`` (0 if omitted), the number of scales as ``steps`` (1 if omitted), ``group_size`` if each group of so
  many inputs has a scale (:mod:`~cpq_lightning.functional.groups`), the widths with a balanced grid as
  ``balanced`` (none if omitted), and ``input``: ``"s4"`` for a signed grid of four bits, ``"u4"`` for an unsigned one,
  ``"o4:3"`` for one with the zero point 3, omitted if the input is not quantized. A layer that shares the weight of
  another one has ``name``, ``input``, and that layer as ``source``. Packed are the codes of the signed grid; the code c
  of a balanced grid means 2 c + 1 times the scale in the file, half the distance between its levels;
- ``products``: the quantized products without a weight, each with its ``module``, ``plan``, ``counts`` and
  ``operands``;
- ``tied``: further names of a layer's weight in the network's state, such as an embedding's, each with the layer;
- ``rest``: the tensors that are not quantized, by type and name, with their shapes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cpq_lightning.attach.decompose import with_own_weights
from cpq_lightning.attach.layers import QuantizedLayer, read_layers
from cpq_lightning.attach.parametrized import computing
from cpq_lightning.attach.products import modules_with_products, operand_names
from cpq_lightning.attach.tied import source_of, tied_readers
from cpq_lightning.functional.grid import MAX_BITS, half_step, signed_zero_point
from cpq_lightning.functional.packing import packed_bytes
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.version import __version__

FORMAT = "cpq-lightning-packed"
VERSION = 5
KEY = "cpq_lightning"
CODES = "codes"
# Names of types in safetensors and their sizes in bytes, in the order in which safetensors writes tensors.
DTYPES = {
    "uint64": ("U64", 8), "int64": ("I64", 8), "float64": ("F64", 8), "complex64": ("C64", 8), "float32": ("F32", 4),
    "uint32": ("U32", 4), "int32": ("I32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2), "uint16": ("U16", 2),
    "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip

Rest = dict[str, dict[str, list[int]]]


def describe(model: nn.Module) -> dict[str, Any]:
    """The quantized layers, products and tied weights of an attached model, as listed in the header."""
    # A shared weight is stored once.
    owners: dict[int, str] = {}
    layers: list[dict[str, Any]] = []
    for name, layer in read_layers(model):
        source = owners.setdefault(layer.weight_id, name)
        weight = {"source": source} if source != name else _weight(layer)
        layers.append({"name": name, **weight, **_input(layer.input_quantizer)})
    products = [
        {
            "module": name,
            "plan": list(module.product_plan),
            "counts": sorted(module.product_counts),
            "operands": {o: _operand(module.product_operands[o]) for o in operand_names(module.product_plan)},
        }
        for name, module in modules_with_products(model)
    ]
    sources = ((f"{name}.{reader.tied_name}", source_of(reader, model)) for name, reader in tied_readers(model))
    tied = {key.lstrip("."): source for key, source in sources if source is not None}
    return {"layers": layers, **({"products": products} if products else {}), **({"tied": tied} if tied else {})}


def _weight(layer: QuantizedLayer) -> dict[str, Any]:
    quantizer = layer.weight_quantizer
    dim, size = quantizer.channel_dim, quantizer.settings.group_size
    return {
        **width_entry(quantizer, quantizer.decided_widths().tolist()),
        "shape": list(layer.read_weight().shape),
        **({"channel_dim": dim} if dim else {}),
        **({"group_size": size} if size else {}),
    }


def width_entry(quantizer: Quantizer, widths: Sequence[int]) -> dict[str, Any]:
    """The part of a layer's entry that depends on the ``widths`` of its weight, one width or one for each channel."""
    steps = len(quantizer.log_scale)
    if quantizer.nesting == "resolution":
        steps = max(steps, len(widths))
    bits = widths[0] if len(widths) == 1 else list(widths)
    balanced = sorted(k for k in set(widths) if half_step(quantizer.settings.zero_point(k)))
    return {
        "bits": bits,
        **({"steps": steps} if steps > 1 else {}),
        **({"balanced": balanced} if balanced else {}),
    }


def _input(quantizer: Quantizer | None) -> dict[str, str]:
    if quantizer is None or not quantizer.fitted:
        return {}
    bits = int(quantizer.decided_widths().max())
    return {"input": grid_name(bits, int(quantizer.settings.zero_point(bits)))}


def grid_name(bits: int, zero_point: int) -> str:
    """The name of an input's grid in the header.

    Example:
        >>> grid_name(4, 8), grid_name(4, 0), grid_name(4, 3)
        ('s4', 'u4', 'o4:3')
    """
    ends = {0: f"u{bits}", signed_zero_point(bits): f"s{bits}"}
    return ends.get(zero_point, f"o{bits}:{zero_point}")


def grid_of_name(name: str) -> tuple[int, int]:
    """The bits and the zero point of a grid from its name.

    Raises:
        ValueError: it is not the name of a grid.
    """
    kind, (digits, colon, zero_point) = name[:1], name[1:].partition(":")
    bits = int(digits) if digits in [str(k) for k in range(1, MAX_BITS + 1)] else 0
    if bits and kind in ("s", "u") and not colon:
        return bits, signed_zero_point(bits) if kind == "s" else 0
    if bits and kind == "o" and zero_point.isdecimal() and len(zero_point) <= 3 and int(zero_point) < 2**bits:
        return bits, int(zero_point)
    raise ValueError(f"{name!r} is not the name of a grid")


def _operand(operand: nn.Module) -> str | None:
    quantizer = operand._modules.get("input_quantizer")
    return _input(quantizer if isinstance(quantizer, Quantizer) else None).get("input")


def rest_of(model: nn.Module, tied: Mapping[str, str]) -> Rest:
    """The unquantized tensors of an attached model, as stored in the file: floats in float32, others unchanged.

    Args:
        model: An attached model.
        tied: Further names of layers' weights in its state, as in :func:`describe`.
    """
    omitted = {*canonical_names(model), *tied}
    # A weight that the forward also reads in full precision, bypassing its layer, is not quantized.
    read = {cast(nn.Module, layer) for _, layer in read_layers(model)}
    quantizer_prefixes: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, Quantizer):
            quantizer_prefixes.append(prefix)
        if module in read:
            omitted.update(f"{prefix}{key}" for key in ("weight", *computing(module)))
    omitted.update(f"{name}.product_state".lstrip(".") for name, _ in modules_with_products(model))
    rest: Rest = {}
    prefixes = tuple(quantizer_prefixes)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(prefixes)}
    shapes: dict[str, Any] = {name: value.shape for name, value in state.items()}
    for name, shape in with_own_weights(model, shapes, [name for name, _ in read_layers(model)]).items():
        if name not in omitted:
            dtype = dtype_name(state[name]) if name in state and not state[name].is_floating_point() else "float32"
            rest.setdefault(dtype, {})[name] = list(shape)
    return rest


def canonical_names(network: nn.Module) -> dict[str, str]:
    """Map the duplicate ``state_dict`` names of modules that are registered several times to the first name."""
    first: dict[nn.Module, str] = {}
    names = {}
    for name, module in network.named_modules(remove_duplicate=False):
        canonical = first.setdefault(module, name)
        if canonical != name:
            names |= {f"{name}.{key}": f"{canonical}.{key}" for key in (*module._parameters, *module._buffers)}
    return names


def dtype_name(tensor: Tensor) -> str:
    """The name of a tensor's type in the header."""
    return str(tensor.dtype).removeprefix("torch.")


def complete(
    described: Mapping[str, Any], rest: Rest, architecture: Mapping[str, Any] | None, sha256: str = "0" * 64
) -> dict[str, Any]:
    """The header of a file."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"cpq-lightning {__version__}",
        "sha256": sha256,
        **({} if architecture is None else {"architecture": dict(architecture)}),
        **described,
        "rest": rest,
    }


def signed(header: Mapping[str, Any]) -> str:
    """The entry of the file's metadata: the SHA-256 of the header's JSON text, a newline, and the text."""
    text = json.dumps(header, separators=(",", ":"))
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in memory."""
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def digest_of_all(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of one line for each tensor, sorted by name: its name, type, shape, and :func:`digest`."""
    lines = [f"{name} {dtype_name(t)} {list(t.shape)} {digest(t)}\n" for name, t in sorted(tensors.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def code_bytes(layer: Mapping[str, Any]) -> int:
    """Bytes of the codes of one layer of a header."""
    widths = layer["bits"] if isinstance(layer["bits"], list) else [layer["bits"]]
    return packed_bytes(math.prod(layer["shape"]) // len(widths) * sum(widths), 1)


def lengths(header: Mapping[str, Any]) -> dict[str, int]:
    """Number of elements of each flat tensor of a file with this header."""
    stored = [layer for layer in header["layers"] if "source" not in layer]
    grids = [layer.get("input") for layer in header["layers"]]
    grids += [grid for product in header.get("products", ()) for grid in product["operands"].values()]
    elements = {CODES: sum(map(code_bytes, stored))}
    elements["float32"] = sum(layer.get("steps", 1) for layer in stored) + sum(grid is not None for grid in grids)
    for dtype, tensors in header["rest"].items():
        elements[dtype] = elements.get(dtype, 0) + sum(map(math.prod, tensors.values()))
    return elements
