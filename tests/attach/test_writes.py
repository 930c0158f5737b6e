"""The weight of a quantized layer is its Parameter: whoever writes to it writes to what is quantized."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.optimizer import _default_to_fused_or_foreach

from cpq_lightning import CPQConfig, attach, calibrate, detach, levels
from cpq_lightning.attach.attach import full_precision_copy
from cpq_lightning.attach.layers import quantized_layers
from tests.models import quantized_weight

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def by_hand(model, x):
    """What a quantized Sequential has to compute."""
    for layer in model:
        if hasattr(layer, "weight_quantizer"):
            x = F.linear(layer.input_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias)
        else:
            x = layer(x)
    return x


def _new_parameter(layer):
    layer.weight = nn.Parameter(torch.full_like(layer.weight, 0.25))


def _data(layer):
    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, 0.1)


def _merged_adapter(layer):
    layer.weight.data += torch.randn(8, 2) @ torch.randn(2, 8) * 0.1


def _swapped(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(8, 8)))


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def _norm_and_direction(layer):
    parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data.mul_(0.5)


WRITES = {
    "nn.init": lambda layer: nn.init.zeros_(layer.weight),
    "in place": lambda layer: layer.weight.detach().clamp_(-0.01, 0.01),
    ".data": _data,
    ".data, in place": _merged_adapter,
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "a new Parameter": _new_parameter,
    "swap_tensors": _swapped,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "a parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Half()),
    "one of two tensors": _norm_and_direction,
    "an old parametrization": lambda layer: nn.utils.spectral_norm(layer),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_counts(name, trained):
    model = calibrate(attach(net()), [X])
    layer = model[2]
    before = quantized_weight(layer)
    with torch.no_grad():
        WRITES[name](layer)
    model.train(trained)
    out = model(X)
    assert out.equal(by_hand(model, X))
    weight = layer.weight
    # Near what was written, to within the grid's error, and not to what was there.
    assert not quantized_weight(layer).equal(before)
    step, low, high = (value.detach().reshape(-1, 1) for value in layer.weight_quantizer.grid())
    clipped = weight.detach().clamp(low * step, high * step)
    assert ((quantized_weight(layer) - clipped).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("make", [lambda: Gain(8, 8), lambda: nn.ConvTranspose1d(8, 8, 1)], ids=["Gain", "transposed"])
def test_a_computed_weight_is_quantized_in_a_forward_that_reads_it(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), make(), nn.Linear(8 if make()._get_name() == "Gain" else 16, 2))
    parametrize.register_parametrization(model[1], "weight", Half())
    attach(model, CPQConfig(weight_bits=2, act_bits=None, first_last_bits=None, per_channel=False))
    layer, x = model[1].eval(), torch.eye(8)
    if isinstance(layer, nn.ConvTranspose1d):
        x = x[:, :, None]
    out = (layer(x) - layer(0 * x)).detach()
    assert len((out * 1e4).round().unique()) <= 4
    assert layer.weight.unique().numel() > 6


@pytest.mark.parametrize("how", ["pruning", "a parametrization", "one of two tensors", "an old parametrization"])
def test_weights_that_are_computed_before_attachment_are_quantized(how):
    model = net()
    WRITES[how](model[2])
    state = set(model.state_dict())
    calibrate(attach(model), [X])
    assert len(dict(quantized_layers(model))) == 3
    assert state <= set(model.state_dict())
    model.eval()
    assert model(X).equal(by_hand(model, X))
    model.train()(X).sum().backward()
    own = [p for n, p in model[2].named_parameters() if "quantizer" not in n]
    assert all(p.grad is not None for p in own)
    assert copy.deepcopy(model).eval()(X).equal(model.eval()(X))
    assert not dict(quantized_layers(full_precision_copy(model)))
    model.eval()
    wanted = model(X)
    for layer in (model[0], model[2], model[4]):
        layer.input_quantizer.configure(active=False)
    wanted = model(X)
    detach(model)
    torch.testing.assert_close(model(X), wanted)
    assert isinstance(model[2].weight, nn.Parameter)
    assert "weight" in dict(model[2].named_parameters())


def test_a_parametrization_comes_and_goes():
    model = calibrate(attach(net()), [X])
    parametrize.register_parametrization(model[2], "weight", nn.Identity())
    model(X)
    parametrize.remove_parametrizations(model[2], "weight")
    assert model[2].weight is dict(model.named_parameters())["2.weight"]
    assert model.eval()(X).equal(by_hand(model, X))
    early = net()
    parametrize.register_parametrization(early[2], "weight", nn.Identity())
    calibrate(attach(early), [X])
    parametrize.remove_parametrizations(early[2], "weight")
    assert len(dict(quantized_layers(early))) == 3
    assert early.eval()(X).equal(by_hand(early, X))


class MaxNorm(nn.Linear):
    """EEGNet's layers: the weight is bounded within the forward."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
        return super().forward(x)


class Gain(nn.Linear):
    """StyleGAN's equalized learning rate, and a mask; the Parameter is written to in place meanwhile."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.2, 0.2)
            self.weight[0] *= 0.5
        return F.linear(x, self.weight * 0.7, self.bias)


@pytest.mark.parametrize("layer_class", [MaxNorm, Gain])
def test_a_forward_of_its_own_writes_to_the_parameter_and_reads_it_quantized(layer_class):
    torch.manual_seed(0)
    model = attach(nn.Sequential(nn.Linear(8, 8), layer_class(8, 8), nn.Linear(8, 2)), CPQConfig(weight_bits=2))
    with torch.no_grad():
        model[1].weight.mul_(10)
    calibrate(model, [X])
    model.eval()
    layer = model[1]
    out = layer(X)
    assert layer.weight is dict(model.named_parameters())["1.weight"]
    bound = layer.weight.norm(dim=1).max() if layer_class is MaxNorm else layer.weight.abs().max()
    assert float(bound) <= 0.31
    gain = 0.7 if layer_class is Gain else 1.0
    wanted = F.linear(layer.input_quantizer(X), quantized_weight(layer) * gain, layer.bias)
    torch.testing.assert_close(out, wanted)


def test_layers_that_are_tied_after_attachment():
    model = calibrate(attach(net()), [X])
    model[0].weight = model[2].weight
    assert model[0].weight is model[2].weight
    out = model.train()(X)
    assert out.equal(by_hand(model, X))
    out.sum().backward()
    assert model[2].weight.grad is not None
    assert [name for name, _ in model.named_parameters() if name.endswith(".weight")] == ["0.weight", "4.weight"]


def test_what_looks_at_parameters_sees_parameters():
    plain, model = net(), attach(net())
    own = {n: p for n, p in model.named_parameters() if "quantizer" not in n}
    assert list(own) == [n for n, _ in plain.named_parameters()]
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all(type(value) is torch.Tensor for value in model.state_dict().values())
    parameters = list(model.parameters())
    wanted = _default_to_fused_or_foreach(list(plain.parameters()), False, True)
    assert _default_to_fused_or_foreach(parameters, False, True) == wanted
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    model(X).sum().backward()
    optimizer.step()
    torch.optim.AdamW(parameters, fused=True).step()


def test_adapters_on_a_quantized_base_merge_into_it():
    class Adapted(nn.Module):
        """As PEFT wraps a layer."""

        def __init__(self, base):
            super().__init__()
            self.base_layer = base.requires_grad_(False)
            self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return self.base_layer(x) + self.b(self.a(x))

        def merged(self):
            self.base_layer.weight.data += self.b.weight.data @ self.a.weight.data
            return self.base_layer

    model = calibrate(attach(net(), CPQConfig(weight_bits=8, act_bits=8)), [X])
    model[2] = Adapted(model[2])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()
    adapted = calibrate(model, [X]).eval()(X)
    model[2] = model[2].merged()
    calibrate(model, [X])
    assert float((model(X) - adapted).norm() / adapted.norm()) < 0.05


def test_a_model_that_is_initialized_behind_attachment_gets_ranges_of_its_own():
    for run in (lambda m: calibrate(m, [X]), lambda m: m.train()(X)):
        model = attach(net(), CPQConfig(weight_bits=8))
        for layer in (model[0], model[2], model[4]):
            nn.init.normal_(layer.weight, std=3.0)
        run(model)
        assert all(r.relative_error < 1e-3 and r.clipped < 0.01 for r in levels(model) if r.kind == "weight")
