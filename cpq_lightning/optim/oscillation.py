"""Oscillation of weights around the boundary between two levels, and its cure by freezing.

Nagel, Fournarakis, Bondarenko, Blankevoort, *Overcoming Oscillations in Quantization-Aware Training*, ICML 2022
(arXiv 2203.11086). Scales per channel, grids of any zero point and the restart after a new range are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cpq_lightning.functional.grid import nearest_level
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.sharding import View, full_tensor, whole, write_part
from cpq_lightning.optim.dampening import updated_weights
from cpq_lightning.optim.optimizer_hook import stepping

# A weight oscillates if its frequency is above this one (Nagel et al.): one reversal in 200 steps.
OSCILLATES = 0.005


class Oscillation:
    """How often each element of a weight reverses its last change of level, and the elements that are frozen.

    In each step, ``o`` is 1 where the level has changed in the direction opposite to its last change, else 0. The
    frequency is its moving average, ``f <- f + momentum (o - f)``, and the mean level one of levels. An element whose
    frequency exceeds a threshold is frozen at its rounded mean level, where it has been most of the time. A frozen
    weight stays on its level while the scale trains on.

    A new range restarts all elements of a weight: levels of two grids cannot be compared.

    Args:
        momentum: The momentum of both averages, over 0 and below 1.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self._grid: tuple[Any, ...] = ()
        self._seen = (0, -1)
        self._state: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, parameter: Tensor, quantizer: Quantizer, threshold: float | None, view: View = whole) -> None:
        """Take notice of a weight after an optimizer step, and write the levels of its frozen elements.

        Args:
            parameter: The Parameter that has the weight.
            quantizer: The weight's quantizer, with a range and a fixed width.
            threshold: The frequency above which elements are frozen; ``None`` freezes none.
            view: Gives the weight as a view of the Parameter.
        """
        w = view(full_tensor(parameter.detach()))
        scale, low, high = (quantizer.along_channels(t.detach(), w) for t in quantizer.grid())
        code = nearest_level(w.float() / scale, low, high) - low
        if self._restarts(quantizer):
            self._state |= {
                "frequency": torch.zeros_like(code),
                "direction": torch.zeros_like(code, dtype=torch.int8),
                "code": code.to(torch.uint8),
                "mean_code": code.clone(),
                "frozen_code": torch.full_like(code, -1, dtype=torch.int16),
            }
            return
        state = self._state
        change = code - state["code"]
        direction = change.sign().to(torch.int8)
        reversed_ = (direction != 0) & (direction == -state["direction"])
        state["direction"] = torch.where(direction != 0, direction, state["direction"])
        state["frequency"].lerp_(reversed_.to(code.dtype), self.momentum)
        state["mean_code"].lerp_(code, self.momentum)
        frozen = state["frozen_code"]
        if threshold is not None:
            newly = (frozen < 0) & (state["frequency"] > threshold)
            frozen = state["frozen_code"] = torch.where(newly, state["mean_code"].round().to(torch.int16), frozen)
        is_frozen = frozen >= 0
        state["code"] = torch.where(is_frozen, frozen, code).to(torch.uint8)
        if threshold is not None:
            value = torch.where(is_frozen, (scale * (frozen + low)).to(w.dtype), w)
            write_part(parameter, view, value)

    def _restarts(self, quantizer: Quantizer) -> bool:
        """Whether the grid is another one than in the last step."""
        buffer = quantizer.state
        if self._state and self._seen == (id(buffer), buffer._version):
            return False
        # Only after a write are scales compared, which on a GPU waits for the device.
        self._seen = (id(buffer), buffer._version)
        settings, start = quantizer.settings, quantizer.start_scale
        grid = (settings.bits, settings.min_bits, settings.fixed, settings.doubled_zero_points)
        if self._state and grid == self._grid and torch.equal(start, self._state["scale"]):
            return False
        self._grid, self._state = grid, {"scale": start.clone()}
        return True

    def share(self) -> float | None:
        """The share of elements that oscillate, with a frequency above :data:`OSCILLATES`; ``None`` before a step."""
        return None if not self._state else float((self._state["frequency"] > OSCILLATES).double().mean())

    def frozen_share(self) -> float | None:
        """The share of elements that are frozen; ``None`` before a step."""
        return None if not self._state else float((self._state["frozen_code"] >= 0).double().mean())

    def state_dict(self) -> dict[str, Any]:
        """The state, from which :meth:`load_state_dict` continues exactly."""
        return {"grid": list(self._grid), "tensors": dict(self._state)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from the state of :meth:`state_dict`."""
        grid = [tuple(value) if isinstance(value, list | tuple) else value for value in state["grid"]]
        self._grid = tuple(grid)
        self._state = {name: tensor.to(device).clone() for name, tensor in state["tensors"].items()}


class OscillationHook:
    """Follows the weights of an optimizer after each of its steps.

    Left alone are weights that :func:`~cpq_lightning.optim.dampening.updated_weights` leaves out, and weights without a
    range.

    Args:
        optimizer: The optimizer.
        tracked: For each Parameter, by its ``id``, its weights: the view of the Parameter, the quantizer, and the
            state.
        threshold: Returns the threshold of :meth:`Oscillation.update`; called in each step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tracked: Mapping[int, Sequence[tuple[View, Quantizer, Oscillation]]],
        threshold: Callable[[], float | None],
    ) -> None:
        self._quantizers = {key: [(view, q) for view, q, _ in weights] for key, weights in tracked.items()}
        self._oscillations = {q: oscillation for weights in tracked.values() for _, q, oscillation in weights}
        self._threshold = threshold
        self._handle = stepping(optimizer).register_step_post_hook(self._after)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        threshold = self._threshold()
        for _, parameter, view, quantizer in updated_weights(optimizer, self._quantizers):
            if quantizer.fitted:
                self._oscillations[quantizer].update(parameter, quantizer, threshold, view)

    def remove(self) -> None:
        """Remove the hook from the optimizer."""
        self._handle.remove()
