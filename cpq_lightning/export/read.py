"""Reading a packed file. The full content is checked before it is used."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cpq_lightning.attach.products import operand_names, operand_path
from cpq_lightning.errors import UnreadableFileError
from cpq_lightning.export.packed import PackedFile
from cpq_lightning.functional.grid import check_bits, check_zero_point, signed_zero_point
from cpq_lightning.functional.groups import group_count
from cpq_lightning.packing.layout import (
    CODES,
    DTYPES,
    FORMAT,
    KEY,
    VERSION,
    code_bytes,
    digest,
    digest_of_all,
    grid_of_name,
    lengths,
)


def read_packed(path: str | Path) -> PackedFile:
    """Read and check a packed file.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFileError: the file is no packed file of cpq-lightning, is of a newer version, or is truncated,
            damaged or edited; the message gives the reason.
    """
    path = Path(path)
    data = path.read_bytes()
    outer = _outer_header(data, path)
    header = _inner_header(outer.pop("__metadata__", None), path)
    version = header.get("version")
    reader = _READERS.get(version) if type(version) is int else None
    if reader is None:
        raise UnreadableFileError(
            f"{path} is of version {version} of the packed format, written by "
            f"{header.get('written_by', 'an unknown program')}; this cpq-lightning reads version "
            f"{', '.join(map(str, _READERS))}: install the version that wrote the file, or a newer one."
        )
    described = {name: _described(entry, name, path) for name, entry in outer.items()}
    return reader(header, described, data, path)


def _loaded(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _damaged(path, f"safetensors refuses it: {error}") from None


_NAMES = {code: name for name, (code, _) in DTYPES.items()}


def _outer_header(data: bytes, path: Path) -> dict[str, Any]:
    """The header of the safetensors file, checked as strictly as safetensors does."""
    if len(data) < 8:
        raise _foreign(path, f"{len(data)} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise _foreign(path, f"its first 8 bytes promise a header of {length} bytes, and the file has {len(data)}")
    try:
        header = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _foreign(path, f"its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise _foreign(path, "its header is no JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _inner_header(metadata: Any, path: Path) -> dict[str, Any]:
    if not isinstance(metadata, dict) or set(metadata) != {KEY} or not isinstance(metadata[KEY], str):
        raise _foreign(path, f"its metadata has no entry {KEY!r}")
    signature, _, text = metadata[KEY].partition("\n")
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != signature:
        raise _damaged(path, "the checksum of its header does not match")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _foreign(path, "its header is of another format")
    return header


def _described(entry: Any, name: str, path: Path) -> tuple[str, list[int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of tensor {name!r} in its header is incomplete")
    return _NAMES.get(entry["dtype"], "unknown"), entry["shape"]


# Errors that a header raises in its reader where it does not describe a model.
_HEADER_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
_Described = dict[str, tuple[str, list[int]]]


def _version_1(header: dict[str, Any], described: _Described, data: bytes, path: Path) -> PackedFile:
    tensors = _listed(header, described, data, path)
    header = {"products": [], "tied": {}, **header}
    try:
        _name_grids(header)
    except _HEADER_ERRORS as error:
        raise _damaged(path, f"its header does not describe a model ({type(error).__name__}: {error})") from None
    return _checked(header, tensors, path)


def _name_grids(header: dict[str, Any]) -> None:
    """Versions 1 and 2 knew signed and unsigned grids only."""
    grids = [layer["input"] for layer in header["layers"]]
    grids += [grid for product in header["products"] for grid in product["operands"].values()]
    for grid in grids:
        if grid is not None:
            signed = grid["signed"]
            if type(signed) is not bool:
                raise ValueError(f"a grid is signed or not, got {signed!r}")
            grid["zero_point"] = signed_zero_point(grid["bits"]) if signed else 0
    for layer in header["layers"]:
        layer["weight"].setdefault("balanced", [])
        layer["weight"]["group_size"] = 0


def _version_2(header: dict[str, Any], described: _Described, data: bytes, path: Path) -> PackedFile:
    if "products" not in header:
        raise _damaged(path, "its header does not describe a model (no products)")
    return _version_1(header, described, data, path)


def _listed(header: dict[str, Any], described: _Described, data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a file of version 1 or 2, whose header has the type, shape and SHA-256 of each tensor."""
    try:
        listed = {name: (entry["dtype"], entry["shape"]) for name, entry in header["tensors"].items()}
    except (AttributeError, KeyError, TypeError):
        raise _damaged(path, "its list of tensors is incomplete") from None
    if described != listed:
        name = next(n for n in sorted(described.keys() | listed.keys()) if described.get(n) != listed.get(n))
        raise _damaged(path, f"tensor {name!r} is {described.get(name)} in the file and {listed.get(name)} in its list")
    tensors = _loaded(data, path)
    for name, entry in header["tensors"].items():
        if digest(tensors[name]) != entry.get("sha256"):
            raise _damaged(path, f"the checksum of tensor {name!r} does not match")
    return tensors


def _version_3(header: dict[str, Any], described: _Described, data: bytes, path: Path) -> PackedFile:
    tensors = _loaded(data, path)
    if digest_of_all(tensors) != header.get("sha256"):
        raise _damaged(path, "the checksum of its tensors does not match")
    try:
        listed = {name: ("uint8" if name == CODES else name, [count]) for name, count in lengths(header).items()}
        if described != listed:
            raise ValueError(f"its tensors are {described}, and {listed} in its list")
        content, named = _split(header, tensors)
    except _HEADER_ERRORS as error:
        raise _damaged(path, f"its header does not describe a model ({type(error).__name__}: {error})") from None
    return _checked(content, named, path)


def _split(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert header and tensors to the form of version 2, in which each tensor has a name."""
    offsets: dict[str, int] = {}
    named: dict[str, Tensor] = {}

    def take(kind: str, name: str, shape: list[int]) -> str:
        if name in named or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"tensor {name!r} occurs twice, or has the shape {shape}")
        begin = offsets.get(kind, 0)
        offsets[kind] = begin + math.prod(shape)
        named[name] = tensors[kind][begin : offsets[kind]].reshape(shape)
        return name

    def grid(owner: str, text: str | None) -> dict[str, Any] | None:
        if text is None:
            return None
        bits, zero_point = grid_of_name(text)
        return {"bits": bits, "zero_point": zero_point, "step": take("float32", f"{owner}.input_step", [1])}

    layers: dict[str, dict[str, Any]] = {}
    for entry in header["layers"]:
        name = entry["name"]
        if "source" in entry:
            weight = layers[entry["source"]]["weight"]
        else:
            weight = {"bits": entry["bits"], "shape": entry["shape"], "channel_dim": entry.get("channel_dim", 0)}
            weight["balanced"] = entry.get("balanced", [])
            weight["group_size"] = entry.get("group_size", 0)
            weight["codes"] = take(CODES, f"{name}.weight_codes", [code_bytes(entry)])
            weight["step"] = take("float32", f"{name}.weight_step", [entry.get("steps", 1)])
        if name in layers:
            raise ValueError(f"layer {name!r} is listed twice")
        layers[name] = {"name": name, "weight": weight, "input": grid(name, entry.get("input"))}
    products = []
    for entry in header.get("products", ()):
        owner = entry["module"]
        operands = {key: grid(operand_path(owner, key), text) for key, text in entry["operands"].items()}
        products.append({**entry, "operands": operands})
    rest = [take(kind, name, shape) for kind, shapes in header["rest"].items() for name, shape in shapes.items()]
    content = {
        "version": header["version"],
        "architecture": header.get("architecture"),
        "layers": list(layers.values()),
        "products": products,
        "tied": header.get("tied", {}),
        "rest": rest,
    }
    return content, named


def _checked(header: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> PackedFile:
    try:
        modules = [_check_products(entry, tensors) for entry in header["products"]]
        names = [_check_layer(layer, tensors) for layer in header["layers"]]
        known, tied = header["rest"], header["tied"]
        if len(set(names)) != len(names) or len(set(modules)) != len(modules):
            raise ValueError("a layer or a module is listed twice")
        if not all(name in tensors for name in known) or not all(source in names for source in tied.values()):
            raise ValueError("a tensor or a layer is missing")
        architecture = header["architecture"]
        if architecture is not None and not (
            isinstance(architecture["timm"], str) and isinstance(architecture["arguments"], dict)
        ):
            raise ValueError("its architecture is no name with arguments")
    except _HEADER_ERRORS as error:
        raise _damaged(path, f"its header does not describe a model ({type(error).__name__}: {error})") from None
    return PackedFile(header, tensors)


def _check_products(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    name, plan, counts, operands = (entry[key] for key in ("module", "plan", "counts", "operands"))
    if not isinstance(name, str) or not isinstance(plan, list) or not plan or not all(type(p) is bool for p in plan):
        raise ValueError(f"the products of {name!r} are {plan}")
    if not isinstance(counts, list) or not all(type(c) is int and 0 <= c <= len(plan) for c in counts) or not counts:
        raise ValueError(f"the numbers of products of {name!r} are {counts}")
    if set(operands) != set(operand_names(plan)):
        raise ValueError(f"the products of {name!r} have the operands {sorted(operands)}")
    for operand, grid in operands.items():
        if grid is not None:
            check_bits(f"bits of operand {operand!r} of {name!r}", grid["bits"])
            _check_input(grid, f"operand {operand!r} of {name!r}", tensors)
    return name


def _check_input(entry: Mapping[str, Any], owner: str, tensors: Mapping[str, Tensor]) -> None:
    if tensors[entry["step"]].shape != (1,):
        raise ValueError(f"the input of {owner} has no single scale")
    check_zero_point(entry["bits"], entry["zero_point"])


def _check_layer(layer: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    name, weight, entry = layer["name"], layer["weight"], layer["input"]
    shape, dim = weight["shape"], weight["channel_dim"]
    if not all(type(size) is int and size > 0 for size in shape) or type(dim) is not int or not 0 <= dim < len(shape):
        raise ValueError(f"layer {name!r} has the shape {shape}, channels in dimension {dim}")
    by_channel = isinstance(weight["bits"], list)
    widths = weight["bits"] if by_channel else [weight["bits"]]
    for width in widths if entry is None else [*widths, entry["bits"]]:
        check_bits(f"bits of layer {name!r}", width)
    if not isinstance(weight["balanced"], list) or not {*weight["balanced"]} <= {*widths} - {8}:
        raise ValueError(f"layer {name!r} has balanced grids of {weight['balanced']} bits")
    if by_channel and len(widths) != shape[dim]:
        raise ValueError(f"layer {name!r} has {len(widths)} widths for {shape[dim]} channels")
    size = weight["group_size"]
    if type(size) is not int or size < 0 or (size and (len(shape) != 2 or dim or by_channel)):
        raise ValueError(f"layer {name!r} has the shape {shape} in groups of {size}")
    numbers = [shape[0] * group_count(shape[1], size)] if size else [1, shape[dim]]
    bits = sum(widths) * math.prod(shape) // len(widths)
    codes, step = tensors[weight["codes"]], tensors[weight["step"]]
    if codes.dtype != torch.uint8 or codes.shape != (-(-bits // 8),) or step.shape not in [(n,) for n in numbers]:
        raise ValueError(
            f"layer {name!r} has codes of shape {tuple(codes.shape)} for {bits} bits, and scales of shape "
            f"{tuple(step.shape)}"
        )
    if entry is not None:
        _check_input(entry, f"layer {name!r}", tensors)
    return name


# One reader per version of the format. The reader of a released version must not change.
_READERS: dict[int, Callable[[dict[str, Any], _Described, bytes, Path], PackedFile]] = {
    1: _version_1,
    2: _version_2,
    # Version 4 added balanced grids of weights and zero points of inputs, version 5 layers of decomposed modules and
    # groups of inputs.
    3: _version_3,
    4: _version_3,
    VERSION: _version_3,
}


def _foreign(path: Path, reason: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"{path} is no packed model of cpq-lightning: {reason}. Expected a complete file of 'cpq export --format "
        "packed'."
    )


def _damaged(path: Path, reason: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"{path} is damaged or was edited: {reason}. Export the model again, or copy the file again."
    )
