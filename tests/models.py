"""Small models and data that tests share."""

from functools import partial

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = (IMAGES.flatten(1) @ torch.randn(192, 4, generator=torch.Generator().manual_seed(2))).argmax(1)


def data(batch_size=16, shuffle=True, count=64):
    return DataLoader(TensorDataset(IMAGES[:count], LABELS[:count]), batch_size, shuffle=shuffle)


def convnet(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * width, 4),
    )


def with_own_forward(cls):
    """A class of torch with a forward of its own, which names its base: nothing can quantize what it multiplies."""

    class Own(cls):
        def forward(self, *args, **kwargs):
            return cls.forward(self, *args, **kwargs)

    return Own


class Branches(nn.ModuleDict):
    """Modules beside each other: an export takes as long for all of them as for one."""

    def forward(self, x):
        return tuple(branch(x) for branch in self.values())


def quantized_weight(layer):
    """What a quantized layer multiplies by."""
    return layer.weight_quantizer(layer.weight).detach()


class Classifier(pl.LightningModule):
    """A LightningModule as anybody writes one: it knows nothing of quantization."""

    def __init__(self, make_optimizer=None, make_scheduler=None):
        super().__init__()
        self.net = convnet()
        self.make_optimizer = make_optimizer
        self.make_scheduler = make_scheduler

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_acc", (self.net(images).argmax(1) == labels).float().mean())

    def test_step(self, batch, batch_idx):
        self.log("test_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        make = self.make_optimizer or partial(torch.optim.AdamW, lr=1e-3)
        optimizer = make(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }


def run_of(folder, number=0):
    """Where a run without a logger leaves its files."""
    return folder / "cpq_runs" / f"version_{number}"
