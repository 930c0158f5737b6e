"""CPQCallback(export=[...]): files at the end of a fit, of anybody's module."""

import json
import re
import warnings

import lightning.pytorch as pl
import numpy as np
import onnxruntime
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from cpq_lightning import CPQCallback, CPQConfig, QuantizedModule, load_quantized
from cpq_lightning.export import export as shipping
from cpq_lightning.export.sample_file import SAMPLES_FILE, read_samples
from cpq_lightning.export.samples import recorded_samples
from cpq_lightning.export.verify import MismatchError
from cpq_lightning.trainer.export import available_samples
from tests.models import IMAGES, Classifier, convnet, data, run_of


def exported(**settings):
    return CPQCallback(CPQConfig(), table=False, **({"export": ["packed"]} | settings))


def files(folder):
    suffixes = (".safetensors", ".onnx", ".pt2", ".tmp")
    return sorted(p.name for p in run_of(folder).glob("*") if p.suffix in suffixes and p.name != SAMPLES_FILE)


def _blocking(name):
    """CPQCallback.on_train_start, with a folder of this name in the way of a run's file."""
    real = CPQCallback.on_train_start

    def on_train_start(self, trainer, pl_module):
        real(self, trainer, pl_module)
        (self.run_folder / name).mkdir()

    return on_train_start


def test_all_formats_at_the_end_of_a_fit(fit, tmp_path, capsys):
    module = Classifier()
    fit(module, [exported(export=["packed", "onnx", "torch"])])
    assert files(tmp_path) == ["Classifier.onnx", "Classifier.pt2", "Classifier.safetensors"]
    expected = module.eval().net(IMAGES).detach()
    loaded = load_quantized(run_of(tmp_path) / "Classifier.safetensors", convnet())
    assert (loaded(IMAGES) - expected).abs().max() <= 1e-5
    (found,) = onnxruntime.InferenceSession(str(run_of(tmp_path) / "Classifier.onnx")).run(
        None, {"input": IMAGES.numpy()}
    )
    assert (found.argmax(1) == expected.argmax(1).numpy()).mean() >= 0.98
    assert np.isfinite(found).all()
    text = capsys.readouterr().out
    assert text.count("weight codes") == 3
    assert "16 samples" in text
    assert "synthetic" not in text


class WithForward(Classifier):
    def forward(self, x):
        return self.net(x) * 10


def test_a_module_with_a_forward_ships_as_a_whole(fit, tmp_path):
    # Its training step calls the network, not the module: the samples are the network's.
    module = WithForward()
    fit(module, [exported()])
    loaded = load_quantized(run_of(tmp_path) / "WithForward.safetensors", WithForward())
    assert (loaded(IMAGES) - module.eval()(IMAGES)).abs().max() <= 1e-4
    assert recorded_samples(module) is None
    assert recorded_samples(module.net) is not None
    assert not module._forward_pre_hooks


class Chosen(WithForward):
    def export_module(self):
        return self.net


def test_a_module_may_say_what_ships(fit, tmp_path):
    module = Chosen()
    fit(module, [exported()])
    loaded = load_quantized(run_of(tmp_path) / "Chosen.safetensors", convnet())
    assert (loaded(IMAGES) - module.eval().net(IMAGES)).abs().max() <= 1e-5


class Labelled(Classifier):
    """Takes arguments by name, in containers, and labels in training alone."""

    def forward(self, batch, *, scale, labels=None):
        logits = self.net(batch["images"][0]) * scale
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"logits": logits, "loss": loss}

    def training_step(self, batch, batch_idx):
        return self({"images": [batch[0]]}, scale=2.0, labels=batch[1])["loss"]


def test_a_call_of_any_form_is_recorded_and_exported(fit, tmp_path, caplog):
    module = Labelled()
    fit(module, [exported(export=["packed", "torch"])], max_epochs=1)
    samples = read_samples(run_of(tmp_path) / SAMPLES_FILE)
    assert samples.places(module) == (["batch.images.0", "labels"], {"scale": 2.0})
    assert files(tmp_path) == ["Labelled.pt2", "Labelled.safetensors"]
    assert "constants of the torch file: scale=2.0" in caplog.text
    program = torch.export.load(run_of(tmp_path) / "Labelled.pt2").module()
    found = program({"images": [IMAGES[:3]]}, scale=2.0, labels=torch.zeros(3, dtype=torch.int64))
    assert found["logits"].allclose(module.eval().net(IMAGES[:3]) * 2, atol=1e-5)


def test_an_example_says_which_arguments_an_export_has_and_the_run_gives_the_data(fit, tmp_path):
    module = Labelled()
    module.example_input_array = {"batch": {"images": [torch.zeros(2, 3, 8, 8)]}, "scale": 1.0}
    fit(module, [exported(export=[])], max_epochs=1)
    samples = available_samples(module)
    assert samples.places(module) == (["batch.images.0"], {"scale": 2.0})
    assert samples.real
    assert images_in(samples.inputs) == 16


class Graph:
    def __init__(self, x):
        self.x = x


class OfGraphs(Classifier):
    def forward(self, graph):
        return self.net(graph.x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(Graph(batch[0])), batch[1])


class Naming(Classifier):
    """Returns what no file can hold."""

    def forward(self, x):
        return {"logits": self.net(x), "names": ["cat", "dog"]}

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0])["logits"], batch[1])


class NamingUnseen(Naming):
    """Its forward is called by nobody in training."""

    def __init__(self):
        super().__init__()
        self.example_input_array = IMAGES[:2]

    training_step = Classifier.training_step


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (OfGraphs, "the argument 'graph' is Graph.*Set example_input_array"),
        (Naming, r"the output 'names\.0' of the model is str"),
        (NamingUnseen, r"the output 'names\.0' of the model is str"),
    ],
)
def test_what_no_export_can_take_or_hold_is_said_before_training_and_ends_no_fit(make, words, fit, tmp_path):
    said = []

    class Begins(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            said.append([str(w.message) for w in caught])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(make(), [exported(export=["packed", "torch"]), Begins()], limit_train_batches=2, max_epochs=1)
    assert trainer.state.finished
    assert files(tmp_path) == []
    early = [text for text in said[0] if re.search(rf"\(packed, torch\) will fail: .*{words}", text)]
    assert len(early) == 1
    late = [str(w.message) for w in caught if re.search(rf"file could not be written .*{words}", str(w.message))]
    assert len(late) == 2


def test_lightnings_summary_gives_no_samples(fit, tmp_path):
    """A run that is resumed is summarized before its first batch, with an example that is none of the data."""
    trainer = fit(Chosen(), [exported(export=[])], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = WithForward()
    module.example_input_array = torch.zeros(2, 3, 8, 8)
    module.training_step = lambda batch, batch_idx: nn.functional.cross_entropy(module(batch[0]), batch[1])
    settings = {"default_root_dir": tmp_path / "again", "ckpt_path": tmp_path / "a.ckpt", "enable_model_summary": True}
    fit(module, [exported(export=[])], **settings)
    assert images_in(read_samples(run_of(tmp_path / "again") / SAMPLES_FILE).inputs) == 16


def test_an_example_input_array_will_do(fit, tmp_path, capsys):
    class Example(Classifier):
        def __init__(self):
            super().__init__()
            self.example_input_array = IMAGES[:4]

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(x := batch[0]) + 0 * x.mean(), batch[1])

    fit(Example(), [exported(samples=4)])
    assert files(tmp_path) == ["Example.safetensors"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision, fit, tmp_path):
    fit(Classifier(), [exported()], precision=precision)
    assert files(tmp_path) == ["Classifier.safetensors"]


def test_a_compiled_network_that_is_resumed_records_too(fit, tmp_path):
    trainer = fit(Classifier(), [exported(export=[])], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module, callback = Classifier(), exported()
    module.net.compile(backend="eager")
    fit(module, [callback], max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert (callback.run_folder / "Classifier.safetensors").is_file()


def test_a_failed_export_ends_no_fit_and_names_what_tries_again(fit, tmp_path, monkeypatch):
    real = shipping.verify

    def verify(model, artefact, samples):
        if "torch.export" in artefact.runtime:
            raise MismatchError("1 of 9 weight codes of layer 'x' differ.")
        return real(model, artefact, samples)

    monkeypatch.setattr(shipping, "verify", verify)
    callback, saving = exported(export=["torch", "packed"]), ModelCheckpoint(tmp_path / "saved", save_last=True)
    with pytest.warns(UserWarning, match="torch file could not be written") as found:
        trainer = fit(Classifier(), [callback, saving], enable_checkpointing=True)
    told = next(str(w.message) for w in found if "could not be written" in str(w.message))
    command = f"cpq export --ckpt {saving.last_model_path} --format torch --module tests.models.Classifier"
    assert "Classifier.pt2 was not written" in told
    assert "layer 'x'" in told
    assert command in told
    assert trainer.state.finished
    assert files(tmp_path) == ["Classifier.safetensors"]
    assert list(callback.failed_exports) == ["torch"]
    failed, written = json.loads((callback.run_folder / "levels.json").read_text())["run"]["exports"]
    assert (failed["format"], failed["command"]) == ("torch", command)
    assert written == {"format": "packed", "file": "Classifier.safetensors"}
    # A test may follow.
    trainer.test(Classifier(), data(), verbose=False)


def test_what_cannot_be_written_names_the_checkpoint(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(CPQCallback, "on_train_start", _blocking("Classifier.safetensors"))
    saving = ModelCheckpoint(tmp_path / "saved")
    with pytest.warns(
        UserWarning, match=r"packed file could not be written .*Nothing of the training is lost: .*saved"
    ):
        fit(Classifier(), [exported(), saving], enable_checkpointing=True)


def test_a_run_that_ends_in_full_precision_ships_nothing(fit, tmp_path):
    with pytest.warns(UserWarning, match="Quantization has not begun in layer"):
        fit(Classifier(), [exported(quantize_from=100)])
    assert files(tmp_path) == []


def test_settings_are_checked_before_training(monkeypatch):
    with pytest.raises(ValueError, match="format must be one of"):
        CPQCallback(export=["tflite"])
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        CPQCallback(export=["packed"], samples=0)
    monkeypatch.setattr("cpq_lightning.extras._version", lambda name: "0.0.1")
    with pytest.raises(ImportError, match=r"ONNX needs .*onnx>="):
        CPQCallback(export=["onnx"])


def test_fast_dev_run_writes_nothing(fit, tmp_path):
    fit(Classifier(), [exported()], fast_dev_run=True)
    assert files(tmp_path) == []


# A QuantizedModule's checkpoint --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of a QuantizedModule, exported at its end, and its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    module = QuantizedModule("test_resnet", num_classes=4, quantization=CPQConfig(weight_bits=3))
    saving = ModelCheckpoint(folder, filename="whole", save_last=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[CPQCallback(export=["packed"], table=False), saving],
        )
        trainer.fit(module, data(), data(shuffle=False))
        trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return folder, module


def images_in(value):
    """How many tensors within a value hold an image of the data."""
    if isinstance(value, torch.Tensor):
        rows = value.reshape(-1, IMAGES[0].numel()) if value.numel() % IMAGES[0].numel() == 0 else torch.zeros(0, 192)
        return sum(bool((IMAGES.flatten(1) == row).all(1).any()) for row in rows)
    if isinstance(value, dict):
        return sum(map(images_in, value.values()))
    return sum(map(images_in, value)) if isinstance(value, list | tuple) else 0


@pytest.mark.parametrize("name", ["whole", "last", "weights"])
def test_no_checkpoint_carries_data(run, name):
    folder, _ = run
    assert images_in(torch.load(folder / f"{name}.ckpt", weights_only=True)) == 0


def test_the_samples_lie_in_the_runs_folder(run):
    samples = read_samples(run_of(run[0]) / "samples.safetensors")
    assert samples.real
    assert [t.shape for t in samples.inputs] == [(16, 3, 8, 8)]
    assert images_in(samples.inputs) == 16


def test_the_file_builds_its_own_network(run):
    folder, module = run
    loaded = load_quantized(run_of(folder) / "test_resnet.safetensors")
    assert type(loaded).__module__.startswith("timm.")
    assert (loaded(IMAGES) - module.eval()(IMAGES)).abs().max() <= 1e-5


def quantized():
    return QuantizedModule("test_resnet", num_classes=4, quantization=CPQConfig())


@pytest.mark.parametrize(
    ("settings", "trainer"),
    [({"samples": 0}, {}), ({"levels_file": None}, {}), ({}, {"fast_dev_run": True})],
    ids=["none wanted", "no files", "fast_dev_run"],
)
def test_no_samples_are_written(fit, tmp_path, settings, trainer):
    fit(quantized(), [CPQCallback(table=False, **settings)], **{"max_epochs": 1, "limit_train_batches": 1, **trainer})
    assert not (run_of(tmp_path) / "samples.safetensors").exists()


def test_none_are_written_of_an_earlier_fit_of_the_module(fit, tmp_path):
    module = quantized()
    for samples in (16, 0):
        settings = {"default_root_dir": tmp_path / str(samples), "max_epochs": 1, "limit_train_batches": 1}
        fit(module, [CPQCallback(table=False, samples=samples)], **settings)
    assert (run_of(tmp_path / "16") / "samples.safetensors").exists()
    assert not (run_of(tmp_path / "0") / "samples.safetensors").exists()


def test_any_run_that_writes_files_leaves_samples(fit, tmp_path):
    for place, module in enumerate((Classifier(), QuantizedModule(convnet(), num_classes=4))):
        fit(module, [CPQCallback(table=False)], max_epochs=1, limit_train_batches=1)
        assert (run_of(tmp_path, 2 * place) / SAMPLES_FILE).is_file()
        fit(module, [CPQCallback(table=False, samples=0)], max_epochs=1, limit_train_batches=1)
        assert not (run_of(tmp_path, 2 * place + 1) / SAMPLES_FILE).exists()


class HoldsItsNetwork(Classifier):
    """Saves its network as a hyperparameter, as many modules do; Lightning then pickles it into checkpoints."""

    def __init__(self, net):
        super().__init__()
        self.save_hyperparameters()
        self.net = net


def test_a_network_that_is_a_hyperparameter_takes_no_data_into_the_checkpoint(fit, tmp_path):
    trainer = fit(HoldsItsNetwork(convnet()), [exported()], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    net = torch.load(tmp_path / "a.ckpt", weights_only=False)["hyper_parameters"]["net"]
    assert images_in([module.__dict__ for module in net.modules()]) == 0
    assert recorded_samples(net) is None


class Interrupts(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("interrupted")


def test_an_interrupted_run_has_left_them_and_says_where(fit, tmp_path, caplog):
    with caplog.at_level("INFO"), pytest.raises(RuntimeError, match="interrupted"):
        fit(quantized(), [CPQCallback(table=False), Interrupts()])
    assert len(read_samples(run_of(tmp_path) / "samples.safetensors")) == 16
    told = next(text for text in caplog.messages if "samples.safetensors" in text)
    assert "16 inputs of the run's data written to" in told
    assert "samples=0" in told


def test_a_run_that_is_resumed_elsewhere_leaves_its_own(fit, tmp_path):
    trainer = fit(quantized(), [CPQCallback(table=False)], default_root_dir=tmp_path / "first", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = tmp_path / "second"
    fit(quantized(), [CPQCallback(table=False, samples=3)], default_root_dir=second, ckpt_path=tmp_path / "a.ckpt")
    assert len(read_samples(run_of(second) / "samples.safetensors")) == 3


def test_samples_that_cannot_be_written_cost_a_warning(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(CPQCallback, "on_train_start", _blocking("samples.safetensors"))
    with pytest.warns(UserWarning, match=r"samples\.safetensors could not be written .*will need --samples or --data"):
        trainer = fit(quantized(), [CPQCallback(table=False)], max_epochs=1, limit_train_batches=1)
    assert trainer.state.finished


@pytest.mark.xdist_group("ddp")
def test_of_several_processes_the_first_writes_its_samples(fit, tmp_path):
    module = quantized()
    fit(module, [CPQCallback(table=False)], strategy="ddp_fork", devices=2, max_epochs=1, limit_train_batches=1)
    assert len(read_samples(run_of(tmp_path) / "samples.safetensors")) == 16
