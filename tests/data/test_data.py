import pytest
import torch

from cpq_lightning.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DataError,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    MissingDataError,
    fashion_mnist,
)
from tests.images import CLASSES, cifar10, image_folder
from tests.images import fashion_mnist as make_fashion_mnist


def ready(data, stage="fit"):
    data.prepare_data()
    data.setup(stage)
    return data


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A way to make each data module over data on the disk, with settings."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN", make_fashion_mnist(tmp_path / "debian"))

    def make(name, **settings):
        settings = {"batch_size": 4, "num_workers": 0, **settings}
        if name == "digits":
            return ready(DigitsDataModule(**settings))
        if name == "fashion_mnist":
            return ready(FashionMNISTDataModule(str(tmp_path / "data"), **settings))
        if name == "cifar10":
            root = tmp_path / "data"
            return ready(CIFAR10DataModule(str(root if root.exists() else cifar10(root, monkeypatch)), **settings))
        root = tmp_path / "images"
        return ready(ImageFolderDataModule(str(root if root.exists() else image_folder(root)), **settings))

    return make


NAMES = ["digits", "fashion_mnist", "cifar10", "image_folder"]
SHAPES = {"digits": (1, 32, 32), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32), "image_folder": (3, 224, 224)}


@pytest.mark.parametrize("name", NAMES)
def test_batches(made, name):
    data = made(name)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape[1:] == SHAPES[name]
        assert images.dtype == torch.float32
        assert labels.max() < data.num_classes == len(data.class_names)


@pytest.mark.parametrize("name", NAMES)
def test_the_split_is_fixed_by_its_seed_and_has_no_image_twice(made, name):
    def held(data):
        return list(data.val_data.indices)

    first, again, other = made(name), made(name), made(name, seed=1)
    assert held(first) == held(again)
    assert held(first) != held(other)
    trained = set(first.train_data.indices)
    assert not trained & set(held(first))
    assert len(trained) + len(held(first)) == len(first.val_data.dataset)


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "image_folder"])
def test_what_validates_is_not_augmented(made, name):
    data = made(name)
    assert data.val_data[0][0].equal(data.val_data[0][0])
    assert any(not data.train_data[0][0].equal(data.train_data[0][0]) for _ in range(20))


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_without_a_split_the_test_images_validate(made, name):
    data = made(name, val_fraction=0.0)
    assert data.val_data is data.test_data
    assert len(data.train_data) == (40 if name == "fashion_mnist" else 80)


def test_workers_load_the_same(made):
    alone, several = made("cifar10"), made("cifar10", num_workers=2)
    for a, b in zip(alone.val_dataloader(), several.val_dataloader(), strict=True):
        assert a[0].equal(b[0])


def test_debians_package_is_unpacked_into_the_root_and_needed_no_more(made, tmp_path, monkeypatch):
    data = made("fashion_mnist")
    assert sorted(p.name for p in (tmp_path / "data" / "FashionMNIST" / "raw").iterdir()) == [
        "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
    ]  # fmt: skip
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "gone")
    assert len(made("fashion_mnist").train_data) == len(data.train_data)


def test_an_image_folder_with_parts(tmp_path):
    root = image_folder(tmp_path / "a", ("train", "val", "test"), count=6)
    data = ready(ImageFolderDataModule(str(root), batch_size=2, num_workers=0))
    assert [len(d) for d in (data.train_data, data.val_data, data.test_data)] == [18, 18, 18]
    assert data.class_names == list(CLASSES)
    assert "train" in data.train_data.samples[0][0]
    assert "val" in data.val_data.samples[0][0]
    assert "test" in data.test_data.samples[0][0]
    # Without "test" what validates also tests.
    root = image_folder(tmp_path / "b", ("train", "valid"), count=3)
    data = ready(ImageFolderDataModule(str(root), batch_size=2, num_workers=0))
    assert data.test_data is data.val_data


def test_images_are_prepared_as_the_backbone_expects_them(tmp_path):
    root = image_folder(tmp_path / "images", count=2)
    resnet = ImageFolderDataModule(str(root), backbone="test_resnet", num_workers=0, batch_size=2)
    vit = ImageFolderDataModule(str(root), backbone="vit_tiny_patch16_384", num_workers=0, batch_size=2)
    assert ready(resnet).val_data[0][0].shape == (3, 160, 160)
    assert ready(vit).val_data[0][0].shape == (3, 384, 384)
    # ViT's augreg weights want (0.5, 0.5, 0.5), ResNet's ImageNet's mean.
    assert vit.val_data[0][0].mean() < resnet.val_data[0][0].mean()
    small = ready(ImageFolderDataModule(str(root), backbone="test_resnet", image_size=32, num_workers=0, batch_size=2))
    assert small.train_data[0][0].shape == small.val_data[0][0].shape == (3, 32, 32)


def test_mixing_mixes_in_training_only(made):
    data = made("cifar10", mixup=0.8, cutmix=1.0)
    images, labels = next(iter(data.train_dataloader()))

    class Trainer:
        training = True

    data.trainer = Trainer()
    mixed, probabilities = data.on_after_batch_transfer([images.clone(), labels], 0)
    assert not mixed.equal(images)
    assert probabilities.shape == (4, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    data.trainer.training = False
    assert data.on_after_batch_transfer([images, labels], 0)[1].equal(labels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: CIFAR10DataModule(root), "CIFAR-10 is not in root=.*download=True .*cifar-10-batches-py"),
        (lambda root: CIFAR100DataModule(root), "CIFAR-100 is not in root=.*download=True .*cifar-100-python"),
        (lambda root: FashionMNISTDataModule(root), "Fashion-MNIST is not in root=.*apt install dataset-fashion-mnist"),
        (lambda root: ImageFolderDataModule(f"{root}/no"), "root=.*no such folder. Expected .*/CLASS/IMAGE.jpg"),
        (lambda root: ImageFolderDataModule(root), "no folder for each class"),
    ],
)
def test_missing_data_say_what_to_do(tmp_path, monkeypatch, make, message):
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "gone")
    with pytest.raises(MissingDataError, match=message):
        ready(make(str(tmp_path)))


def test_a_failed_download_says_what_to_do_by_other_means(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(MissingDataError, match=r"could not be downloaded \(no route to host\). Put the folder"):
        ready(CIFAR10DataModule(str(tmp_path), download=True))


def test_parts_without_one_to_train_on_are_no_classes(tmp_path):
    image_folder(tmp_path, ("Train", "val"), count=2)
    with pytest.raises(DataError, match="has the folders Train, val and none named 'train'"):
        ready(ImageFolderDataModule(str(tmp_path), num_workers=0))


def test_a_misspelled_backbone_is_named(tmp_path):
    image_folder(tmp_path, count=2)
    with pytest.raises(ValueError, match="'resnt18' is no timm model"):
        ready(ImageFolderDataModule(str(tmp_path), backbone="resnt18", num_workers=0))


def test_other_classes_in_validation_are_refused(tmp_path):
    image_folder(tmp_path, ("train",), count=2)
    image_folder(tmp_path, ("val",), classes=("ant", "bee", "dog"), count=2)
    with pytest.raises(ValueError, match="such as 'cat'"):
        ready(ImageFolderDataModule(str(tmp_path), num_workers=0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"val_fraction": 1.0}, "val_fraction must be"),
        ({"mixup": -0.1}, "mixup must be"),
        ({"mixup": 0.1, "batch_size": 3}, "must be even"),
        ({"image_size": 0}, "image_size must be"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10DataModule(**settings)


def test_a_batch_that_no_epoch_fills_is_refused(made):
    with pytest.raises(DataError, match="batch_size=100 is more than the 72 images that train"):
        made("cifar10", batch_size=100)
