"""QuantizedModule: image classification with any timm backbone, quantized."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from cpq_lightning.attach.attach import attach
from cpq_lightning.attach.levels_file import with_levels_read
from cpq_lightning.backbones.create import create_backbone
from cpq_lightning.callbacks.cpq import CPQCallback
from cpq_lightning.callbacks.distillation import DistillationCallback, check_distillation
from cpq_lightning.checkpoint import take_settings
from cpq_lightning.config import CPQConfig, plain
from cpq_lightning.export.load import ORIGINS

_Base = LightningModule if TYPE_CHECKING else object


class QuantizedClassifier(_Base):
    """A timm backbone with Cluster-Promoting Quantization, trained by cross-entropy.

    Batches are ``(images, labels)``. Labels are class indices, or probabilities if training mixes images. It logs
    ``train_loss``, ``train_acc``, ``val_loss``, ``val_acc`` (top 1) and, with more than five classes,
    ``val_acc_top5``; in testing, the same with the prefix ``test``. A Trainer without a
    :class:`~cpq_lightning.CPQCallback` gets one with default settings, which calibrates and reports.

    ``QuantizedModule.load_from_checkpoint(path)`` restores a module whose backbone was given by name. A module that was
    built around an ``nn.Module`` needs that network again: ``load_from_checkpoint(path, backbone=network)``. The
    optimizer and the scheduler are not part of a checkpoint's settings: give them again to continue training.

    For a Trainer of ``pytorch_lightning``, import the class from ``cpq_lightning.pytorch_lightning``.

    Args:
        backbone: Name of a timm model, ``"cifar_resnet20"``, ``"cifar_vgg7"``, or any module from images to logits.
        num_classes: Number of classes; ``None`` is the number of the backbone's pretrained weights (and, for the
            command ``cpq``, that of the data).
        quantization: What to quantize, and how: a config, or a mapping of its settings; ``None`` leaves the network in
            full precision.
        pretrained: Whether a named backbone starts from timm's pretrained weights; or the path of a file with weights
            of that backbone (safetensors, ``.pth``, or a Lightning checkpoint that contains the backbone).
        backbone_args: Further arguments of ``timm.create_model``, such as ``in_chans`` or ``img_size``.
        label_smoothing: Probability mass that the loss spreads over all classes, 0 to 1.
        optimizer: Makes the optimizer from the parameters; ``None`` is AdamW with a learning rate of 0.001 and a weight
            decay of 0.05.
        lr_scheduler: Makes the scheduler from the optimizer; ``None`` keeps the learning rate.
        lr_interval: Whether the scheduler steps each ``"epoch"`` or each ``"step"``.
        teacher: The network whose class probabilities the quantized network also learns: ``"self"`` (its
            full-precision copy, taken when quantization begins), the name of a timm model, or the path of a checkpoint;
            see :class:`~cpq_lightning.callbacks.DistillationCallback`.
        distillation_weight: Weight of the teacher relative to the labels, over 0 and at most 1.
        distillation_temperature: Temperature of both probabilities; low-bit networks do best near 1.
        class_names: Names of the classes, for users of the checkpoint.

    Raises:
        ValueError: the backbone is unknown, the weights do not fit it, or an argument is out of its range.
        FileNotFoundError: ``pretrained`` is a path, and that file does not exist.

    Example:
        ``QuantizedModule("resnet18", num_classes=10, quantization=CPQConfig(weight_bits=4, act_bits=4))``
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        num_classes: int | None = None,
        quantization: CPQConfig | None = CPQConfig(),  # noqa: B008 - frozen
        pretrained: bool | str = False,
        backbone_args: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        teacher: str | None = None,
        distillation_weight: float = 0.5,
        distillation_temperature: float = 1.0,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}.")
        check_distillation(distillation_weight, distillation_temperature)
        if teacher == "self" and quantization is None:
            raise ValueError(
                "teacher='self' is for a network that is quantized: set quantization, or give another teacher."
            )
        if quantization is not None:
            # Checkpoints hold plain values: the widths themselves, since the file that they came from may be deleted.
            quantization = with_levels_read(CPQConfig.of(quantization, "quantization"))
        arguments: dict[str, Any] = plain(backbone_args or {})
        model = _build(backbone, num_classes, pretrained, arguments)
        num_classes = _count_classes(model, num_classes, class_names)
        self.save_hyperparameters(
            {
                "backbone": backbone if isinstance(backbone, str) else None,
                "num_classes": num_classes,
                "quantization": None if quantization is None else quantization.to_dict(),
                "pretrained": pretrained,
                "backbone_args": arguments,
                "label_smoothing": label_smoothing,
                "lr_interval": lr_interval,
                "teacher": teacher,
                "distillation_weight": distillation_weight,
                "distillation_temperature": distillation_temperature,
                "class_names": None if class_names is None else list(class_names),
            }
        )
        self.model = model
        self.label_smoothing = label_smoothing
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        metrics: dict[str, Any] = {"acc": _accuracy(num_classes, 1)}
        if num_classes > 5:
            metrics["acc_top5"] = _accuracy(num_classes, 5)
        self.train_acc = _accuracy(num_classes, 1)
        self.val_metrics = MetricCollection(metrics, prefix="val_")
        self.test_metrics = self.val_metrics.clone(prefix="test_")
        if quantization is not None:
            attach(self, quantization)

    def configure_callbacks(self) -> Sequence[Callback]:
        present = {type(callback) for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        added: list[Callback] = []
        if self.hparams["quantization"] is not None and not any(issubclass(c, CPQCallback) for c in present):
            added.append(CPQCallback(monitor="val_acc"))
        teacher = self.hparams["teacher"]
        if teacher is not None and not any(issubclass(c, DistillationCallback) for c in present):
            settings = {name: self.hparams[f"distillation_{name}"] for name in ("weight", "temperature")}
            added.append(DistillationCallback(teacher, **settings, module="model"))
        return added

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (batch, num_classes)."""
        return self.model(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        # Mixup turns labels into probabilities.
        self.train_acc(logits, labels.argmax(1) if labels.is_floating_point() else labels)
        self.log("train_loss", loss)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val_loss", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test_loss", self.test_metrics)

    def _evaluate(self, batch: Any, loss_name: str, metrics: MetricCollection) -> None:
        images, labels = batch
        logits = self(images)
        metrics.update(logits, labels)
        self.log(loss_name, cross_entropy(logits, labels), sync_dist=True)
        for name, metric in metrics.items():
            self.log(name, metric, prog_bar=name.endswith("_acc"))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Logits of a batch of images, labelled or not."""
        return self(batch[0] if isinstance(batch, tuple | list) else batch)

    def configure_optimizers(self) -> Any:
        make = self.optimizer or partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05)
        optimizer = make(self.parameters())  # type: ignore[arg-type]
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_interval}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            config["monitor"] = getattr(scheduler, "monitor", "val_loss")
        return {"optimizer": optimizer, "lr_scheduler": config}

    def export_module(self) -> nn.Module:
        """The part that exports write: the network from images to logits."""
        return self.model

    def export_architecture(self) -> dict[str, Any] | None:
        """How timm builds the network; ``None`` if the backbone was given as a module, or comes from a hub."""
        name = self.hparams["backbone"]
        if name is None or ":" in name:
            return None
        # The source of the weights is not part of the architecture.
        architecture = {k: v for k, v in self.hparams["backbone_args"].items() if k not in ORIGINS}
        arguments = {"num_classes": self.hparams["num_classes"], **architecture}
        try:
            json.dumps(arguments)
        except TypeError:
            return None
        return {"timm": name, "arguments": arguments, "version": timm.__version__}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        message = take_settings(self, checkpoint)
        if message:
            rank_zero_warn(message)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The checkpoint contains the weights, so restoring it must not download them.
        checkpoint["hyper_parameters"] = {**checkpoint.get("hyper_parameters", {}), "pretrained": False}


class QuantizedModule(QuantizedClassifier, LightningModule):
    # One class for each name of Lightning: a Trainer needs LightningModules of its package.
    __doc__ = QuantizedClassifier.__doc__


def _accuracy(num_classes: int, top_k: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes=num_classes, top_k=top_k, average="micro")


def _build(
    backbone: str | nn.Module | None, num_classes: int | None, pretrained: bool | str, arguments: dict[str, Any]
) -> nn.Module:
    if isinstance(backbone, nn.Module):
        if pretrained or arguments:
            raise ValueError(
                "pretrained and backbone_args need a backbone's name; a module as backbone is already complete."
            )
        return backbone
    if backbone is None:
        raise ValueError(
            "backbone is missing: expected the name of a timm model or an nn.Module. To restore a checkpoint of a "
            "module that was built around an nn.Module, use load_from_checkpoint(path, backbone=network)."
        )
    if not isinstance(backbone, str):
        raise TypeError(f"backbone must be the name of a timm model or an nn.Module, got {backbone!r}.")
    return create_backbone(backbone, pretrained=pretrained, num_classes=num_classes, **arguments)


def _count_classes(network: nn.Module, num_classes: int | None, class_names: Sequence[str] | None) -> int:
    count = getattr(network, "num_classes", None) if num_classes is None else num_classes
    if not isinstance(count, int):
        raise ValueError(
            f"num_classes is None, and {type(network).__name__} has no attribute num_classes: pass num_classes=."
        )
    if class_names is not None and len(class_names) != count:
        raise ValueError(f"class_names must have {count} names, one per class, got {len(class_names)}.")
    return count
