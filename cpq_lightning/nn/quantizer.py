"""The quantizer of one weight or one activation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from cpq_lightning.config import CPQConfig
from cpq_lightning.functional import Estimator, along_channels, level_bounds, quantize_resolution
from cpq_lightning.kernels import Operand, Ring, has_kernel, quantize, quantize_widths
from cpq_lightning.nn.fitting import weight_steps
from cpq_lightning.nn.gates import Gates
from cpq_lightning.nn.gradient import STEP_REACH, Connect, StepAndSigma, noise_logit
from cpq_lightning.nn.observer import RangeObserver, UsageRecorder
from cpq_lightning.nn.widths import Widths

Kind = Literal["weight", "activation"]

# sigma/step starts at 1/3 (RQ, arXiv 1810.01875): a cell then holds 0.64 of the mass at its centre.
_NOISE_START = 1 / 3


class Quantizer(Widths):
    """Quantizes a weight or an activation with a learned step and learned noise.

    ``step = start · exp(R tanh(log_step / R))`` with ``R = log 1000``, so that any update of the parameter
    ``log_step`` leaves it positive and finite, and a learning rate for it is a relative one; ``sigma = T · step · s``
    with ``s`` in (0.02, 1), a sigmoid of the parameter ``noise_logit``. Both are float32 and one-dimensional whatever
    happens to the model: one value, or one a channel.

    What defines the quantizer is in ``state_dict``: besides the parameters and its
    :class:`~cpq_lightning.nn.gates.Gates` these are ``start_step``, ``temperature``, ``width_scale`` (of nesting by
    resolution: the step of each width over that of the widest), ``widths`` (fixed widths, one a channel) and integers:
    ``bits_`` (the widest), ``min_bits_``, ``signed_``, ``calibrated_``, ``active_``, ``exempt_``, ``fixed_`` (whether
    ``widths`` count), ``numel_`` (elements of the weight, or of the activation in one sample), ``macs_``
    (multiply-accumulates of the weight in one sample) and ``order_`` (its place in a forward). Of the integers the
    module keeps a copy on the host, as attributes without the underscore, so that a forward reads nothing back from the
    device: change them with :meth:`configure`.

    Args:
        kind: ``"weight"`` or ``"activation"``.
        config: The layer's settings.
        key: Which quantizer of the model this is: it keys the gates' noise.
        numel: Elements of the weight; 0 for an activation, which learns it from its first batch.
        channels: Output channels of a weight.
        channel_dim: The weight's dimension that holds them.
        exempt: Whether this is the first or last layer, at ``first_last_bits``.
        inner: The settings that the layer has where it is neither first nor last: its gates are made for them.
        device: Where the state lives.
    """

    temperature: Tensor

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
        inner: CPQConfig | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        weight = kind == "weight"
        bits, min_bits = _span(kind, config)
        if bits is None or min_bits is None:
            raise ValueError("act_bits=None leaves activations alone: there is no quantizer to build.")
        inner = inner or config
        widest, narrowest = _span(kind, inner)
        self.kind: Kind = kind
        self.channel_dim = channel_dim
        self.estimator: Estimator = config.weight_estimator if weight else config.act_estimator
        self.nesting = inner.nests_by
        self.range_rule = config.weight_range if weight else config.act_range
        steps = channels if weight and config.per_channel else 1

        def tensor(value: float, size: int = 1) -> Tensor:
            return torch.full((size,), float(value), dtype=torch.float32, device=device)

        self.log_step = nn.Parameter(tensor(0.0, steps))
        self.noise_logit = nn.Parameter(tensor(noise_logit(_NOISE_START), steps))
        self.gates = Gates(
            config,
            count=(widest or 0) - (narrowest or 0),
            learned=inner.learn_bits if weight else inner.learn_act_bits,
            sharing=config.gate_sharing if weight else "tensor",
            key=key,
            channels=channels,
            channel_dim=channel_dim,
            device=device,
        )
        self.register_buffer("start_step", tensor(1.0, steps))
        self.register_buffer("temperature", tensor(config.temperature))
        doubling = torch.tensor([2.0 ** (bits - k) for k in range(1, 9)], device=device)
        self.register_buffer("width_scale", doubling[:, None].repeat(1, steps))
        by_channel = weight and config.gate_sharing == "channel"
        self.register_buffer(
            "widths", torch.full((channels if by_channel else 1,), bits, dtype=torch.int64, device=device)
        )
        self._register_integers(device)
        self.configure(bits=bits, min_bits=min_bits, signed=weight, active=True, numel=numel, exempt=exempt)
        self.observer: RangeObserver | None = None
        self.usage: UsageRecorder | None = None
        self.fits_next = False
        self.measured: tuple[int, float] | None = None

    def range_parameters(self) -> list[nn.Parameter]:
        """The step's and the noise's parameters, without the gates'."""
        return [self.log_step, self.noise_logit]

    @property
    def level_bounds(self) -> tuple[int, int]:
        """Lowest and highest level of the widest grid, in steps."""
        return level_bounds(self.bits, self.signed)

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
        return self.start_step * torch.exp(STEP_REACH * torch.tanh(self.log_step / STEP_REACH))

    def _step_and_sigma(self) -> tuple[Tensor, Tensor]:
        """Both, with gradients scaled by LSQ's 1/sqrt(numel · highest level) (Esser et al., ICLR 2020, section 2.2),
        over the starting step.

        The gradient in log(step) is step times that in the step. With this scale it is as large as LSQ's, and so of the
        order of the weights': a clipped global norm is not spent on steps, however small they are. Adam's update does
        not depend on it.
        """
        root = math.sqrt(max(1, self.numel // len(self.log_step)) * max(1, self.level_bounds[1]))
        return StepAndSigma.apply(self.log_step, self.noise_logit, self.start_step, self.temperature, root)  # type: ignore[no-any-return]

    def along_channels(self, value: Tensor, x: Tensor) -> Tensor:
        """One value a channel, shaped to broadcast to the weight."""
        return along_channels(value, x.dim(), self.channel_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x``; pass it on unchanged while inactive.

        Raises:
            RuntimeError: an activation in evaluation before its range is known.
        """
        if not self.active:
            return Connect.of(x, *self.parameters())
        if self.observer is not None:
            self.observer.update(x)
            return Connect.of(x, *self.parameters())
        if not self.calibrated:
            self._fit_first(x)  # type: ignore[call-arg]
        masks = self._masks(x)
        step, sigma = self._step_and_sigma()
        out = self._quantize(x, step, sigma, masks)
        if masks is not None and self._gates_learn and self.gates.estimator == "curvature":
            out = self._with_worth(out, x, masks, step)
        elif self.gates.logit is not None and not self._gates_learn:
            out = Connect.of(out, self.gates.logit)
        if self.usage is not None:
            self.usage.update(x, out, self.grid()[0])
        return out

    def _takes_part(self, x: Tensor) -> bool:
        """Whether all that :meth:`forward` would do is what a kernel does, and nothing watches it."""
        if self._is_watched or not self.active or self.observer is not None or self.usage is not None:
            return False
        if not self.calibrated:
            # As forward does: a forward that is computed again for its gradient then takes the same way.
            self._fit_first(x)  # type: ignore[call-arg]
        if self.fixed or (self.has_gates and (self.training or self.gates.learned)):
            return False
        return self._has_kernel(x)

    @property
    def _is_watched(self) -> bool:
        """Whether a call of this module does more than its forward, or another one than this class has."""
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        own = type(self).forward is Quantizer.forward and "forward" not in self.__dict__
        return not own or any(map(bool, hooks)) or bool(_has_any_global_hook())

    def _has_kernel(self, x: Tensor) -> bool:
        rows = len(self.start_step)
        return (rows == 1 or self.channel_dim == 0) and has_kernel(x, rows)

    def operand(self, x: Tensor) -> Operand:
        """``x`` and what quantizes it where a product can do it itself, else ``x`` quantized."""
        if not self._takes_part(x):
            return Operand(self(x))
        step, sigma = self._step_and_sigma()
        if self.gates.logit is not None:
            step = Connect.of(step, self.gates.logit)
        return Operand(x, step, sigma, Ring.of(self.bits, self.signed, self.estimator))

    @property
    def _gates_learn(self) -> bool:
        """Whether a forward tells the gates anything: not those of a layer in evaluation, or of a frozen one."""
        return self.learns_bits and self.training and self.log_step.requires_grad

    def _masks(self, x: Tensor) -> Tensor | None:
        count = self.bits - self.min_bits
        if self.fixed:
            return self.gates.fixed_masks(x, self.widths - self.min_bits, count)
        if self.has_gates and (self.training or self.gates.learned):
            # An optimizer that is toggled off, or a frozen layer, moves no step: then no gate either.
            return self.gates.masks(x, count, with_gradient=self._gates_learn)
        return None

    def _with_worth(self, out: Tensor, x: Tensor, masks: Tensor, step: Tensor) -> Tensor:
        """``out``, whose backward tells the gates what their bits are worth."""
        scales = self.width_scale[self.min_bits - 1 : self.bits]
        steps = step.detach() * (scales if self.nesting == "resolution" else torch.ones_like(scales))
        return self.gates.with_worth(out, x, masks, steps, self.min_bits, self.signed, samples=self.kind != "weight")

    def _quantize(self, x: Tensor, step: Tensor, sigma: Tensor, masks: Tensor | None) -> Tensor:
        # Which widths are drawn is read here: from a GPU, or in compiled code, that would cost more than it saves.
        readable = x.is_cpu and not torch.compiler.is_compiling()
        by_tensor = masks is not None and masks.numel() == len(masks) and self.nesting == "resolution"
        if masks is not None and by_tensor and readable and self._has_kernel(x):
            rings = [Ring.of(k, self.signed, self.estimator) for k in range(self.min_bits, self.bits + 1)]
            return quantize_widths(x, step, sigma, masks, self.width_scale[self.min_bits - 1 : self.bits], rings)
        step, sigma = self.along_channels(step, x), self.along_channels(sigma, x)
        settings: dict[str, Any] = {
            "bits": self.bits,
            "min_bits": self.min_bits if masks is not None else self.bits,
            "signed": self.signed,
            "estimator": self.estimator,
        }
        if self.nesting == "range" or masks is None:
            return quantize(x, step, sigma, masks, **settings)
        scales = torch.stack([self.along_channels(s, x) for s in self.width_scale[self.min_bits - 1 : self.bits]])
        return quantize_resolution(x, step, sigma, masks, scales=scales, one_width=quantize, **settings)

    @torch.no_grad()
    def fix_widths(self, widths: Sequence[int]) -> None:
        super().fix_widths(widths)
        # What was measured belongs to the width that was.
        self.measured = None

    # Ranges ---------------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _fit_first(self, x: Tensor) -> None:
        if self.kind == "weight":
            self.fit_weight(x)
            return
        if not self.training and not self.fits_next:
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
        channel_dim = self.channel_dim if len(self.log_step) > 1 else None
        self._start(weight_steps(weight, channel_dim, self._fitted_widths, self.range_rule))

    @property
    def _fitted_widths(self) -> list[int]:
        """Widths that need a step of their own, the widest one first."""
        narrower = range(self.min_bits, self.bits) if self.nesting == "resolution" else ()
        return [self.bits, *narrower]

    def fit_activation(self, observer: RangeObserver) -> None:
        """Fit the starting step and the sign to what an observer has seen; of nothing seen, nothing changes."""
        fitted = observer.fit(self._fitted_widths, self.range_rule)
        if fitted is None:
            return
        steps, signed = fitted
        # An audit, which knows how many samples a batch has, counts better.
        self.configure(signed=signed, numel=self.numel or observer.per_sample)
        self._start(steps)

    @torch.no_grad()
    def _start(self, steps: list[Tensor]) -> None:
        self.start_step.copy_(steps[0])
        for k, step in zip(self._fitted_widths, steps, strict=True):
            self.width_scale[k - 1] = step / steps[0]
        self.log_step.zero_()
        self.noise_logit.fill_(noise_logit(_NOISE_START))
        self.configure(calibrated=True)
        self.fits_next = False

    def refit_next(self) -> None:
        """Fit the range anew to the next values that come, in evaluation mode too: frozen layers train so."""
        self.configure(calibrated=False)
        self.fits_next = True

    def extra_repr(self) -> str:
        state = "" if self.active else ", inactive"
        width = f"{self.min_bits}-{self.bits}" if self.has_gates else f"{self.bits}"
        return f"{self.kind}, bits={width}, {self.estimator}{state}"


def _span(kind: Kind, config: CPQConfig) -> tuple[int | None, int | None]:
    """Widest and narrowest width."""
    if kind == "weight":
        return config.weight_bits, config.narrowest_bits
    return config.act_bits, config.narrowest_act_bits
