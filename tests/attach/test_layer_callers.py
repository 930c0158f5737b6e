"""Modules that multiply by the weights of their layers without calling the layers."""

import copy

import pytest
import torch
from torchvision.models import SwinTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from cpq_lightning import CPQConfig, attach, calibrate, coverage, detach, export_model, load_quantized
from cpq_lightning.attach import loading, quantized_layers
from cpq_lightning.attach.attach import set_active
from cpq_lightning.attach.layer_callers import LayerCaller

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CONFIG = CPQConfig(weight_bits=4, act_bits=4, attention=True)
SECOND = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}


def swin(version):
    torch.manual_seed(0)
    settings = SECOND if version == 2 else {}
    return SwinTransformer(
        [4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=10, stochastic_depth_prob=0.0, **settings
    ).eval()


def quantized(version):
    return calibrate(attach(swin(version), CONFIG, example_inputs=IMAGES), [IMAGES])


@pytest.mark.parametrize("version", [1, 2])
def test_the_layers_are_called_and_everything_is_quantized(version):
    model = quantized(version)
    assert coverage(model, example_inputs=IMAGES).macs == 1
    model.train()(IMAGES).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    set_active(model.eval(), False)
    # The second version sets a part of the bias to zero, which is another order of two sums.
    torch.testing.assert_close(model(IMAGES), swin(version)(IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_a_packed_file_calls_the_layers_too(version, tmp_path):
    model = quantized(version).eval()
    written = export_model(model, tmp_path, samples=torch.randn(8, 3, 32, 32))
    assert written.verification.largest_difference == 0
    with torch.no_grad():
        assert load_quantized(written.path, swin(version))(IMAGES).equal(model(IMAGES))


def test_copies_states_and_the_plain_model_again():
    model = quantized(1)
    expected = model(IMAGES)
    with loading():
        fresh = swin(1)
        fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), fresh):
        assert other(IMAGES).equal(expected)
    assert any(isinstance(m, LayerCaller) for m in fresh.modules())
    detach(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in swin(1).modules()]


def test_what_is_left_out_is_read_as_before():
    model = attach(swin(1), CPQConfig(ignore=["*.attn.*"]))
    assert not any(isinstance(m, LayerCaller) for m in model.modules())
    model = attach(swin(1), CPQConfig(ignore=["*.attn.qkv"]))
    assert not any(name.endswith("qkv") for name, _ in quantized_layers(model))
    calibrate(model, [IMAGES])(IMAGES)
    assert model.features[1][0].attn.proj.input_quantizer.fitted
