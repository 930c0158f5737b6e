"""What a target needs is checked when a model is attached."""

import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate
from cpq_lightning.attach.layers import quantizers

X = torch.randn(64, 16)


def net():
    return nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.mark.parametrize("act_bits", [4, 8])
def test_tensorrt_gets_grids_that_signed_bytes_hold(act_bits):
    model = calibrate(attach(net(), CPQConfig(act_bits=act_bits, deploy="tensorrt")), [X])
    for _, q in quantizers(model):
        if q.kind == "activation":
            assert q.zero_point == 2 ** (q.bits - 1) or (q.zero_point == 0 and q.bits <= 7)
    behind_relu = model[4].input_quantizer
    assert behind_relu.bits == 8
    assert behind_relu.zero_point == 128


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"act_grid": "offset"}, "0, 2, 4"),
        ({"act_grid": "unsigned"}, "0, 4"),
        ({"overrides": {"2": {"act_grid": "offset"}}}, "2"),
    ],
)
def test_other_grids_are_refused_for_tensorrt_by_name(settings, names):
    with pytest.raises(ValueError, match=f"deploy='tensorrt' needs .* get others: {names}\\. Leave act_grid"):
        attach(net(), CPQConfig(deploy="tensorrt", **settings))


def test_qonnx_has_one_width_for_each_tensor():
    config = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, gate_sharing="channel", deploy="qonnx")
    with pytest.raises(ValueError, match="deploy='qonnx' needs one width"):
        attach(net(), config)
    attach(net(), CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, deploy="qonnx"))


@pytest.mark.parametrize("deploy", ["tensorrt", "qonnx"])
def test_groups_of_inputs_are_refused_where_products_are_integer(deploy):
    with pytest.raises(ValueError, match=rf"deploy='{deploy}' .* each group of inputs: 2, 4\. Set group_size=None"):
        attach(net(), CPQConfig(deploy=deploy, group_size=16))
    attach(net(), CPQConfig(deploy=deploy, group_size=32))


def test_a_refused_model_stays_as_it_was():
    model = net()
    with pytest.raises(ValueError, match="deploy"):
        attach(model, CPQConfig(deploy="tensorrt", act_grid="offset"))
    assert not list(quantizers(model))
    assert type(model[0]) is nn.Linear


def test_a_target_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="deploy must be one of"):
        CPQConfig(deploy="executorch")
