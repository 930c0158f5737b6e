"""Small data sets in their real formats on the disk."""

import gzip
import pickle
import struct

import numpy
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def image_folder(root, parts=("",), classes=CLASSES, count=12, size=(40, 36), seed=0):
    """JPEGs in a folder a class, each class of a colour of its own; several parts beside one another."""
    random = numpy.random.default_rng(seed)
    for part in parts:
        for index, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 90, (*size[::-1], 3))
                pixels[..., index % 3] += 60 + 30 * (index // 3)
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{number}.jpg")
    return root


def cifar10(root, monkeypatch, count=16):
    """CIFAR-10's python version with a few made images; its checksums are no longer asked for."""
    from torchvision.datasets import CIFAR10

    random = numpy.random.default_rng(0)
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list):
        labels = [n % 10 for n in range(count)]
        pixels = random.integers(0, 256, (count, 3072), dtype=numpy.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels, "batch_label": name}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names, "num_vis": 3072}))
    for listed in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, listed, [[name, None] for name, _ in getattr(CIFAR10, listed)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    return root


def fashion_mnist(folder, count=40):
    """The four gzipped IDX files, as Debian's package has them."""
    random = numpy.random.default_rng(0)
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = random.integers(0, 256, (count, 28, 28), dtype=numpy.uint8)
        labels = numpy.arange(count, dtype=numpy.uint8) % 10
        for name, head, content in (
            (f"{part}-images-idx3-ubyte.gz", struct.pack(">IIII", 2051, count, 28, 28), pixels),
            (f"{part}-labels-idx1-ubyte.gz", struct.pack(">II", 2049, count), labels),
        ):
            (folder / name).write_bytes(gzip.compress(head + content.tobytes()))
    return folder
