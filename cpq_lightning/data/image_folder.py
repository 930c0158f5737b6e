"""The user's images: one folder per class."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models import PretrainedCfg
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes

from cpq_lightning.backbones.create import pretrained_config
from cpq_lightning.config import plain
from cpq_lightning.data.base import DataError, ImageDataModule, MissingDataError

_TRAIN, _EVALUATION, _TEST = "train", ("val", "valid", "validation"), "test"
_PARTS = (_TRAIN, *_EVALUATION, _TEST)


class ImageFolderDataModule(ImageDataModule):
    """Images in one folder per class: ``root/CLASS/IMAGE``, or ``root/train/CLASS/IMAGE`` and ``root/val/CLASS/IMAGE``
    (the layout of ImageNet).

    Images are scaled, cropped and normalized as the backbone's pretrained weights expect (timm's data config). Without
    a folder ``val`` (or ``valid``, ``validation``) a part of the training images is for validation. A folder ``test``
    has the test images. Class names are the names of the folders, in alphabetical order.

    Args:
        root: The folder.
        backbone: Name of the timm model whose data config to use; ``None`` is images of 224 pixels, normalized as most
            of timm's weights expect. The command ``cpq`` sets it to the model's backbone.
        batch_size: Images per batch and process.
        image_size: Pixels per side, in place of the backbone's.
        val_fraction: Share of the training images for validation if there is no folder for it; the same ``seed``
            chooses the same images.
        num_workers: Number of processes that load images.
        seed: Seed of the split.
        augmentation: Further arguments of ``timm.data.create_transform`` for training, such as ``auto_augment``,
            ``re_prob`` or ``scale``.
        mixup: As in :class:`~cpq_lightning.data.base.ImageDataModule`.
        cutmix: Likewise.

    Raises:
        FileNotFoundError: the data are needed and not in ``root``; the message says what to do.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        root: str = "data",
        *,
        backbone: str | None = None,
        batch_size: int = 64,
        image_size: int | None = None,
        val_fraction: float = 0.1,
        num_workers: int = 4,
        seed: int = 0,
        augmentation: dict[str, Any] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, val_fraction=val_fraction, num_workers=num_workers, seed=seed, mixup=mixup,
            cutmix=cutmix,
        )  # fmt: skip
        if val_fraction == 0:
            raise ValueError("val_fraction must be over 0; where a folder root/val exists, it is used instead.")
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}.")
        augmentation = plain(augmentation)
        self.save_hyperparameters()
        self.root, self.backbone, self.image_size = root, backbone, image_size
        self.augmentation = dict(augmentation or {})

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Names of the classes, read from the folders."""
        return self._training_classes()[1]

    def training_data(self, augmented: bool) -> Dataset[Any]:
        folder, _ = self._training_classes()
        return self._folder(folder, self._transform(augmented))

    def evaluation_data(self) -> Dataset[Any] | None:
        return self._evaluation_folder(_TEST)

    def validation_data(self) -> Dataset[Any] | None:
        return next((self._evaluation_folder(name) for name in _EVALUATION if self._part(name)), None)

    def _training_classes(self) -> tuple[Path, list[str]]:
        """The folder of the training images, and the names of the classes in it."""
        folder = self._part(_TRAIN) or Path(self.root)
        try:
            names, _ = find_classes(str(folder))
        except FileNotFoundError as error:
            raise self._missing(folder, error) from None
        parts = [name for name in names if name.lower() in (*_PARTS, "training")]
        if folder == Path(self.root) and parts:
            raise DataError(
                f"root={self.root} has the folders {', '.join(parts)} and none named {_TRAIN!r}: expected "
                f"{_TRAIN}/CLASS and val/CLASS, or the classes alone."
            )
        return folder, names

    def _evaluation_folder(self, name: str) -> ImageFolder | None:
        folder = self._part(name)
        if folder is None:
            return None
        images = self._folder(folder, self._transform(False))
        if images.classes != self.class_names:
            different = sorted(set(self.class_names) ^ set(images.classes))
            raise DataError(
                f"root={self.root}: the classes in {name!r} differ from those in {_TRAIN!r}, such as {different[0]!r}: "
                "expected the same folders in both."
            )
        return images

    def _part(self, name: str) -> Path | None:
        """The folder of a part such as ``val``; ``None`` without ``train``, since ``val`` is then a class."""
        folder = Path(self.root) / name
        return folder if (Path(self.root) / _TRAIN).is_dir() and folder.is_dir() else None

    def _folder(self, folder: Path, transform: Any) -> ImageFolder:
        try:
            return ImageFolder(str(folder), transform)
        except FileNotFoundError as error:
            raise self._missing(folder, error) from None

    def _missing(self, folder: Path, error: FileNotFoundError) -> MissingDataError:
        reason = f"it has no folder for each class with images in it ({error})" if folder.is_dir() else "no such folder"
        return MissingDataError(
            "The image data",
            self.root,
            f"{reason}. Expected {self.root}/CLASS/IMAGE.jpg, or {self.root}/train/CLASS/IMAGE.jpg and "
            f"{self.root}/val/CLASS/IMAGE.jpg.",
        )

    def _transform(self, augmented: bool) -> Any:
        pretrained = PretrainedCfg() if self.backbone is None else pretrained_config(self.backbone)
        size = {} if self.image_size is None else {"img_size": self.image_size}
        config = resolve_data_config(size, pretrained_cfg=pretrained.to_dict())
        return create_transform(**config, is_training=augmented, **(self.augmentation if augmented else {}))
