import time
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from cpq_lightning import CPQCallback
from cpq_lightning.trainer.calibration import late_progress
from cpq_lightning.trainer.progress import overrides
from tests.models import IMAGES, LABELS, Classifier, data


class Seen(pl.Callback):
    def __init__(self):
        self.sums = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.sums += batch[0].sum((1, 2, 3)).tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_calibration_takes_no_sample_from_the_first_epoch(fit, workers):
    loader = DataLoader(
        TensorDataset(IMAGES, LABELS), 16, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    seen = Seen()
    fit(Classifier(), [CPQCallback(table=False, calibration_batches=3), seen], loaders=(loader, data()), max_epochs=1)
    assert sorted(seen.sums) == pytest.approx(sorted(IMAGES.sum((1, 2, 3)).tolist()))


def test_calibration_does_not_disturb_random_numbers_of_the_run(fit):
    class Draw(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                self.number = torch.rand(1).item()

    drawn = []
    for batches in (1, 4):
        draw = Draw()
        pl.seed_everything(1, verbose=False)
        fit(Classifier(), [CPQCallback(table=False, calibration_batches=batches), draw], max_epochs=1)
        drawn.append(draw.number)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("shown", "delay", "expected"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)])
def test_a_progress_bar_appears_when_it_takes_long(shown, delay, expected, monkeypatch):
    from rich.progress import Progress

    started = []
    start = Progress.start
    monkeypatch.setattr(Progress, "start", lambda self: (started.append(True), start(self)))
    with late_progress("Calibrating", 2, shown, delay) as advance:
        time.sleep(0.01)
        advance()
        advance()
    assert bool(started) is expected


def test_overrides_tells_own_hooks_from_inherited_ones():
    class Own(Classifier):
        def configure_model(self):
            pass

    assert overrides(Own(), "configure_model")
    assert not overrides(Classifier(), "configure_model")


def test_training_steps_of_any_signature_are_calibrated_on(fit):
    class Other(Classifier):
        def training_step(self, samples, position):
            return super().training_step(samples, position)

    class Alone(Classifier):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    for module in (Other(), Alone()):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*could not be calibrated.*")
            fit(module, [CPQCallback(table=False)], max_epochs=1)
