"""A trained module of one's own comes back from its checkpoint alone."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import cross_entropy

import cpq_lightning
from benchmarks.processes import run_processes
from cpq_lightning import CPQCallback, CPQConfig, QuantizedModule
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.attach.origin import attached_config
from cpq_lightning.cli.main import main
from tests.models import IMAGES, convnet, data


class Net(pl.LightningModule):
    """With hyperparameters, one of which is a config."""

    def __init__(self, width=8, config=CPQConfig()):  # noqa: B008
        super().__init__()
        self.save_hyperparameters()
        self.net = convnet(width)

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Plain(nn.Module):
    """A network of somebody's own."""

    def __init__(self, width=8):
        super().__init__()
        self.net = convnet(width)

    def forward(self, images):
        return self.net(images)


class Unsaved(Net):
    """With an argument that no checkpoint holds."""

    def __init__(self, channels=8):
        pl.LightningModule.__init__(self)
        self.net = convnet(channels)


def quiet(folder, *callbacks, **settings):
    settings = {"logger": False, "enable_checkpointing": False, **settings}
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=list(callbacks), **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    module = Net(6, CPQConfig(weight_bits=3, ignore=["net.3"]))
    trainer = quiet(folder, CPQCallback(module.hparams["config"], table=False))
    trainer.fit(module, data())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder, module.eval()


def test_one_call_gets_it_back(run):
    folder, module = run
    loaded = cpq_lightning.load_checkpoint(Net, folder / "last.ckpt").eval()
    assert torch.equal(loaded(IMAGES), module(IMAGES))
    assert attached_config(loaded) == module.hparams["config"] == loaded.hparams["config"]
    assert [name for name, _ in quantizers(loaded)] == [name for name, _ in quantizers(module)]


def load_and_evaluate(folder):
    module = cpq_lightning.load_checkpoint(Net, folder / "last.ckpt", weights_only=True).eval()
    torch.save(module(IMAGES), folder / "out.pt")


def test_in_a_new_process(run):
    folder, module = run
    (done,) = run_processes(load_and_evaluate, folder)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(folder / "out.pt"), module(IMAGES))


@pytest.mark.parametrize("strict", [None, True, False])
def test_the_class_alone_says_what_to_call(run, strict):
    with pytest.raises(RuntimeError, match=r"^Load it with `cpq_lightning.load_checkpoint\(Net, path\)`"):
        Net.load_from_checkpoint(run[0] / "last.ckpt", strict=strict)


def test_a_trainer_without_the_callback_says_so(run):
    with pytest.raises(RuntimeError, match="give a Trainer the CPQCallback of the run"):
        quiet(run[0]).test(Net(6), data(), ckpt_path=run[0] / "last.ckpt", verbose=False)


def test_a_run_in_full_precision_is_refused_by_name(tmp_path):
    trainer = quiet(tmp_path)
    trainer.fit(Net(), data())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"plain.ckpt has no quantizers: .* Net.load_from_checkpoint"):
        cpq_lightning.load_checkpoint(Net, tmp_path / "plain.ckpt")


def test_a_loaded_module_trains_on(run, tmp_path):
    folder, module = run
    loaded = cpq_lightning.load_checkpoint(Net, folder / "last.ckpt")
    quiet(tmp_path, CPQCallback(table=False)).fit(loaded, data())
    assert not torch.equal(loaded.eval()(IMAGES), module(IMAGES))
    assert all(q.bits == p.bits for (_, q), (_, p) in zip(quantizers(loaded), quantizers(module), strict=True))


@pytest.mark.parametrize("logger", [False, True])
def test_a_config_among_hyperparameters(tmp_path, logger):
    module = Net(config=CPQConfig(weight_bits=2))
    trainer = quiet(tmp_path, CPQCallback(module.hparams["config"], table=False), logger=logger)
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"]["config"] == CPQConfig(weight_bits=2)
    quiet(tmp_path, CPQCallback(table=False)).test(Net(), data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)


def exported(folder, *arguments):
    main(["export", "--ckpt", str(folder / "last.ckpt"), "--out", str(folder / "out"), *arguments])


def test_export_by_class_path(run, capsys):
    folder, module = run
    exported(folder, "--module", "tests.test_checkpoint.Net")
    assert "agrees on 100.0%" in capsys.readouterr().out
    network = cpq_lightning.load_quantized(folder / "out" / "Net.safetensors", model=Net(6))
    assert (network(IMAGES) - module(IMAGES)).abs().max() <= 1e-5


def test_export_with_arguments_of_the_class(run, capsys):
    exported(run[0], "--module", "tests.test_checkpoint.Unsaved", "--module_args", '{"channels": 6}')
    assert "agrees on 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--module", "tests.test_checkpoint.Nothing"], "cannot be found"),
        (["--module", "tests.models.data"], "expected the dotted path of a LightningModule's class"),
        (["--module", "tests.test_checkpoint.Unsaved"], "Give its arguments with --module_args"),
        ([], "give its class: --module mypackage.Net"),
    ],
)
def test_export_says_what_is_missing(run, arguments, words):
    with pytest.raises(SystemExit, match=words):
        exported(run[0], *arguments)


def test_export_of_a_quantized_module_around_a_network_of_ones_own(tmp_path, capsys):
    module = QuantizedModule(Plain(6), num_classes=4, quantization=CPQConfig(weight_bits=3))
    trainer = quiet(tmp_path, CPQCallback(table=False))
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(SystemExit, match=r"For a QuantizedModule around an nn\.Module"):
        exported(tmp_path)
    backbone = {"class_path": "tests.test_checkpoint.Plain", "init_args": {"width": 6}}
    exported(tmp_path, "--module", "cpq_lightning.QuantizedModule", "--module_args", json.dumps({"backbone": backbone}))
    assert "agrees on 100.0%" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"must be the name of a timm model or an nn\.Module, got 3"):
        exported(tmp_path, "--module", "cpq_lightning.QuantizedModule", "--module_args", '{"backbone": 3}')


def test_a_config_among_hyperparameters_is_plain_in_the_loggers_file(tmp_path):
    module = Net(config=CPQConfig(weight_bits=2))
    trainer = quiet(tmp_path, CPQCallback(module.hparams["config"], table=False), logger=CSVLogger(tmp_path))
    trainer.fit(module, data())
    written = yaml.safe_load((Path(trainer.logger.log_dir) / "hparams.yaml").read_text())
    assert CPQConfig.of(written["config"]) == CPQConfig(weight_bits=2)
