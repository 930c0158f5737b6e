"""The DropBits gates of one quantizer, with a scheduled probability or learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cpq_lightning.config import GateEstimator, GateSharing
from cpq_lightning.functional.dropbits import (
    BETA,
    hard_concrete,
    keyed_uniform,
    logit_of,
    masks_from_gates,
    open_gates,
    open_probability,
)
from cpq_lightning.functional.modes import is_transformed
from cpq_lightning.nn.autograd import SaliencyToGates
from cpq_lightning.nn.state import Settings

# Initial probability of learned gates, nearly open: a closed gate gets no gradient that could open it.
_OPEN = 0.95


class Gates(nn.Module):
    """Gates ``z_k``, one for each bit above the narrowest width, in one row or in one row for each channel.

    Gates that are not learned are open with probability ``keep_prob``. Learned gates are open with probability
    ``P(z > 0) = S((logit - beta log(-gamma/zeta)) / noise)``; ``noise`` falls from 1 to nearly 0 while widths are
    learned, so that every gate becomes decided (ours; see :func:`cpq_lightning.functional.hard_concrete`). Noise is a
    pure function of (seed, step, key).

    Args:
        settings: Settings of the quantizer.
        keep_prob: Initial probability of an open gate.
        device: Device of the state.
    """

    keep_prob: Tensor
    noise_step: Tensor
    noise: Tensor
    beta: Tensor
    # Forwards within transforms of torch.func, which do not allow writes to the counter.
    steps_ahead = 0

    def __init__(self, settings: Settings, *, keep_prob: float, device: torch.device | None) -> None:
        super().__init__()
        self.follow(settings)
        self.channel_dim = settings.channel_dim
        self.rows = settings.gate_rows
        self._keep_prob = keep_prob
        self.logit: nn.Parameter | None = None
        if not settings.gate_count:
            return
        # Always float32: a logit in bfloat16 could not move by less than a percent.
        for name in ("keep_prob", "noise", "beta"):
            self.register_buffer(name, torch.empty(1, dtype=torch.float32, device=device))
        self.register_buffer("noise_step", torch.empty(1, dtype=torch.int64, device=device))
        if settings.gates_learned:
            # One-dimensional, since some recipes apply weight decay to all parameters with more dimensions.
            logit = torch.empty(settings.gate_count * self.rows, dtype=torch.float32, device=device)
            self.logit = nn.Parameter(logit)

    def follow(self, settings: Settings) -> None:
        """Copy the settings of gates from those of the quantizer."""
        self.seed, self.key = settings.seed, settings.key
        self.sharing: GateSharing = cast(GateSharing, settings.gate_sharing)
        self.estimator: GateEstimator = cast(GateEstimator, settings.gate_estimator)

    @torch.no_grad()
    def initialize(self) -> None:
        """Set every value to its initial one."""
        for name, buffer in self.named_buffers():
            buffer.fill_({"keep_prob": self._keep_prob, "noise": 1.0, "beta": BETA, "noise_step": 0}[name])
        if self.logit is not None:
            start = logit_of(torch.tensor([min(self._keep_prob, _OPEN)], device=self.logit.device))
            self.logit.copy_(start.expand_as(self.logit))

    @property
    def learned(self) -> bool:
        """Whether the gates are learned."""
        return self.logit is not None

    def advance(self) -> None:
        """Advance the noise counter to the next forward."""
        if is_transformed():
            self.steps_ahead += 1
        else:
            self.noise_step.add_(1)

    def logits(self, count: int | None = None) -> Tensor:
        """Logits of the first ``count`` gates, or of all, shape (count, rows)."""
        assert self.logit is not None
        return self.logit.reshape(-1, self.rows)[:count]

    def probabilities(self, count: int) -> Tensor:
        """``P(z > 0)`` of the first ``count`` gates, shape (count, rows)."""
        return open_probability(self.logits(count), noise=self.noise, beta=self.beta)

    def open(self, count: int) -> Tensor:
        """The number of open gates in evaluation, shape (rows,), int64."""
        return open_gates(self.probabilities(count).detach()).sum(0).long()

    def masks(self, x: Tensor, count: int, with_gradient: bool = True) -> Tensor | None:
        """Masks for ``x``: sampled in training, decided in evaluation; ``None`` if all are 1."""
        if self.training:
            gates = self._sample(x, count)
            through = with_gradient and self.estimator == "concrete"
            return masks_from_gates(gates if through else gates.detach())
        if self.logit is None:
            return None
        return masks_from_gates(self._shaped(open_gates(self.probabilities(count)), x))

    def with_saliency(
        self,
        out: Tensor,
        x: Tensor,
        masks: Tensor,
        scales: Tensor,
        min_bits: int,
        zero_points: Sequence[int],
        samples: bool,
    ) -> Tensor:
        """``out``, with a backward pass that gives the logits the saliency of their bits.

        Args:
            out: The quantized tensor.
            x: The tensor before quantization.
            masks: The masks used for ``out``.
            scales: Scale of each width, the narrowest first, shape (widths, 1 or channels), or (widths, channels,
                groups) for an ``x`` of shape (channels, groups, elements).
            min_bits: The narrowest width.
            zero_points: Twice the zero point of each width.
            samples: Whether ``x`` is a batch of samples instead of a weight.
        """
        if not torch.is_grad_enabled():
            return out
        logits, widths = self.logits(len(scales) - 1), tuple(range(min_bits, min_bits + len(scales)))
        sampled = masks[1:].reshape(len(masks) - 1, -1)
        if sampled.shape[1] == self.rows:
            is_open = sampled >= 0.5
        else:
            # With one gate for each element, some gates of a bit are always open.
            is_open = sampled.new_ones((len(sampled), 1), dtype=torch.bool)
        return SaliencyToGates.apply(  # type: ignore[no-any-return]
            out, x.detach(), logits, is_open, scales, widths, tuple(zero_points), self.channel_dim, samples
        )

    def fixed_masks(self, x: Tensor, gates_open: Tensor, count: int) -> Tensor:
        """Masks for ``x`` with the first ``gates_open`` gates of each row open, shape (rows,)."""
        index = torch.arange(count, device=x.device)[:, None]
        return masks_from_gates(self._shaped((index < gates_open).float(), x))

    def _sample(self, x: Tensor, count: int) -> Tensor:
        shared = [1] * x.dim()
        if self.sharing == "element":
            shared = list(x.shape)
        elif self.sharing == "channel":
            shared[self.channel_dim] = x.shape[self.channel_dim]
        step = self.noise_step + self.steps_ahead if self.steps_ahead else self.noise_step
        uniform = keyed_uniform((count, *shared), self.seed, step, self.key)
        if self.logit is None:
            return hard_concrete(logit_of(self.keep_prob), uniform)
        return hard_concrete(self._shaped(self.logits(count), x), uniform, noise=self.noise, beta=self.beta)

    def _shaped(self, gates: Tensor, x: Tensor) -> Tensor:
        """Reshape (count, rows) to (count, *shape), with ``shape`` broadcastable to ``x``."""
        shape = [1] * x.dim()
        if gates.shape[1] > 1:
            shape[self.channel_dim] = gates.shape[1]
        return gates.reshape(len(gates), *shape)
