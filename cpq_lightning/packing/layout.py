"""The layout of a packed file, and what its header says of a model.

A packed file (version 3) is a safetensors file of a few flat tensors. ``codes`` (bytes) holds the codes of each
quantized weight one behind the other (:func:`~cpq_lightning.functional.packing.pack_codes`; rows are the output
channels), each from a whole byte on. ``float32`` holds, for each layer in order, the steps of its weight and, where its
input is quantized, that of its input; the steps of the operands of products without a weight; and what is not
quantized, in the order in which it is listed. What is not quantized and of another type lies in a tensor that is named
after its type, such as ``int64``. The file's metadata has one entry, :data:`KEY`: the SHA-256 of a JSON text, a
newline, and that text:

- ``format``, ``version``, ``written_by``; ``sha256`` of all tensors (:func:`digest_of_all`);
- ``architecture``, where timm builds the network;
- ``layers``: each with its ``name``, its weight's ``bits`` (one width, or one a channel), ``shape``, ``channel_dim``
  (0 where it is left out), the number of ``steps`` (1 likewise), and ``input``, ``"s4"`` of a signed grid of four bits
  and ``"u4"`` of an unsigned one, nothing where it is not quantized; or with its ``name``, its ``input``, and the layer
  that is the ``source`` of its weight;
- ``products`` without a weight that are quantized: each with its ``module``, ``plan``, ``counts`` and ``operands``;
- ``tied``: other names in the network's state of a layer's weight, with the layer, such as an embedding's;
- ``rest``: what is not quantized, by type and name, with its shape.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cpq_lightning.attach.layers import QuantizedLayer, read_layers
from cpq_lightning.attach.parametrized import computing
from cpq_lightning.attach.products import modules_with_products, operand_names
from cpq_lightning.attach.tied import source_of, tied_readers
from cpq_lightning.functional.packing import packed_bytes
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.version import __version__

FORMAT = "cpq-lightning-packed"
VERSION = 3
KEY = "cpq_lightning"
CODES = "codes"
# Names of types in safetensors, and their bytes, in the order in which it writes tensors.
DTYPES = {
    "uint64": ("U64", 8), "int64": ("I64", 8), "float64": ("F64", 8), "complex64": ("C64", 8), "float32": ("F32", 4),
    "uint32": ("U32", 4), "int32": ("I32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2), "uint16": ("U16", 2),
    "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip

Rest = dict[str, dict[str, list[int]]]


def describe(model: nn.Module) -> dict[str, Any]:
    """The quantized layers, products and tied weights of an attached model, as the header lists them."""
    # A weight that layers share is stored once.
    owners: dict[int, str] = {}
    layers: list[dict[str, Any]] = []
    for name, layer in read_layers(model):
        source = owners.setdefault(layer.weight_id, name)
        own = {"source": source} if source != name else _weight(layer)
        layers.append({"name": name, **own, **_input(layer.input_quantizer)})
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
    dim = quantizer.channel_dim
    return {
        **width_entry(quantizer, quantizer.decided_widths().tolist()),
        "shape": list(layer.read_weight().shape),
        **({"channel_dim": dim} if dim else {}),
    }


def width_entry(quantizer: Quantizer, widths: Sequence[int]) -> dict[str, Any]:
    """What depends on the widths of a weight in its layer's entry: one width, or one a channel."""
    steps = len(quantizer.log_scale)
    if quantizer.nesting == "resolution":
        steps = max(steps, len(widths))
    bits = widths[0] if len(widths) == 1 else list(widths)
    return {"bits": bits, **({"steps": steps} if steps > 1 else {})}


def _input(quantizer: Quantizer | None) -> dict[str, str]:
    if quantizer is None or not quantizer.fitted:
        return {}
    return {"input": f"{'s' if quantizer.signed else 'u'}{int(quantizer.decided_widths().max())}"}


def _operand(operand: nn.Module) -> str | None:
    quantizer = operand._modules.get("input_quantizer")
    return _input(quantizer if isinstance(quantizer, Quantizer) else None).get("input")


def rest_of(model: nn.Module, tied: Mapping[str, str]) -> Rest:
    """What is not quantized in an attached model, as the file has it: floats in float32, all else as it is.

    Args:
        model: An attached model.
        tied: Names in its state that are a layer's weight, as in :func:`describe`.
    """
    left_out = {*canonical_names(model), *tied}
    # A weight that the forward reads in full precision, without its layer, stays so.
    read = {cast(nn.Module, layer) for _, layer in read_layers(model)}
    inside: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, Quantizer):
            inside.append(prefix)
        if module in read:
            left_out.update(f"{prefix}{key}" for key in ("weight", *computing(module)))
    left_out.update(f"{name}.product_state".lstrip(".") for name, _ in modules_with_products(model))
    found: Rest = {}
    prefixes = tuple(inside)
    for name, value in model.state_dict().items():
        if name not in left_out and not name.startswith(prefixes):
            dtype = "float32" if value.is_floating_point() else dtype_name(value)
            found.setdefault(dtype, {})[name] = list(value.shape)
    return found


def canonical_names(network: nn.Module) -> dict[str, str]:
    """Names in the ``state_dict`` of a module that is registered several times, each with the first one for it."""
    first: dict[nn.Module, str] = {}
    names = {}
    for name, module in network.named_modules(remove_duplicate=False):
        own = first.setdefault(module, name)
        if own != name:
            names |= {f"{name}.{key}": f"{own}.{key}" for key in (*module._parameters, *module._buffers)}
    return names


def dtype_name(tensor: Tensor) -> str:
    """A tensor's type as the header names it."""
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
    """The entry of the file's metadata."""
    text = json.dumps(header, separators=(",", ":"))
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in memory."""
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def digest_of_all(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a line for each tensor, in the order of their names: its name, type, shape, and :func:`digest`."""
    lines = [f"{name} {dtype_name(t)} {list(t.shape)} {digest(t)}\n" for name, t in sorted(tensors.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def code_bytes(layer: Mapping[str, Any]) -> int:
    """Bytes of the codes of one layer in a header."""
    widths = layer["bits"] if isinstance(layer["bits"], list) else [layer["bits"]]
    return packed_bytes(math.prod(layer["shape"]) // len(widths) * sum(widths), 1)


def lengths(header: Mapping[str, Any]) -> dict[str, int]:
    """Elements of each flat tensor of a file with this header."""
    own = [layer for layer in header["layers"] if "source" not in layer]
    grids = [layer.get("input") for layer in header["layers"]]
    grids += [grid for product in header.get("products", ()) for grid in product["operands"].values()]
    found = {CODES: sum(map(code_bytes, own))}
    found["float32"] = sum(layer.get("steps", 1) for layer in own) + sum(grid is not None for grid in grids)
    for dtype, tensors in header["rest"].items():
        found[dtype] = found.get(dtype, 0) + sum(map(math.prod, tensors.values()))
    return found
