"""An optimizer beside the user's, for one that cannot take the quantizers' parameters (LBFGS, Muon)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from cpq_lightning.optim.beside import Beside
from cpq_lightning.optim.bound import UpdateBound


class Companion:
    """Adam on the quantizers' parameters, stepped whenever the user's optimizer steps.

    Its learning rate follows the user's schedule in proportion, and its gradients are cleared whenever the user's
    are, so that closures evaluated many times a step (LBFGS) and accumulated gradients come out right.

    Args:
        optimizer: The user's optimizer.
        parameters: The quantizers' parameters.
        lr: Learning rate while the user's is at its starting value.
        grad_scale: Reads the factor that gradients are scaled by (16-bit mixed precision), if any.
        wrappers: Objects that stand for the optimizer and have a ``zero_grad`` of their own.
        average: Averages a tensor over all processes in place, where nobody else does it for these parameters.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[nn.Parameter],
        lr: float,
        grad_scale: Callable[[], float] = lambda: 1.0,
        wrappers: Iterable[Any] = (),
        average: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.optimizer = Adam(list(parameters), lr=lr)
        UpdateBound(self.optimizer, self.parameters)
        self._lr = lr
        self._user = optimizer
        group = optimizer.param_groups[0]
        self._user_lr = float(group.get("initial_lr", group["lr"])) or 1.0
        self._beside = Beside(optimizer, self.parameters, self._step, grad_scale, wrappers, average)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What this optimizer trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _step(self, grads: list[Tensor | None]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * float(self._user.param_groups[0]["lr"]) / self._user_lr
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, for a checkpoint."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.optimizer.load_state_dict(state)

    def remove(self) -> None:
        """Step no more."""
        self._beside.remove()
