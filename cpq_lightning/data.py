"""Data modules of the recipes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset, random_split


class DigitsDataModule(LightningDataModule):
    """The UCI handwritten digits that scikit-learn ships: 1,797 real images of 8 x 8 pixels, 10 classes.

    Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998.

    Args:
        batch_size: Images a batch.
        image_size: Images are enlarged to this many pixels a side.
        val_fraction: Share of the images that validates; the same ones for the same ``seed``.
        num_workers: Processes that load.
        seed: Seed of the split.

    Raises:
        ImportError: scikit-learn is not installed.
    """

    def __init__(
        self, batch_size: int = 64, image_size: int = 32, val_fraction: float = 0.2, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}.")
        self.save_hyperparameters()
        self.batch_size, self.image_size, self.val_fraction = batch_size, image_size, val_fraction
        self.num_workers, self.seed = num_workers, seed

    def setup(self, stage: str) -> None:
        images, labels = _digits()
        images = interpolate(images, size=self.image_size, mode="bilinear", align_corners=False)
        # Mean and standard deviation of the pixels, which run from 0 to 1.
        data = TensorDataset((images - 0.305) / 0.376, labels)
        held = round(len(data) * self.val_fraction)
        split = random_split(data, [len(data) - held, held], generator=torch.Generator().manual_seed(self.seed))
        self.train_data, self.val_data = split

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train_data, self.batch_size, shuffle=True, drop_last=True, **self._workers)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val_data, self.batch_size, **self._workers)

    test_dataloader = predict_dataloader = val_dataloader

    @property
    def _workers(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn, which is not installed: pip install 'cpq-lightning[recipes]'."
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    return torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.as_tensor(labels)
