"""The audit of one forward: which quantizers were never called, which matrix products stayed unquantized."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from cpq_lightning.attach.layers import QuantizedLayer
from cpq_lightning.attach.select import attached_config, matches
from cpq_lightning.nn import Quantizer

log = logging.getLogger("cpq_lightning")

_WITH_WEIGHT: set[Any] = {
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip
_WITHOUT_WEIGHT: set[Any] = {
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, torch.tensordot,
    Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm,
    F.scaled_dot_product_attention, F.multi_head_attention_forward,
}  # fmt: skip
# What leaves a quantized tensor quantized: it moves values, or adds zeros, which every grid holds.
_KEEPING = {
    "reshape", "view", "flatten", "unflatten", "transpose", "permute", "movedim", "squeeze", "unsqueeze", "expand",
    "contiguous", "to", "float", "half", "bfloat16", "type", "pad", "clone", "detach", "__getitem__", "chunk", "split",
    "unbind", "repeat", "unfold", "t", "select", "narrow",
}  # fmt: skip


@dataclass
class AuditReport:
    """What one forward showed.

    Attributes:
        never_called: Names of quantizers that no call reached.
        unquantized: ``(module, operation, operand)`` of each product with a weight of which the weight, the input or
            both came in full precision, layers left out by the config aside.
        activation_products: ``(module, operation)`` of each product of two activations, such as attention's.
        order: Names of the quantized layers in the order in which they were first called.
        macs: Multiply-accumulates in one sample, by name of the weight quantizer; a layer that is called twice counts
            once.
        numel: Elements in one sample, by name of the activation quantizer that they passed.
    """

    never_called: list[str] = field(default_factory=list)
    unquantized: list[tuple[str, str, str]] = field(default_factory=list)
    activation_products: list[tuple[str, str]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    numel: dict[str, int] = field(default_factory=dict)

    def messages(self) -> list[str]:
        """One sentence a finding."""
        found = []
        if self.never_called:
            found.append(
                f"{len(self.never_called)} quantizers were never called in the first forward: "
                f"{_some(self.never_called)}. Their layers run in full precision or not "
                "at all; leave such layers out with ignore."
            )
        if self.unquantized:
            lines = [f"{module or 'the model itself'} ({op}: {what})" for module, op, what in self.unquantized]
            found.append(
                f"{len(lines)} matrix products with a weight stayed unquantized in the first forward: {_some(lines)}."
            )
        if self.activation_products:
            lines = [f"{module or 'the model itself'} ({op})" for module, op in self.activation_products]
            found.append(f"{len(lines)} products of two activations are not quantized: {_some(lines)}.")
        return found


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Audit(TorchFunctionMode):
    """Watch one forward of an attached model; used as a context, it leaves its :attr:`report`.

    It sees functions as Python calls them, before casts by autocast. Which of their tensors are quantized it knows by
    following the quantizers' outputs through operations that only move values.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.report = AuditReport()
        self._names = {module: name for name, module in model.named_modules()}
        self._called: set[nn.Module] = set()
        self._left_out = _left_out(model)
        self._stack: list[nn.Module] = []
        # Which quantizer a tensor came from.
        self._quantized = WeakTensorKeyDictionary()
        self._batch = 0
        self._counted: set[tuple[str, Quantizer]] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> Audit:
        # Hooks of all modules rather than of each: they can be removed while a forward is failing.
        self._handles = [
            register_module_forward_pre_hook(self._push),
            register_module_forward_hook(self._pop, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self._handles:
            handle.remove()
        self.report.never_called = [
            name for module, name in self._names.items() if isinstance(module, Quantizer) and module not in self._called
        ]

    def _push(self, module: nn.Module, args: Any) -> None:
        if module not in self._names:
            return
        self._stack.append(module)
        if isinstance(module, QuantizedLayer) and self._names[module] not in self.report.order:
            self.report.order.append(self._names[module])

    def _pop(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()
        if isinstance(module, Quantizer) and output is not None:
            self._called.add(module)
            self._quantized[output] = module
            if module.kind == "activation":
                self.report.numel[self._names[module]] = output.numel() // self._samples(output)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _WITH_WEIGHT:
            self._product(func, args, kwargs, out)
        elif func in _WITHOUT_WEIGHT:
            self.report.activation_products.append((self._where(), func.__name__.strip("_")))
        elif getattr(func, "__name__", "") in _KEEPING and args and self._is_quantized(args[0]):
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    self._quantized[tensor] = self._quantized[args[0]]
        return out

    def _product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        operands = [args[i] if len(args) > i else kwargs.get(name) for i, name in enumerate(("input", "weight"))]
        layer = self._stack[-1] if self._stack else None
        self._count(func, operands[0], operands[1], out, layer)
        expected = ["input", "weight"]
        if isinstance(layer, QuantizedLayer):
            expected = ["weight"] if layer.input_quantizer is None else expected
        elif layer in self._left_out or (layer is not None and next(layer.parameters(), None) is None):
            # What has no parameter, such as a blur within an augmentation, has no weight to quantize.
            return
        missing = [
            name
            for name, operand in zip(("input", "weight"), operands, strict=True)
            if name in expected and not self._is_quantized(operand)
        ]
        if missing:
            self.report.unquantized.append((self._where(), func.__name__, " and ".join(missing)))

    def _count(self, func: Any, input: Any, weight: Any, out: Tensor, layer: nn.Module | None) -> None:
        """Multiply-accumulates of a product with a quantized weight."""
        if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
            return
        quantizer = self._quantized.get(weight)
        if quantizer is None and isinstance(layer, QuantizedLayer):
            quantizer = layer.weight_quantizer
        if quantizer is None or quantizer.kind != "weight" or (self._where(), quantizer) in self._counted:
            return
        self._counted.add((self._where(), quantizer))
        places = (input if "transpose" in func.__name__ else out).numel()
        macs = places * (weight.numel() // weight.shape[0]) // self._samples(input)
        name = self._names[quantizer]
        self.report.macs[name] = self.report.macs.get(name, 0) + macs

    def _samples(self, x: Tensor) -> int:
        """Samples in the batch, as what is met first has them: further in they may be folded with windows or tokens."""
        self._batch = self._batch or (max(1, x.shape[0]) if x.dim() > 1 else 1)
        return self._batch

    def _is_quantized(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self._quantized

    def _where(self) -> str:
        return self._names[self._stack[-1]] if self._stack else ""


def _left_out(model: nn.Module) -> set[nn.Module]:
    """Layers that the config leaves in full precision; where only a part was attached, all outside of it."""
    config = attached_config(model)
    plain = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)}
    if config is None:
        return set(plain.values())
    return {m for n, m in plain.items() if any(matches(n, m, pattern) for pattern in config.ignore)}


def audit_first_forward(model: nn.Module) -> None:
    """Audit the model's next forward and report it with warnings; products of activations go to the log."""
    model.register_forward_pre_hook(_start)
    model.register_forward_hook(_finish, always_call=True)


def forget_first_forward(model: nn.Module) -> None:
    """Take back :func:`audit_first_forward`, whether it has run or not."""
    model.__dict__.pop("_cpq_audit", None)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for handle, hook in list(hooks.items()):
            if hook in (_start, _finish):
                del hooks[handle]
                model._forward_hooks_always_called.pop(handle, None)


def note_forward(model: nn.Module, report: AuditReport) -> None:
    """Write into the quantizers what a forward showed: the order of the layers, and what their weights multiply."""
    modules = dict(model.named_modules())
    for place, name in enumerate(report.order, start=1):
        layer = modules.get(name)
        if isinstance(layer, QuantizedLayer):
            for quantizer in (layer.weight_quantizer, layer.input_quantizer):
                if quantizer is not None:
                    quantizer.configure(order=place)
    for what, counts in (("macs", report.macs), ("numel", report.numel)):
        for name, count in counts.items():
            quantizer = modules.get(name)
            if isinstance(quantizer, Quantizer):
                quantizer.configure(**{what: count})


def agreed(report: AuditReport) -> AuditReport:
    """The report of the first process, where there are several: called by all of them at once.

    Each has seen batches of its own. What is decided from what a forward showed, such as which layers are first and
    last, or what a width costs, has to be the same on all.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return report
    held = [report]
    dist.broadcast_object_list(held)
    return held[0]


def report_audit(report: AuditReport) -> None:
    """Say what an audit found: a warning for what is amiss, the log for what is only worth knowing."""
    for message in report.messages():
        if message.startswith(f"{len(report.activation_products)} products of two"):
            log.info(message)
        else:
            warnings.warn(message, stacklevel=2)


def _start(model: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    state = model.__dict__.get("_cpq_audit")
    if state == "done":
        # Not when it was done: torch may be walking over the hooks there.
        forget_first_forward(model)
    elif state is None:
        audit = model.__dict__["_cpq_audit"] = Audit(model)
        audit.__enter__()


def _finish(model: nn.Module, args: Any, output: Any) -> None:
    audit = model.__dict__.get("_cpq_audit")
    if not isinstance(audit, Audit):
        return
    audit.__exit__(None, None, None)
    if output is None:
        # The forward raised: the next one is the first.
        del model.__dict__["_cpq_audit"]
        return
    model.__dict__["_cpq_audit"] = "done"
    note_forward(model, audit.report)
    report_audit(audit.report)


def auditable(module: nn.Module) -> bool:
    """Whether an audit can watch a model: compiled code runs no Python that an audit could watch."""
    return not any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())
