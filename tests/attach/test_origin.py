"""Layers that come, and weights that are rewritten, behind attach: named everywhere, exported nowhere."""

import copy
import dataclasses
import json
import pickle

import lightning.pytorch as pl
import pytest
import torch
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.utils.model import reparameterize_model
from torch import nn

from cpq_lightning import (
    CPQCallback,
    CPQConfig,
    QuantizedModule,
    attach,
    calibrate,
    detach,
    export_model,
    levels,
    loading,
)
from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.attach.origin import attached_config, full_precision_layers, late_layers
from cpq_lightning.attach.range_tracking import refit_rewritten
from cpq_lightning.report.levels import manifest
from cpq_lightning.report.table import levels_table
from tests.models import IMAGES, Classifier, convnet, with_own_forward

CONFIG = CPQConfig(weight_bits=4, overrides={"3": {"weight_bits": 3}})


def rep_vgg():
    torch.manual_seed(0)
    block = ByoBlockCfg(type="rep", d=1, c=8, s=1, gs=0)
    return ByobNet(ByoModelCfg(blocks=(block, block), stem_type="rep", stem_chs=8), num_classes=4)


def quantized(config=CONFIG, net=convnet):
    torch.manual_seed(0)
    return calibrate(attach(net(), config), [IMAGES]).eval()


@pytest.mark.parametrize("format", ["packed", "onnx", "torch"])
def test_a_network_that_is_reparameterized_behind_attach_is_not_exported(format, tmp_path):
    model = reparameterize_model(quantized(CPQConfig(), rep_vgg)).eval()
    with pytest.raises(ValueError, match=r"3 layers of ByobNet .*stem\.reparam_conv, .*Do that before attach") as error:
        export_model(model, tmp_path, samples=IMAGES, format=format)
    assert "attach(model, config) again" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_came_behind_attach_is_named_by_levels_and_manifest():
    model = quantized()
    model[3] = nn.Conv2d(8, 8, 3, stride=2, padding=1)
    with pytest.warns(UserWarning, match=r"1 layers of Sequential are in full precision.*: 3\."):
        assert {record.name for record in levels(model)} == {"0", "6"}
    content = manifest(model)
    assert content["full_precision"] == [{"name": "3", "type": "Conv2d", "numel": 576, "late": True}]
    assert "in full precision: 3 (Conv2d)" in str(levels_table(content).caption)


def test_attached_again_the_new_layers_are_quantized_and_the_others_stay(tmp_path):
    model = quantized()
    model[6] = nn.Linear(128, 4)
    before = {name: q.state.clone() for name, q in quantizers(model)}
    kept = dict(quantizers(model))
    assert attach(model) is model
    after = dict(quantizers(model))
    assert all(after[name] is kept[name] and after[name].state.equal(before[name]) for name in kept)
    assert set(after) - set(kept) == {"6.weight_quantizer", "6.input_quantizer"}
    assert len({q.settings.key for q in after.values()}) == len(after)
    assert after["6.weight_quantizer"].bits == 8
    assert attached_config(model) == CONFIG
    assert not late_layers(model)
    calibrate(model, [IMAGES])
    assert export_model(model.eval(), tmp_path, samples=IMAGES).verification.weights == 3


def test_attached_again_quantization_begins_with_the_others():
    model = quantized()
    for _, q in quantizers(model):
        q.configure(active=False)
    model[3] = nn.Conv2d(8, 8, 3, stride=2, padding=1)
    attach(model)
    assert not any(q.active for _, q in quantizers(model))


def test_new_layers_may_have_settings_of_their_own_or_be_left_out(tmp_path):
    model = quantized(CPQConfig())
    model.append(nn.Linear(4, 4))
    model[3] = nn.Conv2d(8, 8, 3, stride=2, padding=1)
    config = CPQConfig(overrides={"3": {"weight_bits": 2}}, ignore=["7"])
    attach(model, config)
    assert model[3].weight_quantizer.bits == 2
    assert attached_config(model) == config
    assert [name for name, _ in quantized_layers(model)] == ["0", "3", "6"]
    calibrate(model, [IMAGES])
    assert not full_precision_layers(model)
    export_model(model, tmp_path, samples=IMAGES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CPQConfig(weight_bits=6), "weight_bits 6 instead of 4"),
        (CPQConfig(ignore=["0"]), "would change what is quantized already, such as '0'"),
        (CPQConfig(overrides={"0": {"act_bits": 2}}), "would change what is quantized already, such as '0'"),
        (CPQConfig(ignore=["nothing"]), "matches no layer"),
    ],
)
def test_what_is_quantized_already_keeps_its_settings(config, message):
    model = quantized(CPQConfig())
    model[3] = nn.Conv2d(8, 8, 3)
    with pytest.raises(ValueError, match=message):
        attach(model, config)
    assert [name for name, _ in quantized_layers(model)] == ["0", "6"]
    assert attached_config(model) == CPQConfig()


def test_where_attaching_again_fails_the_model_is_left_as_it_was():
    model = quantized()
    model[3] = nn.Conv2d(8, 8, 3, stride=2, padding=1)
    with torch.no_grad():
        model[3].weight.fill_(torch.nan)
    before = model[0].weight_quantizer
    with pytest.raises(ValueError, match="NaN or infinite"):
        attach(model)
    assert type(model[3]) is nn.Conv2d
    assert model[0].weight_quantizer is before
    with pytest.raises(ValueError, match="quantized already: call detach"):
        attach(quantized())


class Framed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.net(x))


def test_the_config_survives_where_the_model_is_built_anew():
    model = quantized(CPQConfig(ignore=["6"]))
    for other in (torch.fx.symbolic_trace(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert attached_config(other) == CPQConfig(ignore=["6"])
        assert not late_layers(other)
        other.add_module("3", nn.Conv2d(8, 8, 3))
        assert list(late_layers(other)) == ["3"]


def test_the_config_survives_what_is_put_around_a_part():
    model = attach(Framed(convnet()), CPQConfig(ignore=["net.0"]))
    model.net = torch.compile(model.net, backend="eager")
    assert attached_config(model) == CPQConfig(ignore=["net.0"])
    assert not late_layers(model)
    model.head = nn.Linear(4, 4)
    assert list(late_layers(model)) == ["head"]


def test_names_are_those_at_attachment_in_parts_and_within_others():
    model = attach(Framed(convnet()), CPQConfig(ignore=["net.0", "head"]))
    part = model.net
    assert attached_config(part) is None
    assert not late_layers(part)
    part[3] = nn.Conv2d(8, 8, 3)
    assert list(late_layers(part)) == ["3"]
    around = nn.Sequential(nn.Linear(2, 2), model)
    # Nobody has asked to quantize what is outside.
    assert list(late_layers(around)) == ["1.net.3"]


def test_layers_outside_of_the_part_that_was_attached_are_nobodys_fault(tmp_path):
    model = Framed(attach(convnet()))
    calibrate(model, [IMAGES])
    assert not full_precision_layers(model)
    export_model(model.eval(), tmp_path, samples=IMAGES)
    with pytest.raises(ValueError, match="by which config is not known"):
        attach(model)
    attach(model, CPQConfig())
    assert [name for name, _ in quantized_layers(model)][-1] == "head"


def test_what_comes_behind_a_loaded_state_is_named_too(tmp_path):
    state = quantized(CPQConfig(ignore=["0"])).state_dict()
    with loading():
        model = convnet()
        model.load_state_dict(state)
    assert not late_layers(model)
    model[3] = nn.Conv2d(8, 8, 3, stride=2, padding=1)
    with pytest.raises(ValueError, match=r"full precision.*: 3\."):
        export_model(model.eval(), tmp_path, samples=IMAGES)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.front, self.rnn, self.head = nn.Linear(3, 4), with_own_forward(nn.LSTM)(4, 5), nn.Linear(5, 2)
        self.norm, self.table = nn.LayerNorm([4, 3]), nn.Embedding(3, 4)

    def forward(self, x):
        return self.head(self.rnn(self.front(x))[0])


def test_layers_that_nothing_quantizes_are_named_and_exported(tmp_path, caplog):
    x = torch.randn(4, 2, 3)
    with pytest.warns(UserWarning, match=r"stayed unquantized.*rnn \(lstm"):
        model = calibrate(attach(Recurrent()), [x]).eval()
    with pytest.warns(UserWarning, match=r"weights of 1 layers that nothing quantizes.*: rnn \(Own\)"):
        levels(model)
    assert manifest(model)["full_precision"] == [{"name": "rnn", "type": "Own", "numel": 180, "late": False}]
    assert export_model(model, tmp_path, samples=x).full_precision == ("rnn (Own)",)
    assert "rnn (Own)" in caplog.text
    assert not full_precision_layers(detach(model))


# Lightning ------------------------------------------------------------------------------------------------------------


def test_a_head_that_is_replaced_before_a_fit_is_quantized_with_it(fit):
    module = QuantizedModule(convnet(), num_classes=4, quantization=CPQConfig(weight_bits=3))
    module.model[6] = nn.Linear(128, 4)
    with pytest.warns(UserWarning, match=r"1 layers were added since.*: model\.6\."):
        fit(module, [CPQCallback(table=False)], max_epochs=1)
    assert not late_layers(module)
    assert attached_config(module).weight_bits == 3


class Replacing(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        pl_module.net[3] = nn.Conv2d(8, 8, 3, stride=2, padding=1)


def test_the_end_of_a_fit_names_what_came_within_it(fit, tmp_path):
    with pytest.warns(UserWarning, match="could not be written") as caught:
        fit(Classifier(), [Replacing(), CPQCallback(table=False, export=["packed"])], max_epochs=1)
    messages = [str(warning.message) for warning in caught]
    assert any("in full precision, though its config would quantize them: net.3." in m for m in messages)
    assert any("The packed file could not be written" in m and "attach(model, config) again" in m for m in messages)
    (content,) = (json.loads(path.read_text()) for path in tmp_path.rglob("levels.json"))
    assert [layer["name"] for layer in content["full_precision"]] == ["net.3"]
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == {"samples.safetensors"}


# Weights behind their ranges ------------------------------------------------------------------------------------------


def _folded(model):
    with torch.no_grad():
        model[3].weight.mul_(torch.linspace(0.1, 8, 8)[:, None, None, None])


def _loaded(model):
    with torch.no_grad():
        model[3].load_state_dict({"weight": model[3].weight * 30, "bias": model[3].bias}, strict=False)


def _fused(model):
    norm = nn.BatchNorm2d(8).eval()
    nn.init.constant_(norm.running_var, 1e-4)
    model[3] = nn.utils.fusion.fuse_conv_bn_eval(model[3], norm)


@pytest.mark.parametrize("rewrite", [_folded, _fused])
def test_a_weight_that_is_rewritten_behind_its_range_is_not_exported(rewrite, tmp_path):
    model = quantized()
    rewrite(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"weights of 1 layers have been rewritten.*: 3\..*Call calibrate") as error:
        export_model(model, tmp_path, samples=IMAGES)
    assert "refit_rewritten(model)" in str(error.value)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    alone = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="fitted again: 3"):
        assert refit_rewritten(alone) == ["3"]
    export_model(alone, tmp_path, samples=IMAGES, name="alone")
    calibrate(model, [IMAGES])
    export_model(model.eval(), tmp_path, samples=IMAGES)


def test_full_precision_weights_of_one_layer_ask_for_calibration(tmp_path):
    model = quantized()
    with pytest.warns(UserWarning, match="ranges of the quantizers are not known any more"):
        _loaded(model)
    with pytest.raises(RuntimeError, match="call calibrate"):
        model(IMAGES)


def test_a_loop_that_ends_behind_a_large_update_is_exported_with_a_warning(tmp_path):
    model = quantized().train()
    model(IMAGES).sum().backward()
    with torch.no_grad():
        # What an update at a large rate does.
        model[3].weight.mul_(20)
    with pytest.warns(UserWarning, match="fitted again: 3"):
        export_model(model.eval(), tmp_path, samples=IMAGES)
    assert dataclasses.asdict(levels(model)[2])["relative_error"] < 0.05
