"""DistillationCallback: a full-precision teacher for the network that trains quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from cpq_lightning.attach.layers import is_attached
from cpq_lightning.attach.origin import quantizable_layers
from cpq_lightning.functional.distill import distillation_loss
from cpq_lightning.trainer.checks import quantization_start
from cpq_lightning.trainer.lightning_names import Callback, MisconfigurationException
from cpq_lightning.trainer.module_parts import part_with
from cpq_lightning.trainer.progress import run_folder, run_step
from cpq_lightning.trainer.teacher import (
    TEACHER_FILE,
    Teacher,
    copied_teacher,
    loaded_teacher,
    restored_teacher,
    save_teacher,
    share_buffers,
    warn_of_the_untrained,
)

# Arguments and output of one call of the network.
_Call = tuple[tuple[Any, ...], dict[str, Any], Any]


class DistillationCallback(Callback):
    """Train any LightningModule towards a teacher's class probabilities too, its code unchanged.

    The loss of a training step becomes ``(1 - weight) · loss + weight · tau^2 KL(teacher || network)``: see
    :func:`~cpq_lightning.functional.distillation_loss`. The teacher sees what the network was called with in the step,
    after all augmentation; of several calls the mean counts. Logged is ``cpq/distillation``, the second term without
    its weight; what the module logs is its own loss.

    The teacher is no part of the module: no checkpoint, export, optimizer or count of parameters has it.
    ``"self"`` is the network itself as it is when quantization begins, in full precision; until then nothing is
    distilled. Its weights are written to ``teacher.pt`` in the run's folder, where a run that is resumed finds them.

    Args:
        teacher: ``"self"``; the name of a timm model, with its pretrained weights; the path of a checkpoint of a
            :class:`~cpq_lightning.QuantizedModule`, of a packed file, or of weights of a network like the one that
            trains; or a module, which is frozen in place.
        weight: How much the teacher counts, over 0 and up to 1; at 1 labels do not.
        temperature: tau, over 0. A high one blurs what a low-bit network can still tell apart.
        module: Dotted name of the part of the LightningModule whose outputs are the logits, shape (batch, classes,
            ...); ``None`` is the innermost part that has all its convolutions and linear layers. Outputs may also be a
            mapping or an object with ``logits`` (or, as torchvision's segmentation has it, ``out``).

    Raises:
        ValueError: an argument out of its range.
        MisconfigurationException: manual optimization, a teacher that cannot be had, or outputs that cannot be
            compared.

    Example:
        ``Trainer(callbacks=[CPQCallback(quantize_from=0.5), DistillationCallback("self")]).fit(module, data)``
    """

    def __init__(
        self,
        teacher: str | nn.Module = "self",
        weight: float = 0.5,
        temperature: float = 1.0,
        module: str | None = None,
    ) -> None:
        if not isinstance(teacher, str | nn.Module) or teacher == "":
            raise ValueError(f"teacher must be 'self', a timm name, a file or a module, got {teacher!r}.")
        check_distillation(weight, temperature)
        self.teacher, self.weight, self.temperature, self.module = teacher, weight, temperature, module
        self._reset()

    def _reset(self) -> None:
        self._teacher: Teacher | None = None
        self._network: nn.Module | None = None
        # Where the copy of "self" was written, and the mark that it has there.
        self._saved, self._mark = "", ""
        self._start = 0
        self._calls: list[_Call] | None = None
        self._looked_at = False
        self._undo: list[Callable[[], Any]] = []

    # Hooks, in the order in which they fire ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if sum(isinstance(c, DistillationCallback) for c in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException("The Trainer has more than one DistillationCallback: keep one.")
        self.teardown(trainer, pl_module, stage)
        kept = (self._saved, self._mark)
        self._reset()
        if trainer.global_step:
            # The Trainer goes on with a run of its own.
            self._saved, self._mark = kept
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "DistillationCallback adds to the loss that training_step returns, and with manual optimization nobody "
                "takes it: add cpq_lightning.functional.distillation_loss(logits, teacher_logits) to your own loss."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.teacher == "self":
            self._saved, self._mark = state_dict["saved"], state_dict["mark"]

    def state_dict(self) -> dict[str, Any]:
        return {"saved": self._saved, "mark": self._mark}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._network = self._find_network(pl_module)
        if self.teacher != "self":
            own = {id(p) for p in pl_module.parameters()}
            given = self.teacher.parameters() if isinstance(self.teacher, nn.Module) else ()
            if any(id(p) in own for p in given):
                raise MisconfigurationException(
                    "The teacher is a part of the module that trains, and a teacher is frozen: give a copy of it, or "
                    "teacher='self'."
                )
            self._teacher = loaded_teacher(self.teacher, self._network)
        elif not is_attached(pl_module):
            raise MisconfigurationException(
                "teacher='self' is the network before its quantization, and nothing quantizes it: add a CPQCallback "
                "before DistillationCallback, or give another teacher."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._network is not None
        self._start = quantization_start(trainer)
        if self._saved:
            checkpoint = str(trainer.ckpt_path or "")
            self._teacher = restored_teacher(self._network, Path(self._saved), self._mark, checkpoint)
            # Each run's folder has it: the one before may go.
            self._keep(trainer)
        elif self._teacher is None and run_step(trainer) > self._start:
            raise MisconfigurationException(
                f"teacher='self' is the network as it was when quantization began, at step {self._start}, and the run "
                f"that is resumed at step {run_step(trainer)} kept no copy of it: give a checkpoint as teacher."
            )
        if self._teacher is not None:
            self._begin(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # By the step, not by what is quantized: CPQCallback may stand behind this one.
        if self._teacher is None and run_step(trainer) >= self._start:
            assert self._network is not None
            rank_zero_info(f"The network as it is at step {run_step(trainer)} is the teacher from here on.")
            self._teacher = copied_teacher(self._network)
            share_buffers(trainer, self._teacher)
            self._mark = trainer.strategy.broadcast(uuid4().hex)
            self._keep(trainer)
            self._begin(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then.
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for undo in self._undo:
            undo()
        self._undo, self._calls = [], None
        # A large network is not kept on a device that is needed no more.
        self._teacher, self._network = None, None

    # Steps of the work ------------------------------------------------------------------------------------------------

    def _find_network(self, pl_module: LightningModule) -> nn.Module:
        if self.module is None:
            return part_with(pl_module, quantizable_layers(pl_module))
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError:
            parts = [name for name, _ in pl_module.named_children()]
            raise MisconfigurationException(
                f"module={self.module!r} is no part of {type(pl_module).__name__}: expected a dotted name that begins "
                f"with one of {parts}."
            ) from None

    def _begin(self, pl_module: LightningModule) -> None:
        assert self._teacher is not None
        assert self._network is not None
        self._teacher.follow(self._network, pl_module.device)
        # Not before the network is copied: a copy would have the hook too.
        handle = self._network.register_forward_hook(self._note, with_kwargs=True)
        self._undo = [handle.remove, _replace_step(pl_module, self._step_of(pl_module))]

    def _keep(self, trainer: Trainer) -> None:
        """Write the copy of the network where a run that is resumed finds it."""
        assert self._teacher is not None
        if getattr(trainer, "fast_dev_run", False):
            return
        folder = run_folder(trainer)
        # Known on all ranks, so that each one's state says the same.
        self._saved = str(folder.resolve() / TEACHER_FILE)
        if trainer.is_global_zero:
            try:
                save_teacher(self._teacher, folder.resolve(), self._mark)
            except OSError as error:
                rank_zero_warn(f"{self._saved} could not be written ({error}): this run cannot be resumed without it.")

    def _note(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # What the step only looks at, without gradients, is not what it trains.
        if self._calls is not None and torch.is_grad_enabled():
            self._calls.append((args, kwargs, output))

    def _step_of(self, pl_module: LightningModule) -> Callable[..., Any]:
        own = pl_module.training_step

        @wraps(own)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            # Without gradients nobody trains: statistics of batch norms are being estimated.
            if self._teacher is None or not torch.is_grad_enabled():
                return own(*args, **kwargs)
            self._calls = []
            try:
                output, calls = own(*args, **kwargs), self._calls
            finally:
                self._calls = None
            return self._with_teacher(pl_module, output, calls)

        return training_step

    def _with_teacher(self, pl_module: LightningModule, output: Any, calls: list[_Call]) -> Any:
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:
            return output
        if not calls:
            raise MisconfigurationException(
                f"DistillationCallback: training_step never called {type(self._network).__name__}, whose outputs are "
                "to be compared with the teacher's. Name the part that it calls and that returns the logits: "
                "DistillationCallback(module=...)."
            )
        distance = torch.stack([self._distance(*call) for call in calls]).mean()
        pl_module.log("cpq/distillation", distance.detach())
        loss = (1 - self.weight) * loss + self.weight * distance
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _distance(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        assert self._teacher is not None
        logits = _logits(output, self._network)
        try:
            taught = _logits(self._teacher(*args, **kwargs), self._teacher.network)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise MisconfigurationException(
                f"The teacher, a {type(self._teacher.network).__name__}, cannot be called with what the network was "
                f"called with ({type(error).__name__}: {error})."
            ) from error
        if taught.shape != logits.shape or logits.dim() < 2:
            raise MisconfigurationException(
                f"The teacher's outputs have the shape {tuple(taught.shape)} and the network's "
                f"{tuple(logits.shape)}: expected logits of the same classes, (batch, classes, ...). Give a teacher "
                "that was trained for these classes, or name another part with DistillationCallback(module=...)."
            )
        if not self._looked_at:
            self._looked_at = True
            warn_of_the_untrained(taught)
        return distillation_loss(logits, taught, self.temperature)


def check_distillation(weight: float, temperature: float) -> None:
    """Refuse settings of a distillation that are out of their range.

    Raises:
        ValueError: naming them.
    """
    for name, value, most in (("weight", weight, 1.0), ("temperature", temperature, math.inf)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            limit = " and up to 1" if most == 1 else ""
            raise ValueError(f"{name} of a distillation must be a number over 0{limit}, got {value!r}.")


def _logits(output: Any, network: nn.Module | None) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise MisconfigurationException(
        f"{type(network).__name__} returns {type(output).__name__}: expected a tensor of logits, or a mapping or an "
        "object with 'logits'. Name the part that returns them: DistillationCallback(module=...)."
    )


def _replace_step(pl_module: LightningModule, step: Callable[..., Any]) -> Callable[[], None]:
    """Let a module train by another step; returns what takes that back."""
    held = pl_module.__dict__
    # A compiled module has one of its own already.
    before = held.get("training_step")
    held["training_step"] = step

    def undo() -> None:
        held.pop("training_step", None)
        if before is not None:
            held["training_step"] = before

    return undo
