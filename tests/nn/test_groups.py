"""Groups of inputs with a scale each: every group is quantized like a weight of its own, complete or not."""

import copy

import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, detach, levels, loading
from cpq_lightning.attach import layers
from cpq_lightning.attach.range_tracking import RangeTracker, outgrown_weight
from cpq_lightning.errors import StateDictError
from cpq_lightning.functional.categorical import quantize
from cpq_lightning.functional.groups import from_groups, spread, to_groups
from cpq_lightning.kernels.cpu_build import use_kernels
from cpq_lightning.kernels.product import product
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.scale_init import WeightRows, fit_rows
from tests.models import quantized_weight

OUTPUTS, SIZE = 6, 4
# Complete groups, and a last one of two inputs.
INPUTS = (12, 10)
GRIDS = {"signed": {"weight_bits": 3}, "balanced": {"weight_bits": 2, "weight_grid": "balanced"}}


def weight_of(inputs):
    """Groups of very different size."""
    weight = torch.randn(OUTPUTS, inputs, generator=torch.Generator().manual_seed(0))
    return weight * spread(torch.logspace(-1, 1, OUTPUTS * 3).reshape(OUTPUTS, 3), inputs, SIZE)


def quantizer_of(weight, **settings):
    config = CPQConfig(**{"weight_bits": 3, "group_size": SIZE, **settings})
    quantizer = Quantizer("weight", config, numel=weight.numel(), channels=len(weight), inputs=weight.shape[1])
    quantizer.fit_weight(weight)
    return quantizer


def parts(weight):
    """The groups as matrices of their own, the last one without padding."""
    return [weight[:, start : start + SIZE] for start in range(0, weight.shape[1], SIZE)]


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "functional"])
def test_each_group_is_quantized_like_a_weight_of_its_own(inputs, grid, kernels):
    weight = weight_of(inputs).requires_grad_()
    q, upstream = quantizer_of(weight, **GRIDS[grid]).train(), torch.randn(OUTPUTS, inputs)
    leaves = [weight, q.log_scale, q.noise_logit]
    with use_kernels(kernels):
        out = q(weight)
        found = torch.autograd.grad(out, leaves, upstream)
    scale, sigma = (t.reshape(OUTPUTS, 3) for t in q._scale_and_sigma(q.settings))
    expected = torch.cat(
        [
            quantize(part, scale[:, [k]], sigma[:, [k]], bits=q.bits, zero_point=q.zero_point, estimator="expectation")
            for k, part in enumerate(parts(weight))
        ],
        1,
    )
    assert torch.equal(out, expected)
    for ours, theirs in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert torch.equal(q.eval()(weight), q.nearest(weight))


@pytest.mark.parametrize("rule", ["mse", "max"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_zeros_at_the_end_of_an_incomplete_group_change_no_scale(grid, rule):
    # A balanced grid has no level 0: zeros would have an error.
    weight = weight_of(10).abs() + 0.1
    q = quantizer_of(weight, weight_range=rule, **GRIDS[grid])
    balanced = {q.bits} if grid == "balanced" else set()
    for k, part in enumerate(parts(weight)):
        [fit] = fit_rows(WeightRows(part, grouped=True), [q.bits], rule, balanced)
        torch.testing.assert_close(q.scale().reshape(OUTPUTS, 3)[:, k], fit.scale)


def test_clipped_values_are_counted_among_those_of_the_weight_only():
    model = attach(nn.Linear(10, OUTPUTS, bias=False), CPQConfig(group_size=SIZE, act_bits=None, first_last_bits=None))
    with torch.no_grad():
        model.weight[:, 8:] *= 100
    assert outgrown_weight(model)[0] == pytest.approx(2 / 10, abs=0.02)


def test_only_the_group_that_training_has_outgrown_is_fitted_again():
    model = attach(nn.Linear(10, OUTPUTS, bias=False), CPQConfig(group_size=SIZE, act_bits=None, first_last_bits=None))
    model(torch.randn(2, 10))
    before = model.weight_quantizer.scale().detach().reshape(OUTPUTS, 3).clone()
    with torch.no_grad():
        model.weight[2, 8:] *= 100
    assert RangeTracker(model).renew_weights() == {model.weight_quantizer}
    after = model.weight_quantizer.scale().detach().reshape(OUTPUTS, 3)
    assert (after != before).nonzero().tolist() == [[2, 2]]
    assert after[2, 2] > 20 * before[2, 2]


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("nesting", ["range", "resolution"])
def test_a_bit_is_worth_what_it_adds_to_a_whole_output(inputs, nesting):
    weight, gradient = weight_of(inputs), torch.randn(OUTPUTS, inputs)
    q = quantizer_of(weight, weight_bits=4, min_bits=3, learn_bits=True, nesting=nesting).train()
    q.gates.logits().data.fill_(20.0)
    q(weight.clone().requires_grad_()).backward(gradient)
    widths = [copy.deepcopy(q).eval(), copy.deepcopy(q).eval()]
    for bits, at_width in zip((3, 4), widths, strict=True):
        at_width.fix_widths([bits])
    narrow, wide = ((gradient * at_width.nearest(weight)).sum(1) for at_width in widths)
    torch.testing.assert_close(q.gates.logit.grad, -(wide - narrow).square().sum()[None], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("inputs", INPUTS)
def test_a_product_with_complete_groups_is_one_operation_of_the_same_values(inputs, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(5, inputs)
    model = calibrate(attach(nn.Linear(inputs, 3), CPQConfig(group_size=SIZE, first_last_bits=None)), [x]).train()
    calls = []
    monkeypatch.setattr(layers, "product", lambda *operands: calls.append(operands) or product(*operands))
    results = []
    for kernels in (True, False):
        model.zero_grad()
        with use_kernels(kernels):
            out = model(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    assert calls[0][1].grid is not None if inputs % SIZE == 0 else calls[0][1].grid is None
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_transposed_weight_has_the_groups_of_its_values():
    weight = weight_of(12)
    x, outputs = torch.randn(5, 12), []
    for stored in (weight.clone(), weight.t().contiguous().t()):
        layer = nn.Linear(12, OUTPUTS, bias=False)
        layer.weight = nn.Parameter(stored)
        model = calibrate(attach(layer, CPQConfig(group_size=SIZE, first_last_bits=None)), [x]).train()
        out = model(x)
        out.sum().backward()
        outputs.append((out.detach(), model.weight.grad))
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs)


def net():
    return nn.Sequential(nn.Conv1d(3, 10, 3), nn.Flatten(), nn.Linear(60, 10), nn.ReLU(), nn.Linear(10, 4))


X = torch.randn(8, 3, 8, generator=torch.Generator().manual_seed(1))
GROUPED = {"weight_bits": 3, "first_last_bits": None, "group_size": 16}


def scales(model):
    return {name: len(layer.weight_quantizer.log_scale) for name, layer in layers.quantized_layers(model)}


def test_convolutions_and_layers_that_one_group_holds_keep_a_scale_for_each_output():
    assert scales(attach(net(), CPQConfig(**GROUPED))) == {"0": 10, "2": 40, "4": 4}
    overrides = {"4": {"group_size": 8}, "2": {"group_size": None}}
    assert scales(attach(net(), CPQConfig(**GROUPED, overrides=overrides))) == {"0": 10, "2": 10, "4": 8}


def test_a_state_rebuilds_the_groups_and_others_are_refused_by_name():
    torch.manual_seed(0)
    model = calibrate(attach(net(), CPQConfig(**GROUPED)), [X]).eval()
    state = model.state_dict()
    other = net().eval()
    with loading():
        other.load_state_dict(state)
    assert torch.equal(other(X), model(X))
    assert other[2].weight_quantizer.settings == model[2].weight_quantizer.settings
    with pytest.raises(RuntimeError, match="group_size 16 in the state_dict, None in the model"):
        attach(net(), CPQConfig(**GROUPED | {"group_size": None})).load_state_dict(state)
    narrow = net()
    narrow[2] = nn.Linear(44, 10)
    with pytest.raises(StateDictError, match=r"40 scales of the layer '2', one per group of 16 inputs, .*\(10, 44\)"):
        with loading():
            narrow.load_state_dict(state)


def test_detached_weights_are_those_of_the_evaluation_and_levels_tell_the_groups():
    model = calibrate(attach(net(), CPQConfig(**GROUPED)), [X]).eval()
    wanted = quantized_weight(model[2])
    record = next(r for r in levels(model) if r.name == "2" and r.kind == "weight")
    assert record.group_size == 16
    torch.testing.assert_close(
        torch.tensor(record.scale), model[2].weight_quantizer.scale().reshape(10, 4).mean(1).detach()
    )
    groups = to_groups(wanted, 16)
    assert all(len(row.unique()) <= 2**3 for row in groups)
    assert torch.equal(from_groups(groups, 60), wanted)
    assert torch.equal(detach(model)[2].weight, wanted)
