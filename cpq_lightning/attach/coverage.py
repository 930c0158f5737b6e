"""How much of a model runs quantized: of its weights, and of the multiply-accumulates of a forward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from cpq_lightning.attach.audit import Audit, AuditReport
from cpq_lightning.attach.calls import as_call
from cpq_lightning.attach.layers import is_attached
from cpq_lightning.attach.timm_layers import weight_parameters
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.watch import Watcher

# What a forward has shown of a module, kept on it.
_FORWARD = "_cpq_forward"
# Names in a sentence.
_MOST = 5


@dataclass(frozen=True)
class Left:
    """What of one module stays in full precision.

    Attributes:
        weights: Its share of the model's weight elements, 0 to 1.
        macs: Its share of the forward's multiply-accumulates, 0 to 1.
    """

    weights: float
    macs: float


@dataclass(frozen=True)
class Coverage:
    """How much of a model runs quantized.

    Attributes:
        weights: Share of the weight elements that are quantized when they are read, 0 to 1. Weights are Parameters of
            two or more dimensions: embeddings and tables of positions count, biases and norms do not.
        macs: Share of a forward's multiply-accumulates of which both operands are quantized, 0 to 1; those of two
            activations, such as attention's, count.
        left: The rest, by name of the module, or of the Parameter where a module has it beside layers; the largest
            share of multiply-accumulates first.
    """

    weights: float
    macs: float
    left: dict[str, Left]

    def sentence(self, verb: str = "run quantized") -> str:
        """One line.

        Example:
            >>> Coverage(0.97, 1.0, {"embedding": Left(0.03, 0.0)}).sentence()
            '97 % of the weights and 100 % of the multiply-accumulates run quantized; in full precision: embedding (3 % of the weights)'
        """  # noqa: E501
        shares = f"{_percent(self.weights)} of the weights and {_percent(self.macs)} of the multiply-accumulates {verb}"
        if not self.left:
            return shares
        parts = [f"{name or 'the model itself'} ({_shares(left)})" for name, left in self.left.items()]
        more = f" and {len(parts) - _MOST} more" if len(parts) > _MOST else ""
        return f"{shares}; in full precision: {', '.join(parts[:_MOST])}{more}"

    def to_dict(self) -> dict[str, Any]:
        """The same, as JSON holds it."""
        left = [{"name": name, "weights": part.weights, "macs": part.macs} for name, part in self.left.items()]
        return {"weights": self.weights, "macs": self.macs, "left": left}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Coverage:
        """What :meth:`to_dict` has returned."""
        left = {part["name"]: Left(part["weights"], part["macs"]) for part in content["left"]}
        return Coverage(content["weights"], content["macs"], left)


def _percent(share: float) -> str:
    """Never rounded to all or to nothing."""
    if 0 < share < 0.001:
        return "<0.1 %"
    digits = math.floor(1000 * share + 1e-9) / 10 if share > 0.5 else round(100 * share, 1)
    return f"{digits:g} %"


def _shares(left: Left) -> str:
    both = ((left.weights, "weights"), (left.macs, "multiply-accumulates"))
    return ", ".join(f"{_percent(share)} of the {what}" for share, what in both if share) or "nothing of either"


def coverage(model: nn.Module, example_inputs: Any = None) -> Coverage:
    r"""How much of an attached model runs quantized.

    .. math:: \text{macs} = \sum_{p \in Q} m_p / \sum_p m_p

    over the products :math:`p` of one forward, with :math:`m_p` multiply-accumulates, :math:`Q` those with both
    operands quantized. The sum over all of them is half of what torch's ``FlopCounterMode`` counts in full precision,
    and that of fused attention on a CPU and of recurrent layers, which it does not count.

    Args:
        model: An attached model.
        example_inputs: What to call it with, as :func:`attach` takes them; it runs in evaluation, without gradients,
            and nothing of the model changes. Without them, what its last audited forward has shown: calibration's, or
            the first in training or evaluation.

    Raises:
        ValueError: the model is not attached, or no forward of it was recorded and there are no example inputs.

    Example:
        >>> from cpq_lightning import CPQConfig, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), CPQConfig())
        >>> coverage(model, torch.randn(2, 4))
        Coverage(weights=1.0, macs=1.0, left={})
    """
    model = unwrapped(model)
    if not is_attached(model):
        raise ValueError(f"The model {type(model).__name__} is not quantized: call attach(model, config) first.")
    if example_inputs is not None:
        return _coverage(model, _by_module(model, _forward(model, example_inputs)))
    shown = {module: module.__dict__[_FORWARD] for module in model.modules() if _FORWARD in module.__dict__}
    if not shown:
        raise ValueError(
            f"No forward of {type(model).__name__} was recorded: calibrate(model, batches) records one, and so does "
            "the first batch of training. Or give coverage(model, example_inputs=batch). Compiled code shows none: "
            "compile the model afterwards."
        )
    return _coverage(model, shown)


def remember_products(model: nn.Module, report: AuditReport) -> None:
    """Leave with the modules what a forward has shown of them, for :func:`coverage`."""
    model = unwrapped(model)
    forget_products(model)
    for module, shown in _by_module(model, report).items():
        module.__dict__[_FORWARD] = shown


def forget_products(model: nn.Module) -> None:
    """Take back :func:`remember_products`."""
    for module in model.modules():
        module.__dict__.pop(_FORWARD, None)


def coverage_once_active(model: nn.Module) -> Coverage | None:
    """:func:`coverage` when all quantizers are switched on; ``None`` where no forward was recorded."""
    model = unwrapped(model)
    shown = {module: module.__dict__[_FORWARD] for module in model.modules() if _FORWARD in module.__dict__}
    return _coverage(model, shown, once_active=True) if shown else None


@dataclass(frozen=True)
class _Shown:
    """Of one module in a forward.

    Attributes:
        macs: Of the products that it makes.
        quantized: Those of which both operands are quantized.
        weight: Whether its weight was read quantized.
    """

    macs: int = 0
    quantized: int = 0
    weight: bool = False


def _by_module(model: nn.Module, report: AuditReport) -> dict[nn.Module, _Shown]:
    modules = dict(model.named_modules())
    never = set(report.never_called)
    found = {
        module: _Shown(weight=f"{name}.weight_quantizer".lstrip(".") not in never)
        for name, module in modules.items()
        if isinstance(module._modules.get("weight_quantizer"), Quantizer)
    }
    for name, (macs, quantized) in report.products.items():
        if name in modules:
            known = found.get(modules[name], _Shown())
            found[modules[name]] = _Shown(macs, quantized, known.weight)
    return found


class _Passing(Watcher):
    """Activations of which no range is known pass."""

    def passes(self, quantizer: Quantizer, x: Tensor) -> bool:
        return quantizer.kind == "activation" and not quantizer.fitted


def _forward(model: nn.Module, inputs: Any) -> AuditReport:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def ours(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(like.device, like.dtype if value.is_floating_point() else None)

    args, kwargs = tree_map(ours, as_call(model, inputs))
    modes = {module: module.training for module in model.modules()}
    states = [(b, b.clone()) for b in model.buffers()]
    audit = Audit(model)
    try:
        for module in modes:
            module.training = False
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), torch.random.fork_rng(), _Passing(), audit:
            model(*args, **kwargs)
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in states:
                buffer.copy_(value)
    return audit.report


def _coverage(model: nn.Module, shown: Mapping[nn.Module, _Shown], once_active: bool = False) -> Coverage:
    names = {module: name for name, module in model.named_modules()}
    left: dict[str, list[int]] = {}
    elements = quantized_elements = products = quantized_products = 0
    weights: dict[object, tuple[int, str, bool]] = {}
    for name, key, count, module in _weights(model, names, shown):
        runs = module in shown and shown[module].weight and (once_active or _active(module))
        earlier = weights.get(key)
        # One that several read runs quantized where all of them do.
        weights[key] = (count, name, runs) if earlier is None or earlier[2] else earlier
    for count, name, runs in weights.values():
        elements += count
        quantized_elements += count if runs else 0
        if not runs:
            left.setdefault(name, [0, 0])[0] += count
    for module, one in shown.items():
        quantized = one.quantized if once_active or _active(module) else 0
        products += one.macs
        quantized_products += quantized
        if quantized < one.macs:
            left.setdefault(names[module], [0, 0])[1] += one.macs - quantized
    ordered = sorted(left.items(), key=lambda item: (-item[1][1], -item[1][0]))
    return Coverage(
        quantized_elements / elements if elements else 1.0,
        quantized_products / products if products else 1.0,
        {name: Left(count / max(elements, 1), macs / max(products, 1)) for name, (count, macs) in ordered},
    )


def _active(module: nn.Module) -> bool:
    """Whether no quantizer of a module's own is switched off."""
    operands = module._modules.get("product_operands")
    own = [m for m in module.children() if isinstance(m, Quantizer)]
    inner = [] if operands is None else [m for m in operands.modules() if isinstance(m, Quantizer)]
    return all(quantizer.active for quantizer in (*own, *inner))


def _weights(
    model: nn.Module, names: Mapping[nn.Module, str], shown: Mapping[nn.Module, _Shown]
) -> Iterator[tuple[str, object, int, nn.Module]]:
    """Weights with the name that they are told by, what is the same for those that are shared, and who reads them."""
    taken: set[int] = set()
    for module in names:
        quantizer = module._modules.get("weight_quantizer")
        if isinstance(quantizer, Quantizer):
            parameters = weight_parameters(module)
            # What computes a weight is no weight beside it.
            taken.update(id(p) for p in parameters if module._parameters.get("weight") is not p)
            yield names[module], id(parameters[0]) if parameters else module, quantizer.numel, module
    for module, name in names.items():
        if isinstance(module, Quantizer) or isinstance(module._modules.get("weight_quantizer"), Quantizer):
            continue
        for own, parameter in module._parameters.items():
            if parameter is None or is_lazy(parameter) or parameter.dim() < 2 or id(parameter) in taken:
                continue
            told = name if name and (own == "weight" or module in shown) else f"{name}.{own}".lstrip(".")
            yield told, id(parameter), parameter.numel(), module
