"""A module that was never fitted is validated, tested and predicted with ranges that last as long as that."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from cpq_lightning import CPQCallback, CPQConfig, attach
from cpq_lightning.attach.layers import is_attached, quantizers
from tests.models import IMAGES, LABELS, Classifier, data


class Module(Classifier):
    """Its steps rely on hooks, count, and fill a metric."""

    def __init__(self):
        super().__init__()
        self.accuracy, self.seen = MulticlassAccuracy(4), 0

    def on_validation_epoch_start(self):
        self.outputs = []

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen += 1
        outputs = self.net(batch[0])
        self.outputs.append(outputs)
        self.accuracy.update(outputs, batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.log("mean", outputs.mean(), on_epoch=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        self.outputs.append(self.net(batch[0]))
        return self.outputs[-1]


class Stream(IterableDataset):
    def __init__(self):
        self.samples = iter(list(zip(IMAGES, LABELS, strict=True)))

    def __iter__(self):
        return self.samples


LOADERS = {
    "a loader": lambda: data(8, shuffle=False),
    "a seeded one": lambda: DataLoader(data().dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "a one-shot stream": lambda: DataLoader(Stream(), 8),
    "several": lambda: [data(16, shuffle=False, count=32), data(8, shuffle=False)],
}


def trainer(tmp_path, *callbacks, **settings):
    settings = {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False, **settings}
    return pl.Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **settings,
    )


def cpq(config=CPQConfig(), **settings):  # noqa: B008 - frozen
    return CPQCallback(config, table=False, levels_file=None, calibration_batches=3, **settings)


def evaluate(what, run, module, loader, **settings):
    if what == "predict":
        found = run.predict(module, loader, **settings)
        found = [found] if torch.is_tensor(found[0]) else found
        return [batch.tolist() for batches in found for batch in batches]
    return getattr(run, what)(module, loader, verbose=False, **settings)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.equal(other[name]), name


@pytest.mark.filterwarnings("ignore:.*(shuffling enabled|many workers).*")
@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_it_gives_what_a_twin_gives_whose_ranges_come_from_the_first_batch(tmp_path, what, name):
    module = Module()
    twin = attach(copy.deepcopy(module))
    first = LOADERS[name]()
    first = next(iter(first[0] if isinstance(first, list) else first))
    for _, quantizer in quantizers(twin):
        quantizer.fits_next = quantizer.kind == "activation"
    twin.eval().net(first[0])
    wanted = evaluate(what, trainer(tmp_path), twin, LOADERS[name]())
    with pytest.warns(UserWarning, match=r"Module was never fitted.*from the first batch"):
        found = evaluate(what, trainer(tmp_path, cpq()), module, LOADERS[name]())
    assert found == wanted
    assert module.seen == twin.seen
    assert not any(tensor.is_inference() for tensor in module.state_dict().values())


CONFIGS = {
    "both": CPQConfig(),
    "weights": CPQConfig(act_bits=None),
    "dropped bits": CPQConfig(weight_bits=4, min_bits=2, first_last_bits=8),
}


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_of_it_is_left_in_a_later_fit(tmp_path, config, moved):
    modules = [Module()]
    modules.append(copy.deepcopy(modules[0]))
    for module, evaluations in zip(modules, ([], ["validate", "test", "predict"]), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for what in evaluations:
                # Other data, and twice the range.
                loader = DataLoader(TensorDataset(2 * IMAGES, LABELS), 8)
                evaluate(what, trainer(tmp_path, cpq(CONFIGS[config])), module, loader)
                assert not any(q.fitted for _, q in quantizers(module) if q.kind == "activation")
            if moved:
                with torch.no_grad():
                    for layer in (module.net[0], module.net[6]):
                        layer._parameters["weight"].mul_(3)
            torch.manual_seed(1)
            trainer(tmp_path, cpq(CONFIGS[config])).fit(module, data(), data(shuffle=False))
    assert_same(state(modules[0]), state(modules[1]))


def test_an_evaluation_that_fails_leaves_nothing_either(tmp_path):
    class Broken(Module):
        def on_validation_batch_end(self, *args):
            raise ValueError("broken")

    module = attach(Broken())
    before = state(module)
    with pytest.raises(ValueError, match="broken"), pytest.warns(UserWarning, match="never fitted"):
        trainer(tmp_path, cpq()).validate(module, data(shuffle=False))
    assert_same(before, state(module))


def test_a_checkpoint_with_ranges_wins(tmp_path):
    fitted = Module()
    run = trainer(tmp_path, cpq())
    run.fit(fitted, data(), data(shuffle=False))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    wanted = run.validate(fitted, data(shuffle=False), verbose=False)
    module = Module()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never fitted.*")
        run = trainer(tmp_path, cpq())
        found = evaluate("validate", run, module, data(shuffle=False), ckpt_path=tmp_path / "saved.ckpt")
    assert found == wanted
    assert_same(state(fitted), state(module))
    # And stays in a later fit, as it would without an evaluation.
    trainer(tmp_path, cpq(), limit_train_batches=0).fit(module, data())
    assert_same(state(fitted), state(module))


def test_before_quantization_begins_it_is_in_full_precision_and_says_so(tmp_path):
    module = Module()
    wanted = trainer(tmp_path).validate(copy.deepcopy(module), data(shuffle=False), verbose=False)
    with pytest.warns(UserWarning, match=r"never fitted.*quantize_from=0\.5.*full precision"):
        found = trainer(tmp_path, cpq(quantize_from=0.5)).validate(module, data(shuffle=False), verbose=False)
    assert found == wanted
    assert is_attached(module)


def test_a_step_that_takes_the_iterator(tmp_path):
    class Taking(Module):
        def validation_step(self, dataloader_iter):
            batch, *_ = next(dataloader_iter)
            self.log("mean", self.net(batch[0]).mean(), batch_size=16)

    module = Taking()
    wanted = trainer(tmp_path, cpq()).validate(copy.deepcopy(module), data(16, shuffle=False), verbose=False)
    with pytest.warns(UserWarning, match="never fitted"):
        found = trainer(tmp_path, cpq()).validate(module, data(16, shuffle=False), verbose=False)
    assert found == wanted
    assert not any(q.fitted for _, q in quantizers(module) if q.kind == "activation")


def test_a_fit_that_trains_nothing_validates_quantized(tmp_path):
    module = Module()
    run = trainer(tmp_path, cpq(), limit_train_batches=0, limit_val_batches=2)
    with pytest.warns(UserWarning, match="never fitted"):
        run.fit(module, data(), data(shuffle=False))
    assert not any(q.fitted for _, q in quantizers(module) if q.kind == "activation")


def test_metrics_and_monitors_are_the_users_own(tmp_path):
    class Noted(Logger):
        name = version = "noted"

        def __init__(self):
            super().__init__()
            self.found = {}

        def log_hyperparams(self, *args, **kwargs):
            pass

        def log_metrics(self, metrics, step=None):
            self.found |= metrics

    run = trainer(tmp_path, CPQCallback(table=False))
    run.loggers = [noted := Noted()]
    run.fit(Module(), data(), data(shuffle=False))
    assert set(run.callback_metrics) <= {"train_loss", "accuracy", "mean"}
    assert 0 <= noted.found["cpq/clipped_weights"] < 0.1
    assert 0 <= noted.found["cpq/clipped_inputs"] < 0.1
