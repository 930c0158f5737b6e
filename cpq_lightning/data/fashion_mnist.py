"""Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import extract_archive

from cpq_lightning.data.downloaded import DownloadedDataModule

# The folder of Debian's package dataset-fashion-mnist.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


class FashionMNISTDataModule(DownloadedDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28 x 28 pixels, 10 classes, grey; torchvision's format.

    If ``root`` does not contain it and Debian's package ``dataset-fashion-mnist`` is installed, the package's files are
    unpacked into ``root``, and nothing is downloaded. Training shifts images by up to two pixels and mirrors half of
    them.

    Xiao, Rasul, Vollgraf, *Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms*, 2017.
    """

    title, dataset, size, shift = "Fashion-MNIST", FashionMNIST, 28, 14
    files = "FashionMNIST/raw with the four files *-ubyte (on Debian: apt install dataset-fashion-mnist)"
    # Mean and standard deviation of the training images.
    mean, std = (0.2860,), (0.3530,)
    class_names = (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip

    def prepare_data(self) -> None:
        folder = Path(self.root) / "FashionMNIST"
        if DEBIAN.is_dir() and len(list((folder / "raw").glob("*-ubyte"))) < 4:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder) as unpacked:
                for archive in sorted(DEBIAN.glob("*-ubyte.gz")):
                    extract_archive(str(archive), unpacked)
                # Each file is moved complete, also into an existing folder that lacks some.
                (folder / "raw").mkdir(exist_ok=True)
                for file in Path(unpacked).iterdir():
                    file.replace(folder / "raw" / file.name)
        super().prepare_data()
