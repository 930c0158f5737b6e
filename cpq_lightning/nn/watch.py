"""Who watches a forward: in its own thread, and without a change to what is computed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

    from cpq_lightning.nn.quantizer import Quantizer


class Watcher:
    """Entered as a context, it is told what quantizers and quantized layers do in this thread.

    Other threads, compiled code, and what backward computes again in a thread of its own tell it nothing.
    """

    def passes(self, quantizer: Quantizer, x: Tensor) -> bool:
        """Asked before ``x`` is quantized: whether to pass it on as it is instead, as calibration does."""
        return False

    def on_quantized(self, quantizer: Quantizer, x: Tensor, out: Tensor | None) -> None:
        """``x`` was quantized to ``out``; ``None`` where a kernel does it within the product."""

    def on_layer(self, layer: nn.Module) -> None:
        """A quantized layer is called."""

    def on_product(self, layer: nn.Module, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """A layer has computed a product in which a kernel quantizes at least one side."""

    def __enter__(self) -> Self:
        _running.watchers = (*_running.watchers, self)
        return self

    def __exit__(self, *exc: Any) -> None:
        _running.watchers = tuple(watcher for watcher in _running.watchers if watcher is not self)


class _Running(threading.local):
    watchers: tuple[Watcher, ...] = ()


_running = _Running()


def watchers() -> tuple[Watcher, ...]:
    """Who watches this thread."""
    return () if torch.compiler.is_compiling() else _running.watchers
