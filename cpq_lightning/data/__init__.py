"""Data modules of the recipes, one data set per file. May import module, callbacks and below."""

from cpq_lightning.data.base import DataError as DataError
from cpq_lightning.data.base import ImageDataModule as ImageDataModule
from cpq_lightning.data.base import MissingDataError as MissingDataError
from cpq_lightning.data.cifar import CIFAR10DataModule as CIFAR10DataModule
from cpq_lightning.data.cifar import CIFAR100DataModule as CIFAR100DataModule
from cpq_lightning.data.digits import DigitsDataModule as DigitsDataModule
from cpq_lightning.data.fashion_mnist import FashionMNISTDataModule as FashionMNISTDataModule
from cpq_lightning.data.image_folder import ImageFolderDataModule as ImageFolderDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DataError",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "MissingDataError",
]
