"""Evaluation is the network that trains: the same quantizers, with and without gradients, in both modes."""

import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, detach, load_quantized
from cpq_lightning.attach.audit import Audit
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.export.packed import write_packed

TOKENS = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(3))


def _layer(**settings):
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **settings)


ENCODERS = {
    "a layer": _layer,
    "gelu, norm first": lambda: _layer(activation="gelu", norm_first=True),
    "an encoder": lambda: nn.TransformerEncoder(_layer(), 2, enable_nested_tensor=True),
    "an encoder with padding": lambda: Padded(),
    "attention alone": lambda: Alone(),
}


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(_layer(), 2, enable_nested_tensor=True)

    def forward(self, x):
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        mask[:, 3:] = True
        return self.encoder(x, src_key_padding_mask=mask)[:, :3]


class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def encoder(name, config=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), ENCODERS[name](), nn.Linear(8, 4))
    return model, CPQConfig(act_bits=2, weight_bits=3) if config is None else config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ENCODERS)
def test_every_way_to_call_an_encoder_is_quantized_alike(name):
    model, config = encoder(name)
    plain = model.eval()(TOKENS)
    calibrate(attach(model, config), [TOKENS])
    outputs = [model.train()(TOKENS), model.eval()(TOKENS)]
    with torch.no_grad():
        outputs.append(model(TOKENS))
    with torch.inference_mode():
        outputs.append(model(TOKENS).clone())
    assert not torch.allclose(outputs[0], plain, atol=1e-3)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ENCODERS)
def test_what_ships_is_the_encoder_that_was_trained(name, tmp_path):
    model, config = encoder(name)
    calibrate(attach(model, config), [TOKENS]).eval()
    path = write_packed(model, tmp_path / "encoder.safetensors")
    plain, _ = encoder(name)
    with torch.no_grad():
        torch.testing.assert_close(load_quantized(path, plain)(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_attention_multiplies_by_its_output_projection_quantized():
    model, config = encoder("attention alone", CPQConfig(weight_bits=2, act_bits=None, first_last_bits=None))
    model = calibrate(attach(model, config), [TOKENS])
    attention = model[1].attention
    seen = []
    handle = attention.out_proj.weight_quantizer.register_forward_hook(lambda q, args, out: seen.append(out))
    model.eval()(TOKENS)
    handle.remove()
    assert len(seen) == 1
    assert all(len(channel.unique()) <= 4 for channel in seen[0])
    assert attention.out_proj.weight.unique().numel() > 4


@pytest.mark.filterwarnings("ignore")
def test_detach_gives_the_fused_path_back():
    model, config = encoder("an encoder")
    before = (model[1].use_nested_tensor, model[1].layers[0].activation_relu_or_gelu)
    assert all(before)
    calibrate(attach(model, config), [TOKENS])
    assert not any((model[1].use_nested_tensor, model[1].layers[0].activation_relu_or_gelu))
    detach(model)
    assert (model[1].use_nested_tensor, model[1].layers[0].activation_relu_or_gelu) == before
    assert type(model[1].layers[0].self_attn) is nn.MultiheadAttention


class SecondWay(nn.Module):
    """Evaluation goes another way than training."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = self.second(self.first(x))
        return self.third(x) if self.training else nn.functional.linear(x, self.third.weight)


def test_the_first_forward_in_evaluation_is_audited_too():
    model = calibrate(attach(SecondWay()), [TOKENS])
    with pytest.warns(UserWarning, match=r"first forward in evaluation.*linear by third.weight: input and weight"):
        model.eval()(TOKENS)
    with Audit(model) as audit:
        model(TOKENS)
    assert audit.report.unquantized == [("", "linear", "input and weight")]


def test_averages_and_modes_share_one_quantizer():
    model = calibrate(attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))), [TOKENS])
    assert model.train()(TOKENS).equal(model.eval()(TOKENS))
    with torch.no_grad():
        assert model(TOKENS).equal(model.train()(TOKENS))
    assert len(dict(quantizers(model))) == 4
