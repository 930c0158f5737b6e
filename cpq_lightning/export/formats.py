"""The formats of exported files, and the packages that they require."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from cpq_lightning.extras import require

Format = Literal["packed", "onnx", "torch"]
# The integer type of the codes in an ONNX file.
Container = Literal["int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
CONTAINERS: tuple[Container, ...] = get_args(Container)
SUFFIXES: dict[Format, str] = {"packed": ".safetensors", "onnx": ".onnx", "torch": ".pt2"}


def check_formats(formats: Sequence[str]) -> None:
    """Raise an error for unknown formats, and for formats whose packages are not installed.

    Raises:
        ValueError: a format is unknown.
        ImportError: packages are missing; the message names the packages to install.
    """
    for format in formats:
        if format not in FORMATS:
            raise ValueError(f"format must be one of {FORMATS}, got {format!r}.")
    if "onnx" in formats:
        require("ONNX", "onnx")
