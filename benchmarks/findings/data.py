"""Fashion-MNIST in memory: what is trained on, what rates are chosen by, and what is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from cpq_lightning.data import FashionMNISTDataModule

# The last sixth of the training images, 10,000 of 60,000: rates and defaults are chosen by them.
_PARTS = 6


@lru_cache(maxsize=4)
def load(root: str, train: bool) -> tuple[Tensor, Tensor]:
    """Images, normalized, shape (n, 1, 28, 28), and labels.

    Raises:
        FileNotFoundError: they are not there, with what to do.
    """
    known = FashionMNISTDataModule(root)
    known.prepare_data()
    data_set: Any = known.training_data(augmented=False) if train else known.evaluation_data()
    images = data_set.data[:, None].float() / 255
    images = (images - known.mean[0]) / known.std[0]
    return images.to(memory_format=torch.channels_last), data_set.targets


class _Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Whole batches, cut out of tensors: nothing is paid for each image.

    Shuffled ones are shifted by up to two pixels, all images of a batch alike, and half of the images are mirrored. All
    that is drawn is a function of the seed and of the epoch: who else iterates (a calibration) changes nothing.
    """

    def __init__(self, images: Tensor, labels: Tensor, size: int, seed: int | None, epoch: int = 0) -> None:
        self.images, self.labels, self.size = images, labels, size
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return -(-len(self.labels) // self.size) if self.seed is None else len(self.labels) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.seed is None:
            yield from zip(self.images.split(self.size), self.labels.split(self.size), strict=True)
            return
        g = torch.Generator().manual_seed(self.seed * 1000 + self.epoch)
        order = torch.randperm(len(self.labels), generator=g)
        for chosen in order[: len(self) * self.size].split(self.size):
            images = self.images[chosen]
            mirrored = torch.rand(len(chosen), 1, 1, 1, generator=g) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
            down, right = torch.randint(-2, 3, (2,), generator=g).tolist()
            # A clothed background is black: what is shifted in at one side left at the other, empty.
            yield (
                images.roll((down, right), (-2, -1)).contiguous(memory_format=torch.channels_last),
                self.labels[chosen],
            )


class Images(LightningDataModule):
    """The first ``count`` training images, in an order that is the seed's; held-out and test images whole.

    Args:
        root: Folder with Fashion-MNIST, as torchvision has it.
        count: Images to train on.
        seed: Of the order and the augmentation: runs of one seed see the same batches, whatever the method.
        batch_size: Images a training batch.
    """

    def __init__(self, root: str, count: int, seed: int, batch_size: int = 128) -> None:
        super().__init__()
        self.root, self.count, self.seed, self.batch_size = root, count, seed, batch_size

    @property
    def holds_out(self) -> bool:
        """Whether validation images are no training images."""
        known = len(load(self.root, True)[1])
        return self.count <= known - known // _PARTS

    def _loader(self, images: Tensor, labels: Tensor, seed: int | None) -> DataLoader[Any]:
        # Activations of a larger batch do not fit into the cache: evaluation takes twice as long.
        size = 250 if seed is None else self.batch_size
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        return DataLoader(_Batches(images, labels, size, seed, epoch), batch_size=None)

    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = load(self.root, True)
        return self._loader(images[: self.count], labels[: self.count], self.seed)

    def val_dataloader(self) -> DataLoader[Any]:
        images, labels = load(self.root, True)
        held_out = len(labels) // _PARTS
        return self._loader(images[-held_out:], labels[-held_out:], None)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(*load(self.root, False), None)
