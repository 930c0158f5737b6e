"""An auxiliary optimizer for the quantizers' parameters, which are never added to the user's optimizer."""

# pyright: reportPrivateImportUsage=false
# torch exposes its multi-tensor operations under private names only.

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from cpq_lightning.nn.sharding import is_sharded
from cpq_lightning.optim.optimizer_hook import OptimizerHook, before_update, nested, stepping
from cpq_lightning.optim.param_groups import largest_group
from cpq_lightning.optim.update_clamp import UpdateClamp

# Adam's default rate, used if the user's optimizer is of another class: it changes a log-scale by 0.1 % an update.
_ADAM_LR = 1e-3
# The optimizers of torch with special needs: LBFGS a closure, Muon matrices, SparseAdam sparse gradients. All others
# take any parameter, and keep no counters in their groups.
_UNSUITABLE = tuple(getattr(torch.optim, n) for n in ("LBFGS", "Muon", "SparseAdam") if hasattr(torch.optim, n))
# Entries that identify a group. All others are settings.
_IDENTITY = ("params", "param_names", "name")


class AuxiliaryOptimizer:
    """Trains the quantizers' parameters with an optimizer like the user's, stepped whenever the user's steps.

    It has the class of the user's optimizer. Before each update it copies the settings of the user's largest group, as
    schedulers have set them, without weight decay and with ``lr_factor`` times the learning rate. The result is the
    same as with a separate group in the user's optimizer. For a wrapper (SAM, Lookahead) the class is that of the inner
    optimizer. If that class takes no one-dimensional parameters (LBFGS, Muon), or the user's parameters are sharded,
    the auxiliary optimizer is Adam, with a rate that changes in proportion to the user's.

    Args:
        optimizer: The user's optimizer.
        parameters: The quantizers' parameters, one-dimensional and on one device.
        lr_factor: Learning rate relative to the user's.
        hook: Further arguments of the :class:`~cpq_lightning.optim.optimizer_hook.OptimizerHook` on the user's
            optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[nn.Parameter],
        lr_factor: float = 1.0,
        **hook: Any,
    ) -> None:
        self.parameters = list(parameters)
        self._user = optimizer
        self._lr_factor = lr_factor
        self._updated = False
        like = optimizer_like(optimizer, self.parameters)
        self.has_users_class = like is not None
        self.optimizer, self._counters = like or (Adam(self.parameters, lr=_ADAM_LR * lr_factor), set())
        group = largest_group(optimizer)
        self._first_lr = float(group.get("initial_lr") or group.get("lr") or 0.0)
        UpdateClamp(self.optimizer, self.parameters)
        self._hook = OptimizerHook(optimizer, self.parameters, self._step, **hook)
        # Schedule-free optimizers train at other parameter values than they evaluate at.
        for mode in ("train", "eval"):
            if hasattr(self.optimizer, mode):
                self._hook.follow(mode, getattr(self.optimizer, mode))
        self._handle = before_update(optimizer, self.follow_settings)
        self.follow_settings()

    def follow_settings(self) -> None:
        """Copy the settings of the user's optimizer."""
        (group,) = self.optimizer.param_groups
        settings = _settings(self._user)
        rate = settings.get("lr")
        if not self.has_users_class:
            ratio = float(rate) / self._first_lr if rate is not None and self._first_lr else 1.0
            group["lr"] = _ADAM_LR * self._lr_factor * ratio
            return
        group.update({name: value for name, value in settings.items() if name not in self._counters})
        if rate is not None:
            group["lr"] = rate * self._lr_factor

    def _step(self, gradients: list[Tensor | None]) -> None:
        present = [gradient for gradient in gradients if gradient is not None]
        with torch.no_grad():
            finite = torch.cat(present).nan_to_num_(0.0, 0.0, 0.0)
            torch._foreach_copy_(present, finite.split([len(gradient) for gradient in present]))
        self.optimizer.step()
        self._updated = True

    @property
    def is_left_out(self) -> bool:
        """Whether there are gradients, but the user's optimizer has never run its step hooks."""
        return not self._updated and any(p.grad is not None for p in self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer and the name of its class, for a checkpoint."""
        return {**self.optimizer.state_dict(), "optimizer": type(self.optimizer).__name__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: The state is that of another optimizer class, or of another number of parameters.
        """
        saved = state.get("optimizer"), [len(group["params"]) for group in state["param_groups"]]
        expected = type(self.optimizer).__name__, [len(self.parameters)]
        if saved != expected:
            raise ValueError(
                f"The checkpoint's state of the quantizers' optimizer does not match: expected {_named(*expected)}, "
                f"got {_named(*saved)}. Resume with the optimizer and the CPQConfig of the run that saved it, or load "
                "the checkpoint's state_dict into the module and start a new run."
            )
        self.optimizer.load_state_dict({key: state[key] for key in ("state", "param_groups")})

    def remove(self) -> None:
        """Remove the hooks from the user's optimizer."""
        self._handle.remove()
        self._hook.remove()


def _named(optimizer: str | None, sizes: list[int]) -> str:
    return f"one of {optimizer} on {' + '.join(map(str, sizes))} parameters"


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    """The settings of the largest group, without weight decay."""
    group = largest_group(optimizer)
    # Tensors are cloned, since an optimizer may write to them.
    copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k not in _IDENTITY}
    return copied | ({"weight_decay": 0.0} if "weight_decay" in copied else {})


def optimizer_like(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> tuple[Optimizer, set[str]] | None:
    """Create another optimizer of the same class and settings; for a wrapper, of those of the inner optimizer.

    A trial step on a one-dimensional parameter shows whether a class accepts one: LBFGS needs a closure, Muon refuses
    in its constructor, others only in the step. It also shows which entries of the group are counters, not settings.

    Returns:
        The optimizer and the names of its counters; ``None`` if the class takes no one-dimensional parameters, or the
        parameters of ``optimizer`` are sharded.
    """
    if any(is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        return None
    for candidate in nested(stepping(optimizer)):
        if type(candidate).__module__.startswith("torch.optim.") and not isinstance(candidate, _UNSUITABLE):
            return _make_like(candidate, parameters), set()
        trial = nn.Parameter(torch.zeros_like(parameters[0]))
        trial.grad = torch.zeros_like(trial)
        try:
            trial_optimizer = _make_like(candidate, [trial])
            if hasattr(trial_optimizer, "train"):
                trial_optimizer.train()  # type: ignore[attr-defined]
            before = _settings(trial_optimizer)
            trial_optimizer.step()
        except Exception:
            continue
        counters = {name for name, value in _settings(trial_optimizer).items() if not _equal(value, before.get(name))}
        return _make_like(candidate, parameters), counters - {"lr", "weight_decay"}
    return None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


def _make_like(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> Optimizer:
    settings = {}
    for name in _argument_names(type(optimizer)):
        if name in optimizer.defaults:
            settings[name] = optimizer.defaults[name]
        elif hasattr(optimizer, name):
            settings[name] = getattr(optimizer, name)
    groups = [{**_settings(optimizer), "params": list(parameters)}]
    return type(optimizer)(groups, **settings)  # type: ignore[arg-type]


def _argument_names(cls: type) -> set[str]:
    """Names of the arguments of a constructor, including those that it forwards to base classes."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            names |= parameters.keys()
            if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
                break
    return names - {"self", "params"}
