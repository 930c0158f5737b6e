"""Detect how a computation is differentiated: one ordinary backward, or a mode that needs PyTorch operations."""

from __future__ import annotations

import torch
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a ``torch.func`` transform, forward-mode differentiation, or ``torch.jit.trace`` is active."""
    # Compiled code would keep the answer of its tracing; and torch compiles no transforms of these quantizers.
    if torch.compiler.is_compiling():
        return False
    if torch._C._is_tracing():
        return True
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def is_differentiated_again(grad: torch.Tensor) -> bool:
    """Whether the running backward is itself differentiated (``create_graph=True``) or batched
    (``is_grads_batched=True``).

    Args:
        grad: The incoming gradient.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or is_transformed() or _functorch.is_legacy_batchedtensor(grad)
