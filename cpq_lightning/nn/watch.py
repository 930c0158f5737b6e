"""Watchers of a forward, local to a thread, without a change to the computation."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

    from cpq_lightning.nn.quantizer import Quantizer


class Watcher:
    """A context manager whose methods are called by the quantizers and quantized layers that run in this thread.

    Other threads, compiled code, and recomputation in the thread of a backward pass do not call them.
    """

    def passes(self, quantizer: Quantizer, x: Tensor) -> bool:
        """Called before ``x`` is quantized; return ``True`` to leave it unquantized, as calibration does."""
        return False

    def on_quantized(self, quantizer: Quantizer, x: Tensor, out: Tensor | None) -> None:
        """Called after ``x`` was quantized to ``out``; ``None`` if a kernel quantizes it within the product."""

    def on_layer(self, layer: nn.Module) -> None:
        """Called when a quantized layer is called."""

    def on_product(self, layer: nn.Module, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Called after a layer computed a product in which a kernel quantizes at least one operand."""

    def __enter__(self) -> Self:
        _running.watchers = (*_running.watchers, self)
        return self

    def __exit__(self, *exc: Any) -> None:
        _running.watchers = tuple(watcher for watcher in _running.watchers if watcher is not self)


class _Running(threading.local):
    watchers: tuple[Watcher, ...] = ()


_running = _Running()


def watchers() -> tuple[Watcher, ...]:
    """The watchers of this thread."""
    return () if torch.compiler.is_compiling() else _running.watchers
