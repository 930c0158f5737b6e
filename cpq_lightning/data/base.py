"""What the data modules share: a fixed split, loaders, and mixing of batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from timm.data.mixup import Mixup
from torch.utils.data import DataLoader, Dataset, Subset


class ImageDataModule(LightningDataModule):
    """Labelled images, of which a part that a seed chooses validates.

    A data set says in :meth:`training_data` and :meth:`evaluation_data` what it has.

    Args:
        batch_size: Images a batch, on each process.
        val_fraction: Share of the training images that validates, from 0 up to below 1; the same ones for the same
            ``seed``, drawn from all classes together. 0 trains on all and validates on the test images, as published
            results do.
        num_workers: Processes that load.
        seed: Seed of the split.
        mixup: alpha of mixup, the mean of two images and of their labels (Zhang et al., 2018); 0 leaves it out.
        cutmix: alpha of CutMix, a piece of one image in another (Yun et al., 2019); 0 leaves it out. With both, each
            batch gets one of them.

    Raises:
        ValueError: an argument out of its range.
    """

    class_names: Sequence[str]

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("num_workers", num_workers)):
            if value < (1 if name == "batch_size" else 0):
                raise ValueError(f"{name} must be at least {1 if name == 'batch_size' else 0}, got {value}.")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be from 0 up to below 1, got {val_fraction}.")
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}.")
        if (mixup or cutmix) and batch_size % 2:
            raise ValueError(f"mixup and cutmix take images in pairs: batch_size must be even, got {batch_size}.")
        self.batch_size, self.val_fraction, self.num_workers, self.seed = batch_size, val_fraction, num_workers, seed
        self.mixup, self.cutmix = mixup, cutmix
        self._mix: Mixup | None = None

    @property
    def num_classes(self) -> int:
        """How many classes the labels have."""
        return len(self.class_names)

    def training_data(self, augmented: bool) -> Dataset[Any]:
        """The training images; those that validate are seen without augmentation."""
        raise NotImplementedError

    def evaluation_data(self) -> Dataset[Any] | None:
        """Images that no training sees, ``None`` where the data set has none apart."""
        raise NotImplementedError

    def validation_data(self) -> Dataset[Any] | None:
        """Images that the data set itself sets aside for validation; ``None`` splits the training images."""
        return None

    def setup(self, stage: str) -> None:
        test, chosen = self.evaluation_data(), self.validation_data()
        if chosen is None and not self.val_fraction:
            chosen = test
        if chosen is None:
            plain = self.training_data(augmented=False)
            train, held = split(len(plain), self.val_fraction, self.seed)  # type: ignore[arg-type]
            self.train_data = Subset(self.training_data(augmented=True), train)
            chosen = Subset(plain, held)
        else:
            self.train_data = self.training_data(augmented=True)
        self.val_data = chosen
        self.test_data = chosen if test is None else test
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
        # Smoothing is the loss's own: no label is smoothed twice.
        return self._mix(images, labels)

    @property
    def _loading(self) -> dict[str, Any]:
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return {**workers, "pin_memory": torch.cuda.is_available()}


def split(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Positions that train and positions that validate, the same for the same seed.

    Example:
        >>> [len(part) for part in split(10, 0.2, seed=0)]
        [8, 2]
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = min(count - 1, max(1, round(count * fraction)))
    return order[: count - held], order[count - held :]


class DataError(ValueError):
    """Data are not as they should be; it says what to do."""


class MissingDataError(DataError, FileNotFoundError):
    """A data set is not where it is looked for; it says what to do."""

    def __init__(self, name: str, root: str | Path, remedy: str) -> None:
        super().__init__(f"{name} is not in root={root}: {remedy}")
