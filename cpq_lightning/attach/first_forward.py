"""Audits of an attached model's first forwards: when they run, what they record, and how they are reported.

The first forward in training and the first in evaluation are audited, because each may call layers that the other does
not. Nothing changes between a forward and its backward: the layer order that a forward shows takes effect only after
the weights have been updated.
"""

from __future__ import annotations

import logging
import threading
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.jit._trace import TracerWarning

from cpq_lightning.attach.audit import Audit, AuditReport
from cpq_lightning.attach.coverage import remember_products
from cpq_lightning.attach.first_last import nothing_between, settle_first_and_last
from cpq_lightning.attach.layers import QuantizedLayer, quantized_layers, quantizers
from cpq_lightning.attach.range_tracking import RangeTracker, is_due
from cpq_lightning.attach.timm_layers import weight_parameters
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.functional.modes import is_transformed
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.watch import watchers

log = logging.getLogger("cpq_lightning")


_PENDING, _SHOWN, _SAID, _TRACKING = "_cpq_unaudited", "_cpq_shown", "_cpq_said", "_cpq_tracking"


class _Started(threading.local):
    """The running audits of a thread, with their models."""

    def __init__(self) -> None:
        self.audits: list[tuple[nn.Module, Audit]] = []


_started = _Started()


def audit_first_forwards(model: nn.Module) -> None:
    """Audit the model's next forwards in training and in evaluation, and report them with warnings.

    The hooks stay registered, because removing one would break another thread that iterates over them.
    """
    forget_first_forwards(model)
    # Modes without an audited forward yet; the thread that removes one of them audits.
    model.__dict__[_PENDING] = [True, False]
    model.__dict__[_TRACKING] = _Tracking(model)
    model.register_forward_pre_hook(_start)
    model.register_forward_hook(_finish, always_call=True)


def forget_first_forwards(model: nn.Module) -> None:
    """Undo :func:`audit_first_forwards` for a model and all its submodules."""
    for module in model.modules():
        for name in (_PENDING, _SHOWN, _SAID, _TRACKING):
            module.__dict__.pop(name, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for handle, hook in list(hooks.items()):
                if hook in (_start, _finish):
                    del hooks[handle]
                    module._forward_hooks_always_called.pop(handle, None)


def set_audited(model: nn.Module, training: bool) -> bool:
    """Mark the mode (training or evaluation) as audited; return whether it was not audited before."""
    try:
        unwrapped(model).__dict__.get(_PENDING, []).remove(training)
    except ValueError:
        return False
    return True


def record_forward(model: nn.Module, report: AuditReport, counts: bool = True) -> None:
    """Write the results of a forward into the quantizers: the order of the layers, and what their weights multiply.

    Args:
        model: The model of the forward.
        report: The report of the forward's audit.
        counts: Whether to store the number of elements of each activation, on which gradients depend.
    """
    model = unwrapped(model)
    remember_products(model, report)
    modules = dict(model.named_modules())
    facts: dict[Quantizer, dict[str, int]] = {}
    for index, name in enumerate(report.execution_order, start=1):
        layer = modules.get(name)
        if isinstance(layer, QuantizedLayer):
            for quantizer in (layer.weight_quantizer, layer.input_quantizer):
                if quantizer is not None:
                    facts.setdefault(quantizer, {})["execution_index"] = index
    for what, counted in (("macs", report.macs), ("numel", report.numel)):
        for name, count in counted.items():
            quantizer = modules.get(name)
            if isinstance(quantizer, Quantizer) and (counts or what != "numel"):
                facts.setdefault(quantizer, {})[what] = count
    for quantizer, values in facts.items():
        quantizer.configure(has_facts=True, **values)


def record_uncalled(model: nn.Module, report: AuditReport) -> None:
    """Write into the quantizers what a forward in evaluation shows about layers that training does not call."""
    model = unwrapped(model)
    known = [layer for _, layer in quantized_layers(model) if layer.weight_quantizer.execution_index]
    if not known:
        return
    last = max(layer.weight_quantizer.execution_index for layer in known)
    modules = dict(model.named_modules())
    new = [modules[name] for name in report.execution_order if modules.get(name) not in known]
    for index, layer in enumerate((m for m in new if isinstance(m, QuantizedLayer)), start=last + 1):
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer is not None and not quantizer.execution_index:
                quantizer.configure(has_facts=True, execution_index=index)
    for name, macs in report.macs.items():
        quantizer = modules.get(name)
        if isinstance(quantizer, Quantizer) and not quantizer.macs:
            quantizer.configure(has_facts=True, macs=macs)


def broadcast_report(report: AuditReport) -> AuditReport:
    """The report of the first process, if there are several; all processes must call this together.

    Each process sees different batches. Decisions that depend on a forward, such as which layers are first and last, or
    the cost of a width, must be the same on all processes.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return report
    reports = [report]
    dist.broadcast_object_list(reports)
    return reports[0]


def report_audit(model: nn.Module, report: AuditReport, evaluation: bool = False) -> None:
    """Report the findings of a first forward's audit: warnings for problems, else log messages.

    Findings that an earlier audit of the same model reported are not repeated. Evaluation does not report quantizers
    that were not called, because training alone may call them, as for a second head.
    """
    forward = "the first forward in evaluation" if evaluation else "the first forward"
    reported: set[Any] = unwrapped(model).__dict__.setdefault(_SAID, set())
    names = ("never_called", "unquantized", "activation_products", "overlooked", "lookups")
    new = AuditReport(weights=report.weights, unsearched=report.unsearched)
    for name in names[1:] if evaluation else names:
        setattr(new, name, [finding for finding in getattr(report, name) if (name, finding) not in reported])
        reported.update((name, finding) for finding in getattr(new, name))
    warning = nothing_between(model)
    if warning is not None and warning not in reported:
        reported.add(warning)
        warnings.warn(warning, stacklevel=2)
    for message in new.messages(forward):
        if message.startswith(f"{len(new.activation_products)} products of two"):
            log.info(message)
        else:
            warnings.warn(message, stacklevel=2)


def is_training(model: nn.Module) -> bool:
    """Whether weights have been updated since the last forward in training that the model's hooks have seen."""
    tracking: _Tracking | None = unwrapped(model).__dict__.get(_TRACKING)
    return tracking is not None and tracking.weights_updated()


def _start(model: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if is_transformed():
        if torch._C._is_tracing():
            _warn_of_tracing(model)
        return
    if model.training and torch.is_grad_enabled():
        _apply_execution_order(model)
        if _TRACKING in model.__dict__:
            model.__dict__[_TRACKING].before_forward()
    watched = any(isinstance(watcher, Audit) for watcher in watchers())
    if model.__dict__.get(_PENDING) and not watched and auditable(model) and set_audited(model, model.training):
        audit = Audit(model)
        _started.audits.append((model, audit))
        audit.__enter__()


def _warn_of_tracing(model: nn.Module) -> None:
    # Code that runs during tracing reads only shapes, and settings that hold for all inputs.
    warnings.filterwarnings("ignore", category=TracerWarning, module=r"cpq_lightning\.")
    if model.training:
        warnings.warn(
            "A quantized model is traced in training mode. The quantizers of a traced module pass no gradient and drop "
            "no bits: call model.eval() before torch.jit.trace, and train the model itself.",
            stacklevel=2,
        )


def _finish(model: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling() or is_transformed():
        return
    if _TRACKING in model.__dict__:
        model.__dict__[_TRACKING].after_forward()
    if not _started.audits or _started.audits[-1][0] is not model:
        return
    _, audit = _started.audits.pop()
    audit.__exit__(None, None, None)
    if output is None:
        # The forward raised, so the next one counts as the first.
        model.__dict__.setdefault(_PENDING, []).append(model.training)
        return
    record_forward(model, audit.report, counts=False)
    if model.training:
        model.__dict__[_SHOWN] = (audit.report, _versions(model))
    report_audit(model, audit.report, evaluation=not model.training)


def _apply_execution_order(model: nn.Module) -> None:
    """Move ``first_last_bits`` to the layers that the first forward in training showed as first and last.

    A weight that has been updated proves that the backward is over, so that forward is not recomputed.
    """
    shown = model.__dict__.get(_SHOWN)
    if shown is None:
        return
    report, versions = shown
    if _versions(model) != versions:
        del model.__dict__[_SHOWN]
        settle_first_and_last(model, report.execution_order)
        record_forward(model, report)


def _versions(model: nn.Module) -> list[int]:
    return [p._version for _, layer in quantized_layers(model) for p in weight_parameters(layer)]


class _Tracking:
    """Track ranges by the model's hooks, in a training loop without our callback: a weight update counts as a step.

    The first quantizer keeps the number of steps, and each activation quantizer keeps its proposed range until the next
    step, so a resumed run continues exactly. With several processes, only weights are tracked: weights are equal on all
    processes, inputs are not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tracker = RangeTracker(model)
        self._layers: list[Any] = []
        self._inputs: list[Quantizer] = []
        self._versions: list[tuple[int, int]] | None = None
        self._training = False

    def before_forward(self) -> None:
        """Called before a forward in training."""
        versions = self._weight_versions()
        first = self._layers[0].weight_quantizer
        if first.state.is_meta:
            return
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.tracker.inputs = not several
        steps = first.settings.steps
        if versions != self._versions:
            for layer in self._layers:
                quantizer = layer.weight_quantizer
                if quantizer.active and quantizer.fitted and not quantizer.settled:
                    # Not in the layer's forward, which checkpointing runs without gradients and again with them.
                    quantizer.fit_weight(layer.read_weight())
            if is_due(steps - 1):
                self.tracker.renew_weights()
            for quantizer in self._inputs:
                quantizer.accept()
            self.tracker.forget()
            steps += 1
            first.configure(has_facts=True, steps=steps)
        self._versions = versions
        self._training = True
        self.tracker.before_batch(steps - 1)

    def after_forward(self) -> None:
        """Called after each forward."""
        if self._training:
            self._training = False
            self.tracker.pause()
            self.tracker.propose()

    def weights_updated(self) -> bool:
        """Whether weights have changed since the last forward in training; ``False`` before the first one."""
        return self._versions is not None and self._versions != self._weight_versions()

    def _weight_versions(self) -> list[tuple[int, int]]:
        """A version and an address for each weight; the address shows assignments that change no version."""
        if not self._layers or not all(isinstance(layer, QuantizedLayer) for layer in self._layers):
            # A part of the model may have been detached.
            self._layers = [layer for _, layer in quantized_layers(self.tracker.model)]
            self._inputs = [q for _, q in quantizers(self.tracker.model) if q.kind == "activation"]
        versions = []
        for p in (p for layer in self._layers for p in weight_parameters(layer) if not p.is_meta):
            tensor = p._local_tensor if isinstance(p, DTensor) else p
            plain = type(tensor) in (Tensor, nn.Parameter)
            versions.append((0 if tensor.is_inference() else tensor._version, tensor.data_ptr() if plain else 0))
        return versions


def auditable(module: nn.Module) -> bool:
    """Whether an audit can watch a model; it cannot watch compiled code, which runs no Python."""
    return not any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())
