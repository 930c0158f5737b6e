"""The quantizer of one weight or one activation."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cpq_lightning.config import CPQConfig, Nesting
from cpq_lightning.functional import (
    Estimator,
    fit_step,
    hard_concrete,
    keyed_uniform,
    level_bounds,
    logit_of,
    masks_from_gates,
    quantize_unchecked,
)
from cpq_lightning.functional.resolution import quantize_resolution
from cpq_lightning.nn.gradient import Connect, ScaleGradient
from cpq_lightning.nn.observer import RangeObserver, UsageRecorder

Kind = Literal["weight", "activation"]

# sigma/step starts at 1/3 (RQ, arXiv 1810.01875): a cell then holds 0.64 of the mass at its centre.
_NOISE_START = 1 / 3
_NOISE_MIN = 0.02
# The step can move by this factor from where it was fitted: far more than training ever asks for, and no learning
# rate can take it to zero, below zero, or out of float32.
_STEP_SPAN = 1000.0
# Enough values for a step within half a percent of the best one.
_SAMPLE = 2**15


class Quantizer(nn.Module):
    """Quantizes a weight or an activation with a learned step and learned noise.

    ``step = start · exp(R tanh(log_step / R))`` with ``R = log 1000``, so that any update of the parameter
    ``log_step`` leaves it positive and finite, and a learning rate for it is a relative one; ``sigma = T · step · s``
    with ``s`` in (0.02, 1), a sigmoid of the parameter ``noise_logit``. Both are float32 and one-dimensional whatever
    happens to the model: one value, or one a channel.

    What defines the quantizer is in ``state_dict``: besides the two parameters ``start_step``, ``temperature``,
    ``keep_prob``, ``noise_step`` and the integers ``bits_``, ``min_bits_``, ``signed_``, ``calibrated_``, ``active_``,
    ``exempt_`` and ``numel_`` (elements of the weight, or of the activation in one sample). Of these the module keeps a
    copy on the host, as attributes without the underscore, so that a forward reads nothing back from the device:
    change them with :meth:`configure`.

    Args:
        kind: ``"weight"`` or ``"activation"``.
        config: The layer's settings.
        key: Which quantizer of the model this is: it keys the gates' noise.
        numel: Elements of the weight; 0 for an activation, which learns it from its first batch.
        channels: Output channels of a weight.
        channel_dim: The weight's dimension that holds them.
        exempt: Whether this is the first or last layer, at ``first_last_bits``.
        device: Where the state lives.
    """

    start_step: Tensor
    temperature: Tensor
    keep_prob: Tensor
    noise_step: Tensor

    _INTEGERS = ("bits", "min_bits", "signed", "calibrated", "active", "numel", "exempt")

    def __init__(
        self,
        kind: Kind,
        config: CPQConfig,
        *,
        key: int = 0,
        numel: int = 0,
        channels: int = 1,
        channel_dim: int = 0,
        exempt: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        weight = kind == "weight"
        bits = config.weight_bits if weight else config.act_bits
        if bits is None:
            raise ValueError("act_bits=None leaves activations alone: there is no quantizer to build.")
        self.kind: Kind = kind
        self.key = key
        self.seed = config.seed
        self.channel_dim = channel_dim
        self.estimator: Estimator = config.weight_estimator if weight else config.act_estimator
        self.nesting: Nesting = config.nesting
        self.range_rule = config.weight_range if weight else config.act_range
        self.gate_sharing = config.gate_sharing
        steps = channels if weight and config.per_channel else 1

        def tensor(value: float, size: int = 1) -> Tensor:
            return torch.full((size,), float(value), dtype=torch.float32, device=device)

        self.log_step = nn.Parameter(tensor(0.0, steps))
        self.noise_logit = nn.Parameter(tensor(_noise_logit(_NOISE_START), steps))
        self.register_buffer("start_step", tensor(1.0, steps))
        self.register_buffer("temperature", tensor(config.temperature))
        self.register_buffer("keep_prob", tensor(config.keep_prob))
        self.register_buffer("noise_step", torch.zeros(1, dtype=torch.int64, device=device))
        for name in self._INTEGERS:
            self.register_buffer(f"{name}_", torch.zeros(1, dtype=torch.int64, device=device))
        self._host: dict[str, int] = dict.fromkeys(self._INTEGERS, 0)
        self.configure(
            bits=bits,
            min_bits=config.narrowest_bits if weight else bits,
            signed=weight,
            active=True,
            numel=numel,
            exempt=exempt,
        )
        self.observer: RangeObserver | None = None
        self.usage: UsageRecorder | None = None
        self.measured: tuple[int, float] | None = None

    # Integer state ------------------------------------------------------------------------------------------------

    def configure(self, **values: int) -> None:
        """Set some of the integer state, in the buffers and in their copy on the host."""
        for name, value in values.items():
            self._host[name] = int(value)
            getattr(self, f"{name}_").fill_(int(value))

    bits = property(lambda self: self._host["bits"])
    min_bits = property(lambda self: self._host["min_bits"])
    numel = property(lambda self: self._host["numel"])
    signed = property(lambda self: bool(self._host["signed"]))
    calibrated = property(lambda self: bool(self._host["calibrated"]))
    active = property(lambda self: bool(self._host["active"]))
    exempt = property(lambda self: bool(self._host["exempt"]))

    @property
    def has_gates(self) -> bool:
        """Whether there is a bit that DropBits may drop."""
        return self.min_bits < self.bits

    @property
    def level_bounds(self) -> tuple[int, int]:
        """Lowest and highest level, in steps."""
        return level_bounds(self.bits, self.signed)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self._INTEGERS:
            buffer = getattr(self, f"{name}_")
            if not buffer.is_meta:
                self._host[name] = int(buffer)

    def _apply(self, fn: Any, recurse: bool = True) -> Quantizer:
        # A step in bfloat16 could not move by less than half a percent: devices change, no less than float32 stays.
        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            halved = moved.is_floating_point() and moved.dtype.itemsize < 4
            return t.to(moved.device, torch.float32) if halved else moved

        return super()._apply(keep_precision, recurse)

    # Values ---------------------------------------------------------------------------------------------------------

    def step(self) -> Tensor:
        """Step of the widest grid, shape (1,) or (channels,), in the unit of what is quantized."""
        return self._step(self.log_step)

    def _step(self, log_step: Tensor) -> Tensor:
        reach = math.log(_STEP_SPAN)
        return self.start_step * torch.exp(reach * torch.tanh(log_step / reach))

    def _step_and_sigma(self) -> tuple[Tensor, Tensor]:
        scale = self._gradient_scale()
        step = self._step(ScaleGradient.apply(self.log_step, scale))
        s = _NOISE_MIN + (1 - _NOISE_MIN) * torch.sigmoid(ScaleGradient.apply(self.noise_logit, scale))
        return step, step * s * self.temperature

    def _gradient_scale(self) -> Tensor:
        """LSQ's 1/sqrt(numel · highest level) (Esser et al., ICLR 2020, section 2.2), over the step.

        The gradient in log(step) is step times that in the step. With this scale it is as large as LSQ's, and so of the
        order of the weights': a clipped global norm is not spent on steps, however small they are. Adam's update does
        not depend on it.
        """
        per_step = max(1, self.numel // len(self.log_step))
        return self.start_step.mul(math.sqrt(per_step * max(1, self.level_bounds[1]))).reciprocal()

    def along_channels(self, value: Tensor, x: Tensor) -> Tensor:
        """One value a channel, shaped to broadcast to the weight."""
        if len(value) == 1:
            return value
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        return value.reshape(shape)

    def _masks(self, x: Tensor) -> Tensor:
        rings = self.bits - self.min_bits
        if self.gate_sharing == "element":
            shape = tuple(x.shape)
        else:
            shape = tuple(
                x.shape[d] if d == self.channel_dim and self.gate_sharing == "channel" else 1 for d in range(x.dim())
            )
        uniform = keyed_uniform((rings, *shape), self.seed, self.noise_step, self.key)
        return masks_from_gates(hard_concrete(logit_of(self.keep_prob), uniform))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x``; pass it on unchanged while inactive.

        Raises:
            RuntimeError: an activation in evaluation before its range is known.
        """
        if not self.active:
            return Connect.apply(x, self.log_step, self.noise_logit)
        if self.observer is not None:
            self.observer.update(x)
            return Connect.apply(x, self.log_step, self.noise_logit)
        if not self.calibrated:
            self._fit_first(x)
        step, sigma = self._step_and_sigma()
        masks = self._masks(x) if self.training and self.has_gates else None
        out = self._quantize(x, step, sigma, masks)
        if self.usage is not None:
            self.usage.update(x, out, step)
        return out

    def _quantize(self, x: Tensor, step: Tensor, sigma: Tensor, masks: Tensor | None) -> Tensor:
        nested = quantize_resolution if self.nesting == "resolution" else quantize_unchecked
        return nested(
            x,
            self.along_channels(step, x),
            self.along_channels(sigma, x),
            masks,
            bits=self.bits,
            min_bits=self.min_bits if masks is not None else self.bits,
            signed=self.signed,
            estimator=self.estimator,
        )

    # Ranges ---------------------------------------------------------------------------------------------------------

    def _fit_first(self, x: Tensor) -> None:
        if self.kind == "weight":
            self.fit_weight(x)
            return
        if not self.training:
            raise RuntimeError(
                "An activation quantizer was evaluated before its range is known: call calibrate(model, batches) with "
                "a few training batches first, load a checkpoint of a quantized model, or train for one step."
            )
        observer = RangeObserver()
        observer.update(x)
        observer.close_range(x.device)
        observer.update(x)
        self.fit_activation(observer)

    @torch.no_grad()
    def fit_weight(self, weight: Tensor) -> None:
        """Fit the starting step to a weight and forget what was learned."""
        rows = weight.detach().float()
        rows = rows.movedim(self.channel_dim, 0).flatten(1) if len(self.log_step) > 1 else rows.reshape(1, -1)
        if self.range_rule == "max":
            low, high = self.level_bounds
            full = rows.amax(1) / high if high else torch.zeros_like(rows[:, 0])
            step = torch.maximum(full, rows.amin(1) / low)
            step = torch.where(step > 0, step, 1.0)
        else:
            step = fit_step(rows[:, :: _stride(rows.shape[1])], self.bits, self.signed)
        self._start(step)

    def fit_activation(self, observer: RangeObserver) -> None:
        """Fit the starting step and the sign to what an observer has seen; of nothing seen, nothing changes."""
        fitted = observer.fit(self.bits, self.range_rule)
        if fitted is None:
            return
        step, signed = fitted
        self.configure(signed=signed, numel=observer.per_sample)
        self._start(step)

    @torch.no_grad()
    def _start(self, step: Tensor) -> None:
        self.start_step.copy_(step)
        self.log_step.zero_()
        self.noise_logit.fill_(_noise_logit(_NOISE_START))
        self.configure(calibrated=True)

    def extra_repr(self) -> str:
        state = "" if self.active else ", inactive"
        width = f"{self.min_bits}-{self.bits}" if self.has_gates else f"{self.bits}"
        return f"{self.kind}, bits={width}, {self.estimator}{state}"


def _noise_logit(s: float) -> float:
    p = (s - _NOISE_MIN) / (1 - _NOISE_MIN)
    return math.log(p / (1 - p))


def _stride(n: int) -> int:
    """A stride that samples evenly: no multiple of a kernel's width, which would see one of its corners only."""
    stride = -(-n // _SAMPLE)
    while stride > 1 and any(stride % p == 0 for p in (2, 3, 5, 7)):
        stride += 1
    return stride
