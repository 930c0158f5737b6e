"""Count the multiply-accumulates of torch operations, whichever Python functions call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class MacCounter(TorchDispatchMode):
    """Context manager that counts the multiply-accumulates inside of it, and changes nothing.

    The count is half of the floating-point operations of torch's ``FlopCounterMode``, by the same formulas, plus
    operations that ``FlopCounterMode`` does not count: fused attention on a CPU, and recurrent layers.

    Attributes:
        macs: The count since creation, or since the last :meth:`take`.
    """

    # Lets operators such as flex_attention run unchanged.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def take(self) -> int:
        """Return the count, and reset it to 0."""
        macs, self.macs = self.macs, 0
        return macs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        operation = func.overloadpacket
        known = operation in flop_registry or operation in _NOT_IN_REGISTRY
        if not known and func is not torch.ops.prim.device.default:
            # Inference mode does not decompose composite operations, so their parts are counted here.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if operation in _NOT_IN_REGISTRY:
            self.macs += _NOT_IN_REGISTRY[operation](args)
        elif known:
            self.macs += flop_registry[operation](*args, **kwargs, out_val=out) // 2
        return out


def _attention(args: tuple[Any, ...]) -> int:
    """Multiply-accumulates of fused attention: query times key, and attention times value."""
    query, key, value = args[:3]
    return query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _recurrent(args: tuple[Any, ...]) -> int:
    """One layer in one direction: each time step multiplies the input and the hidden state by their weights."""
    return args[0].numel() // args[0].shape[-1] * (args[1].numel() + args[2].numel())


def _recurrent_cudnn(args: tuple[Any, ...]) -> int:
    steps = args[0].numel() // args[0].shape[-1]
    return steps * sum(w.numel() for w in args[1] if isinstance(w, Tensor) and w.dim() > 1)


_NOT_IN_REGISTRY: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten.mkldnn_rnn_layer: _recurrent,
    aten._cudnn_rnn: _recurrent_cudnn,
}
