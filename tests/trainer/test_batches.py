"""The data of a run with CPQCallback, and with BatchNormReestimation, are those of one without, to the batch."""

import itertools
import random

import lightning.pytorch as pl
import numpy
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from cpq_lightning import CPQCallback
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.callbacks import BatchNormReestimation
from cpq_lightning.nn.quantizer import Quantizer
from tests.marks import thorough
from tests.models import IMAGES, LABELS, Classifier, data

BATCHES = [(IMAGES[i : i + 8], LABELS[i : i + 8]) for i in range(0, 64, 8)]


class OneShot:
    """Batches that can be read once, whoever asks; it knows how many it gave."""

    def __init__(self, count=20):
        self.rest, self.given = list(itertools.islice(itertools.cycle(BATCHES), count)), 0
        self.rest = [(images + place, labels) for place, (images, labels) in enumerate(self.rest)]

    def __iter__(self):
        return self

    def __next__(self):
        if not self.rest:
            raise StopIteration
        self.given += 1
        return self.rest.pop(0)


class Stream(IterableDataset):
    """Samples that can be read once."""

    def __init__(self):
        self.samples = iter(zip(IMAGES, LABELS, strict=True))

    def __iter__(self):
        return self.samples


class Sized:
    """Batches that may not be read past their number."""

    def __len__(self):
        return 3

    def __iter__(self):
        yield from ((images.clone(), labels) for images, labels in BATCHES[:3])
        raise ValueError("read past the length")


class Augmented(Dataset):
    """Images that random numbers of all kinds move."""

    def __len__(self):
        return 64

    def __getitem__(self, place):
        return IMAGES[place] + torch.rand(1) + numpy.random.rand() + random.random(), LABELS[place]


class Own(Sampler):
    """An order that depends on what was drawn before, from states that only it knows."""

    def __init__(self):
        self.numpy, self.python, self.epochs = numpy.random.RandomState(3), random.Random(3), 0

    def __iter__(self):
        order = self.numpy.permutation(64).tolist()
        self.python.shuffle(order)
        self.epochs += 1
        return iter(order[self.epochs :] + order[: self.epochs])

    def __len__(self):
        return 64


def seeded(make=DataLoader, **settings):
    return make(data().dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(3), **settings)


def sampled(sampler, **settings):
    return DataLoader(data().dataset, 8, sampler=sampler, **settings)


LOADERS = {
    "a one-shot loader": OneShot,
    "a one-shot data set": lambda: DataLoader(Stream(), 8),
    "a one-shot data set in a worker": lambda: DataLoader(Stream(), 8, num_workers=1),
    "two one-shot loaders": lambda: [OneShot(9), OneShot(20)],
    "the shorter of two": lambda: CombinedLoader({"a": OneShot(9), "b": OneShot(5)}, "min_size"),
    "the longer of two": lambda: CombinedLoader({"a": seeded(), "b": OneShot(5)}, "max_size"),
    "no batch past its length": Sized,
    "a seeded loader": seeded,
    "a seeded loader in workers": lambda: seeded(num_workers=2, persistent_workers=True),
    "a seeded sampler": lambda: sampled(RandomSampler(IMAGES, generator=torch.Generator().manual_seed(3))),
    "global random numbers": lambda: data(8),
    "augmentations": lambda: DataLoader(Augmented(), 8, shuffle=True),
    "a distributed sampler": lambda: sampled(DistributedSampler(IMAGES, 2, 0)),
    "a sampler of one's own": lambda: sampled(Own()),
    "a stateful loader": lambda: seeded(StatefulDataLoader),
}


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Any(Classifier):
    """Takes the batches of several loaders as one, and changes what it gets in place."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        parts = batch.values() if isinstance(batch, dict) else [batch] if torch.is_tensor(batch[0]) else batch
        parts = [part for part in parts if part is not None]
        images, labels = (torch.cat(values) for values in zip(*parts, strict=True))
        for part in parts:
            part[0].add_(1)
        return images, labels

    def training_step(self, batch, batch_idx):
        batch[0].mul_(0.5)
        return super().training_step(batch, batch_idx)


class Seen(pl.Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx, batch[0].sum((1, 2, 3)).tolist()))


def seen(fit, make, callbacks, module=Any, fits=1, **settings):
    """What training saw, and how often loaders were read."""
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    watch, loader = Seen(), make()
    trainer = fit(module(), [*callbacks, watch], loaders=(loader, data(shuffle=False)), **settings)
    for _ in range(1, fits):
        trainer.fit_loop.max_epochs += 2
        trainer.fit(trainer.lightning_module, loader, data(shuffle=False))
    parts = loader if isinstance(loader, list) else getattr(loader, "flattened", [loader])
    given = [part.given for part in parts if isinstance(part, OneShot)]
    return watch.batches, given, torch.rand(1), numpy.random.rand(), random.random()


def cpq():
    return CPQCallback(table=False, levels_file=None, calibration_batches=5)


@pytest.mark.parametrize("name", LOADERS)
def test_training_sees_the_batches_that_it_sees_without_calibration(fit, name):
    wanted = seen(fit, LOADERS[name], [], max_epochs=3)
    assert len(wanted[0]) >= 5 or name == "no batch past its length"
    assert seen(fit, LOADERS[name], [cpq()], max_epochs=3) == wanted


SETTINGS = [
    {"limit_train_batches": 2},
    {"max_steps": 3},
    {"max_steps": 2, "accumulate_grad_batches": 2},
    {"max_steps": 3, "module": Manual},
    {"num_sanity_val_steps": 0},
    {"reload_dataloaders_every_n_epochs": 1},
    {"fast_dev_run": 2},
    {"val_check_interval": 2},
    {"fits": 2},
]


class Drawing(Dataset):
    """Images that a generator of the data set's own moves."""

    def __init__(self):
        self.generator = numpy.random.default_rng(3)

    def __len__(self):
        return 64

    def __getitem__(self, place):
        return IMAGES[place] + self.generator.random(), LABELS[place]


def sharing(kind):
    """A training and a validation loader that draw from one generator."""
    if kind == "one data set":
        held = Drawing()
        return DataLoader(held, 8, shuffle=True), DataLoader(held, 16)
    generator = torch.Generator().manual_seed(3)
    workers = {"num_workers": 1, "persistent_workers": True} if kind == "one loader, workers that stay" else {}
    training = DataLoader(data().dataset, 8, shuffle=True, generator=generator, **workers)
    return training, training if "one loader" in kind else DataLoader(data().dataset, 16, generator=generator)


class Keeping(Classifier):
    """Its loaders are attributes of its own."""

    def __init__(self):
        super().__init__()
        self.training_loader, self.validation_loader = sharing("two loaders")

    def train_dataloader(self):
        return self.training_loader

    def val_dataloader(self):
        return self.validation_loader


@pytest.mark.parametrize("kind", ["one loader", "one loader, workers that stay", "two loaders", "one data set"])
@pytest.mark.parametrize("sanity", [2, *thorough(0)])
def test_validation_may_draw_from_the_generator_of_the_training_data(fit, kind, sanity):
    watches = Seen(), Seen()
    for callbacks, watch in zip(([], [cpq()]), watches, strict=True):
        torch.manual_seed(0)
        fit(Classifier(), [*callbacks, watch], loaders=sharing(kind), num_sanity_val_steps=sanity)
    assert len(watches[0].batches) == 16
    assert watches[0].batches == watches[1].batches


def test_validation_may_draw_from_the_generator_of_a_loader_that_the_module_keeps(fit):
    watches = Seen(), Seen()
    for callbacks, watch in zip(([], [cpq()]), watches, strict=True):
        fit(Keeping(), [*callbacks, watch], loaders=(None, None))
    assert len(watches[0].batches) == 16
    assert watches[0].batches == watches[1].batches


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", [seeded, *thorough(OneShot)])
def test_whatever_limits_the_trainer_has(fit, make, settings):
    wanted = seen(fit, make, [], **settings)
    assert wanted[0]
    assert seen(fit, make, [cpq()], **settings) == wanted


@pytest.mark.parametrize("settings", [{"limit_train_batches": 0.5}, {"overfit_batches": 3}], ids=str)
def test_whatever_share_of_the_data_is_trained_on(fit, settings):
    assert seen(fit, seeded, [cpq()], **settings) == seen(fit, seeded, [], **settings)


def test_data_that_end_in_an_error_end_where_they_would(fit):
    def fails():
        yield from BATCHES[:3]
        raise ValueError("the disk is gone")

    watch = Seen()
    with pytest.raises(ValueError, match="the disk is gone"):
        fit(Classifier(), [cpq(), watch], loaders=(fails(), data()))
    # Lightning reads one ahead where there is no length.
    assert len(watch.batches) == 2


def test_a_step_that_takes_the_iterator_gets_all_of_it(fit):
    class Taking(Classifier):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            self.sums.append(batch[0].sum().item())
            return cross_entropy(self.net(batch[0]), batch[1])

    def run(callbacks):
        module = Taking()
        module.sums = []
        fit(module, callbacks, loaders=(OneShot(6), None), max_epochs=1)
        return module

    with pytest.warns(UserWarning, match="training_step takes the data's iterator"):
        module = run([cpq()])
    assert module.sums == run([]).sums
    assert len(module.sums) == 6
    assert all(q.active and q.fitted for _, q in quantizers(module))


class Save(pl.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("step", "workers"), [(3, 0), (3, 1), (6, 0), *thorough((1, 0), (5, 0), (1, 1), (6, 1))])
def test_a_checkpoint_counts_only_the_batches_that_were_trained_on(fit, tmp_path, step, workers):
    def make():
        return seeded(StatefulDataLoader, num_workers=workers)

    def resumed(callback, path):
        whole = seen(fit, make, [*callback(), Save(path, step)], max_epochs=1)[0]
        rest = seen(fit, make, callback(), max_epochs=2, ckpt_path=path)[0]
        assert rest[: 8 - step] == whole[step:]
        return rest

    assert resumed(lambda: [cpq()], tmp_path / "one.ckpt") == resumed(list, tmp_path / "other.ckpt")


def test_a_resumed_run_that_lacks_ranges_calibrates_on_the_batches_that_follow(fit, tmp_path):
    class Forget(Save):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            for name, value in checkpoint["state_dict"].items():
                if name.endswith("input_quantizer.state"):
                    forgotten = Quantizer.from_state({"state": value})
                    forgotten.reset()
                    checkpoint["state_dict"][name] = forgotten.state

    def make():
        return seeded(StatefulDataLoader)

    wanted = seen(fit, make, [cpq(), Forget(tmp_path / "saved.ckpt", 3)], max_epochs=1)[0]
    saved = torch.load(tmp_path / "saved.ckpt")["state_dict"]
    assert any(name.endswith("input_quantizer.state") for name in saved)
    calibrated = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            calibrated.append(all(q.fitted for _, q in quantizers(pl_module)))

    resumed = seen(fit, make, [cpq(), Watch()], max_epochs=1, ckpt_path=tmp_path / "saved.ckpt")[0]
    assert resumed == wanted[3:]
    assert calibrated == [True]


@pytest.mark.parametrize(("limit", "fits"), [(1.0, 2), *thorough((1.0, 1), (3, 1), (3, 2))])
@pytest.mark.parametrize("name", LOADERS)
def test_estimating_batch_norms_takes_no_batch_either(fit, name, limit, fits):
    settings = {"max_epochs": 2, "limit_train_batches": limit, "fits": fits}
    wanted = seen(fit, LOADERS[name], [], **settings)
    made = []
    found = seen(fit, LOADERS[name], [BatchNormReestimation(4)], lambda: made.append(Any()) or made[0], **settings)
    assert found == wanted
    # Some data have no more.
    assert 2 <= made[0].net[1].num_batches_tracked <= 4
