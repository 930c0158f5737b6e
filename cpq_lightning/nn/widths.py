"""The widths of one quantizer: what may be dropped or learned, what is decided, and the grid that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cpq_lightning.functional import along_channels, expected_bits, level_bounds
from cpq_lightning.nn.gates import Gates
from cpq_lightning.nn.integers import HostIntegers


class Widths(HostIntegers):
    """The half of a :class:`~cpq_lightning.nn.Quantizer` that knows its widths; the other half has steps and values."""

    start_step: Tensor
    width_scale: Tensor
    widths: Tensor

    _INTEGERS = (
        "bits", "min_bits", "signed", "calibrated", "active", "numel", "exempt", "fixed", "macs", "order",
    )  # fmt: skip

    gates: Gates
    channel_dim: int
    nesting: Literal["range", "resolution"]

    bits = property(lambda self: self._host["bits"])
    min_bits = property(lambda self: self._host["min_bits"])
    numel = property(lambda self: self._host["numel"])
    macs = property(lambda self: self._host["macs"])
    order = property(lambda self: self._host["order"])
    fixed = property(lambda self: bool(self._host["fixed"]))
    signed = property(lambda self: bool(self._host["signed"]))
    calibrated = property(lambda self: bool(self._host["calibrated"]))
    active = property(lambda self: bool(self._host["active"]))
    exempt = property(lambda self: bool(self._host["exempt"]))

    @property
    def has_gates(self) -> bool:
        """Whether there is a bit that DropBits may drop."""
        return self.min_bits < self.bits and not self.fixed

    @property
    def learns_bits(self) -> bool:
        """Whether training decides the width."""
        return self.has_gates and self.gates.learned

    @property
    def keep_prob(self) -> Tensor:
        """Probability with which a gate that is not learned is open."""
        return self.gates.keep_prob

    @property
    def noise_step(self) -> Tensor:
        """Counter that the gates' noise is drawn at."""
        return self.gates.noise_step

    def step(self) -> Tensor:
        raise NotImplementedError

    def decided_widths(self) -> Tensor:
        """The widths of evaluation, int64: one, or one a channel where channels have their own."""
        if self.fixed:
            return self.widths
        if self.learns_bits:
            return self.min_bits + self.gates.open(self.bits - self.min_bits)
        return torch.full((1,), self.bits, dtype=torch.int64, device=self.widths.device)

    def expected_widths(self) -> Tensor:
        """The widths that training draws on average, likewise; the decided ones where none are learned."""
        if not self.learns_bits:
            return self.decided_widths().float()
        return expected_bits(self.gates.probabilities(self.bits - self.min_bits).detach(), self.min_bits)

    @torch.no_grad()
    def fix_widths(self, widths: Sequence[int]) -> None:
        """Fix the width, or one of each channel; nothing is dropped or learned any more.

        In evaluation the result is what it was at these widths.
        """
        top = max(widths)
        if self.nesting == "resolution":
            # The widest width that is left is what the step is counted in.
            scale = self.width_scale[top - 1].clone()
            self.start_step.mul_(scale)
            self.width_scale.div_(scale)
        if min(widths) < top:
            self.widths.copy_(torch.as_tensor(widths))
        self.configure(bits=top, min_bits=min(widths), fixed=min(widths) < top)

    def nearest(self, x: Tensor) -> Tensor:
        """The grid points that evaluation puts values on, in the unit of ``x``."""
        step, codes = self._placed(x)
        return (step * codes).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """The levels that evaluation puts values on, as whole numbers in float32."""
        return self._placed(x)[1]

    def _placed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The step, which broadcasts to ``x``, and the levels."""
        step, low, high = (along_channels(t, x.dim(), self.channel_dim) for t in self.grid())
        return step, torch.minimum(torch.maximum((x.float() / step).round(), low), high)

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Step, lowest and highest level in evaluation, each of one value or one a channel."""
        widths = self.decided_widths()
        bounds = torch.tensor([level_bounds(k, self.signed) for k in range(1, 9)], device=widths.device)[widths - 1]
        step = self.step()
        if self.nesting == "resolution":
            scale = self.width_scale.expand(-1, max(len(widths), len(step)))
            step = step * scale.gather(0, (widths - 1).expand(scale.shape[1])[None])[0]
        return step, bounds[:, 0], bounds[:, 1]
