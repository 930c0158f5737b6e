"""Checkpoints that were trained with other settings than those that are asked for: which run is said."""

import warnings

import lightning.pytorch as pl
import pytest
import torch

from cpq_lightning import CPQCallback, CPQConfig, QuantizedModule
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.attach.origin import attached_config
from tests.models import Classifier, convnet, data

TRAINED, ASKED = CPQConfig(weight_bits=4, act_bits=4), CPQConfig(weight_bits=6, act_bits=8)
BOTH = r"weight_bits 4 in the checkpoint, 6 asked for; act_bits 4 in the checkpoint, 8 asked for"


class Predicting(Classifier):
    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def trainer(*callbacks, epochs=1, folder=None):
    return pl.Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip


def callback(config):
    return CPQCallback(config, table=False, levels_file=None)


def saved(folder, module, *callbacks, weights_only=False):
    run = trainer(*callbacks, folder=folder)
    run.fit(module, data())
    run.save_checkpoint(folder / "run.ckpt", weights_only=weights_only)
    return folder / "run.ckpt"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("run"), Predicting(), callback(TRAINED))


def run(fn, module, path, *callbacks):
    arguments = {} if fn in ("fit", "predict") else {"verbose": False}
    getattr(trainer(*callbacks, epochs=2), fn)(module, data(), ckpt_path=path, **arguments)


def widths(module):
    return {name: q.bits for name, q in quantizers(module)}


@pytest.mark.parametrize("fn", ["validate", "test", "predict", "fit"])
def test_both_values_are_said_and_the_checkpoints_run(fn, ckpt):
    module = Predicting()
    with pytest.warns(UserWarning, match=BOTH):
        run(fn, module, ckpt, callback(ASKED))
    assert widths(module)["net.3.weight_quantizer"] == widths(module)["net.3.input_quantizer"] == 4
    # It is what the next checkpoint says, too.
    assert attached_config(module) == TRAINED
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(asked for|CPQCallback's config)")
        run(fn, Predicting(), ckpt, callback(TRAINED))


def test_a_checkpoint_of_weights_alone_says_its_widths(tmp_path):
    path = saved(tmp_path, Predicting(), callback(TRAINED), weights_only=True)
    with pytest.warns(UserWarning, match=r"net\.3\.weight_quantizer 4 bits, 6 asked for"):
        run("test", Predicting(), path, callback(ASKED))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    torch.manual_seed(0)
    module = QuantizedModule(convnet(), num_classes=4, quantization=TRAINED)
    return saved(tmp_path_factory.mktemp("own"), module, callback(TRAINED))


def test_a_quantized_module_says_it_once(own):
    module = QuantizedModule(convnet(), num_classes=4, quantization=ASKED)
    with pytest.warns(UserWarning, match=BOTH) as caught:
        run("test", module, own)
    assert sum("asked for" in str(warning.message) for warning in caught) == 1
    assert widths(module)["model.3.weight_quantizer"] == 4
    with pytest.warns(UserWarning, match=BOTH):
        QuantizedModule.load_from_checkpoint(own, backbone=convnet(), quantization=ASKED)


def test_a_module_that_is_quantized_already_is_no_silent_answer_to_another_config():
    module = QuantizedModule(convnet(), num_classes=4, quantization=TRAINED)
    with pytest.warns(UserWarning, match=r"quantized already and stays.*weight_bits 4 there, 6 asked for"):
        trainer(callback(ASKED)).fit(module, data())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CPQConfig(per_channel=False), "per_channel True in the state_dict, False in the model"),
        (CPQConfig(min_bits=2), "They differ in min_bits None in the checkpoint, 2 asked for"),
        (CPQConfig(weight_bits=8, min_bits=6), "weight_bits 4 in the checkpoint, 8 asked for; min_bits None in the"),
        (CPQConfig(nesting="resolution"), "nesting 'range' in the state_dict, 'resolution' in the model"),
    ],
)
def test_quantizers_of_another_kind_are_refused_by_settings(config, words, ckpt):
    with pytest.raises(RuntimeError, match=rf"{words}.*loading\(\)"):
        run("test", Predicting(), ckpt, callback(config))


def test_quantizers_that_a_checkpoint_lacks_are_refused_by_name(tmp_path):
    path = saved(tmp_path, Predicting(), callback(CPQConfig(ignore=["net.3"])))
    with pytest.raises(
        RuntimeError, match=r"nothing of 2 quantizers of Predicting, such as 'net\.3\.weight_quantizer'"
    ):
        run("test", Predicting(), path, callback(TRAINED))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CPQConfig(act_bits=None), r"in 3 modules.*act_bits 4 in the checkpoint, None asked for"),
        (
            CPQConfig(ignore=["net.3"]),
            r"in 1 modules, such as 'net\.3'.*ignore \[\] in the checkpoint, \['net\.3'\] asked",
        ),
    ],
)
def test_quantizers_that_a_module_lacks_are_refused_by_settings(config, words, ckpt):
    with pytest.raises(RuntimeError, match=f"has quantizers that Predicting lacks, {words}"):
        run("fit", Predicting(), ckpt, callback(config))


@pytest.mark.parametrize("fn", ["fit", "test"])
def test_a_full_precision_checkpoint_is_said_to_be_one(fn, tmp_path):
    path = saved(tmp_path, Predicting())
    with pytest.warns(UserWarning, match="state_dict is of a full-precision Predicting"):
        run(fn, Predicting(), path, callback(TRAINED))
