"""Activation ranges from a few batches."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cpq_lightning.attach.audit import Audit
from cpq_lightning.attach.calls import as_batch_call
from cpq_lightning.attach.first_forward import broadcast_report, record_forward, report_audit, set_audited
from cpq_lightning.attach.first_last import settle_first_and_last
from cpq_lightning.attach.layers import is_attached, quantized_layers, quantizers
from cpq_lightning.attach.range_tracking import InputSampler, RangeTracker, outgrown, sampled_inputs
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.nn.observer import RangeObserver, Usage, UsageRecorder, pool
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.watch import Watcher

M = TypeVar("M", bound=nn.Module)
log = logging.getLogger("cpq_lightning")


def calibrate(
    model: M,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], Any] | None = None,
    most: int = 16,
) -> M:
    """Set the activation ranges of an attached model from a few batches.

    Activations pass in full precision while they are observed, weights are quantized. Each range is the step of
    least squared error on a histogram over all batches (and, under ``torch.distributed``, all ranks). The first
    batch also shows which layers truly run first and last and what they multiply, and is audited as a first forward
    is; where no activation is to be observed, it is the only one. Weights that were fitted at attachment are fitted
    again: they may have been initialized or loaded since. The model runs in the mode it is in, without
    gradients; its buffers (batch norm's statistics) and the random state are afterwards what they were.

    Args:
        model: An attached model.
        batches: What to run: inputs; or tuples or lists whose first element is the input, as ``(images, labels)``. An
            input is a tensor, or the dict, tuple or list that the forward takes as its one argument; or a dict of its
            arguments by name, or, where it takes more than one, a tuple or list of them. Read once, held in memory.
        forward: How to run one batch, where that is another: ``lambda batch: model(*batch[0], **batch[1])``.
        most: Take at most this many batches.

    Returns:
        The model itself.

    Raises:
        ValueError: the model is not attached, or there is no batch, or an empty one.
        TypeError: the forward takes no such input.
        FailedElsewhere: a forward failed in another process.
    """
    if not is_attached(model):
        raise ValueError(f"The model {type(model).__name__} is not quantized: call attach(model, config) first.")
    held = list(itertools.islice(batches, most))
    if not held:
        raise ValueError("calibrate got no batch: expected an iterable of at least one batch of training data.")
    run = forward or (lambda batch: _call(model, batch))
    inner = unwrapped(model)
    for _, layer in quantized_layers(inner):
        if not layer.weight_quantizer.settled:
            # Fitted at attachment: the weights may have been initialized or loaded since.
            layer.weight_quantizer.fit_weight(layer.read_weight())
    # And those that have been trained may have been rewritten, as by merging an adapter.
    RangeTracker(inner).renew_weights(frozen=True)
    observed = [q for _, q in quantizers(inner) if q.kind == "activation" and q.active]
    observing = _Observing(observed)
    with _untouched(inner), torch.no_grad(), _uncompiled():
        set_audited(inner, inner.training)
        audit = Audit(inner)

        def first_pass() -> None:
            with audit:
                run(held[0])
            for batch in held[1:] if observed else ():
                run(batch)

        def second_pass() -> None:
            for batch in held if observed else ():
                run(batch)

        with observing:
            _on_all(first_pass, inner)
            for quantizer, observer in observing.observers.items():
                observer.close_range(quantizer.state.device)
            _on_all(second_pass, inner)
    report = broadcast_report(audit.report)
    settle_first_and_last(inner, report.order)
    record_forward(inner, report)
    for quantizer, observer in observing.observers.items():
        quantizer.fit_activation(observer)
    report_audit(inner, report)
    zeros = [name for name, q in quantizers(inner) if q in observing.observers and q.settled and not q.fitted]
    if zeros:
        # As behind a branch that starts at zero by design: no fault, unless it stays so.
        log.info(
            "Calibration has seen nothing but zeros at %d activation quantizers, whose range the first other values "
            "set: %s.",
            len(zeros),
            ", ".join(zeros),
        )
    return model


class _Observing(Watcher):
    """Activations pass in full precision, and are observed."""

    def __init__(self, quantizers: Iterable[Quantizer]) -> None:
        self.observers = {quantizer: RangeObserver() for quantizer in quantizers}

    def passes(self, quantizer: Quantizer, x: Tensor) -> bool:
        observer = self.observers.get(quantizer)
        if observer is not None:
            observer.update(x)
        return observer is not None


class FailedElsewhere(RuntimeError):
    """What was done by all processes at once has failed in another one."""


def _on_all(run: Callable[[], None], model: nn.Module) -> None:
    """Run something that may fail on one process only: then all of them fail, and none waits for it."""
    error: Exception | None = None
    try:
        run()
    except Exception as caught:
        error = caught
    device = next(model.parameters()).device
    anywhere = pool(torch.tensor(float(error is not None), device=device), dist.ReduceOp.MAX)
    if error is not None:
        raise error
    if anywhere:
        raise FailedElsewhere("a training step failed in another process")


def _uncompiled() -> Any:
    """Compiled code runs as it was written meanwhile: observers and audits look at its values in Python."""
    return torch.compiler.set_stance("force_eager")


def _call(model: nn.Module, batch: Any) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        call = as_batch_call(model, batch)
    except TypeError as error:
        raise TypeError(f"batches: {error}: say how to run one, calibrate(..., forward=...).") from None
    args, kwargs = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, call)
    return model(*args, **kwargs)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Run something that leaves the model's buffers and the random state as they were."""
    skip = {id(b) for _, q in quantizers(model) for b in q.buffers()}
    saved = [(b, b.detach().clone()) for b in model.buffers() if id(b) not in skip]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


@contextmanager
def recording(model: nn.Module) -> Iterator[None]:
    """Record which levels activations use, for :func:`~cpq_lightning.levels` to report.

    Example:
        ``with recording(model): model(batch)``, then ``levels(model)``.
    """
    watched = [q for _, q in quantizers(model) if q.kind == "activation" and q.active and q.fitted]
    usage = _Recording(watched)
    try:
        with _uncompiled(), usage:
            yield
    finally:
        usage.note()


class _Recording(InputSampler):
    """What activations are quantized to is counted, as evaluation quantizes them."""

    def __init__(self, quantizers: Iterable[Quantizer]) -> None:
        quantizers = list(quantizers)
        super().__init__(quantizers)
        grids = {quantizer: quantizer.grid() for quantizer in quantizers}
        self.steps = {quantizer: step.detach() for quantizer, (step, _, _) in grids.items()}
        self.recorders = {quantizer: UsageRecorder(int(low), int(high)) for quantizer, (_, low, high) in grids.items()}

    def on_quantized(self, quantizer: Quantizer, x: Tensor, out: Tensor | None) -> None:
        super().on_quantized(quantizer, x, out)
        if quantizer in self.recorders:
            with torch.no_grad():
                values = quantizer.nearest(x) if out is None else out
                self.recorders[quantizer].update(x, values, self.steps[quantizer])

    @torch.no_grad()
    def note(self) -> None:
        """Leave with the quantizers what was measured."""
        fresh = {q: outgrown(q, rows, counts)[1] for q, rows, counts in sampled_inputs(self, pooled=False)}
        for quantizer, recorder in self.recorders.items():
            if recorder.used_levels:
                error, clipped = recorder.relative_error, recorder.clipped_share
                quantizer.measured = Usage(recorder.used_levels, error, clipped, fresh.get(quantizer, 0.0))
