"""Function modes around the forward of one module, whose products they replace."""

from __future__ import annotations

import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction


class ForwardMode(TorchFunctionMode):
    """Base of the function modes around a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.started_with_gradients = torch.is_grad_enabled()

    def refuse_reentrant_checkpoint(self) -> None:
        """Refuse a product in a part of the forward that ``checkpoint(..., use_reentrant=True)`` runs.

        Backward computes that part again outside of the forward, thus without this mode: the gradients would be those
        of a network in full precision. With ``use_reentrant=False``, torch notices the difference and fails.

        Raises:
            RuntimeError: with what to do instead.
        """
        if not self.started_with_gradients or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is CheckpointFunction.forward.__code__:
                raise RuntimeError(
                    "A product inside of checkpoint(..., use_reentrant=True) belongs to a module whose forward calls "
                    "checkpoint: backward would compute it again outside of that forward, in full precision, and the "
                    "gradients would be wrong. Call checkpoint on the module from outside, or leave the module out "
                    "with ignore."
                )
            frame = frame.f_back  # type: ignore[assignment]
