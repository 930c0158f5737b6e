"""Verification that an exported file computes the same as the trained model: codes, layers and outputs are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cpq_lightning.attach.audit import Audit
from cpq_lightning.attach.layers import quantizers, read_layers
from cpq_lightning.errors import ExportError
from cpq_lightning.export.calls import flat_outputs
from cpq_lightning.export.integer_model import evaluated, grid_of, input_of, quantized_inputs
from cpq_lightning.export.samples import Samples
from cpq_lightning.functional.grid import along_channels
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.report.levels import weight_codes

# The name of a layer, and the index of its call in a forward.
Place = tuple[str, int]
# Largest share of a layer's activation codes that may differ, by one level: runtimes round values halfway between two
# levels differently.
MAX_MISMATCHED = 1e-3
# Smallest share of samples with the same class.
LEAST_AGREEMENT = 0.99
# Number of samples for the comparison of layers, whose activations are kept in memory, and the batch size.
_MAX_SAMPLES, _BATCH = 16, 8


class MismatchError(ExportError):
    """An exported file does not compute what the trained model computes."""


class Artefact(Protocol):
    """An exported file, loaded in its runtime."""

    runtime: str
    # Largest difference of outputs, relative to the largest output, where the trained model's values replace the inputs
    # of all quantizers.
    tolerance: float

    def weight_codes(self) -> dict[str, Tensor]:
        """The stored codes of each layer's weight, in the shape of the weight."""
        ...

    def negated_by(self) -> Mapping[str, str]:
        """Names of folded batch norms by the name of their layer: where the gain is negative, the codes are negated."""
        ...

    def outputs(self, batch: Samples) -> list[Tensor]:
        """The outputs of the model."""
        ...

    def codes(self, batch: Samples, given: Mapping[Place, Tensor]) -> tuple[dict[Place, Tensor], list[Tensor]]:
        """The codes of each input quantizer, and the outputs.

        The codes are those of the value that arrives at the quantizer. Where ``given`` has a value for the quantizer,
        the forward then continues with the given value in place of the arrived one.
        """
        ...

    def remedy(self) -> tuple[str, Artefact] | None:
        """A known fault of the runtime with this file on some processors, and the file loaded in a form without the
        fault; ``None`` where no such fault is known.
        """
        ...


@dataclass(frozen=True)
class Verification:
    """The compared values, and their differences.

    Attributes:
        runtime: Name and version of the runtime.
        samples: Number of samples for the comparison of outputs; layers are compared on the first 16.
        real: Whether the samples are data; ``False`` for random numbers.
        weights: Number of layers in the file; the weight codes of all of them are equal.
        activations: Number of quantizers with compared codes; each quantizes the values of the trained model.
        mismatched: The largest share of codes of one quantizer that differ, all by one level.
        mismatched_at: The layer with this largest share.
        agreement: Share of rows with the largest entry in the same column (for a classifier: the same class), over all
            outputs of shape (samples, columns). ``None`` where no output has that shape.
        largest_difference: The largest absolute difference of two numbers in the outputs.
        left_out: Layers that the file lacks because the forward of the samples in evaluation does not use them, such as
            heads of an auxiliary loss.
    """

    runtime: str
    samples: int
    real: bool
    weights: int
    activations: int
    mismatched: float
    mismatched_at: str
    agreement: float | None
    largest_difference: float
    left_out: tuple[str, ...] = ()


@dataclass
class _Trace:
    outputs: list[Tensor]
    values: dict[Place, Tensor]
    codes: dict[Place, Tensor]


class Reference:
    """The trained model in evaluation, with the inputs and codes of its quantizers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = evaluated(model)

    @torch.no_grad()
    def trace(self, batch: Samples) -> _Trace:
        """The outputs, and the values and codes of each input quantizer."""
        values: dict[Place, Tensor] = {}
        codes: dict[Place, Tensor] = {}
        with ExitStack() as stack:
            for name, module, quantizer in quantized_inputs(self.model):
                hook = _observe(name, quantizer, values, codes)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            outputs = self.outputs(batch)
        return _Trace(outputs, values, codes)

    @torch.no_grad()
    def outputs(self, batch: Samples) -> list[Tensor]:
        """The outputs of the model."""
        args, kwargs = batch.call()
        return flat_outputs(self.model(*args, **kwargs))

    def unused(self, samples: Samples) -> set[str]:
        """Names of the layers whose weight the forward does not read."""
        with Audit(self.model) as audit:
            self.outputs(samples.first(1))
        not_called = set(audit.report.never_called)
        weights = {q: name for name, q in quantizers(self.model)}
        return {name for name, layer in read_layers(self.model) if weights[layer.weight_quantizer] in not_called}

    def weight_codes(self, negated_by: Mapping[str, str]) -> dict[str, Tensor]:
        """The codes of each layer's weight, negated where the gain of a folded batch norm is negative."""
        codes_by_layer = {}
        for name, layer in read_layers(self.model):
            codes = weight_codes(layer)
            if name in negated_by:
                gain: Tensor | None = self.model.get_submodule(negated_by[name]).weight  # type: ignore[assignment]
                dim = layer.weight_quantizer.channel_dim
                sign = torch.ones(codes.shape[dim]) if gain is None else gain.detach().sign()
                codes = codes * along_channels(sign.to(codes.dtype), codes.dim(), dim)
            codes_by_layer[name] = codes
        return codes_by_layer


def _observe(name: str, quantizer: Quantizer, values: dict[Place, Tensor], codes: dict[Place, Tensor]) -> Any:
    step, _, _ = grid_of(quantizer)
    count = 0

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        x = input_of(args, kwargs)
        values[name, count] = x.clone()
        quantized: Tensor = quantizer(x)
        codes[name, count] = (quantized / step).round().short()
        count += 1

    return hook


def verify(model: nn.Module, artefact: Artefact, samples: Samples) -> Verification:
    """Compare an exported file with the trained model.

    The codes of each weight must be equal. Layers are compared one by one: the inputs of earlier quantizers are
    replaced by the values of the trained model, and the codes of the next input quantizer may then differ by at most
    one level, in at most 0.1 % of the elements (one element is always allowed). With the inputs of all quantizers
    replaced, outputs may differ only by the rounding of floats. Without replacement, the classes must agree on 99 % of
    the samples.

    Args:
        model: The attached model that was exported.
        artefact: The loaded file.
        samples: The samples for the comparison.

    Raises:
        MismatchError: the file and the model differ; the message names the first such layer, or the fault of the
            runtime on this processor where the file is otherwise correct.
    """
    reference = Reference(model)
    weights, left_out = _compare_weights(reference, artefact, samples)
    try:
        return replace(_compare_computed(reference, artefact, samples, weights), left_out=left_out)
    except MismatchError as error:
        fault = _fault(reference, artefact, samples, weights)
        if fault is None:
            raise
        raise MismatchError(f"{fault} What differs: {error}") from None


def _fault(reference: Reference, artefact: Artefact, samples: Samples, weights: int) -> str | None:
    """The known fault of the runtime, where the file is correct without this fault; otherwise ``None``."""
    remedy = artefact.remedy()
    if remedy is None:
        return None
    fault, without_fault = remedy
    try:
        _compare_computed(reference, without_fault, samples, weights)
    except MismatchError:
        return None
    return fault


def _compare_computed(reference: Reference, artefact: Artefact, samples: Samples, weights: int) -> Verification:
    mismatched, mismatched_at, quantizers = _compare_layers(reference, artefact, samples)
    agreement, largest = _compare_outputs(reference, artefact, samples)
    if agreement is not None and agreement < LEAST_AGREEMENT:
        raise MismatchError(
            f"Top-1 (the largest entry of each output's row) agrees on {agreement:.1%} of {len(samples)} samples, at "
            f"least {LEAST_AGREEMENT:.0%} expected "
            f"(largest difference of outputs {largest:.3g}). {_first_difference(reference, artefact, samples)}"
        )
    return Verification(
        artefact.runtime, len(samples), samples.real, weights, quantizers, mismatched, mismatched_at, agreement, largest
    )


def _compare_weights(reference: Reference, artefact: Artefact, samples: Samples) -> tuple[int, tuple[str, ...]]:
    """The number of layers with equal codes, and the names of those that the file rightly lacks."""
    expected, actual = reference.weight_codes(artefact.negated_by()), artefact.weight_codes()
    missing = [name for name in expected if name not in actual]
    unused = reference.unused(samples) if missing else set()
    for name, codes in expected.items():
        if name in unused and name not in actual:
            continue
        if name not in actual:
            raise MismatchError(f"The file has no weight codes of layer {name!r}.")
        if codes.shape != actual[name].shape:
            raise MismatchError(
                f"The weight of layer {name!r} has the shape {tuple(actual[name].shape)} in the file, and "
                f"{tuple(codes.shape)} in the model."
            )
        wrong = int((codes.short() != actual[name].short()).sum())
        if wrong:
            raise MismatchError(f"{wrong} of {codes.numel()} weight codes of layer {name!r} differ.")
    return len(expected) - len(missing), tuple(missing)


def _compare_layers(reference: Reference, artefact: Artefact, samples: Samples) -> tuple[float, str, int]:
    different: dict[Place, int] = {}
    elements: dict[Place, int] = {}
    for batch in samples.first(_MAX_SAMPLES).batches(_BATCH):
        trace = reference.trace(batch)
        all_codes, outputs = artefact.codes(batch, trace.values)
        for place, expected in trace.codes.items():
            actual = _codes_of_call(place, all_codes)
            if actual is None or actual.numel() != expected.numel():
                raise MismatchError(f"The file does not quantize the input of layer {place[0]!r} as the model does.")
            gap = (expected - actual.reshape(expected.shape)).abs()
            if int(gap.max()) > 1:
                raise MismatchError(
                    f"Activation codes of layer {place[0]!r} are up to {int(gap.max())} levels apart, computed from "
                    f"the trained model's values ({int((gap > 1).sum())} of {gap.numel()} by more than one level)."
                )
            different[place] = different.get(place, 0) + int(gap.sum())
            elements[place] = elements.get(place, 0) + gap.numel()
        _compare_last_part(trace.outputs, outputs, artefact.tolerance)
    shares = {place: different[place] / elements[place] for place in different}
    for place, share in shares.items():
        if share > MAX_MISMATCHED and different[place] > 1:
            raise MismatchError(
                f"{share:.2%} of the activation codes of layer {place[0]!r} differ, computed from the trained model's "
                f"values; at most {MAX_MISMATCHED:.1%} expected."
            )
    worst = max(shares, key=lambda place: shares[place], default=("", 0))
    return shares.get(worst, 0.0), worst[0], len(shares)


def _codes_of_call(place: Place, codes: Mapping[Place, Tensor]) -> Tensor | None:
    """The codes of a call. Exporters merge calls with the same input, so the codes may be those of an earlier call."""
    return next((codes[place[0], call] for call in range(place[1], -1, -1) if (place[0], call) in codes), None)


def _compare_last_part(expected: Sequence[Tensor], actual: Sequence[Tensor], tolerance: float) -> None:
    """Compare the part after the last quantizers, where no codes are rounded: only floats are rounded differently."""
    _check_shapes(expected, actual)
    for ours, theirs in zip(expected, actual, strict=True):
        if ours.numel() and ours.is_floating_point():
            gap = float((ours.double() - theirs.double()).nan_to_num().abs().max())
            if gap > tolerance * max(float(ours.double().nan_to_num().abs().max()), tolerance):
                raise MismatchError(
                    f"Outputs differ by up to {gap:.3g}, the largest is {float(ours.abs().max()):.3g}, although all "
                    "quantizers got the trained model's values: the part after the last quantized input differs."
                )


def _check_shapes(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
    if [t.shape for t in expected] != [t.shape for t in actual]:
        raise MismatchError(
            f"The file returns {[tuple(t.shape) for t in actual]}, the model {[tuple(t.shape) for t in expected]}."
        )


def _compare_outputs(reference: Reference, artefact: Artefact, samples: Samples) -> tuple[float | None, float]:
    same = rows = 0
    largest = 0.0
    for batch in samples.batches(_BATCH):
        expected, actual = reference.outputs(batch), artefact.outputs(batch)
        _check_shapes(expected, actual)
        for ours, theirs in zip(expected, actual, strict=True):
            if not ours.isfinite().equal(theirs.isfinite()):
                raise MismatchError("An output is finite in the file and not in the model, or the reverse.")
            if ours.numel():
                largest = max(largest, float((ours.double() - theirs.double()).nan_to_num().abs().max()))
            if ours.dim() == 2 and ours.shape[1] > 1 and ours.is_floating_point():
                same += int((ours.argmax(1) == theirs.argmax(1)).sum())
                rows += len(ours)
    return (same / rows if rows else None), largest


def _first_difference(reference: Reference, artefact: Artefact, samples: Samples) -> str:
    batch = samples.batches(_BATCH)[0]
    trace = reference.trace(batch)
    all_codes, _ = artefact.codes(batch, {})
    for place, expected in trace.codes.items():
        actual = _codes_of_call(place, all_codes)
        assert actual is not None
        share = float((expected != actual.reshape(expected.shape)).float().mean())
        if share > MAX_MISMATCHED:
            return f"The first difference is at the input of layer {place[0]!r}, where {share:.2%} of the codes differ."
    return (
        "At most 0.1 % of the activation codes of each layer differ: the difference is after the last quantized input."
    )
