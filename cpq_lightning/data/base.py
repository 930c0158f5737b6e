"""The base class of the data modules: a fixed split, loaders, and mixing of batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from timm.data.mixup import Mixup
from torch.utils.data import DataLoader, Dataset, Subset

from cpq_lightning.errors import CPQError


class ImageDataModule(LightningDataModule):
    """Labelled images; a seed chooses the part that is for validation.

    Subclasses return their data from :meth:`training_data` and :meth:`evaluation_data`.

    Args:
        batch_size: Images per batch and process.
        val_fraction: Share of the training images for validation, at least 0 and below 1. The same ``seed`` chooses the
            same images, from all classes together. With 0, all images train and the test images validate, as in
            published results.
        num_workers: Number of processes that load images.
        seed: Seed of the split.
        mixup: alpha of mixup, the mean of two images and of their labels (Zhang et al., 2018); 0 switches it off.
        cutmix: alpha of CutMix, a piece of one image in another (Yun et al., 2019); 0 switches it off. With both, each
            batch gets one of them.

    Raises:
        ValueError: an argument is out of its range.
    """

    class_names: Sequence[str]

    def __init__(
        self,
        *,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        given = {"batch_size": batch_size, "num_workers": num_workers, "mixup": mixup, "cutmix": cutmix}
        for name, value in given.items():
            least = 1 if name == "batch_size" else 0
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}.")
        if (mixup or cutmix) and batch_size % 2:
            raise ValueError(f"mixup and cutmix mix pairs of images: batch_size must be even, got {batch_size}.")
        self.batch_size, self.val_fraction, self.num_workers, self.seed = batch_size, val_fraction, num_workers, seed
        self.mixup, self.cutmix = mixup, cutmix
        self._mix: Mixup | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes of the labels."""
        return len(self.class_names)

    def training_data(self, augmented: bool) -> Dataset[Any]:
        """The training images, with augmentation or, for validation, without."""
        raise NotImplementedError

    def evaluation_data(self) -> Dataset[Any] | None:
        """The test images, ``None`` if the data set has no separate ones."""
        raise NotImplementedError

    def validation_data(self) -> Dataset[Any] | None:
        """The data set's validation images; ``None`` splits the training images."""
        return None

    def setup(self, stage: str) -> None:
        test, validation = self.evaluation_data(), self.validation_data()
        if validation is None and not self.val_fraction:
            validation = test
        if validation is None:
            plain = self.training_data(augmented=False)
            train, held_out = split(len(plain), self.val_fraction, self.seed)  # type: ignore[arg-type]
            self.train_data = Subset(self.training_data(augmented=True), train)
            validation = Subset(plain, held_out)
        else:
            self.train_data = self.training_data(augmented=True)
        self.val_data = validation
        self.test_data = validation if test is None else test
        count = len(self.train_data)  # type: ignore[arg-type]
        if stage == "fit" and count < self.batch_size:
            raise DataError(f"batch_size={self.batch_size} is more than the {count} images that train: lower it.")

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_data, self.batch_size, shuffle=True, drop_last=True, **self._loading)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_data, self.batch_size, **self._loading)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test_data, self.batch_size, **self._loading)

    predict_dataloader = test_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not (self.mixup or self.cutmix) or self.trainer is None or not self.trainer.training:
            return batch
        if self._mix is None:
            self._mix = Mixup(self.mixup, self.cutmix, label_smoothing=0.0, num_classes=self.num_classes)
        images, labels = batch
        # The loss smooths the labels, so mixup must not smooth them too.
        return self._mix(images, labels)

    @property
    def _loading(self) -> dict[str, Any]:
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return {**workers, "pin_memory": torch.cuda.is_available()}


def split(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices for training and indices for validation, the same for the same seed.

    Example:
        >>> [len(part) for part in split(10, 0.2, seed=0)]
        [8, 2]
    """
    permutation = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(count - 1, max(1, round(count * fraction)))
    return permutation[: count - held_out], permutation[count - held_out :]


class DataError(CPQError, ValueError):
    """The data or settings for them are wrong; the message says what to do."""


class MissingDataError(DataError, FileNotFoundError):
    """A data set is not in its folder; the message says what to do."""

    def __init__(self, name: str, root: str | Path, remedy: str) -> None:
        super().__init__(f"{name} is not in root={root}: {remedy}")
