"""Both names of Lightning: whatever callbacks do for ``lightning.pytorch`` they do for ``pytorch_lightning``."""

import copy
import importlib.machinery
import importlib.util
import io
import pickle
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import lightning.pytorch
import pytest
import torch
from torch.nn.functional import cross_entropy

import cpq_lightning.callbacks
from cpq_lightning import CPQCallback, CPQConfig, load_quantized
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.callbacks import (
    BatchNormReestimation,
    BitBudget,
    ClusterPull,
    DistillationCallback,
    DropBitsSchedule,
    TemperatureSchedule,
)
from cpq_lightning.trainer import lightning_names as _names
from tests.marks import thorough
from tests.models import Classifier, convnet, data

PUBLIC = [c for c in vars(cpq_lightning.callbacks).values() if isinstance(c, type)]
LEARNED = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, act_bits=4, first_last_bits=None)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request):
    return importlib.import_module(request.param)


@pytest.fixture
def exceptions(pl):
    return importlib.import_module(f"{pl.__name__}.utilities.exceptions")


def classifier(pl):
    class Theirs(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = convnet()
            self.make_optimizer, self.make_scheduler = partial(torch.optim.AdamW, lr=1e-2), None

        training_step, validation_step = Classifier.training_step, Classifier.validation_step
        test_step, configure_optimizers = Classifier.test_step, Classifier.configure_optimizers

    return Theirs()


def one_of_each(make=lambda callback, *args, **kwargs: callback(*args, **kwargs)):
    given = {BitBudget: {"target": 4.0}, CPQCallback: {"config": LEARNED}, BatchNormReestimation: {"batches": 2}}
    first = sorted(PUBLIC, key=lambda c: (c is not CPQCallback, c is BatchNormReestimation))
    return [make(callback, **given.get(callback, {})) for callback in first]


def in_a_process(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Classes --------------------------------------------------------------------------------------------------------------


CHECK = (
    "import importlib, lightning.pytorch as one, pytorch_lightning as other\n"
    "for pl in (one, other, one):\n"
    "    assert isinstance(cb, pl.Callback) and issubclass(Own, pl.Callback), pl\n"
    "    pl.Trainer(callbacks=[cb, Own()], accelerator='cpu', logger=False)\n"
    "    errors = importlib.import_module(pl.__name__ + '.utilities.exceptions')\n"
    "    try:\n"
    "        cb.setup(pl.Trainer(callbacks=[cb, CPQCallback()], accelerator='cpu'), None, 'fit')\n"
    "        raise SystemExit('not refused')\n"
    "    except errors.MisconfigurationException:\n"
    "        pass\n"
)
CONSTRUCT = "from cpq_lightning import CPQCallback\nclass Own(CPQCallback): pass\ncb = CPQCallback()\n"
# The name that is not used is not imported.
USE_ONE = (
    "import sys, cpq_lightning.callbacks, cpq_lightning.module, cpq_lightning.data, lightning.pytorch as pl\n"
    "pl.Trainer(callbacks=[cb], accelerator='cpu', logger=False)\n"
    "assert not {'pytorch_lightning', 'lightning_fabric'} & set(sys.modules)\n"
)


@pytest.mark.parametrize(
    "before",
    [
        f"import pytorch_lightning\n{CONSTRUCT}",
        # By somebody who looks first whether it can be had, and imports a part of it.
        f"{CONSTRUCT}{USE_ONE}import importlib.util\nassert importlib.util.find_spec('pytorch_lightning').origin\n"
        "from pytorch_lightning.callbacks import ModelCheckpoint",
        *thorough(
            f"import pytorch_lightning, lightning.pytorch\n{CONSTRUCT}",
            "import sys, lightning.pytorch\nsys.modules['pytorch_lightning'] = lightning.pytorch\n"
            f"sys.modules['pytorch_lightning.utilities'] = lightning.pytorch.utilities\n{CONSTRUCT}",
        ),
    ],
    ids=["other first", "other after the callback", "both first", "alias"],
)
def test_a_callback_is_of_both_names_in_any_order_of_imports(before):
    in_a_process(f"{before}\n{CHECK}")


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A package whose import is watched for, and what was told of it."""
    told = []
    monkeypatch.setattr(_names, "_OTHER", "watched_package")
    monkeypatch.setattr(_names, "_add_bases", told.append)
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "watched_package"
    package.mkdir()
    (package / "__init__.py").write_text("value = 1")
    yield SimpleNamespace(told=told, source=package / "__init__.py")
    sys.modules.pop("watched_package", None)


def test_a_watched_package_is_loaded_as_without_us_and_told_of_each_time(watched):
    module = importlib.import_module("watched_package")
    assert watched.told == [module]
    assert module.value == 1
    assert isinstance(module.__loader__, importlib.machinery.SourceFileLoader)
    assert module.__spec__.loader is module.__loader__
    importlib.reload(module)
    assert watched.told == [module, module]
    del sys.modules["watched_package"]
    again = importlib.import_module("watched_package")
    assert watched.told[2:] == [again]


def test_a_watched_package_that_is_broken_or_missing_stays_so(watched):
    watched.source.write_text("raise RuntimeError('broken')")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            importlib.import_module("watched_package")
    watched.source.unlink()
    watched.source.parent.rename(watched.source.parent.with_name("elsewhere"))
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="No module named 'watched_package'"):
        importlib.import_module("watched_package")
    assert importlib.util.find_spec("watched_package") is None
    assert not watched.told


@pytest.mark.parametrize("callback", one_of_each(), ids=lambda c: type(c).__name__)
def test_callbacks_are_instances_and_can_be_copied(callback, pl):
    assert isinstance(callback, pl.Callback)
    assert isinstance(callback, lightning.pytorch.Callback)
    buffer = io.BytesIO()
    torch.save(callback, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(callback),
        pickle.loads(pickle.dumps(callback)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(copied) is type(callback)
        assert isinstance(copied, pl.Callback)


def test_the_command_line_of_each_name_takes_them(pl, tmp_path, monkeypatch):
    cli = importlib.import_module(f"{pl.__name__}.cli")
    monkeypatch.setattr(sys, "argv", ["fit.py"])
    names = ["cpq_lightning.CPQCallback", "cpq_lightning.callbacks.TemperatureSchedule", "BitBudget"]
    listed = [f"--trainer.callbacks+={name}" for name in names]
    arguments = [*listed, "--trainer.callbacks.target=3", f"--trainer.default_root_dir={tmp_path}"]

    class Theirs(pl.LightningModule):
        pass

    trainer = cli.LightningCLI(Theirs, args=[*arguments, "--trainer.accelerator=cpu"], run=False).trainer
    assert {CPQCallback, TemperatureSchedule, BitBudget} <= {type(callback) for callback in trainer.callbacks}


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def journey(pl, tmp_path, fit):
    """What a run needs of one name, and a fit with it."""
    callbacks = importlib.import_module(f"{pl.__name__}.callbacks")
    loggers = importlib.import_module(f"{pl.__name__}.loggers")

    def run(module, more, folder, **settings):
        checkpoint = callbacks.ModelCheckpoint(tmp_path / folder, save_last=True, save_top_k=-1, every_n_epochs=1)
        logger = loggers.CSVLogger(tmp_path / folder)
        trainer = fit(
            module,
            [*more, checkpoint],
            trainer_class=pl.Trainer,
            loaders=(data(shuffle=False), data(shuffle=False)),
            logger=logger,
            enable_checkpointing=True,
            log_every_n_steps=2,
            **settings,
        )
        return trainer, checkpoint

    return SimpleNamespace(run=run, averaging=getattr(callbacks, "EMAWeightAveraging", None))


def test_all_callbacks_fit_resume_evaluate_and_export(pl, journey, tmp_path):
    def company():
        average = [] if journey.averaging is None else [journey.averaging(decay=0.9, update_starting_at_step=4)]
        first = [CPQCallback(LEARNED, quantize_from=0.25, export=["packed"]), TemperatureSchedule()]
        first += [ClusterPull(start=0.5), BitBudget(4.0, freeze=16), DistillationCallback()]
        return [*first, *average, BatchNormReestimation(2)]

    torch.manual_seed(3)
    whole = classifier(pl)
    trainer, _ = journey.run(whole, company(), "whole", max_epochs=6)
    resumed, path = classifier(pl), tmp_path / "whole" / "epoch=2-step=12.ckpt"
    journey.run(resumed, company(), "resumed", max_epochs=6, ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    run = next((tmp_path / "whole").rglob("levels.json")).parent
    assert "cpq/weight_bits" in (run / "metrics.csv").read_text()
    assert {"levels.csv", "trajectory.csv", "teacher.pt", "Theirs.safetensors"} <= {p.name for p in run.iterdir()}
    images = data(shuffle=False).dataset.tensors[0]
    with torch.no_grad():
        torch.testing.assert_close(
            load_quantized(run / "Theirs.safetensors", convnet())(images), whole.net.eval()(images)
        )

    fresh = classifier(pl)
    evaluate = pl.Trainer(callbacks=[CPQCallback(LEARNED)], logger=False, accelerator="cpu", enable_progress_bar=False)
    found = evaluate.test(fresh, data(shuffle=False), ckpt_path=tmp_path / "whole" / "last.ckpt", verbose=False)
    assert found[0]["test_acc"] == pytest.approx(trainer.callback_metrics["val_acc"].item())
    assert all(q.settled for _, q in quantizers(fresh))


def test_one_callback_serves_trainers_of_both_names_in_turn(fit):
    callbacks = [CPQCallback(CPQConfig(weight_bits=4, min_bits=3), levels_file=None), DropBitsSchedule()]
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.pytorch"):
        pl = importlib.import_module(name)
        module = classifier(pl)
        fit(module, callbacks, trainer_class=pl.Trainer)
        assert all(q.settled for _, q in quantizers(module))


def test_a_step_that_takes_the_iterator_is_seen(pl, fit):
    class Theirs(type(classifier(pl))):
        def training_step(self, dataloader_iter):
            (images, labels), _, _ = next(dataloader_iter)
            return cross_entropy(self.net(images), labels)

    module = Theirs()
    with pytest.warns(UserWarning, match="training_step takes the data's iterator"):
        fit(module, [CPQCallback(levels_file=None)], trainer_class=pl.Trainer)
    assert all(q.settled for _, q in quantizers(module))


def test_evaluation_of_a_module_never_fitted_borrows_ranges(pl):
    module = classifier(pl)
    trainer = pl.Trainer(callbacks=[CPQCallback()], logger=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.warns(UserWarning, match="was never fitted with quantizers"):
        trainer.validate(module, data(shuffle=False), verbose=False)


def test_refusals_are_caught_by_the_name_in_use(pl, exceptions, fit):
    for callbacks in ([CPQCallback(), CPQCallback()], [BitBudget(3.0)], [TemperatureSchedule()]):
        with pytest.raises(exceptions.MisconfigurationException):
            fit(classifier(pl), callbacks, trainer_class=pl.Trainer)


def test_a_second_averaging_callback_of_either_name_is_seen(pl, exceptions, fit):
    averaging = importlib.import_module(f"{pl.__name__}.callbacks").StochasticWeightAveraging(1e-2)
    with pytest.raises(exceptions.MisconfigurationException, match="put CPQCallback first"):
        fit(classifier(pl), [averaging, CPQCallback()], trainer_class=pl.Trainer)


def test_other_processes_than_the_first_stay_silent(pl, monkeypatch, recwarn):
    from cpq_lightning.trainer.run_report import rank_zero_warn

    ranks = importlib.import_module(f"{pl.__name__}.utilities.rank_zero").rank_zero_only
    monkeypatch.setattr(ranks, "rank", 1)
    rank_zero_warn("said by the first process")
    assert not recwarn.list


def test_quantized_module_trains_and_loads_under_each_name(pl, fit, tmp_path):
    place = "cpq_lightning" if pl is lightning.pytorch else "cpq_lightning.pytorch_lightning"
    made = importlib.import_module(place).QuantizedModule
    module = made(classifier(pl).net, num_classes=4, teacher="self")
    assert isinstance(module, pl.LightningModule)
    trainer = fit(module, trainer_class=pl.Trainer)
    assert {CPQCallback, DistillationCallback} <= {type(callback) for callback in trainer.callbacks}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = made.load_from_checkpoint(tmp_path / "last.ckpt", backbone=classifier(pl).net)
    assert loaded.hparams == module.hparams
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


class Subclass(CPQCallback):
    def __init__(self, mine):
        super().__init__(CPQConfig(weight_bits=3), table=False)
        self.mine, self._own = mine, [mine]


@pytest.mark.parametrize("how", ["pickle", "copy"])
def test_a_callback_that_has_run_is_stored_as_its_settings(how, tmp_path):
    """Packages pickle their Trainer's arguments, behind a fit too."""
    held = [Subclass("x"), TemperatureSchedule(last=0.5), DistillationCallback("self", weight=0.25)]
    trainer = lightning.pytorch.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=held,
    )  # fmt: skip
    trainer.fit(Classifier(partial(torch.optim.Adam, lr=0.01)), data())
    stored = pickle.loads(pickle.dumps(held)) if how == "pickle" else copy.deepcopy(held)
    assert (stored[0].config, stored[0].mine, stored[0]._own, stored[0].table) == (held[0].config, "x", ["x"], False)
    assert not stored[0]._companions
    assert held[0]._companions
    assert stored[1].last == 0.5
    assert stored[2].weight == 0.25
    trainer.callbacks = [*stored, *trainer.callbacks[3:]]
    trainer.fit(Classifier(), data())
