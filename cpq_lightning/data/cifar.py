"""CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from torchvision.datasets import CIFAR10, CIFAR100

from cpq_lightning.backbones.cifar import CIFAR_MEAN, CIFAR_STD
from cpq_lightning.data.downloaded import DownloadedDataModule


class CIFAR10DataModule(DownloadedDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 pixels, 10 classes, in torchvision's format.

    Training shifts images by up to an eighth and mirrors half of them, as He et al. (2016) do.

    Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """

    title, dataset, size, shift = "CIFAR-10", CIFAR10, 32, 8
    files = "the folder cifar-10-batches-py (or cifar-10-python.tar.gz, unpacked)"
    mean, std = CIFAR_MEAN, CIFAR_STD
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class CIFAR100DataModule(DownloadedDataModule):
    """CIFAR-100: 50,000 training and 10,000 test images of 32 x 32 pixels, 100 classes, in torchvision's format.

    Training shifts images by up to an eighth and mirrors half of them.

    Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """

    title, dataset, size, shift = "CIFAR-100", CIFAR100, 32, 8
    files = "the folder cifar-100-python (or cifar-100-python.tar.gz, unpacked)"
    # Mean and standard deviation of CIFAR-100's training images.
    mean, std = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)

    @property
    def num_classes(self) -> int:
        return 100

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Names of the classes, read from the data."""
        return self._load(False, None).classes  # type: ignore[attr-defined]
