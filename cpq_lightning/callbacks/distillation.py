"""DistillationCallback: knowledge distillation from a full-precision teacher."""

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
from cpq_lightning.trainer.lightning_names import Callback, MisconfigurationException, NotResumable
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
    """Add knowledge distillation to the loss of any LightningModule, without a change to its code.

    The loss of a training step becomes ``(1 - weight) · loss + weight · tau^2 KL(teacher || network)``: see
    :func:`~cpq_lightning.functional.distillation_loss`. The teacher gets the same inputs as the network in the step,
    after all augmentation. If the step calls the network several times, the mean over the calls is used. The callback
    logs ``cpq/distillation``, the second term without its weight. The module still logs its loss without distillation.

    The teacher is not part of the module, so it is in no checkpoint, export, optimizer or parameter count. ``"self"``
    is a full-precision copy of the network at the step where quantization begins; there is no distillation before that
    step. The copy's weights are written to ``teacher.pt`` in the run's folder, and a resumed run reads them there.

    Args:
        teacher: ``"self"``; the name of a timm model, used with its pretrained weights; the path of a checkpoint of a
            :class:`~cpq_lightning.QuantizedModule`, of a packed file, or of weights of a network with the architecture
            of the trained one; or a module, which is frozen in place.
        weight: Weight of the teacher, over 0 and at most 1; at 1 the labels are not used.
        temperature: tau, over 0. A high temperature blurs differences that a low-bit network can still resolve.
        module: Dotted name of the part of the LightningModule whose outputs are the logits, shape (batch, classes,
            ...). ``None`` is the innermost part with all its convolutions and linear layers. Outputs may also be a
            mapping or an object with ``logits`` (or ``out``, as in torchvision's segmentation models).

    Raises:
        ValueError: an argument is out of range.
        MisconfigurationException: the module optimizes manually, the teacher cannot be loaded, or the outputs of
            teacher and network cannot be compared.

    Example:
        ``Trainer(callbacks=[CPQCallback(quantize_from=0.5), DistillationCallback("self")]).fit(module, data)``
    """

    def __init__(
        self,
        teacher: str | nn.Module = "self",
        *,
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
        # Path of the copy of "self", and the identifier in that file.
        self._saved, self._identifier = "", ""
        self._start = 0
        self._calls: list[_Call] | None = None
        self._checked = False
        self._undo: list[Callable[[], Any]] = []

    # Hooks, in the order in which they fire ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if sum(isinstance(c, DistillationCallback) for c in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException("The Trainer has more than one DistillationCallback: keep one.")
        self.teardown(trainer, pl_module, stage)
        saved = (self._saved, self._identifier)
        self._reset()
        if trainer.global_step:
            # The Trainer continues a run that this callback has trained in.
            self._saved, self._identifier = saved
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "DistillationCallback adds to the loss that training_step returns, which manual optimization does not "
                "use: add cpq_lightning.functional.distillation_loss(logits, teacher_logits) to your loss."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.teacher == "self":
            self._saved, self._identifier = state_dict["saved"], state_dict["mark"]

    def state_dict(self) -> dict[str, Any]:
        return {"saved": self._saved, "mark": self._identifier}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._network = self._find_network(pl_module)
        if self.teacher != "self":
            trained = {id(p) for p in pl_module.parameters()}
            teacher_parameters = self.teacher.parameters() if isinstance(self.teacher, nn.Module) else ()
            if any(id(p) in trained for p in teacher_parameters):
                raise MisconfigurationException(
                    "The teacher is a part of the module that trains, and a teacher is frozen: give a copy of that "
                    "part, or teacher='self'."
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
            self._teacher = restored_teacher(self._network, Path(self._saved), self._identifier, checkpoint)
            # Write it to this run's folder too: the previous folder may be deleted.
            self._save_copy(trainer)
        elif self._teacher is None and run_step(trainer) > self._start:
            raise NotResumable(
                f"teacher='self' is the network as it was when quantization began, at step {self._start}, and the run "
                f"that is resumed at step {run_step(trainer)} kept no copy of it: give a checkpoint as teacher."
            )
        if self._teacher is not None:
            self._begin_distillation(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Compare steps, not active quantizers: CPQCallback may be listed after this callback.
        if self._teacher is None and run_step(trainer) >= self._start:
            assert self._network is not None
            rank_zero_info(f"The network at step {run_step(trainer)} is the teacher from here on.")
            self._teacher = copied_teacher(self._network)
            share_buffers(trainer, self._teacher)
            self._identifier = trainer.strategy.broadcast(uuid4().hex)
            self._save_copy(trainer)
            self._begin_distillation(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for undo in self._undo:
            undo()
        self._undo, self._calls = [], None
        # Free the device memory of the teacher.
        self._teacher, self._network = None, None

    # Implementation ---------------------------------------------------------------------------------------------------

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

    def _begin_distillation(self, pl_module: LightningModule) -> None:
        assert self._teacher is not None
        assert self._network is not None
        self._teacher.follow(self._network, pl_module.device)
        # After the network is copied: a copy would have the hook too.
        handle = self._network.register_forward_hook(self._record_call, with_kwargs=True)
        self._undo = [handle.remove, _replace_step(pl_module, self._wrapped_step(pl_module))]

    def _save_copy(self, trainer: Trainer) -> None:
        """Write the copy of the network to the run's folder, for a resumed run."""
        assert self._teacher is not None
        if getattr(trainer, "fast_dev_run", False):
            return
        folder = run_folder(trainer)
        # Set on all ranks, so that their states agree.
        self._saved = str(folder.resolve() / TEACHER_FILE)
        if trainer.is_global_zero:
            try:
                save_teacher(self._teacher, folder.resolve(), self._identifier)
            except OSError as error:
                rank_zero_warn(f"{self._saved} could not be written ({error}): this run cannot be resumed without it.")

    def _record_call(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Calls without gradients do not train the network.
        if self._calls is not None and torch.is_grad_enabled():
            self._calls.append((args, kwargs, output))

    def _wrapped_step(self, pl_module: LightningModule) -> Callable[..., Any]:
        original = pl_module.training_step

        @wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            # Without gradients, this is no training: the statistics of batch norms are being estimated.
            if self._teacher is None or not torch.is_grad_enabled():
                return original(*args, **kwargs)
            self._calls = []
            try:
                output, calls = original(*args, **kwargs), self._calls
            finally:
                self._calls = None
            return self._add_distillation(pl_module, output, calls)

        return training_step

    def _add_distillation(self, pl_module: LightningModule, output: Any, calls: list[_Call]) -> Any:
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None:
            return output
        if not calls:
            raise MisconfigurationException(
                f"DistillationCallback: training_step never called {type(self._network).__name__}, whose outputs are "
                "to be compared with the teacher's. Name the part that training_step calls and that returns the "
                "logits: DistillationCallback(module=...)."
            )
        divergence = torch.stack([self._distance(*call) for call in calls]).mean()
        pl_module.log("cpq/distillation", divergence.detach())
        loss = (1 - self.weight) * loss + self.weight * divergence
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _distance(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        assert self._teacher is not None
        logits = _logits(output, self._network)
        try:
            teacher_logits = _logits(self._teacher(*args, **kwargs), self._teacher.network)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise MisconfigurationException(
                f"The teacher, a {type(self._teacher.network).__name__}, cannot be called with the arguments of the "
                f"network ({type(error).__name__}: {error})."
            ) from error
        if teacher_logits.shape != logits.shape or logits.dim() < 2:
            raise MisconfigurationException(
                f"The teacher's outputs have the shape {tuple(teacher_logits.shape)} and the network's "
                f"{tuple(logits.shape)}: expected logits of the same classes, (batch, classes, ...). Give a teacher "
                "that was trained for these classes, or name another part with DistillationCallback(module=...)."
            )
        if not self._checked:
            self._checked = True
            warn_of_the_untrained(teacher_logits)
        return distillation_loss(logits, teacher_logits, temperature=self.temperature)


def check_distillation(weight: float, temperature: float) -> None:
    """Check the settings of a distillation.

    Raises:
        ValueError: a setting is out of range.
    """
    for name, value, maximum in (("weight", weight, 1.0), ("temperature", temperature, math.inf)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= maximum:
            limit = " and up to 1" if maximum == 1 else ""
            raise ValueError(f"{name} of a distillation must be a number over 0{limit}, got {value!r}.")


def _logits(output: Any, network: nn.Module | None) -> Tensor:
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    raise MisconfigurationException(
        f"{type(network).__name__} returns {type(output).__name__}: expected a tensor of logits, or a mapping or an "
        "object with 'logits'. Name the part that returns them: DistillationCallback(module=...)."
    )


def _replace_step(pl_module: LightningModule, step: Callable[..., Any]) -> Callable[[], None]:
    """Replace the module's ``training_step``; return a function that restores it."""
    attributes = pl_module.__dict__
    # The instance may already have a training_step of its own, for example a compiled one.
    previous = attributes.get("training_step")
    attributes["training_step"] = step

    def undo() -> None:
        attributes.pop("training_step", None)
        if previous is not None:
            attributes["training_step"] = previous

    return undo
