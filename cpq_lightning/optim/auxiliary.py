"""An optimizer beside the user's, for the quantizers' parameters: the user's is never given any of them."""

# pyright: reportPrivateImportUsage=false
# torch has the operations on many tensors at once under private names only.

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from cpq_lightning.nn.sharding import is_sharded
from cpq_lightning.optim.optimizer_hook import OptimizerHook, before_update, nested, stepping
from cpq_lightning.optim.param_groups import largest_group
from cpq_lightning.optim.update_clamp import UpdateClamp

# Adam's usual rate, where the user's is no guide; on a logarithm of a step it is 0.1 % an update.
_ADAM_LR = 1e-3
# Of torch's own: LBFGS takes a closure, Muon matrices, SparseAdam sparse gradients. All others take any parameter, and
# count nothing in their groups.
_NEEDS_OTHERS = tuple(getattr(torch.optim, n) for n in ("LBFGS", "Muon", "SparseAdam") if hasattr(torch.optim, n))
# What a group has of its own. All else are settings.
_IDENTITY = ("params", "param_names", "name")


class AuxiliaryOptimizer:
    """Trains the quantizers' parameters with an optimizer like the user's, stepped whenever the user's steps.

    It has the class of the user's, and before each update takes on every setting of the user's largest group, as
    schedulers have left it; but no weight decay, and ``lr_factor`` times the rate. So the numbers are those of a group
    of its own in the user's optimizer. Of a wrapper (SAM, Lookahead) it is the class of the optimizer inside. Where
    that takes no one-dimensional parameters (LBFGS, Muon), or the user's parameters are sharded, it is Adam, whose rate
    follows the user's in proportion.

    Args:
        optimizer: The user's optimizer.
        parameters: The quantizers' parameters, one-dimensional and on one device.
        lr_factor: Learning rate relative to the user's.
        grad_scale: Reads the factor that gradients are scaled by; ``None`` where no gradient scaler is in use.
        wrappers: Objects that stand for the optimizer and have methods of their own.
        average: Averages a tensor over all processes in place, where nobody else does it for these parameters.
        kept_out: Parameters that may not be added to the user's optimizer; ``None`` means those of this one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[nn.Parameter],
        lr_factor: float = 1.0,
        grad_scale: Callable[[], float] | None = None,
        wrappers: Iterable[Any] = (),
        average: Callable[[Tensor], None] | None = None,
        kept_out: Iterable[nn.Parameter] | None = None,
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
        self._beside = OptimizerHook(optimizer, self.parameters, self._step, grad_scale, wrappers, average, kept_out)
        # Optimizers without a schedule train at other values than they are evaluated at.
        for mode in ("train", "eval"):
            if hasattr(self.optimizer, mode):
                self._beside.follow(mode, getattr(self.optimizer, mode))
        self._handle = before_update(optimizer, self.follow_settings)
        self.follow_settings()

    def follow_settings(self) -> None:
        """Take on what the user's optimizer is set to."""
        (group,) = self.optimizer.param_groups
        settings = _settings(self._user)
        rate = settings.get("lr")
        if not self.has_users_class:
            part = float(rate) / self._first_lr if rate is not None and self._first_lr else 1.0
            group["lr"] = _ADAM_LR * self._lr_factor * part
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
        """Whether there are gradients, and the user's optimizer has never told of a step."""
        return not self._updated and any(p.grad is not None for p in self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer and the name of its class, for a checkpoint."""
        return {**self.optimizer.state_dict(), "optimizer": type(self.optimizer).__name__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: it is the state of another optimizer, or of other parameters.
        """
        saved = state.get("optimizer"), [len(group["params"]) for group in state["param_groups"]]
        expected = type(self.optimizer).__name__, [len(self.parameters)]
        if saved != expected:
            raise ValueError(
                f"The checkpoint's state of the quantizers' optimizer does not fit: expected {_named(*expected)}, got "
                f"{_named(*saved)}. Resume with the optimizer and the CPQConfig of the run that saved it, or load the "
                "checkpoint's state_dict into the module and begin a new run."
            )
        self.optimizer.load_state_dict({key: state[key] for key in ("state", "param_groups")})

    def remove(self) -> None:
        """Step no more."""
        self._handle.remove()
        self._beside.remove()


def _named(optimizer: str | None, sizes: list[int]) -> str:
    return f"one of {optimizer} on {' + '.join(map(str, sizes))} parameters"


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    """Those of the largest group, without weight decay."""
    group = largest_group(optimizer)
    # A tensor may be written to by whoever steps.
    copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k not in _IDENTITY}
    return copied | ({"weight_decay": 0.0} if "weight_decay" in copied else {})


def optimizer_like(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> tuple[Optimizer, set[str]] | None:
    """Another optimizer of the same class and settings; of a wrapper, like the one inside.

    Whether a class takes one-dimensional parameters shows in a step on one: LBFGS needs a closure for it, Muon refuses
    them at once, others as late as there. So does what it counts in its group from step to step, which is no setting.

    Returns:
        The optimizer, and the names of what it counts; ``None`` where the class takes no such parameters, or the
        optimizer's own are sharded.
    """
    if any(is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        return None
    for candidate in nested(stepping(optimizer)):
        if type(candidate).__module__.startswith("torch.optim.") and not isinstance(candidate, _NEEDS_OTHERS):
            return _make_like(candidate, parameters), set()
        trial = nn.Parameter(torch.zeros_like(parameters[0]))
        trial.grad = torch.zeros_like(trial)
        try:
            tried = _make_like(candidate, [trial])
            if hasattr(tried, "train"):
                tried.train()  # type: ignore[attr-defined]
            before = _settings(tried)
            tried.step()
        except Exception:
            continue
        counters = {name for name, value in _settings(tried).items() if not _same(value, before.get(name))}
        return _make_like(candidate, parameters), counters - {"lr", "weight_decay"}
    return None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)


def _make_like(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> Optimizer:
    settings = {}
    for name in _accepted(type(optimizer)):
        if name in optimizer.defaults:
            settings[name] = optimizer.defaults[name]
        elif hasattr(optimizer, name):
            settings[name] = getattr(optimizer, name)
    groups = [{**_settings(optimizer), "params": list(parameters)}]
    return type(optimizer)(groups, **settings)  # type: ignore[arg-type]


def _accepted(cls: type) -> set[str]:
    """Names of the arguments that a constructor takes, also of those that it passes on."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            found = inspect.signature(vars(base)["__init__"]).parameters
            names |= found.keys()
            if not any(p.kind == p.VAR_KEYWORD for p in found.values()):
                break
    return names - {"self", "params"}
