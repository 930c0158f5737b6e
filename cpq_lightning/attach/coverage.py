"""Coverage: the shares of a model's weights and of a forward's multiply-accumulates that run quantized."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cpq_lightning.attach.audit import Audit, AuditReport, listed
from cpq_lightning.attach.calls import as_call, copied_to, in_evaluation, restored
from cpq_lightning.attach.decomposed import ParameterLayer, whole_parameter
from cpq_lightning.attach.layers import is_attached
from cpq_lightning.attach.timm_layers import weight_parameters
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.watch import Watcher

# Attribute of a module with the results of a forward.
_FORWARD = "_cpq_forward"


@dataclass(frozen=True)
class Left:
    """The part of one module that stays in full precision.

    Attributes:
        weights: Its share of the model's weight elements, 0 to 1.
        macs: Its share of the forward's multiply-accumulates, 0 to 1.
    """

    weights: float
    macs: float


@dataclass(frozen=True)
class Coverage:
    """The shares of a model that run quantized.

    Attributes:
        weights: Share of the weight elements that are read quantized, 0 to 1. Weights are Parameters of two or more
            dimensions: embeddings and position tables count, biases and norms do not.
        macs: Share of a forward's multiply-accumulates with both operands quantized, 0 to 1; products of two
            activations, such as attention's, count.
        left: The remaining parts, by name of the module, or of the Parameter if it belongs to a module that is no
            layer; the largest share of multiply-accumulates first.
    """

    weights: float
    macs: float
    left: dict[str, Left]

    def sentence(self, verb: str = "run quantized") -> str:
        """The shares in one line.

        Example:
            >>> Coverage(0.97, 1.0, {"embedding": Left(0.03, 0.0)}).sentence()
            '97 % of the weights and 100 % of the multiply-accumulates run quantized; in full precision: embedding (3 % of the weights)'
        """  # noqa: E501
        shares = f"{_percent(self.weights)} of the weights and {_percent(self.macs)} of the multiply-accumulates {verb}"
        if not self.left:
            return shares
        parts = [f"{name or 'the model itself'} ({_shares(left)})" for name, left in self.left.items()]
        return f"{shares}; in full precision: {listed(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """The coverage as a dict for JSON."""
        left = [{"name": name, "weights": part.weights, "macs": part.macs} for name, part in self.left.items()]
        return {"weights": self.weights, "macs": self.macs, "left": left}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Coverage:
        """The inverse of :meth:`to_dict`."""
        left = {part["name"]: Left(part["weights"], part["macs"]) for part in content["left"]}
        return Coverage(content["weights"], content["macs"], left)


def _percent(share: float) -> str:
    """Format a share; 100 % and 0 % are exact, never rounded."""
    if 0 < share < 0.001:
        return "<0.1 %"
    digits = math.floor(1000 * share + 1e-9) / 10 if share > 0.5 else round(100 * share, 1)
    return f"{digits:g} %"


def _shares(left: Left) -> str:
    both = ((left.weights, "weights"), (left.macs, "multiply-accumulates"))
    return ", ".join(f"{_percent(share)} of the {what}" for share, what in both if share) or "nothing of either"


def coverage(model: nn.Module, *, example_inputs: Any = None) -> Coverage:
    r"""Measure how much of an attached model runs quantized.

    .. math:: \text{macs} = \sum_{p \in Q} m_p / \sum_p m_p

    over the products :math:`p` of one forward, with :math:`m_p` multiply-accumulates, and :math:`Q` the products with
    both operands quantized. The sum over all products is half of the count of torch's ``FlopCounterMode`` in full
    precision, plus fused attention on a CPU and recurrent layers, which ``FlopCounterMode`` does not count.

    Args:
        model: An attached model.
        example_inputs: Inputs to call the model with, in any form that :func:`attach` accepts; it runs in evaluation,
            without gradients, and does not change. Without them, the results of the last audited forward are used: the
            forward of calibration, or the first one in training or evaluation.

    Raises:
        ValueError: the model is not attached, or no forward of it was recorded and there are no example inputs.

    Example:
        >>> from cpq_lightning import CPQConfig, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), CPQConfig())
        >>> coverage(model, example_inputs=torch.randn(2, 4))
        Coverage(weights=1.0, macs=1.0, left={})
    """
    model = unwrapped(model)
    if not is_attached(model):
        raise ValueError(f"The model {type(model).__name__} is not quantized: call attach(model, config) first.")
    if example_inputs is not None:
        return _coverage(model, _by_module(model, _forward(model, example_inputs)))
    recorded = recorded_coverage(model)
    if recorded is None:
        raise ValueError(
            f"No forward of {type(model).__name__} was recorded: calibrate(model, batches) records one, and so does "
            "the first batch of training. Or give coverage(model, example_inputs=batch). Compiled code cannot be "
            "recorded: compile the model afterwards."
        )
    return recorded


def remember_products(model: nn.Module, report: AuditReport) -> None:
    """Store the results of a forward in the modules, for :func:`coverage`."""
    model = unwrapped(model)
    forget_products(model)
    for module, shown in _by_module(model, report).items():
        module.__dict__[_FORWARD] = shown


def forget_products(model: nn.Module) -> None:
    """Undo :func:`remember_products`."""
    for module in model.modules():
        module.__dict__.pop(_FORWARD, None)


def recorded_coverage(model: nn.Module, once_active: bool = False) -> Coverage | None:
    """:func:`coverage` by the last audited forward; ``None`` if no forward was recorded.

    With ``once_active``, it is the coverage as if all quantizers were active.
    """
    model = unwrapped(model)
    shown = {module: module.__dict__[_FORWARD] for module in model.modules() if _FORWARD in module.__dict__}
    return _coverage(model, shown, once_active) if shown else None


@dataclass(frozen=True)
class _Shown:
    """The results of a forward for one module.

    Attributes:
        macs: Multiply-accumulates of its products.
        quantized: Multiply-accumulates of its products with both operands quantized.
        weight: Whether its weight was read quantized.
    """

    macs: int = 0
    quantized: int = 0
    weight: bool = False


def _by_module(model: nn.Module, report: AuditReport) -> dict[nn.Module, _Shown]:
    modules = dict(model.named_modules())
    never_called = set(report.never_called)
    by_module = {
        module: _Shown(weight=f"{name}.weight_quantizer".lstrip(".") not in never_called)
        for name, module in modules.items()
        if isinstance(module._modules.get("weight_quantizer"), Quantizer)
    }
    for name, (macs, quantized) in report.products.items():
        if name in modules:
            known = by_module.get(modules[name], _Shown())
            by_module[modules[name]] = _Shown(macs, quantized, known.weight)
    return by_module


class _Passing(Watcher):
    """Pass activations in full precision while their range is not known."""

    def passes(self, quantizer: Quantizer, x: Tensor) -> bool:
        return quantizer.kind == "activation" and not quantizer.fitted


def _forward(model: nn.Module, inputs: Any) -> AuditReport:
    args, kwargs = copied_to(model, as_call(model, inputs))
    audit = Audit(model)
    with in_evaluation(model), restored(model, [*model.buffers()]), torch.no_grad():
        with torch.compiler.set_stance("force_eager"), _Passing(), audit:
            model(*args, **kwargs)
    return audit.report


def _coverage(model: nn.Module, shown: Mapping[nn.Module, _Shown], once_active: bool = False) -> Coverage:
    names = {module: name for name, module in model.named_modules()}
    left: dict[str, list[int]] = {}
    elements = quantized_elements = products = quantized_products = 0
    weights: dict[object, tuple[int, str, bool]] = {}
    for name, key, count, module in _weights(model, names, shown):
        runs = module in shown and shown[module].weight and (once_active or _active(module))
        previous = weights.get(key)
        # A weight with several readers runs quantized if all of them read it quantized.
        weights[key] = (count, name, runs) if previous is None or previous[2] else previous
    for count, name, runs in weights.values():
        elements += count
        quantized_elements += count if runs else 0
        if not runs:
            left.setdefault(name, [0, 0])[0] += count
    for module, result in shown.items():
        quantized = result.quantized if once_active or _active(module) else 0
        products += result.macs
        quantized_products += quantized
        if quantized < result.macs:
            left.setdefault(names[module], [0, 0])[1] += result.macs - quantized
    ordered = sorted(left.items(), key=lambda item: (-item[1][1], -item[1][0]))
    return Coverage(
        quantized_elements / elements if elements else 1.0,
        quantized_products / products if products else 1.0,
        {name: Left(count / max(elements, 1), macs / max(products, 1)) for name, (count, macs) in ordered},
    )


def _active(module: nn.Module) -> bool:
    """Whether all quantizers of a module are active."""
    operands = module._modules.get("product_operands")
    quantizers = [m for m in module.children() if isinstance(m, Quantizer)]
    operand_quantizers = [] if operands is None else [m for m in operands.modules() if isinstance(m, Quantizer)]
    return all(quantizer.active for quantizer in (*quantizers, *operand_quantizers))


def _weights(
    model: nn.Module, names: Mapping[nn.Module, str], shown: Mapping[nn.Module, _Shown]
) -> Iterator[tuple[str, object, int, nn.Module]]:
    """Weights: the name to report, a key that is equal for shared weights, the number of elements, and the reader."""
    counted: set[int] = set()
    for module in names:
        quantizer = module._modules.get("weight_quantizer")
        if isinstance(quantizer, Quantizer):
            parameters = weight_parameters(module)
            # Tensors that compute this weight do not count as weights.
            counted.update(id(p) for p in parameters if module._parameters.get("weight") is not p)
            whole = whole_parameter(module) if isinstance(module, ParameterLayer) else next(iter(parameters), None)
            yield names[module], module if whole is None else id(whole), quantizer.numel, module
        elif isinstance(module, ParameterLayer):
            counted.update(id(p) for p in weight_parameters(module))
            yield names[module], module, module.weight.numel(), module
    for module, name in names.items():
        if isinstance(module, Quantizer) or isinstance(module._modules.get("weight_quantizer"), Quantizer):
            continue
        for key, parameter in module._parameters.items():
            if parameter is None or is_lazy(parameter) or parameter.dim() < 2 or id(parameter) in counted:
                continue
            reported_name = name if name and (key == "weight" or module in shown) else f"{name}.{key}".lstrip(".")
            yield reported_name, id(parameter), parameter.numel(), module
