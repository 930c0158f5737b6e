"""The formats of artefacts, and what each needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal, get_args

Format = Literal["packed", "onnx", "torch"]
# What holds the codes of an ONNX file.
Container = Literal["int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
CONTAINERS: tuple[Container, ...] = get_args(Container)
SUFFIXES: dict[Format, str] = {"packed": ".safetensors", "onnx": ".onnx", "torch": ".pt2"}
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_formats(formats: Sequence[str]) -> None:
    """Refuse formats that there are not, or that lack a package here.

    Raises:
        ValueError: an unknown format.
        ImportError: naming the extra to install.
    """
    for format in formats:
        if format not in FORMATS:
            raise ValueError(f"format must be one of {FORMATS}, got {format!r}.")
    missing = [p for p in _ONNX_PACKAGES if importlib.util.find_spec(p) is None] if "onnx" in formats else []
    if missing:
        raise ImportError(f"ONNX needs {', '.join(missing)}: pip install 'cpq-lightning[onnx]'.")
