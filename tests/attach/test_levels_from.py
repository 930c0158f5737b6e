"""Widths read from a file."""

import copy
import json

import pytest
import torch

from cpq_lightning import CPQConfig, QuantizedModule, attach, levels
from cpq_lightning.attach.attach import quantized_layers
from cpq_lightning.bitwidth.model_cost import mean_width
from cpq_lightning.report.levels import write_levels
from tests.models import IMAGES, convnet

WIDTHS = {"0": (8, 8), "3": (3, 4), "6": (8, 8)}


@pytest.fixture
def file(tmp_path):
    model = attach(convnet(), CPQConfig(weight_bits=3, act_bits=4))
    return write_levels(model, tmp_path / "levels.json")


def widths(model):
    return {name: (layer.weight_quantizer.bits, layer.input_quantizer.bits) for name, layer in quantized_layers(model)}


def test_every_layer_takes_its_widths_from_the_file(file):
    model = attach(convnet(), CPQConfig(weight_bits=6, act_bits=6, first_last_bits=4, levels_from=str(file)))
    assert widths(model) == WIDTHS
    assert mean_width(model, "weight") == 3
    model.train()(IMAGES).sum().backward()


def test_widths_of_channels_are_read_too(file, tmp_path):
    source = convnet()
    config = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, act_bits=4, gate_sharing="channel")
    attach(source, config)
    source[3].weight_quantizer.fix_widths([2, 3, 4, 5, 2, 2, 2, 8])
    path = write_levels(source, tmp_path / "channels.json")
    model = attach(convnet(), CPQConfig(act_bits=4, levels_from=str(path)))
    assert model[3].weight_quantizer.decided_widths().tolist() == [2, 3, 4, 5, 2, 2, 2, 8]
    assert mean_width(model, "weight") == mean_width(source, "weight") == 3.5
    model.train()(IMAGES)
    assert [r.bits for r in levels(model)] == [r.bits for r in levels(source)]


def test_widths_of_channels_that_are_not_there_are_refused(file):
    content = json.loads(file.read_text())
    content["layers"][1]["weight"]["bits"] = [2, 3, 4]
    file.write_text(json.dumps(content))
    model = convnet()
    with pytest.raises(ValueError, match=r"layer '3' has 3 widths, one a channel, and 8 channels"):
        attach(model, CPQConfig(levels_from=str(file)))
    assert not any("quantizer" in name for name, _ in model.named_modules())


def test_a_module_s_checkpoint_needs_the_file_no_more(tmp_path):
    def build(**settings):
        return QuantizedModule("test_resnet", num_classes=4, quantization=CPQConfig(act_bits=None, **settings))

    path = write_levels(build(weight_bits=3), tmp_path / "levels.json")
    module = build(levels_from=str(path))
    path.unlink()
    again = QuantizedModule(**copy.deepcopy(dict(module.hparams)))
    again.load_state_dict(module.state_dict())
    assert [r.bits for r in levels(again)] == [r.bits for r in levels(module)]
    assert mean_width(again, "weight") == 3


def test_levels_of_another_network_are_refused(file):
    before = convnet()
    state = copy.deepcopy(before.state_dict())
    with pytest.raises(ValueError, match="1 of it are not here, such as '6'"):
        attach(before[:5], CPQConfig(levels_from=str(file)))
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())
    deeper = convnet().append(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="1 of these are not in it"):
        attach(deeper, CPQConfig(levels_from=str(file)))


@pytest.mark.parametrize(("content", "words"), [(None, "cannot be read"), ("{", "not JSON"), ("{}", "no levels.json")])
def test_what_is_no_levels_file_is_refused(tmp_path, content, words):
    path = tmp_path / "levels.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"levels_from.*{words}"):
        attach(convnet(), CPQConfig(levels_from=str(path)))
