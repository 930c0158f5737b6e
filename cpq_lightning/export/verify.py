"""Proof that an artefact is the trained model: its codes, its layers, and its answers, in its own runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cpq_lightning.attach.layers import read_layers
from cpq_lightning.export.calls import flat_outputs
from cpq_lightning.export.integer_model import evaluated, grid_of, input_of, quantized_inputs
from cpq_lightning.export.samples import Samples
from cpq_lightning.functional.grid import along_channels
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.report.levels import weight_codes

# A layer's name, and which of its calls in a forward.
Place = tuple[str, int]
# Share of a layer's activation codes that may differ, by one level: at a cell's edge runtimes round differently.
MOST_MOVED = 1e-3
# Share of samples whose class must be the same.
LEAST_AGREEMENT = 0.99
# Samples that layers are compared on, one by one; their activations are held in memory.
_MOST_SAMPLES, _BATCH = 16, 8


class MismatchError(ValueError):
    """An artefact does not compute what the trained model computes."""


class Artefact(Protocol):
    """An exported file, loaded in its own runtime."""

    runtime: str
    # How far outputs may be apart where all quantizers are fed by the trained model's values, relative to the largest.
    tolerance: float

    def weight_codes(self) -> dict[str, Tensor]:
        """Levels of each layer's weight as they are stored, of the weight's shape."""
        ...

    def turned_by(self) -> Mapping[str, str]:
        """Names of batch norms by the layer that they were folded into: a negative gain turns codes round."""
        ...

    def outputs(self, batch: Samples) -> list[Tensor]:
        """What the model returns."""
        ...

    def codes(self, batch: Samples, given: Mapping[Place, Tensor]) -> tuple[dict[Place, Tensor], list[Tensor]]:
        """Levels that each input quantizer gives, and the outputs; where ``given`` has a value for a quantizer, the
        model goes on from that.
        """
        ...

    def remedy(self) -> tuple[str, Artefact] | None:
        """What its runtime may do wrong with this file on some processors, and the file loaded so that it does not;
        ``None`` where nothing such is known.
        """
        ...


@dataclass(frozen=True)
class Verification:
    """What was compared, and how far apart it was.

    Attributes:
        runtime: What ran the artefact, with its version.
        samples: How many samples the answers were compared on; layers on the first 16.
        real: Whether they are data, rather than random numbers.
        weights: Layers whose weight codes are equal, all of them.
        activations: Quantizers whose codes were compared, each fed by the trained model's own values.
        moved: The largest share of codes of one quantizer that differ, all by one level.
        moved_at: The layer where that is.
        agreement: Share of rows, a sample each in all outputs of shape (samples, columns), whose largest entry is in
            the same column: of a classifier, the same class. ``None`` where no output has that shape.
        largest_difference: Of any number in the outputs.
    """

    runtime: str
    samples: int
    real: bool
    weights: int
    activations: int
    moved: float
    moved_at: str
    agreement: float | None
    largest_difference: float


@dataclass
class _Trace:
    outputs: list[Tensor]
    values: dict[Place, Tensor]
    codes: dict[Place, Tensor]


class Reference:
    """The trained model as it evaluates, with what passes through each of its quantizers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = evaluated(model)

    @torch.no_grad()
    def trace(self, batch: Samples) -> _Trace:
        """Outputs, and what comes into each input quantizer and the levels that it gives."""
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
        """What the model returns."""
        args, kwargs = batch.call()
        return flat_outputs(self.model(*args, **kwargs))

    def weight_codes(self, turned_by: Mapping[str, str]) -> dict[str, Tensor]:
        """Levels of each layer's weight, turned round where the gain of a folded batch norm is negative."""
        found = {}
        for name, layer in read_layers(self.model):
            codes = weight_codes(layer)
            if name in turned_by:
                gain: Tensor | None = self.model.get_submodule(turned_by[name]).weight  # type: ignore[assignment]
                dim = layer.weight_quantizer.channel_dim
                sign = torch.ones(codes.shape[dim]) if gain is None else gain.detach().sign()
                codes = codes * along_channels(sign.to(codes.dtype), codes.dim(), dim)
            found[name] = codes
        return found


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
    """Compare an artefact with the trained model.

    The codes of each weight must be equal. Each input quantizer, reached from the values that the trained model has at
    the quantizers before it, must give codes that differ by at most one level, on at most 0.1 % of its elements (one
    element in any case); with all quantizers fed so, outputs may differ by the rounding of floats. The classes must
    agree on 99 % of the samples.

    Args:
        model: The attached model that was exported.
        artefact: The file, loaded.
        samples: What to compare on.

    Raises:
        MismatchError: naming the first layer where they part; or what the runtime does wrong on this processor, where
            the file is right otherwise.
    """
    reference = Reference(model)
    weights = _compare_weights(reference, artefact)
    try:
        return _compare_computed(reference, artefact, samples, weights)
    except MismatchError as error:
        fault = _fault(reference, artefact, samples, weights)
        if fault is None:
            raise
        raise MismatchError(f"{fault} What differs: {error}") from None


def _fault(reference: Reference, artefact: Artefact, samples: Samples, weights: int) -> str | None:
    """What the runtime does wrong, where the file is right without that."""
    remedy = artefact.remedy()
    if remedy is None:
        return None
    fault, remedied = remedy
    try:
        _compare_computed(reference, remedied, samples, weights)
    except MismatchError:
        return None
    return fault


def _compare_computed(reference: Reference, artefact: Artefact, samples: Samples, weights: int) -> Verification:
    moved, moved_at, places = _compare_layers(reference, artefact, samples)
    agreement, largest = _compare_outputs(reference, artefact, samples)
    if agreement is not None and agreement < LEAST_AGREEMENT:
        raise MismatchError(
            f"Top-1 (the largest entry of each output's row) agrees on {agreement:.1%} of {len(samples)} samples, at "
            f"least {LEAST_AGREEMENT:.0%} expected "
            f"(largest difference of outputs {largest:.3g}). {_first_parting(reference, artefact, samples)}"
        )
    return Verification(
        artefact.runtime, len(samples), samples.real, weights, places, moved, moved_at, agreement, largest
    )


def _compare_weights(reference: Reference, artefact: Artefact) -> int:
    expected, found = reference.weight_codes(artefact.turned_by()), artefact.weight_codes()
    for name, codes in expected.items():
        if name not in found:
            raise MismatchError(f"The artefact has no weight codes of layer {name!r}.")
        if codes.shape != found[name].shape:
            raise MismatchError(
                f"The weight of layer {name!r} has the shape {tuple(found[name].shape)} in the artefact, and "
                f"{tuple(codes.shape)} in the model."
            )
        wrong = int((codes.short() != found[name].short()).sum())
        if wrong:
            raise MismatchError(f"{wrong} of {codes.numel()} weight codes of layer {name!r} differ.")
    return len(expected)


def _compare_layers(reference: Reference, artefact: Artefact, samples: Samples) -> tuple[float, str, int]:
    different: dict[Place, int] = {}
    elements: dict[Place, int] = {}
    for batch in samples.first(_MOST_SAMPLES).batches(_BATCH):
        trace = reference.trace(batch)
        found, outputs = artefact.codes(batch, trace.values)
        for place, codes in trace.codes.items():
            theirs = _found_at(place, found)
            if theirs is None or theirs.numel() != codes.numel():
                raise MismatchError(
                    f"The artefact does not quantize the input of layer {place[0]!r} as the model does."
                )
            gap = (codes - theirs.reshape(codes.shape)).abs()
            if int(gap.max()) > 1:
                raise MismatchError(
                    f"Activation codes of layer {place[0]!r} are up to {int(gap.max())} levels apart, fed by the "
                    f"trained model's own values ({int((gap > 1).sum())} of {gap.numel()} by more than one)."
                )
            different[place] = different.get(place, 0) + int(gap.sum())
            elements[place] = elements.get(place, 0) + gap.numel()
        _compare_ends(trace.outputs, outputs, artefact.tolerance)
    shares = {place: different[place] / elements[place] for place in different}
    for place, share in shares.items():
        if share > MOST_MOVED and different[place] > 1:
            raise MismatchError(
                f"{share:.2%} of the activation codes of layer {place[0]!r} differ, fed by the trained model's own "
                f"values; at most {MOST_MOVED:.1%} expected."
            )
    worst = max(shares, key=lambda place: shares[place], default=("", 0))
    return shares.get(worst, 0.0), worst[0], len(shares)


def _found_at(place: Place, found: Mapping[Place, Tensor]) -> Tensor | None:
    """The codes of a call; exporters merge calls that get the same input."""
    return next((found[place[0], call] for call in range(place[1], -1, -1) if (place[0], call) in found), None)


def _compare_ends(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> None:
    """What is behind the last quantizers: nothing rounds there, so that outputs differ by rounding of floats alone."""
    _check_shapes(expected, found)
    for ours, theirs in zip(expected, found, strict=True):
        if ours.numel() and ours.is_floating_point():
            gap = float((ours.double() - theirs.double()).nan_to_num().abs().max())
            if gap > tolerance * max(float(ours.double().nan_to_num().abs().max()), tolerance):
                raise MismatchError(
                    f"Outputs are up to {gap:.3g} apart, of at most {float(ours.abs().max()):.3g}, with all quantizers "
                    "fed by the trained model's own values: something behind the last quantized layer's input differs."
                )


def _check_shapes(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    if [t.shape for t in expected] != [t.shape for t in found]:
        raise MismatchError(
            f"The artefact returns {[tuple(t.shape) for t in found]}, the model {[tuple(t.shape) for t in expected]}."
        )


def _compare_outputs(reference: Reference, artefact: Artefact, samples: Samples) -> tuple[float | None, float]:
    same = judged = 0
    largest = 0.0
    for batch in samples.batches(_BATCH):
        expected, found = reference.outputs(batch), artefact.outputs(batch)
        _check_shapes(expected, found)
        for ours, theirs in zip(expected, found, strict=True):
            if not ours.isfinite().equal(theirs.isfinite()):
                raise MismatchError("The artefact and the model differ in where their outputs are finite.")
            if ours.numel():
                largest = max(largest, float((ours.double() - theirs.double()).nan_to_num().abs().max()))
            if ours.dim() == 2 and ours.shape[1] > 1 and ours.is_floating_point():
                same += int((ours.argmax(1) == theirs.argmax(1)).sum())
                judged += len(ours)
    return (same / judged if judged else None), largest


def _first_parting(reference: Reference, artefact: Artefact, samples: Samples) -> str:
    batch = samples.batches(_BATCH)[0]
    trace = reference.trace(batch)
    found, _ = artefact.codes(batch, {})
    for place, codes in trace.codes.items():
        theirs = _found_at(place, found)
        assert theirs is not None
        share = float((codes != theirs.reshape(codes.shape)).float().mean())
        if share > MOST_MOVED:
            return f"They part first at the input of layer {place[0]!r}, where {share:.2%} of the codes differ."
    return "No layer's activation codes part by more than 0.1 %: the difference is behind the last of them."
