"""How many multiply-accumulates torch's operations take, whatever function of Python leads to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class MacCounter(TorchDispatchMode):
    """Count the multiply-accumulates of what runs within, and change nothing of it; used as a context.

    Half of the floating-point operations of torch's ``FlopCounterMode``, by the same formulas. To these come operations
    that it does not count: fused attention on a CPU, and recurrent layers.

    Attributes:
        macs: The count since it was made, or since :meth:`take`.
    """

    # Such as flex_attention: they run as they would.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def take(self) -> int:
        """The count, which begins anew."""
        macs, self.macs = self.macs, 0
        return macs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        operation = func.overloadpacket
        known = operation in flop_registry or operation in _OWN
        if not known and func is not torch.ops.prim.device.default:
            # In inference mode composite operations come whole.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if operation in _OWN:
            self.macs += _OWN[operation](args)
        elif known:
            self.macs += flop_registry[operation](*args, **kwargs, out_val=out) // 2
        return out


def _attention(args: tuple[Any, ...]) -> int:
    query, key, value = args[:3]
    return query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _recurrent(args: tuple[Any, ...]) -> int:
    """One layer in one direction: each step multiplies input and hidden state by their weights."""
    return args[0].numel() // args[0].shape[-1] * (args[1].numel() + args[2].numel())


def _recurrent_cudnn(args: tuple[Any, ...]) -> int:
    steps = args[0].numel() // args[0].shape[-1]
    return steps * sum(w.numel() for w in args[1] if isinstance(w, Tensor) and w.dim() > 1)


_OWN: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten.mkldnn_rnn_layer: _recurrent,
    aten._cudnn_rnn: _recurrent_cudnn,
}
