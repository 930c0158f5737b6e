"""The audits of an attached model's first forwards: when they are made, what is noted, and how it is reported.

The first forward in training is audited, and the first in evaluation: the one may call what the other does not.
Nothing is changed between a forward and its backward: what a forward has shown of the layers' order is acted on when
the weights have been updated since.
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
    """The audits under way in a thread, with their models."""

    def __init__(self) -> None:
        self.audits: list[tuple[nn.Module, Audit]] = []


_started = _Started()


def audit_first_forwards(model: nn.Module) -> None:
    """Audit the model's next forwards in training and in evaluation, and report them with warnings.

    The hooks stay, so that none is removed while another thread walks over them.
    """
    forget_first_forwards(model)
    # Modes of which no forward has been seen yet: whichever thread takes one out makes the audit.
    model.__dict__[_PENDING] = [True, False]
    model.__dict__[_TRACKING] = _Tracking(model)
    model.register_forward_pre_hook(_start)
    model.register_forward_hook(_finish, always_call=True)


def forget_first_forwards(model: nn.Module) -> None:
    """Take back :func:`audit_first_forwards`, of a model and of its parts."""
    for module in model.modules():
        for name in (_PENDING, _SHOWN, _SAID, _TRACKING):
            module.__dict__.pop(name, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for handle, hook in list(hooks.items()):
                if hook in (_start, _finish):
                    del hooks[handle]
                    module._forward_hooks_always_called.pop(handle, None)


def set_audited(model: nn.Module, training: bool) -> bool:
    """Note that a forward in training, or in evaluation, has been audited otherwise; whether it had not been before."""
    try:
        unwrapped(model).__dict__.get(_PENDING, []).remove(training)
    except ValueError:
        return False
    return True


def record_forward(model: nn.Module, report: AuditReport, counts: bool = True) -> None:
    """Write into the quantizers what a forward showed: the order of the layers, and what their weights multiply.

    Args:
        model: The model that made it.
        report: What it showed.
        counts: Whether to take its count of an activation's elements, which gradients depend on.
    """
    model = unwrapped(model)
    remember_products(model, report)
    modules = dict(model.named_modules())
    facts: dict[Quantizer, dict[str, int]] = {}
    for place, name in enumerate(report.order, start=1):
        layer = modules.get(name)
        if isinstance(layer, QuantizedLayer):
            for quantizer in (layer.weight_quantizer, layer.input_quantizer):
                if quantizer is not None:
                    facts.setdefault(quantizer, {})["execution_index"] = place
    for what, found in (("macs", report.macs), ("numel", report.numel)):
        for name, count in found.items():
            quantizer = modules.get(name)
            if isinstance(quantizer, Quantizer) and (counts or what != "numel"):
                facts.setdefault(quantizer, {})[what] = count
    for quantizer, values in facts.items():
        quantizer.configure(has_facts=True, **values)


def record_uncalled(model: nn.Module, report: AuditReport) -> None:
    """Write into the quantizers what a forward in evaluation showed of layers that training does not call."""
    model = unwrapped(model)
    known = [layer for _, layer in quantized_layers(model) if layer.weight_quantizer.execution_index]
    if not known:
        return
    last = max(layer.weight_quantizer.execution_index for layer in known)
    modules = dict(model.named_modules())
    new = [modules[name] for name in report.order if modules.get(name) not in known]
    for place, layer in enumerate((m for m in new if isinstance(m, QuantizedLayer)), start=last + 1):
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer is not None and not quantizer.execution_index:
                quantizer.configure(has_facts=True, execution_index=place)
    for name, macs in report.macs.items():
        quantizer = modules.get(name)
        if isinstance(quantizer, Quantizer) and not quantizer.macs:
            quantizer.configure(has_facts=True, macs=macs)


def broadcast_report(report: AuditReport) -> AuditReport:
    """The report of the first process, where there are several: called by all of them at once.

    Each has seen batches of its own. What is decided from what a forward showed, such as which layers are first and
    last, or what a width costs, has to be the same on all.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return report
    held = [report]
    dist.broadcast_object_list(held)
    return held[0]


def report_audit(model: nn.Module, report: AuditReport, evaluation: bool = False) -> None:
    """Say what an audit of a first forward found: a warning for what is amiss, else the log.

    What an earlier one of the same model has said is not said again, nor that evaluation leaves out what only training
    calls, such as a second head.
    """
    forward = "the first forward in evaluation" if evaluation else "the first forward"
    said: set[Any] = unwrapped(model).__dict__.setdefault(_SAID, set())
    names = ("never_called", "unquantized", "activation_products", "overlooked", "lookups")
    new = AuditReport(weights=report.weights)
    for name in names[1:] if evaluation else names:
        setattr(new, name, [found for found in getattr(report, name) if (name, found) not in said])
        said.update((name, found) for found in getattr(new, name))
    ends = nothing_between(model)
    if ends is not None and ends not in said:
        said.add(ends)
        warnings.warn(ends, stacklevel=2)
    for message in new.messages(forward):
        if message.startswith(f"{len(new.activation_products)} products of two"):
            log.info(message)
        else:
            warnings.warn(message, stacklevel=2)


def is_training(model: nn.Module) -> bool:
    """Whether weights have been updated behind the last forward in training that the model's hooks have followed."""
    tracking: _Tracking | None = unwrapped(model).__dict__.get(_TRACKING)
    return tracking is not None and tracking.is_behind()


def _start(model: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if is_transformed():
        if torch._C._is_tracing():
            _note_trace(model)
        return
    if model.training and torch.is_grad_enabled():
        _act_on_what_was_shown(model)
        if _TRACKING in model.__dict__:
            model.__dict__[_TRACKING].before_forward()
    watched = any(isinstance(watcher, Audit) for watcher in watchers())
    if model.__dict__.get(_PENDING) and not watched and auditable(model) and set_audited(model, model.training):
        audit = Audit(model)
        _started.audits.append((model, audit))
        audit.__enter__()


def _note_trace(model: nn.Module) -> None:
    # What is read while a module is traced are shapes, and settings that hold for all of its inputs.
    warnings.filterwarnings("ignore", category=TracerWarning, module=r"cpq_lightning\.")
    if model.training:
        warnings.warn(
            "A quantized model is traced in training mode. No gradient passes the quantizers of a traced module, and "
            "it draws no bits: call model.eval() before torch.jit.trace, and train the model itself.",
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
        # The forward raised: the next one is the first.
        model.__dict__.setdefault(_PENDING, []).append(model.training)
        return
    record_forward(model, audit.report, counts=False)
    if model.training:
        model.__dict__[_SHOWN] = (audit.report, _versions(model))
    report_audit(model, audit.report, evaluation=not model.training)


def _act_on_what_was_shown(model: nn.Module) -> None:
    """Give first and last layer their widths, where the first forward in training has shown others than were guessed.

    Once a weight has been updated there has been a backward: nothing of that forward is computed again.
    """
    shown = model.__dict__.get(_SHOWN)
    if shown is None:
        return
    report, versions = shown
    if _versions(model) != versions:
        del model.__dict__[_SHOWN]
        settle_first_and_last(model, report.order)
        record_forward(model, report)


def _versions(model: nn.Module) -> list[int]:
    return [p._version for _, layer in quantized_layers(model) for p in weight_parameters(layer)]


class _Tracking:
    """Ranges that training outgrows, in a loop that knows nothing of them: a step is what has updated a weight.

    How many there were is kept with the first quantizer, and what a forward has shown of its inputs with theirs until
    the next step: a run that is resumed goes on as it would have. Where there are several processes only weights are
    looked at: they are the same on all, and inputs are not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tracker = RangeTracker(model)
        self._layers: list[Any] = []
        self._inputs: list[Quantizer] = []
        self._versions: list[tuple[int, int]] | None = None
        self._training = False

    def before_forward(self) -> None:
        """Called ahead of a forward in training."""
        versions = self._written()
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
                    # Here and not in the layer, whose forward may run without gradients and again with them.
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
        """Called behind each forward."""
        if self._training:
            self._training = False
            self.tracker.pause()
            self.tracker.propose()

    def is_behind(self) -> bool:
        """Whether weights are not those of the last forward in training, of which there has been one."""
        return self._versions is not None and self._versions != self._written()

    def _written(self) -> list[tuple[int, int]]:
        """What changes where a weight is written to; who replaces what a Parameter holds changes no version."""
        if not self._layers or not all(isinstance(layer, QuantizedLayer) for layer in self._layers):
            # A part may have been detached.
            self._layers = [layer for _, layer in quantized_layers(self.tracker.model)]
            self._inputs = [q for _, q in quantizers(self.tracker.model) if q.kind == "activation"]
        found = []
        for p in (p for layer in self._layers for p in weight_parameters(layer) if not p.is_meta):
            tensor = p._local_tensor if isinstance(p, DTensor) else p
            plain = type(tensor) in (Tensor, nn.Parameter)
            found.append((0 if tensor.is_inference() else tensor._version, tensor.data_ptr() if plain else 0))
        return found


def auditable(module: nn.Module) -> bool:
    """Whether an audit can watch a model: compiled code runs no Python that an audit could watch."""
    return not any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())
