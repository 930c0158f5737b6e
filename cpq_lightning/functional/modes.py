"""Who differentiates: torch's backward once, or something for which only PyTorch operations will do."""

from __future__ import annotations

import torch
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a transform of ``torch.func``, forward-mode differentiation, or ``torch.jit.trace`` looks into what is
    computed.
    """
    # Compiled code holds what it was traced with; torch compiles no transform of what is below.
    if torch.compiler.is_compiling():
        return False
    if torch._C._is_tracing():
        return True
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def is_differentiated_again(grad: torch.Tensor) -> bool:
    """Asked in a backward: whether its own result is to be differentiated (``create_graph=True``), or is one of many
    that are computed at once (``is_grads_batched=True``).

    Args:
        grad: The gradient that has come in.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or is_transformed() or _functorch.is_legacy_batchedtensor(grad)
