"""The audit of one forward: quantizers that were never called, and matrix products that stayed unquantized."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from cpq_lightning.attach.decomposed import whole_parameter
from cpq_lightning.attach.layers import QuantizedLayer, quantized_layers
from cpq_lightning.attach.mac_counter import MacCounter
from cpq_lightning.attach.origin import attached_config, late_layers
from cpq_lightning.attach.parametrized import is_computed
from cpq_lightning.attach.patterns import matches
from cpq_lightning.attach.products import QuantizedProducts
from cpq_lightning.attach.tied import tied_to_layers
from cpq_lightning.attach.timm_layers import holds_weight
from cpq_lightning.attach.torch_ops import (
    FUSED,
    LOOKUPS,
    WITH_WEIGHT,
    WITHOUT_WEIGHT,
    keeps_values,
    may_multiply,
    multiply_accumulates,
    product_operands,
)
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.watch import Watcher

if TYPE_CHECKING:
    from typing_extensions import Self


# Functions whose names match ``may_multiply``, but which do not multiply.
_NO_PRODUCTS: set[Any] = {torch.conj, Tensor.conj}
_UNAUDITED: ContextVar[bool] = ContextVar("unaudited", default=False)


@contextmanager
def unaudited() -> Iterator[None]:
    """Exclude from audits what is not part of the audited model, such as a teacher."""
    token = _UNAUDITED.set(True)
    try:
        yield
    finally:
        _UNAUDITED.reset(token)


# Attribute of an attached model: see AuditReport.unsearched.
_UNSEARCHED = "_cpq_unsearched"


def remember_search(model: nn.Module, failure: str) -> None:
    """Record why no forward showed what an attached model multiplies without a layer."""
    model.__dict__[_UNSEARCHED] = failure


def forget_search(model: nn.Module) -> None:
    """Undo :func:`remember_search`, for a model and all its submodules."""
    for module in model.modules():
        module.__dict__.pop(_UNSEARCHED, None)


@dataclass
class AuditReport:
    """The findings of one audited forward.

    Attributes:
        weights: For each entry of ``unquantized``, names of the multiplied Parameters that belong to other modules.
        never_called: Names of quantizers that were not called.
        unquantized: ``(module, operation, operand)`` of each product with a weight (also a Parameter that is multiplied
            without a layer, or by a recurrent layer) whose weight, input or both were in full precision, except layers
            that the config leaves out.
        activation_products: ``(module, operation)`` of each product of two activations, such as attention's, with one
            or both in full precision.
        overlooked: Entries of ``activation_products`` that ``attention=True`` should have quantized, but whose modules
            multiplied nothing in the forward that ``attach`` ran.
        lookups: ``(module, layer)`` of each lookup, in full precision, in the weight of a quantized layer.
        execution_order: Names of the quantized layers in the order of their first calls.
        macs: Multiply-accumulates of one sample, by name of the weight quantizer, or of the quantizer of a product's
            left operand; a layer that is called twice counts once.
        numel: Elements of one sample, by name of the activation quantizer that quantizes them.
        products: Multiply-accumulates of all calls, and of those with both operands quantized, by name of the innermost
            module whose code multiplies.
        unsearched: Why no forward showed products with Parameters when the model was attached; empty if one did.
    """

    never_called: list[str] = field(default_factory=list)
    unquantized: list[tuple[str, str, str]] = field(default_factory=list)
    activation_products: list[tuple[str, str]] = field(default_factory=list)
    overlooked: list[tuple[str, str]] = field(default_factory=list)
    lookups: list[tuple[str, str]] = field(default_factory=list)
    execution_order: list[str] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    numel: dict[str, int] = field(default_factory=dict)
    weights: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)
    products: dict[str, tuple[int, int]] = field(default_factory=dict)
    unsearched: str = ""

    def messages(self, forward: str = "the first forward") -> list[str]:
        """One sentence for each kind of finding; ``forward`` names the audited forward."""
        messages = []
        if self.never_called:
            messages.append(
                f"{len(self.never_called)} quantizers were never called in {forward}: "
                f"{listed(self.never_called)}. Their layers run in full precision or not "
                "at all; leave such layers out with ignore."
            )
        if self.unquantized:
            lines = [
                f"{where or 'the model itself'} ({' by '.join([op, *self.weights.get((where, op, what), [])])}: {what})"
                for where, op, what in self.unquantized
            ]
            messages.append(
                f"{len(lines)} matrix products with a weight stayed unquantized in {forward}: {listed(lines)}."
                + (f" Products with a Parameter were not searched for. {self.unsearched}" if self.unsearched else "")
            )
        if self.lookups:
            lines = [f"{where or 'the model itself'} (the weight of {layer})" for where, layer in self.lookups]
            messages.append(
                f"{len(lines)} lookups in the weight of a quantized layer stayed in full precision in {forward}: "
                f"{listed(lines)}. Tie weights before the model is quantized, and look rows up in the module that "
                "has the weight; or name that module in ignore."
            )
        if self.overlooked:
            messages.append(
                f"attention=True: {len(self.overlooked)} products of two activations stayed unquantized, of modules "
                "that multiplied nothing in the forward that the model was attached with: "
                f"{listed(_where_and_what(self.overlooked))}. Give attach(..., "
                "example_inputs=...), or an example_input_array, with which these modules multiply too."
            )
        if self.activation_products:
            lines = _where_and_what(self.activation_products)
            messages.append(f"{len(lines)} products of two activations are not quantized: {listed(lines)}.")
        return messages


def _where_and_what(products: list[tuple[str, str]]) -> list[str]:
    return [f"{module or 'the model itself'} ({op})" for module, op in products]


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, at most ``most``, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Audit(TorchFunctionMode, Watcher):
    """Watch one forward of an attached model in this thread, as a context manager; the result is :attr:`report`.

    It sees functions as Python calls them, before autocast casts, and does not change them. Quantizers report which
    tensors are quantized, and the audit follows these through operations that only move values. A quantized weight that
    is standardized (as in timm's ``StdConv2d``) or scaled stays quantized: one affine map per channel moves its levels.
    A mixture of quantized weights (``CondConv2d``) stays quantized too, because a product with the mixture is the same
    mixture of the products with each weight.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model = unwrapped(model)
        self.report = AuditReport(unsearched=self.model.__dict__.get(_UNSEARCHED, ""))
        self._names = {module: name for name, module in model.named_modules()}
        self._called: set[nn.Module] = set()
        self._left_out = _left_out(model)
        config = attached_config(model)
        self._all_products = config is not None and config.attention
        # Quantized layers by their Parameters; if only a part was attached, modules outside of it are not audited.
        self._layers = WeakTensorKeyDictionary()
        for name, layer in () if config is None else quantized_layers(model):
            parameter = whole_parameter(layer)
            if parameter is not None:
                self._layers[parameter] = name
        ignored = () if config is None else config.ignore
        tied = (t for t in tied_to_layers(model) if any(matches(t.name, t.module, p) for p in ignored))
        self._left_out |= {t.module for t in tied}
        # The quantizers of quantized tensors.
        self._quantized = WeakTensorKeyDictionary()
        # Parameters, and tensors that are made of their values.
        self._parameters = WeakTensorKeyDictionary()
        # Buffers, and tensors that are made of their values.
        self._buffers = WeakTensorKeyDictionary()
        self._batch = 0
        self._counted: set[tuple[str, Quantizer]] = set()
        self._entered = False
        self._macs = MacCounter()

    def __enter__(self) -> Self:
        self._entered = True
        self._parameters.update((parameter, name) for name, parameter in self.model.named_parameters())
        self._buffers.update((buffer, name) for name, buffer in self.model.named_buffers())
        Watcher.__enter__(self)
        TorchFunctionMode.__enter__(self)
        return self

    def __exit__(self, *exc: Any) -> None:
        # A run that fails may exit twice.
        if not self._entered:
            return
        self._entered = False
        TorchFunctionMode.__exit__(self, *exc)
        Watcher.__exit__(self)
        self.report.never_called = [
            name for module, name in self._names.items() if isinstance(module, Quantizer) and module not in self._called
        ]

    def on_layer(self, layer: nn.Module) -> None:
        name = self._names.get(layer)
        if name is not None and name not in self.report.execution_order:
            self.report.execution_order.append(name)

    def on_quantized(self, quantizer: Quantizer, x: Tensor, out: Tensor | None) -> None:
        if quantizer not in self._names or _UNAUDITED.get():
            return
        self._called.add(quantizer)
        if quantizer.kind == "activation":
            self.report.numel[self._names[quantizer]] = x.numel() // self._samples(x)
        if out is not None:
            self._quantized[out] = quantizer

    def on_product(self, layer: nn.Module, x: Tensor, weight: Tensor, out: Tensor) -> None:
        if layer in self._names and isinstance(layer, QuantizedLayer) and not _UNAUDITED.get():
            macs = out.numel() * (weight.numel() // weight.shape[0])
            self._note_macs(layer.weight_quantizer, macs // self._samples(x), self._names[layer])
            self._note_product(self._names[layer], macs, quantized=True)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _UNAUDITED.get() or getattr(func, "__name__", "") == "__get__":
            # A property computes nothing, but may return a quantized tensor's values, such as its transpose.
            out = func(*args, **kwargs)
        else:
            with self._macs:
                out = func(*args, **kwargs)
        if _UNAUDITED.get():
            return out
        if macs := self._macs.take():
            self._note_product(self._where(), macs, self._multiplies_quantized(func, args, kwargs))
        if func in WITH_WEIGHT:
            self._product(func, args, kwargs, out)
        elif func in WITHOUT_WEIGHT:
            self._product_of_two(func, args, kwargs, out)
        elif func in FUSED:
            self._note_unquantized(func.__name__, "input and weight")
            self._count_inside(func, args, kwargs, out)
        elif func in LOOKUPS:
            self._lookup(func, args, kwargs, out)
        elif may_multiply(func):
            self._unknown_product(func, args, kwargs)
        elif isinstance(out, Tensor | tuple | list):
            self._follow(func, args, out)
        return out

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], out: Any) -> None:
        """Carry over that a tensor is quantized, a Parameter or a buffer, through an operation without products."""
        for followed in (self._quantized, self._parameters, self._buffers):
            # For operations that join tensors, the first argument is a list of tensors.
            given = [*args[0], *args[1:2]] if args and isinstance(args[0], tuple | list) else args[:2]
            source = next((value for value in given if isinstance(value, Tensor) and value in followed), None)
            if source is None:
                continue
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor) and tensor is not source and self._keeps(func, args, source, tensor):
                    followed[tensor] = followed[source]

    def _keeps(self, func: Callable[..., Any], args: tuple[Any, ...], source: Tensor, out: Tensor) -> bool:
        if keeps_values(func):
            return bool(args) and (args[0] is source or isinstance(args[0], tuple | list))
        # A standardized, scaled or masked weight matrix is still a weight matrix.
        weight = self._kind(source)[1] == "weight" and source.dim() > 1
        return weight and (func is F.batch_norm or out.shape == source.shape)

    def _unknown_product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Report an operation that is in no list, if it gets a weight matrix."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        weights = [t for t in tensors if t.dim() > 1 and self._kind(t)[1] == "weight"]
        if len(tensors) < 2 or not weights or func in _NO_PRODUCTS:
            return
        missing = {"weight" for t in weights if not self._is_quantized(t)}
        missing |= {"input" for t in tensors if t.is_floating_point() and self._kind(t) == (None, "input")}
        if missing:
            name = getattr(func, "__name__", "").partition(".")[0].strip("_") or str(func)
            self._note_unquantized(name, " and ".join(sorted(missing)), tensors)

    def _lookup(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self._follow(func, args, out)
        weight = args[LOOKUPS[func]] if len(args) > LOOKUPS[func] else kwargs.get("weight", kwargs.get("input"))
        if not isinstance(weight, Tensor) or weight not in self._layers:
            return
        module = self._module()
        if module not in self._left_out and not isinstance(module, Quantizer):
            finding = (self._where(), self._layers[weight])
            if finding not in self.report.lookups:
                self.report.lookups.append(finding)

    def _note_unquantized(self, operation: str, missing: str, operands: Iterable[Any] = ()) -> None:
        where = self._where()
        finding = (where, operation, missing)
        if finding not in self.report.unquantized:
            self.report.unquantized.append(finding)
        names = [
            self._parameters[value] for value in operands if isinstance(value, Tensor) and value in self._parameters
        ]
        for name in names:
            parameters = self.report.weights.setdefault(finding, [])
            if name.rpartition(".")[0] != where and name not in parameters:
                parameters.append(name)

    def _product_of_two(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """Check a product outside of layers: of two activations, or of an activation and a Parameter."""
        where, name = self._where(), func.__name__.strip("_")
        operands = product_operands(func, args, kwargs)
        kinds = [self._kind(operand) for operand in operands]
        if len(kinds) < 2:
            return
        layer = self._module()
        if self._computes_weight(layer, where, operands):
            return
        mixed = [quantizer for quantizer, kind in kinds if quantizer is not None and kind == "weight"]
        if mixed and isinstance(layer, QuantizedLayer):
            self._quantized[out] = mixed[0]
        missing = {kind for quantizer, kind in kinds if quantizer is None}
        left = kinds[0][0]
        if not missing and left is not None and left.kind == "activation":
            self._note_macs(left, multiply_accumulates(func, args, operands, out) // self._samples(operands[0]), where)
        if missing and any(kind == "weight" for _, kind in kinds):
            self._note_unquantized(name, " and ".join(sorted(missing)), operands)
        elif missing:
            self.report.activation_products.append((where, name))
            if self._all_products and not isinstance(layer, QuantizedProducts):
                self.report.overlooked.append((where, name))

    def _computes_weight(self, layer: nn.Module | None, where: str, operands: list[Tensor]) -> bool:
        """Whether a product is part of computing a quantized layer's weight, such as a spectral norm."""
        owner, inside, _ = where.partition(".parametrizations.")
        if inside or where.startswith("parametrizations."):
            return isinstance(self.model.get_submodule(owner if inside else ""), QuantizedLayer)
        stored = all(operand in self._parameters or operand in self._buffers for operand in operands)
        return stored and isinstance(layer, QuantizedLayer) and is_computed(layer)

    def _kind(self, value: Any) -> tuple[Quantizer | None, str]:
        """The quantizer of an operand, and whether the operand is a weight or an input."""
        if not isinstance(value, Tensor):
            return None, "input"
        quantizer = self._quantized.get(value)
        weight = value in self._parameters or (quantizer is not None and quantizer.kind == "weight")
        return quantizer, "weight" if weight else "input"

    def _product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        operands = product_operands(func, args, kwargs)
        layer = self._module()
        self._count(func, operands[0], operands[1], out, layer)
        expected = ["input", "weight"]
        if isinstance(layer, QuantizedLayer):
            expected = ["weight"] if layer.input_quantizer is None else expected
        elif layer in self._left_out or self._kind(operands[1])[1] != "weight":
            # For example a blur in an augmentation, which has no weight to quantize.
            return
        missing = [
            name
            for name, operand in zip(("input", "weight"), operands, strict=True)
            if name in expected and not self._is_quantized(operand)
        ]
        if missing:
            self._note_unquantized(func.__name__, " and ".join(missing), operands)

    def _multiplies_quantized(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether all operands of a product are quantized."""
        known = func in WITH_WEIGHT or func in WITHOUT_WEIGHT
        return known and all(map(self._is_quantized, product_operands(func, args, kwargs)))

    def _note_product(self, where: str, macs: int, quantized: bool) -> None:
        total, total_quantized = self.report.products.get(where, (0, 0))
        self.report.products[where] = (total + macs, total_quantized + macs * quantized)

    def _count(self, func: Any, input: Tensor, weight: Tensor, out: Tensor, layer: nn.Module | None) -> None:
        """Count the multiply-accumulates of a product with a quantized weight."""
        quantizer = self._quantized.get(weight)
        if quantizer is None and isinstance(layer, QuantizedLayer):
            quantizer = layer.weight_quantizer
        if quantizer is None or quantizer.kind != "weight":
            return
        places = (input if "transpose" in func.__name__ else out).numel()
        macs = places * (weight.numel() // weight.shape[0]) // self._samples(input)
        self._note_macs(quantizer, macs, self._where())

    def _count_inside(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Count the multiply-accumulates of the quantized weights that a fused operation gets, such as the
        out-projection of attention.
        """
        first = next((leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), None)
        if func is F.multi_head_attention_forward and first is not None and first.dim() == 3:
            # In this layout, tokens are the first dimension.
            self._batch = self._batch or first.shape[1]
        for leaf in tree_leaves((args, kwargs)):
            quantizer = self._quantized.get(leaf) if isinstance(leaf, Tensor) else None
            if first is not None and quantizer is not None and quantizer.kind == "weight":
                macs = first.numel() // first.shape[-1] * leaf.numel()
                self._note_macs(quantizer, macs // self._samples(first), self._where())

    def _note_macs(self, quantizer: Quantizer, macs: int, where: str) -> None:
        """Count each module once, regardless of how often it is called."""
        if (where, quantizer) not in self._counted:
            self._counted.add((where, quantizer))
            name = self._names[quantizer]
            self.report.macs[name] = self.report.macs.get(name, 0) + macs

    def _samples(self, x: Tensor) -> int:
        """Batch size, taken from the first tensor seen; later tensors may fold windows or tokens into it."""
        self._batch = self._batch or (max(1, x.shape[0]) if x.dim() > 1 else 1)
        return self._batch

    def _is_quantized(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self._quantized

    def _module(self) -> nn.Module | None:
        """The innermost module of the model whose code is running, found on Python's call stack without hooks."""
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_argcount:
                module = frame.f_locals.get(code.co_varnames[0])
                if isinstance(module, nn.Module) and module in self._names:
                    return module
            frame = frame.f_back  # type: ignore[assignment]
        return None

    def _where(self) -> str:
        module = self._module()
        return "" if module is None else self._names[module]


def _left_out(model: nn.Module) -> set[nn.Module]:
    """Layers that the config leaves in full precision; if only a part was attached, all layers outside of it."""
    late = set(late_layers(model).values())
    return {module for module in model.modules() if holds_weight(module)} - late
