"""One's own images: a folder a class."""

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
    """Images in folders, one a class: ``root/CLASS/IMAGE``, or ``root/train/CLASS/IMAGE`` beside ``root/val/CLASS/...``
    (ImageNet's layout too).

    Images are scaled, cropped and normalized as the backbone's pretrained weights expect it: timm's data config.
    Without a folder ``val`` (or ``valid``, ``validation``) a part of the training images validates; ``test``, where it
    is there, tests. Class names are those of the folders, in alphabetical order.

    Args:
        root: The folder.
        backbone: Name of the timm model whose data config counts; ``None`` takes images of 224 pixels, normalized as
            most of timm's weights expect it. The command ``cpq`` gives the model's.
        batch_size: Images a batch, on each process.
        image_size: Pixels a side, in place of the backbone's.
        val_fraction: Share of the training images that validates where no folder does; the same ones for the same
            ``seed``.
        num_workers: Processes that load.
        seed: Seed of the split.
        augmentation: Further arguments of ``timm.data.create_transform`` for training, such as ``auto_augment``,
            ``re_prob`` or ``scale``.
        mixup: As of :class:`~cpq_lightning.data.base.ImageDataModule`.
        cutmix: Likewise.

    Raises:
        FileNotFoundError: when data are asked for that are not there, with what to do.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        root: str = "data",
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
        super().__init__(batch_size, val_fraction, num_workers, seed, mixup, cutmix)
        if val_fraction == 0:
            raise ValueError("val_fraction must be over 0; a folder root/val validates in its place where it is there.")
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
        place, _ = self._training_classes()
        return self._folder(place, self._transform(augmented))

    def evaluation_data(self) -> Dataset[Any] | None:
        return self._held_out(_TEST)

    def validation_data(self) -> Dataset[Any] | None:
        return next((self._held_out(name) for name in _EVALUATION if self._place(name)), None)

    def _training_classes(self) -> tuple[Path, list[str]]:
        """Where the training images are, and the names of the classes there."""
        place = self._place(_TRAIN) or Path(self.root)
        try:
            names, _ = find_classes(str(place))
        except FileNotFoundError as error:
            raise self._missing(place, error) from None
        parts = [name for name in names if name.lower() in (*_PARTS, "training")]
        if place == Path(self.root) and parts:
            raise DataError(
                f"root={self.root} has the folders {', '.join(parts)} and none named {_TRAIN!r}: expected "
                f"{_TRAIN}/CLASS beside val/CLASS, or the classes alone."
            )
        return place, names

    def _held_out(self, name: str) -> ImageFolder | None:
        place = self._place(name)
        if place is None:
            return None
        found = self._folder(place, self._transform(False))
        if found.classes != self.class_names:
            apart = sorted(set(self.class_names) ^ set(found.classes))
            raise DataError(
                f"root={self.root}: the classes in {name!r} are not those in {_TRAIN!r}, such as {apart[0]!r}: "
                "expected the same folders in both."
            )
        return found

    def _place(self, name: str) -> Path | None:
        """A folder of a layout with ``train``: beside classes, ``val`` would be a class of that name."""
        place = Path(self.root) / name
        return place if (Path(self.root) / _TRAIN).is_dir() and place.is_dir() else None

    def _folder(self, place: Path, transform: Any) -> ImageFolder:
        try:
            return ImageFolder(str(place), transform)
        except FileNotFoundError as error:
            raise self._missing(place, error) from None

    def _missing(self, place: Path, error: FileNotFoundError) -> MissingDataError:
        found = f"it has no folder for each class with images in it ({error})" if place.is_dir() else "no such folder"
        return MissingDataError(
            "The image data",
            self.root,
            f"{found}. Expected {self.root}/CLASS/IMAGE.jpg, or {self.root}/train/CLASS/IMAGE.jpg and "
            f"{self.root}/val/CLASS/IMAGE.jpg.",
        )

    def _transform(self, augmented: bool) -> Any:
        known = PretrainedCfg() if self.backbone is None else pretrained_config(self.backbone)
        chosen = {} if self.image_size is None else {"img_size": self.image_size}
        config = resolve_data_config(chosen, pretrained_cfg=known.to_dict())
        return create_transform(**config, is_training=augmented, **(self.augmentation if augmented else {}))
