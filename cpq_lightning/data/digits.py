"""The UCI handwritten digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, TensorDataset

from cpq_lightning.data.base import ImageDataModule


class DigitsDataModule(ImageDataModule):
    """The UCI handwritten digits that scikit-learn ships: 1,797 real images of 8 x 8 pixels, 10 classes, grey.

    Nothing is downloaded. The validation images are also the test images.

    Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998.

    Args:
        batch_size: Images per batch and process.
        image_size: Images are enlarged to this number of pixels per side; their own 8 are too few for most networks.
        val_fraction: Share of the images for validation; the same ``seed`` chooses the same images. The default is
            twice that of other data sets, because a tenth of the 1,797 images is too few to compare networks with.
        num_workers: Number of processes that load images; the default is 0, because all images are in memory.
        seed: Seed of the split.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: an argument is out of its range.
    """

    class_names = tuple("0123456789")

    def __init__(
        self,
        *,
        batch_size: int = 64,
        image_size: int = 32,
        val_fraction: float = 0.2,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_fraction=val_fraction, num_workers=num_workers, seed=seed)
        if val_fraction == 0:
            raise ValueError("val_fraction must be over 0: the digits have no separate test images.")
        self.save_hyperparameters()
        self.image_size = image_size
        self._data: TensorDataset | None = None

    def training_data(self, augmented: bool) -> Dataset[Any]:
        if self._data is None:
            images, labels = _digits()
            images = interpolate(images, size=self.image_size, mode="bilinear", align_corners=False)
            # Mean 0.305 and standard deviation 0.376 of the pixels, which are from 0 to 1.
            self._data = TensorDataset((images - 0.305) / 0.376, labels)
        return self._data

    def evaluation_data(self) -> None:
        return None


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn, which is not installed: pip install scikit-learn."
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    return torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.as_tensor(labels)
