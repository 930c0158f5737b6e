"""The audit of an attached model's first forward: when it is made, what is noted of it, and how it is reported."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cpq_lightning.attach.audit import Audit, AuditReport
from cpq_lightning.attach.layers import QuantizedLayer
from cpq_lightning.nn import Quantizer

log = logging.getLogger("cpq_lightning")


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
    elif state is None and not auditable(model):
        # A part of it is compiled.
        model.__dict__["_cpq_audit"] = "done"
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
