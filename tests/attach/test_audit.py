import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate
from cpq_lightning.attach.audit import Audit, unaudited
from tests.models import convnet, with_own_forward


class Direct(nn.Module):
    """Calls F.linear on a layer's weight instead of the layer, as the attention of timm's BEiT does."""

    def __init__(self):
        super().__init__()
        self.first, self.fc, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(F.linear(self.first(x).relu(), self.fc.weight))


class Bare(nn.Module):
    """A product with a Parameter that no layer owns."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return F.linear(self.fc(x), self.table)


def test_a_weight_that_is_read_and_a_layer_that_is_not_called_are_named():
    with pytest.warns(UserWarning, match="quantizers") as caught:
        calibrate(attach(Direct()), [torch.randn(2, 4)])
    messages = [str(w.message) for w in caught]
    never = "2 quantizers were never called"
    assert any(never in m and "fc.weight_quantizer, fc.input_quantizer" in m for m in messages)
    assert any("the model itself (linear by fc.weight: input and weight)" in m for m in messages)


def test_a_weight_outside_of_layers_is_named():
    with pytest.warns(UserWarning, match=r"1 matrix products.*the model itself \(linear: input and weight\)"):
        calibrate(attach(Bare()), [torch.randn(2, 4)])


def test_a_quiet_model_says_nothing_and_its_order_is_known():
    model = attach(convnet())
    with warnings.catch_warnings(), Audit(model) as audit:
        warnings.simplefilter("error")
        model(torch.randn(2, 3, 8, 8))
    assert audit.report.messages() == []
    assert audit.report.execution_order == ["0", "3", "6"]


def test_layers_left_out_by_the_config_are_not_reported():
    model = attach(convnet(), CPQConfig(ignore=["3"]))
    with Audit(model) as audit:
        model(torch.randn(2, 3, 8, 8))
    assert audit.report.unquantized == []


def test_products_of_activations_are_known():
    model = attach(timm.create_model("test_vit", num_classes=2))
    with Audit(model) as audit:
        model(torch.randn(1, 3, *model.default_cfg["input_size"][1:]))
    assert len(audit.report.activation_products) == len(model.blocks)
    assert audit.report.unquantized == []


def test_the_first_forward_of_an_attached_model_is_audited_once():
    model = attach(Direct())
    with pytest.warns(UserWarning, match="never called"):
        model(torch.randn(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4))


def test_what_is_no_part_of_a_model_is_not_audited_and_what_follows_is():
    model, other = attach(Direct()), Direct()
    with Audit(model) as audit:
        with unaudited():
            other(torch.randn(2, 4))
        assert audit.report.unquantized == []
        model(torch.randn(2, 4))
    assert [operation for _, operation, *_ in audit.report.unquantized] == ["linear"]


def test_a_forward_that_raises_leaves_no_mode_behind():
    model = attach(convnet())
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 8, 8))
    assert not torch.overrides._get_current_function_mode_stack()
    model(torch.randn(2, 3, 8, 8))


class ByHand(nn.Module):
    """Products with Parameters and weights that no layer's call stands for."""

    def __init__(self):
        super().__init__()
        self.fc, self.query = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 1))
        self.rnn = with_own_forward(nn.GRU)(4, 4)
        self.attention = with_own_forward(nn.MultiheadAttention)(4, 2)
        self.fixed = nn.Buffer(torch.randn(4, 4))

    def forward(self, x):
        x = self.fc(x)
        x = x * (x @ self.query.view(4, 1)) + x @ self.fixed
        x, _ = self.rnn(x)
        x, _ = self.attention(x, x, x)
        return F.linear(x @ self.fc.weight.T, self.fc.weight)


def test_products_with_parameters_are_named_apart_from_those_of_activations():
    net = attach(ByHand())
    with Audit(net) as audit:
        net(torch.randn(3, 2, 4))
    assert audit.report.unquantized == [
        ("", "matmul", "input and weight"),
        ("rnn", "gru", "input and weight"),
        ("attention", "multi_head_attention_forward", "input and weight"),
        # What a weight has been multiplied by is no weight.
        ("", "linear", "input and weight"),
    ]
    assert audit.report.activation_products == [("", "matmul")]


def test_a_layer_that_is_left_out_and_standardizes_its_weight_is_not_named():
    conv = timm.layers.StdConv2d(3, 4, 3)
    net = attach(nn.Sequential(nn.Conv2d(3, 3, 3), conv), CPQConfig(ignore=("StdConv2d",)))
    calibrate(net, [torch.randn(2, 3, 8, 8)])
    with Audit(net) as audit:
        net(torch.randn(2, 3, 8, 8))
    assert audit.report.unquantized == []
