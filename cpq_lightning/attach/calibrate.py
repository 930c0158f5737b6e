"""Calibration: fit activation ranges on a few batches."""

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
from cpq_lightning.attach.calls import as_batch_call, restored
from cpq_lightning.attach.first_forward import broadcast_report, record_forward, report_audit, set_audited
from cpq_lightning.attach.first_last import settle_first_and_last
from cpq_lightning.attach.layers import is_attached, quantized_layers, quantizers
from cpq_lightning.attach.range_tracking import InputSampler, RangeTracker, outgrown, sampled_inputs
from cpq_lightning.attach.wrapping import unwrapped
from cpq_lightning.errors import CPQError
from cpq_lightning.nn.observer import RangeObserver, Usage, UsageRecorder, pool
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.watch import Watcher

M = TypeVar("M", bound=nn.Module)
# Default of every setting of this name.
CALIBRATION_BATCHES = 8
log = logging.getLogger("cpq_lightning")


def calibrate(
    model: M,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], Any] | None = None,
    calibration_batches: int = CALIBRATION_BATCHES,
) -> M:
    """Set the activation ranges of an attached model from a few batches.

    Activations pass in full precision while they are observed; weights are quantized. Each range uses the scale of
    least squared error on a histogram over all batches (and, under ``torch.distributed``, over all ranks). The first
    batch also shows which layers run first and last and what they multiply, and is audited like a first forward; if
    there is no activation to observe, only this batch is run. Weight scales that were fitted during attach are fitted
    again, because weights may have been initialized or loaded since. The model runs in its current mode, without
    gradients; its buffers (batch norm statistics) and the random state are restored afterwards.

    Args:
        model: An attached model.
        batches: Batches to run: inputs, or tuples or lists whose first element is the input, as ``(images, labels)``.
            An input is a tensor, or the dict, tuple or list that the forward takes as its only argument; or a dict of
            its arguments by name; or, if it takes several, a tuple or list of them. The iterable is read once, and its
            batches are kept in memory.
        forward: A function that runs one batch, for other formats: ``lambda batch: model(*batch[0], **batch[1])``.
        calibration_batches: The largest number of batches to use.

    Returns:
        The model itself.

    Raises:
        ValueError: the model is not attached, there is no batch, a batch is empty, or ``calibration_batches`` is below
            1.
        TypeError: the forward does not accept such an input.
        FailedElsewhere: a forward failed in another process.
    """
    if not is_attached(model):
        raise ValueError(f"The model {type(model).__name__} is not quantized: call attach(model, config) first.")
    check_calibration_batches(calibration_batches)
    kept = list(itertools.islice(batches, calibration_batches))
    if not kept:
        raise ValueError("calibrate got no batch: expected an iterable of at least one batch of training data.")
    run = forward or (lambda batch: _call(model, batch))
    inner = unwrapped(model)
    for _, layer in quantized_layers(inner):
        if not layer.weight_quantizer.settled:
            # The weights may have been initialized or loaded since attach.
            layer.weight_quantizer.fit_weight(layer.read_weight())
    # Trained weights may have been rewritten as well, for example by merging an adapter.
    RangeTracker(inner).renew_weights(frozen=True, rewritten=True)
    observed = [q for _, q in quantizers(inner) if q.kind == "activation" and q.active]
    observing = _Observing(observed)
    of_quantizers = {id(b) for _, q in quantizers(inner) for b in q.buffers()}
    with restored(inner, [b for b in inner.buffers() if id(b) not in of_quantizers]), torch.no_grad(), _eager():
        set_audited(inner, inner.training)
        audit = Audit(inner)

        def first_pass() -> None:
            with audit:
                run(kept[0])
            for batch in kept[1:] if observed else ():
                run(batch)

        def second_pass() -> None:
            for batch in kept if observed else ():
                run(batch)

        with observing:
            _run_on_all_processes(first_pass, inner)
            for quantizer, observer in observing.observers.items():
                observer.close_range(quantizer.state.device)
            _run_on_all_processes(second_pass, inner)
    report = broadcast_report(audit.report)
    settle_first_and_last(inner, report.execution_order)
    record_forward(inner, report)
    for quantizer, observer in observing.observers.items():
        quantizer.fit_activation(observer)
    report_audit(inner, report)
    zeros = [name for name, q in quantizers(inner) if q in observing.observers and q.settled and not q.fitted]
    if zeros:
        # For example after a branch that starts at zero by design: not an error, unless it stays zero.
        log.info(
            "Calibration has seen nothing but zeros at %d activation quantizers; the first nonzero values will set "
            "their ranges: %s.",
            len(zeros),
            ", ".join(zeros),
        )
    return model


def check_calibration_batches(count: int) -> None:
    """Check the setting ``calibration_batches``.

    Raises:
        ValueError: it is below 1.
    """
    if count < 1:
        raise ValueError(f"calibration_batches must be at least 1, got {count}.")


class _Observing(Watcher):
    """Pass activations in full precision, and observe their ranges."""

    def __init__(self, quantizers: Iterable[Quantizer]) -> None:
        self.observers = {quantizer: RangeObserver() for quantizer in quantizers}

    def passes(self, quantizer: Quantizer, x: Tensor) -> bool:
        observer = self.observers.get(quantizer)
        if observer is not None:
            observer.update(x)
        return observer is not None


class FailedElsewhere(CPQError, RuntimeError):
    """An operation that all processes run together failed in another process."""


def _run_on_all_processes(run: Callable[[], None], model: nn.Module) -> None:
    """Run a function on all processes; if it fails on one, it raises on all, so that no process waits forever."""
    error: Exception | None = None
    try:
        run()
    except Exception as caught:
        error = caught
    device = next(model.parameters()).device
    failed = pool(torch.tensor(float(error is not None), device=device), dist.ReduceOp.MAX)
    if error is not None:
        raise error
    if failed:
        raise FailedElsewhere("a training step failed in another process")


def _eager() -> Any:
    """Run compiled code eagerly, because observers and audits read values in Python."""
    return torch.compiler.set_stance("force_eager")


def _call(model: nn.Module, batch: Any) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        call = as_batch_call(model, batch)
    except TypeError as error:
        raise TypeError(f"batches: {error}: pass a function that runs one, calibrate(..., forward=...).") from None
    args, kwargs = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, call)
    return model(*args, **kwargs)


@contextmanager
def recording(model: nn.Module) -> Iterator[None]:
    """Record which levels activations use, for :func:`~cpq_lightning.levels` to report.

    Example:
        ``with recording(model): model(batch)``, then ``levels(model)``.
    """
    watched = [q for _, q in quantizers(model) if q.kind == "activation" and q.active and q.fitted]
    usage = _Recording(watched)
    try:
        with _eager(), usage:
            yield
    finally:
        usage.store()


class _Recording(InputSampler):
    """Count the levels to which activations are quantized, as evaluation quantizes them."""

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
    def store(self) -> None:
        """Store the measurements in the quantizers."""
        fresh = {q: outgrown(q, rows, counts)[1] for q, rows, counts in sampled_inputs(self, pooled=False)}
        for quantizer, recorder in self.recorders.items():
            if recorder.used_levels:
                error, clipped = recorder.relative_error, recorder.clipped_share
                quantizer.measured = Usage(recorder.used_levels, error, clipped, fresh.get(quantizer, 0.0))
