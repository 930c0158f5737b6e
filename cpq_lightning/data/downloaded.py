"""Data sets that torchvision downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar
from urllib.error import URLError

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from cpq_lightning.data.base import ImageDataModule, MissingDataError


class DownloadedDataModule(ImageDataModule):
    """A data set of torchvision, in torchvision's format on the disk, with training and test images.

    Args:
        root: Folder that contains the data set, or into which to download it.
        batch_size: Images per batch and process.
        image_size: Pixels per side; images of another size are scaled. ``None`` is the size of the data set.
        val_fraction: As in :class:`~cpq_lightning.data.base.ImageDataModule`.
        num_workers: Number of processes that load images.
        seed: Seed of the split.
        download: Whether to download the data set if ``root`` does not contain it.
        mixup: As in :class:`~cpq_lightning.data.base.ImageDataModule`.
        cutmix: Likewise.

    Raises:
        FileNotFoundError: the data are needed and not in ``root``; the message says what to do.
        ValueError: an argument is out of its range.
    """

    title: ClassVar[str]
    dataset: ClassVar[Callable[..., Dataset[Any]]]
    files: ClassVar[str]
    size: ClassVar[int]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    # Training shifts images by up to their size divided by this number.
    shift: ClassVar[int]

    def __init__(
        self,
        root: str = "data",
        *,
        batch_size: int = 64,
        image_size: int | None = None,
        val_fraction: float = 0.1,
        num_workers: int = 4,
        seed: int = 0,
        download: bool = False,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, val_fraction=val_fraction, num_workers=num_workers, seed=seed, mixup=mixup,
            cutmix=cutmix,
        )  # fmt: skip
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}.")
        self.save_hyperparameters()
        self.root, self.image_size, self.download = root, image_size or self.size, download

    def prepare_data(self) -> None:
        if not self.download:
            return
        try:
            for train in (True, False):
                self._load(train, None, download=True)
        except (OSError, RuntimeError, URLError) as error:
            raise MissingDataError(
                self.title, self.root, f"it could not be downloaded ({error}). Put {self.files} there in another way."
            ) from error

    def training_data(self, augmented: bool) -> Dataset[Any]:
        return self._load(True, self._transform(augmented))

    def evaluation_data(self) -> Dataset[Any]:
        return self._load(False, self._transform(False))

    def _transform(self, augmented: bool) -> v2.Compose:
        size = self.image_size
        scaled = [] if size == self.size else [v2.Resize(size)]
        moved = [v2.RandomCrop(size, padding=size // self.shift), v2.RandomHorizontalFlip()] if augmented else []
        tensors = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        return v2.Compose([*scaled, *moved, *tensors])

    def _load(self, train: bool, transform: Any, download: bool = False) -> Dataset[Any]:
        try:
            return type(self).dataset(self.root, train=train, transform=transform, download=download)
        except RuntimeError as error:
            if download:
                raise
            raise MissingDataError(
                self.title,
                self.root,
                f"give download=True (--data.download true), or put {self.files} there; torchvision says: {error}",
            ) from error
