"""The DropBits gates of one quantizer: drawn with a probability that a schedule sets, or learned."""

from __future__ import annotations

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

# Learned gates start near open: a closed one gets no gradient that could open it.
_OPEN = 0.95


class Gates(nn.Module):
    """Gates ``z_k``, one for each bit above the narrowest width; a row of them for each channel that has its own.

    Fixed gates are open with the probability ``keep_prob``. Learned ones are open with
    ``P(z > 0) = S((logit - beta log(-gamma/zeta)) / noise)``; ``noise`` falls from 1 to nearly 0 while widths are
    learned, so that gates end decided (ours; see :func:`cpq_lightning.functional.hard_concrete`). Noise is a pure
    function of (seed, step, key).

    Args:
        settings: Of the quantizer.
        keep_prob: Probability at the beginning with which a gate is open.
        device: Where the state lives.
    """

    keep_prob: Tensor
    noise_step: Tensor
    noise: Tensor
    beta: Tensor
    # Forwards within transforms of torch.func, which let nobody write to the counter.
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
        # Whatever the default type of the run is: a logit in bfloat16 could not move by less than a percent.
        for name in ("keep_prob", "noise", "beta"):
            self.register_buffer(name, torch.empty(1, dtype=torch.float32, device=device))
        self.register_buffer("noise_step", torch.empty(1, dtype=torch.int64, device=device))
        if settings.gates_learned:
            # One-dimensional: some recipes decay whatever has more dimensions.
            logit = torch.empty(settings.gate_count * self.rows, dtype=torch.float32, device=device)
            self.logit = nn.Parameter(logit)

    def follow(self, settings: Settings) -> None:
        """Take on what a state says of gates."""
        self.seed, self.key = settings.seed, settings.key
        self.sharing: GateSharing = cast(GateSharing, settings.gate_sharing)
        self.estimator: GateEstimator = cast(GateEstimator, settings.gate_estimator)

    @torch.no_grad()
    def initialize(self) -> None:
        """Every value as it is at the beginning."""
        for name, buffer in self.named_buffers():
            buffer.fill_({"keep_prob": self._keep_prob, "noise": 1.0, "beta": BETA, "noise_step": 0}[name])
        if self.logit is not None:
            start = logit_of(torch.tensor([min(self._keep_prob, _OPEN)], device=self.logit.device))
            self.logit.copy_(start.expand_as(self.logit))

    @property
    def learned(self) -> bool:
        """Whether there are logits to learn."""
        return self.logit is not None

    def advance(self) -> None:
        """Draw the next forward's noise."""
        if is_transformed():
            self.steps_ahead += 1
        else:
            self.noise_step.add_(1)

    def logits(self, count: int | None = None) -> Tensor:
        """Logits of the innermost ``count`` gates, or of all, shape (count, rows)."""
        assert self.logit is not None
        return self.logit.reshape(-1, self.rows)[:count]

    def probabilities(self, count: int) -> Tensor:
        """``P(z > 0)`` of the innermost ``count`` gates, shape (count, rows)."""
        return open_probability(self.logits(count), self.noise, self.beta)

    def open(self, count: int) -> Tensor:
        """How many gates are open in evaluation, shape (rows,), int64."""
        return open_gates(self.probabilities(count).detach()).sum(0).long()

    def masks(self, x: Tensor, count: int, with_gradient: bool = True) -> Tensor | None:
        """Masks for ``x``: sampled in training, decided in evaluation; ``None`` where all are 1."""
        if self.training:
            gates = self._sample(x, count)
            through = with_gradient and self.estimator == "concrete"
            return masks_from_gates(gates if through else gates.detach())
        if self.logit is None:
            return None
        return masks_from_gates(self._shaped(open_gates(self.probabilities(count)), x))

    def with_saliency(
        self, out: Tensor, x: Tensor, masks: Tensor, steps: Tensor, min_bits: int, signed: bool, samples: bool
    ) -> Tensor:
        """``out``, whose backward tells the logits what their bits are worth.

        Args:
            out: ``x`` quantized.
            x: What it was before.
            masks: By which it was.
            steps: Step of each width, the narrowest first, shape (widths, 1 or channels).
            min_bits: The narrowest width.
            signed: Whether grids hold negative levels.
            samples: Whether ``x`` is a batch of samples instead of a weight.
        """
        if not torch.is_grad_enabled():
            return out
        logits, widths = self.logits(len(steps) - 1), tuple(range(min_bits, min_bits + len(steps)))
        drawn = masks[1:].reshape(len(masks) - 1, -1)
        # Where each element has a gate, a bit is always there for some.
        there = drawn >= 0.5 if drawn.shape[1] == self.rows else drawn.new_ones((len(drawn), 1), dtype=torch.bool)
        return SaliencyToGates.apply(  # type: ignore[no-any-return]
            out, x.detach(), logits, there, steps, widths, signed, self.channel_dim, samples
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
        return hard_concrete(self._shaped(self.logits(count), x), uniform, self.noise, self.beta)

    def _shaped(self, gates: Tensor, x: Tensor) -> Tensor:
        """(count, rows) as (count, *shape) with ``shape`` broadcasting to ``x``."""
        shape = [1] * x.dim()
        if gates.shape[1] > 1:
            shape[self.channel_dim] = gates.shape[1]
        return gates.reshape(len(gates), *shape)
