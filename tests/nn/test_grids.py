"""Grids of quantizers: offsets of inputs, balanced weights, and weights whose zeros mean something."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from cpq_lightning import CPQConfig, attach, calibrate, levels
from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.attach.range_tracking import RangeTracker, refit_rewritten, rewritten_weights
from cpq_lightning.errors import ExportError
from cpq_lightning.export.integer_model import check_exportable
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.scale_init import has_meaningful_zeros


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 4))


X = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))


def quantized(**settings):
    return calibrate(attach(net(), CPQConfig(first_last_bits=None, **settings)), [X])


def weight_quantizer(weight, **settings):
    q = Quantizer("weight", CPQConfig(**settings), numel=weight.numel(), channels=len(weight))
    q.fit_weight(weight)
    return q


def test_inputs_with_a_short_negative_tail_get_an_offset_and_less_error():
    model, signed = quantized(act_bits=4), quantized(act_bits=4, act_grid="signed")
    x = F.silu(net()[0](X))
    errors = []
    for each in (model, signed):
        q = each[2].input_quantizer
        errors.append(float((q(x) - x).square().sum()))
        assert q(torch.zeros(2, 3)).eq(0).all()
    assert 0 < model[2].input_quantizer.zero_point < 8
    assert errors[0] < 0.6 * errors[1]


LEARNED = {"act_bits": 8, "learn_act_bits": True, "min_act_bits": 2, "weight_bits": 8, "min_bits": 2}


def test_each_learned_width_has_its_zero_point():
    model = quantized(**LEARNED)
    settings = model[2].input_quantizer.settings
    zero_points = [settings.zero_point(bits) for bits in range(2, 9)]
    assert zero_points == sorted(zero_points)
    assert 0 <= zero_points[0] <= 1 < zero_points[-1] < 128
    for bits in (2, 5, 8):
        q = quantized(**LEARNED)[2].input_quantizer.eval()
        q.fix_widths([bits])
        _, low, high = q.grid()
        assert (-low.item(), high - low) == (settings.zero_point(bits), 2**bits - 1)
        levels_ = (q(F.silu(X)) / q.grid()[0]).detach()
        assert levels_.min() >= low - 1e-3


def test_a_weight_of_one_bit_has_two_levels_of_one_size():
    weight = torch.randn(8, 20)
    q = weight_quantizer(weight, weight_bits=1)
    out = q(weight).detach()
    # The least squared error of two levels is at the mean of absolute values.
    torch.testing.assert_close(out, weight.sign() * weight.abs().mean(1, keepdim=True), rtol=2e-3, atol=0)


@pytest.mark.parametrize(("bits", "expected"), [(1, 0.5), (2, 1.5), (4, 7.5), (7, 63.5), (8, 128)])
def test_balanced_weights_of_up_to_seven_bits(bits, expected):
    weight = torch.randn(8, 20)
    q = weight_quantizer(weight, weight_bits=bits, weight_grid="balanced")
    assert q.zero_point == expected
    assert bits == 8 or q.levels(-weight).eq(-q.levels(weight)).all()


@pytest.mark.parametrize(("nesting", "expected"), [("range", {0.5}), ("resolution", {0, 0.5})])
def test_widths_by_range_share_a_kind_of_grid_and_by_resolution_have_their_own(nesting, expected):
    weight = torch.randn(8, 20)
    q = weight_quantizer(weight, weight_bits=4, min_bits=1, nesting=nesting)
    assert {q.settings.zero_point(bits) % 1 for bits in range(1, 5)} == expected
    assert q.settings.zero_point(1) == 0.5


MEANING = {
    "pruned": lambda w: w.mul_(torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) > 0.3),
    "a row": lambda w: w[2].zero_(),
    "one of twenty": lambda w: w[0, 0].zero_(),
}


@pytest.mark.parametrize("change", MEANING)
@pytest.mark.parametrize("bits", [1, 2])
def test_zeros_that_mean_something_stay_zero(change, bits):
    weight = torch.randn(8, 20)
    MEANING[change](weight)
    q = weight_quantizer(weight, weight_bits=bits, weight_grid="balanced")
    assert q.zero_point == 2 ** (bits - 1)
    assert q(weight)[weight == 0].eq(0).all()


@pytest.mark.parametrize("dim", [0, 1])
def test_a_row_or_a_column_of_zeros_means_something_however_few_they_are(dim):
    weight = torch.randn(2000, 1500, 1, 1)
    assert not has_meaningful_zeros(weight)
    weight.select(dim, 7).zero_()
    assert has_meaningful_zeros(weight)


def test_a_zero_among_many_means_nothing():
    weight = torch.randn(100, 100)
    weight[3, 4] = 0
    assert not has_meaningful_zeros(weight)


@pytest.mark.parametrize("bits", [1, 2])
def test_a_layer_that_is_pruned_in_training_keeps_its_sparsity(bits):
    model = quantized(weight_bits=bits, weight_grid="balanced")
    layer = dict(quantized_layers(model))["2"]
    assert layer.weight_quantizer.zero_point % 1 == 0.5
    prune.random_unstructured(layer, "weight", 0.5)
    assert "2" in rewritten_weights(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    tracker = RangeTracker(model, [optimizer])
    tracker.before_batch(0)
    model.train()(X).square().sum().backward()
    optimizer.step()
    assert any("2" in name for name in tracker.after_step(0))
    model.eval()(X)
    quantized_weight = layer.weight_quantizer(layer.weight)
    assert layer.weight_quantizer.zero_point % 1 == 0
    assert quantized_weight[layer.weight_mask == 0].eq(0).all()
    [record] = [r for r in levels(model) if (r.name, r.kind) == ("2", "weight")]
    assert record.low == -(2 ** (bits - 1))


def test_zeros_that_only_the_forward_sees_are_noticed():
    """As of a loop that masks weights before each forward: the optimizer has moved the zeros when a step ends."""
    model = quantized(weight_bits=1).train()
    layer = dict(quantized_layers(model))["2"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    tracker = RangeTracker(model, [optimizer])
    model(X)
    tracker.before_batch(0)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    # Without a level 0, all weights have a gradient; in the model's forward its own hooks would see the zeros.
    layer(X[:, :1].expand(-1, 32)).square().sum().backward()
    optimizer.step()
    assert layer.weight.ne(0).all()
    assert layer.weight_quantizer.zero_point == 0.5
    assert "2.weight_quantizer" in tracker.after_step(0)
    assert layer.weight_quantizer.zero_point == 1


def test_an_export_tells_of_zeros_without_a_level_and_of_the_remedy():
    model = quantized(weight_bits=1)
    layer = dict(quantized_layers(model))["2"]
    with torch.no_grad():
        layer.weight[:, :5] = 0
    with pytest.raises(ExportError, match=r"1 layers have zeros.*no level 0.*: 2\."):
        check_exportable(model)
    with pytest.warns(UserWarning, match="have zeros, as after pruning"):
        assert refit_rewritten(model) == ["2"]
    check_exportable(model)
    assert layer.weight_quantizer(layer.weight)[:, :5].eq(0).all()


def test_a_weight_that_is_still_zero_passes_and_then_gets_its_grid():
    """As LoRA's B: the adapter is nothing until training makes it something."""
    layer = nn.Linear(16, 4, bias=False)
    nn.init.zeros_(layer.weight)
    model = calibrate(attach(nn.Sequential(layer), CPQConfig(weight_bits=1, first_last_bits=None)), [X])
    assert model(X).eq(0).all()
    with torch.no_grad():
        layer.weight.normal_()
    model.train()(X)
    assert layer.weight_quantizer.zero_point == 0.5


def test_levels_of_a_balanced_grid_are_reported_as_they_are():
    model = quantized(weight_bits=2, weight_grid="balanced")
    [record] = [r for r in levels(model) if (r.name, r.kind) == ("2", "weight")]
    assert (record.low, record.high, record.zero_point, record.used_levels) == (-1.5, 1.5, 1.5, 4)
    assert len(record.level_shares) == 4
    assert sum(record.level_shares) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", ["weight", "activation"])
@pytest.mark.parametrize("bits", [8, 5, 2, 1])
def test_another_width_keeps_the_range_until_it_is_fitted(kind, bits):
    q = Quantizer(kind, CPQConfig(weight_bits=4, act_bits=4), numel=320, channels=1)
    x = torch.randn(16, 20) if kind == "weight" else F.silu(torch.randn(16, 20))
    q(x)
    low, high = (bound * q.scale().item() for bound in q.level_bounds)
    q.set_width(bits)
    assert q.bits == bits
    new_low, new_high = (bound * q.scale().item() for bound in q.level_bounds)
    assert new_high - new_low == pytest.approx(high - low, rel=0.6)
    assert abs(new_low - low) <= q.scale().item()


def test_copies_of_a_model_follow_a_new_grid():
    model, other = quantized(act_bits=4), quantized(act_bits=4, act_grid="signed")
    other.load_state_dict(model.state_dict())
    for (_, a), (_, b) in zip(quantizers(model), quantizers(other), strict=True):
        assert a.settings == b.settings
    assert torch.equal(model.eval()(X), other.eval()(X))
