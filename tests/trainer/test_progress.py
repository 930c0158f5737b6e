"""Where a run leaves its files, and what it says of itself at its start and at its end."""

import json
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn

from cpq_lightning import CPQCallback, CPQConfig, coverage, levels
from cpq_lightning.callbacks import BitBudget, DistillationCallback
from cpq_lightning.cli.export import find_samples
from cpq_lightning.cli.main import report
from tests.models import IMAGES, Classifier, run_of

LEARNED = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True)


def quiet(**settings):
    return CPQCallback(**({"table": False} | settings))


def test_without_a_logger_each_fit_has_a_folder_of_its_own(fit, tmp_path):
    first = [quiet(config=LEARNED, quantize_from=1), BitBudget(4.0), DistillationCallback()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = fit(Classifier(), first)
    names = {"levels.json", "trajectory.csv", "teacher.pt", "samples.safetensors"}
    assert names <= {p.name for p in run_of(tmp_path).iterdir()}
    before = {p: p.read_bytes() for p in run_of(tmp_path).iterdir()}
    second = quiet()
    fit(Classifier(), [second], max_epochs=1)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(Classifier(), torch.utils.data.DataLoader(list(zip(IMAGES, torch.zeros(64).long(), strict=True)), 16))
    assert sorted(p.name for p in run_of(tmp_path).parent.iterdir()) == ["version_0", "version_1", "version_2"]
    assert second.run_folder == run_of(tmp_path, 1)
    assert all(p.read_bytes() == content for p, content in before.items())


class OnePlace(Logger):
    """A logger whose folder is the same for all runs, as that of several services is."""

    save_dir = name = version = None
    log_metrics = log_hyperparams = lambda *args, **kwargs: None

    def __init__(self, save_dir, name, version):
        self.save_dir, self.name, self.version = save_dir, name, version


def test_a_logger_that_keeps_runs_in_one_place_gets_a_folder_a_run(fit, tmp_path):
    for version in ("a", "b"):
        callback = quiet()
        fit(Classifier(), [callback], logger=OnePlace(tmp_path / "logs", "digits", version), max_epochs=1)
        assert callback.run_folder == tmp_path / "logs" / "digits" / version
        assert (callback.run_folder / "levels.json").is_file()
    callback = quiet()
    fit(Classifier(), [callback], logger=CSVLogger(tmp_path / "csv"), max_epochs=1)
    assert callback.run_folder == tmp_path / "csv" / "lightning_logs" / "version_0"


def test_a_run_that_writes_nothing_makes_no_folder(fit, tmp_path):
    fit(Classifier(), [quiet(levels_file=None)], max_epochs=1)
    fit(Classifier(), [quiet()], fast_dev_run=True)
    assert not (tmp_path / "cpq_runs").exists()


def test_samples_of_a_run_without_a_logger_are_found_from_its_checkpoint(fit, tmp_path):
    for _ in range(2):
        saving = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
        fit(Classifier(), [quiet(), saving], max_epochs=1, enable_checkpointing=True)
    folder = torch.load(saving.last_model_path, weights_only=True)["cpq_lightning"]["folder"]
    assert find_samples(saving.last_model_path, folder) == run_of(tmp_path, 1) / "samples.safetensors"


def test_coverage_is_told_at_the_start_and_at_the_end(fit, tmp_path, caplog, capsys):
    class Started(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 1:
                said.extend(text for text in caplog.messages if text.startswith("Coverage: "))

    said = []
    module, callback = Classifier(), CPQCallback(CPQConfig(ignore=["net.6"]), quantize_from=2)
    with caplog.at_level("INFO"):
        fit(module, [callback, Started()])
    (start,) = said
    assert start.endswith(f"{coverage(module).sentence('run quantized from step 2 on')}.")
    assert "in full precision: net.6 (" in start
    assert coverage(module).sentence() in " ".join(capsys.readouterr().out.split())
    content = json.loads((callback.run_folder / "levels.json").read_text())
    assert content["coverage"] == coverage(module).to_dict()


def test_a_resumed_run_tells_its_coverage_too(fit, tmp_path, caplog):
    trainer = fit(Classifier(), [quiet()], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    caplog.clear()
    module = Classifier()
    with caplog.at_level("INFO"):
        fit(module, [quiet()], ckpt_path=tmp_path / "a.ckpt")
    assert sum(text.startswith("Coverage: ") for text in caplog.messages) == 1
    assert coverage(module).macs == 1


def test_a_layer_that_only_evaluation_calls_counts_as_called(fit):
    class TwoHeads(Classifier):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(4, 4)

        def validation_step(self, batch, batch_idx):
            self.log("val_acc", (self.second(self.net(batch[0])).argmax(1) == batch[1]).float().mean())

    module = TwoHeads()
    with pytest.warns(UserWarning, match="never called"):
        fit(module, [quiet()])
    records = {(r.name, r.kind): r for r in levels(module)}
    assert records["second", "weight"].quantizing
    assert ("second", "activation") in records


def test_what_was_measured_before_quantization_is_no_result(fit, tmp_path, capsys):
    fit(Classifier(), [CPQCallback(quantize_from=4)])
    shown = capsys.readouterr().out
    assert "before quantization" in shown
    assert "at step 4" in shown
    fit(Classifier(), [quiet(quantize_from=1.0)])
    baseline = json.loads((run_of(tmp_path, 1) / "levels.json").read_text())["run"]
    assert list(baseline["metrics"]) == ["full precision"]
    report([str(tmp_path / "cpq_runs")])
    shown = capsys.readouterr().out
    assert "fp32" in shown
    assert "before quantization" not in shown


def test_a_run_in_full_precision_says_so_throughout(fit, tmp_path, caplog, capsys):
    with caplog.at_level("INFO"):
        fit(Classifier(), [quiet(quantize_from=1.0, table=True)])
    assert "would run quantized" in caplog.text
    content = json.loads((run_of(tmp_path) / "levels.json").read_text())
    totals = content["totals"]
    assert totals["weight_bits_avg"] is totals["weight_bits_avg_all"] is totals["act_bits_avg"] is None
    assert totals["size_bytes"] == totals["fp32_bytes"]
    macs = sum(layer["weight"]["macs"] for layer in content["layers"])
    assert totals["bops"] == sum(layer["weight"]["bops"] for layer in content["layers"]) == 32 * 32 * macs
    assert sum(layer["weight"]["bytes"] for layer in content["layers"]) == 4 * (3 * 8 * 9 + 8 * 8 * 9 + 128 * 4)
    shown = capsys.readouterr().out
    assert "in full precision: " in shown
    assert "times smaller" not in shown
    assert "on average" not in shown


class StopEarly(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def test_a_fit_that_ends_before_quantization_begins_says_so(fit, tmp_path):
    with pytest.warns(UserWarning, match="before quantization was to begin") as caught:
        fit(Classifier(), [quiet(quantize_from=0.5, export=["packed"]), StopEarly()], max_epochs=4)
    said = [str(warning.message) for warning in caught]
    assert any("has ended at step 4, before quantization was to begin at step 8" in message for message in said)
    (refusal,) = [message for message in said if "packed file could not be written" in message]
    assert "cpq export" not in refusal
