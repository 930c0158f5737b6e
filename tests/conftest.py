import base64
import functools
import gc
import os
import shutil
import sys
import warnings
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing import ProcessRaisedException

import benchmarks.processes  # noqa: F401 - the fork server imports what it says, before its first process
from cpq_lightning.files import write_atomically
from tests.models import data

# The models here are too small to share, and the suite runs in several processes, those that tests start among them.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A picture of one grey pixel, as PNG.
_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)


class _OfLightning26:
    def __init__(self, *args, **kwargs):
        pytest.skip(f"Lightning {pl.__version__} has no averaging callback")


for _name in ("WeightAveraging", "EMAWeightAveraging"):
    if not hasattr(pl.callbacks, _name):
        setattr(pl.callbacks, _name, _OfLightning26)


def pytest_collection_finish():
    # What is imported by now stays: the garbage collector need not look through it again and again.
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _pictures_are_not_drawn(request, monkeypatch):
    """Drawing takes as long as much of a small fit, and few tests look at what is drawn: those have the marker."""
    if "pictures" not in request.keywords:
        for name in ("draw_levels", "draw_weight_histograms"):
            monkeypatch.setattr(f"cpq_lightning.report.run_files.{name}", _write_a_pixel)
        monkeypatch.setattr(
            "cpq_lightning.trainer.trajectory.draw_trajectory",
            lambda folder, monitor: _write_a_pixel(folder / "trajectory.png"),
        )


def _write_a_pixel(*arguments):
    write_atomically(arguments[-1], _PIXEL)
    return arguments[-1]


@pytest.fixture(autouse=True, scope="session")
def _torch_reads_its_operators_once():
    """Each export reads all operators of torch and of ONNX again, which takes longer than a small network."""
    try:
        from torch._export import utils
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        read, materialize = functools.cache(ONNXRegistry.from_torchlib), functools.cache(utils._materialize_cpp_cia_ops)
    except (ImportError, AttributeError):
        # Another version of torch: exports take longer.
        yield
        return

    def from_torchlib(*arguments, **settings):
        # Operators may be added to what an export gets.
        known, registry = read(*arguments, **settings), ONNXRegistry()
        registry._opset_version = known.opset_version
        registry.functions = {operator: list(found) for operator, found in known.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        patch.setattr(utils, "_materialize_cpp_cia_ops", materialize)
        yield


@pytest.fixture
def cpq(tmp_path, monkeypatch, capsys):
    """Run the command ``cpq`` in an empty folder, within this process: importing everything takes seconds."""
    from cpq_lightning.cli.main import main

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(sys, "argv", ["cpq"])
        capsys.readouterr()
        code = 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
        written = capsys.readouterr()
        # A code that is a sentence is what Python itself writes there.
        sentence = code if isinstance(code, str) else ""
        return SimpleNamespace(
            returncode=1 if sentence else code or 0, stdout=written.out, stderr=written.err + sentence, folder=tmp_path
        )

    return run


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
            "log_every_n_steps": 10,
        }
        train, val = loaders or (data(), data(shuffle=False))

        def run_with(**more):
            trainer = trainer_class(callbacks=list(callbacks), **(defaults | settings | more))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*(does not have many workers|checkpoint callback).*")
                trainer.fit(module, train, val, ckpt_path=ckpt_path)
            return trainer

        try:
            return run_with()
        except ProcessRaisedException as error:
            # A process that is forked from this one cannot go backwards where an earlier test has started autograd's
            # threads.
            if "combination with fork-based multiprocessing" not in str(error):
                raise
            # The run that failed has begun a folder.
            shutil.rmtree(tmp_path / "cpq_runs", ignore_errors=True)
            return run_with(strategy=DDPStrategy(start_method="forkserver"))

    return run
