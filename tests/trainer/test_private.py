"""A contract with each private attribute of Lightning that this package reads."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from cpq_lightning.trainer import private
from tests.models import Classifier, data


class Look(pl.Callback):
    """Reads something in a hook of a fit."""

    def __init__(self, read, hook):
        self.seen = []
        setattr(self, hook, lambda trainer, pl_module, *args: self.seen.append(read(trainer)))


def seen(fit, read, hook="on_train_batch_end", **settings):
    look = Look(read, hook)
    fit(Classifier(), [look], **settings)
    return look.seen


def test_trainer_of():
    module = Classifier()
    assert private.trainer_of(module) is None
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer = trainer
    assert private.trainer_of(module) is trainer
    assert private.trainer_of(torch.nn.Linear(1, 1)) is None


def test_loaded_checkpoint(fit, tmp_path):
    trainer = fit(Classifier(), max_epochs=1)
    assert private.loaded_checkpoint(trainer) is None
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    class Restoring(Classifier):
        def on_load_checkpoint(self, checkpoint):
            self.loaded = private.loaded_checkpoint(self.trainer)
            assert self.loaded is checkpoint

    module = Restoring()
    fit(module, ckpt_path=tmp_path / "a.ckpt")
    assert "state_dict" in module.loaded


def test_optimizer_wrappers(fit):
    for (wrapper,) in seen(fit, private.optimizer_wrappers, max_epochs=1):
        assert isinstance(wrapper, LightningOptimizer)
        assert isinstance(wrapper.optimizer, torch.optim.AdamW)


def test_training_fetcher_and_loader(fit):
    def read(trainer):
        fetcher, loader = private.training_fetcher(trainer), private.training_loader(trainer)
        return isinstance(fetcher, private.DataFetcher), fetcher.combined_loader is loader, loader

    for fetches, same, loader in seen(fit, read, max_epochs=1):
        assert fetches
        assert same
        assert isinstance(loader, CombinedLoader)
        assert len(loader.flattened) == 1
        assert private.loader_states(loader) == []
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert private.training_fetcher(trainer) is private.training_loader(trainer) is None


def test_a_fetcher_iterates_what_is_set_as_its_loader_and_iterator(fit):
    def read(trainer):
        fetcher = private.training_fetcher(trainer)
        return fetcher.iterator is not None, hasattr(fetcher, "_combined_loader")

    assert all(all(found) for found in seen(fit, read, max_epochs=1))


def test_training_source(fit):
    assert [s.is_module() for s in seen(fit, private.training_source, "on_train_start")] == [False]
    module = Classifier()
    module.train_dataloader = data
    look = Look(private.training_source, "on_train_start")
    fit(module, [look], loaders=(None, None))
    assert look.seen[0].is_module()
    assert look.seen[0].instance is module


def test_metrics_of_validation(fit):
    class Logging(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("f1", 1.0, on_step=True, on_epoch=True)
            self.log("each step", 1.0, on_step=True, on_epoch=False)

        def on_validation_epoch_end(self):
            self.log("at the end", 1.0)
            if self.current_epoch == 0:
                self.log("once", 1.0)

    def read(trainer):
        return trainer.sanity_checking or (private.metrics_of_validation(trainer), {*trainer.callback_metrics})

    for loaders, suffixes in ((data(), [""]), ([data(), data()], ["/dataloader_idx_0", "/dataloader_idx_1"])):
        look = Look(read, "on_validation_end")
        fit(Logging(), [look], loaders=(data(), loaders), max_epochs=2)
        first, second = (found for found in look.seen if found is not True)
        always = {"at the end", *(f"f1{suffix}" for suffix in suffixes)}
        assert first[0] == {"once", *always} <= first[1]
        assert second[0] == always <= second[1]
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert private.metrics_of_validation(trainer) == set()


def test_logged_step(fit):
    assert seen(fit, private.logged_step, max_epochs=1) == [0, 1, 2, 3]


def test_logs_now(fit):
    assert seen(fit, private.logs_now, max_epochs=1, log_every_n_steps=2) == [False, True, False, True]


def test_can_stop_early(fit):
    found = seen(fit, private.can_stop_early, "on_train_epoch_end", max_epochs=3, min_epochs=2)
    assert found[0] is False
    assert found[-1] is True


def test_is_last_training_batch_done(fit):
    assert seen(fit, private.is_last_training_batch_done, max_epochs=1) == [False, False, False, True]


def test_restore_training_mode(fit):
    class Mixed(Classifier):
        def on_train_start(self):
            self.net[1].eval()

    modes = []

    class Restore(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                assert not pl_module.net[0].training
                private.restore_training_mode(trainer, pl_module)
                modes.append((pl_module.net[0].training, pl_module.net[1].training))

    fit(Mixed(), [Restore()], max_epochs=1)
    assert modes == [(True, False)]


def test_random_states():
    before = private.collect_rng_states()
    drawn = torch.rand(1)
    private.set_rng_states(before)
    assert torch.rand(1).equal(drawn)


def test_set_sampler_epoch():
    sampler = torch.utils.data.DistributedSampler(range(8), 2, 0)
    private.set_sampler_epoch(torch.utils.data.DataLoader(range(8), sampler=sampler), 3)
    assert sampler.epoch == 3


def test_before_batch_transfer(fit):
    class Halving(Classifier):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] / 2, batch[1]]

    look = Look(lambda trainer: private.before_batch_transfer(trainer, [torch.ones(1), None], 0)[0], "on_train_start")
    fit(Halving(), [look], max_epochs=1)
    assert look.seen == [torch.full((1,), 0.5)]


def test_averaged_models(fit):
    averaging = pl.callbacks.WeightAveraging()
    module, look = Classifier(), Look(lambda trainer: list(private.averaged_models(trainer)), "on_train_batch_end")
    fit(module, [averaging, look], max_epochs=1)
    assert [type(average) for (average,) in look.seen] == [Classifier] * 4
    assert look.seen[0][0] is not module
    assert seen(fit, lambda trainer: list(private.averaged_models(trainer)), max_epochs=1) == [[]] * 4
