import warnings

import lightning.pytorch as pl
import pytest
import torch

from tests.models import data

# The models here are too small to share, and the suite runs in several processes.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def fit(tmp_path):
    """Fit a module on the small data set with a quiet Trainer; returns the Trainer."""

    def run(module, callbacks=(), trainer_class=pl.Trainer, ckpt_path=None, loaders=None, **settings):
        defaults = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "log_every_n_steps": 1,
        }
        trainer = trainer_class(callbacks=list(callbacks), **(defaults | settings))
        train, val = loaders or (data(), data(shuffle=False))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(does not have many workers|checkpoint callback).*")
            trainer.fit(module, train, val, ckpt_path=ckpt_path)
        return trainer

    return run
