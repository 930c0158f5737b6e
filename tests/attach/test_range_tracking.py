"""Ranges belong to what they are used on: they follow weights and inputs that training moves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, levels
from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.attach.range_tracking import RangeTracker, is_due, refit_rewritten, rewritten_weights
from cpq_lightning.errors import ExportError
from cpq_lightning.export.integer_model import check_exportable
from cpq_lightning.functional.grid import level_bounds
from cpq_lightning.nn.observer import RangeObserver
from cpq_lightning.report.levels import clipped_shares, range_warnings

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
Y = (X @ torch.randn(8, 4, generator=torch.Generator().manual_seed(3))).argmax(1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def train(model, steps, lr=1e-2, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(X), Y)
        loss.backward()
        optimizer.step()
    return float(loss)


def test_checks_grow_rare():
    assert all(is_due(step) for step in range(16))
    assert [sum(map(is_due, range(n))) for n in (100, 1000, 100_000)] == [36, 63, 116]
    assert not is_due(-1)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_head_that_starts_at_zero_learns(per_channel):
    """ViT's and Mixer's heads, adapters' second matrix, adaptive norms: zero by design."""
    losses = []
    for quantized in (False, True):
        model = net()
        nn.init.zeros_(model[4].weight)
        if quantized:
            attach(model, CPQConfig(weight_bits=8, act_bits=8, per_channel=per_channel))
        losses.append(train(model, 100))
    assert losses[1] < 1.3 * losses[0] + 0.01
    weight = next(r for r in levels(model) if r.name == "4" and r.kind == "weight")
    assert weight.used_levels > 32
    assert weight.relative_error < 1e-2


def test_a_weight_of_zeros_passes_as_it_is_until_it_is_none():
    model = net()
    nn.init.zeros_(model[4].weight)
    calibrate(attach(model), [X])
    assert not model[4].weight_quantizer.fitted
    assert model.eval()(X).equal(model[4].bias.expand(64, -1))
    with torch.no_grad():
        model[4].weight.normal_()
    model(X)
    assert model[4].weight_quantizer.fitted


def test_ranges_of_random_weights_follow_them():
    model = calibrate(attach(net(), CPQConfig(weight_bits=8, act_bits=8)), [X])
    train(model, 150, 3e-2)
    with torch.no_grad():
        model.train()(X)
    shares = clipped_shares(model)
    assert shares["weights"] < 0.02


def test_inputs_that_outgrow_their_range_get_another_one():
    model = calibrate(attach(net(), CPQConfig(weight_bits=8, act_bits=8)), [X])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    tracker = RangeTracker(model, [optimizer])
    del model.__dict__["_cpq_tracking"]
    before = float(model[0].input_quantizer.scale())
    tracker.before_batch(0)
    model.train()(30 * X).sum().backward()
    optimizer.step()
    assert "0.input_quantizer" in tracker.after_step(0)
    assert float(model[0].input_quantizer.scale()) > 10 * before
    # Layers behind it see what it passes on from the next step on.
    for step in range(1, 5):
        tracker.before_batch(step)
        model(30 * X).sum().backward()
        found = tracker.after_step(step)
    assert found == []


def test_a_loop_of_one_s_own_needs_no_tracker():
    model = calibrate(attach(net(), CPQConfig(weight_bits=8, act_bits=8)), [X])
    before = float(model[0].input_quantizer.scale())
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(30 * X).sum().backward()
        optimizer.step()
    assert float(model[0].input_quantizer.scale()) > 10 * before


def test_a_resumed_loop_ends_as_the_uninterrupted_one():
    def run(stop=None, state=None):
        model = attach(net(), CPQConfig(weight_bits=4, act_bits=4))
        optimizer = torch.optim.Adam(model.parameters(), 3e-2)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        train(model, 12 if stop is None else stop, optimizer=optimizer)
        return model.state_dict(), optimizer.state_dict()

    wanted, _ = run()
    found, _ = run(12 - 5, run(stop=5))
    assert all(found[name].equal(value) for name, value in wanted.items())


def test_a_trained_network_keeps_its_ranges():
    model = net()
    train(model, 200)
    calibrate(attach(model, CPQConfig(weight_bits=4, act_bits=4)), [X])
    starts = {name: q.start_scale.clone() for name, q in quantizers(model)}
    train(model, 50, 1e-3)
    kept = [q.start_scale.equal(starts[name]) for name, q in quantizers(model)]
    assert sum(kept) >= len(kept) - 1


@pytest.mark.parametrize("f", [F.leaky_relu, F.gelu, F.silu, F.relu, torch.tanh, lambda x: -F.relu(x)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_kind_of_grid_is_the_one_with_less_error(f, bits):
    x = f(torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 1.5)

    def fitted(values):
        observer = RangeObserver()
        observer.update(values)
        observer.close_range(values.device)
        observer.update(values)
        return observer.fit([bits], "mse")

    [(step, z)] = fitted(x)

    def error(step, low, high):
        return float((x - (x / step).round().clamp(low, high) * step).square().sum())

    own = error(step, *level_bounds(bits, z))
    steps = float(x.abs().max()) * torch.logspace(-10, 1, 200, base=2)
    every = {0, 1, 2, *range(0, 2 ** (bits - 1) + 1, max(1, 2**bits // 16)), 2**bits - 1}
    best = min(error(s, *level_bounds(bits, other)) for s in steps for other in every)
    assert own <= 1.05 * best + 1e-9


def test_one_slightly_negative_value_costs_no_bit():
    observer = RangeObserver()
    x = torch.cat([torch.rand(1000), torch.tensor([-0.01])])
    observer.update(x)
    observer.close_range(x.device)
    observer.update(x)
    fitted = observer.fit([2], "mse")
    assert fitted is not None
    assert fitted[0].zero_point == 0


def test_what_is_clipped_is_told_by_name():
    model = calibrate(attach(net(), CPQConfig(weight_bits=8, act_bits=8)), [X])
    assert range_warnings(model) == []
    with torch.no_grad():
        model[2].weight[:4].mul_(10)
    [message] = range_warnings(model)
    assert "2 (weight," in message
    record = next(r for r in levels(model) if r.name == "2" and r.kind == "weight")
    assert 0.05 < record.clipped < 0.5


def test_inputs_on_one_level_are_told_by_name():
    from cpq_lightning.attach.calibrate import recording

    model = calibrate(attach(net(), CPQConfig(weight_bits=4, act_bits=4)), [X])
    with recording(model):
        model.eval()(X * 1e-4)
    [message] = range_warnings(model)
    assert "fall on one level" in message
    assert "0" in message


def test_zeros_alone_are_told(caplog):
    model = attach(net())
    with caplog.at_level("INFO", "cpq_lightning"):
        calibrate(model, [torch.zeros(4, 8)])
    assert "nothing but zeros at 1 activation" in caplog.text
    # The first other values set the range; in evaluation that is said.
    with pytest.warns(UserWarning, match="an evaluation has brought other values"):
        model.eval()(X)
    assert model[0].input_quantizer.fitted
    assert all(layer.weight_quantizer.fitted for _, layer in quantized_layers(model))


@pytest.mark.parametrize("rule", ["mse", "max"])
def test_a_channel_that_has_left_its_range_is_fitted_again_and_is_no_rewritten_weight(rule):
    """Of many channels, one may be out of its range between two checks, and an export need not be refused."""
    torch.manual_seed(0)
    config = CPQConfig(weight_bits=4, weight_range=rule, first_last_bits=None)
    x = torch.randn(8, 40)
    model = calibrate(attach(nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 4)), config), [x])
    quantizer = dict(quantized_layers(model))["0"].weight_quantizer
    before = quantizer.start_scale.clone()
    with torch.no_grad():
        model[0].weight[3] /= 8
    assert rewritten_weights(model) == []
    assert quantizer in RangeTracker(model).renew_weights()
    changed = quantizer.start_scale != before
    assert changed.nonzero().flatten().tolist() == [3]
    assert float(quantizer.start_scale[3] / before[3]) == pytest.approx(1 / 8, rel=0.05)
    with torch.no_grad():
        model[0].weight *= 8
    assert rewritten_weights(model) == ["0"]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("grid", ["auto", "signed"])
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("factor", [100.0, 0.2])
def test_weights_of_few_bits_that_were_rewritten_are_fitted_again(factor, bits, grid, per_channel):
    """Of one bit the error of a scale that is too small is never four times the least one."""
    config = CPQConfig(weight_bits=bits, weight_grid=grid, per_channel=per_channel, first_last_bits=None)
    model = calibrate(attach(net(), config), [X])
    with torch.no_grad():
        model[2].weight.mul_(factor)
    assert rewritten_weights(model) == ["2"]
    with pytest.raises(ExportError, match="have been rewritten"):
        check_exportable(model.eval())
    calibrate(model, [X])
    fresh = calibrate(attach(detached(model), config), [X])
    for (_, ours), (_, theirs) in zip(quantized_layers(model), quantized_layers(fresh), strict=True):
        assert ours.weight_quantizer(ours.weight).equal(theirs.weight_quantizer(theirs.weight))


def detached(model):
    """A plain network with the same weights."""
    plain = net()
    names = plain.state_dict().keys()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    return plain


def test_inputs_of_one_bit_are_fitted_again():
    model = calibrate(attach(net(), CPQConfig(act_bits=1, first_last_bits=None)), [X])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    tracker = RangeTracker(model, [optimizer])
    del model.__dict__["_cpq_tracking"]
    tracker.before_batch(0)
    model.train()(50 * X).sum().backward()
    optimizer.step()
    assert "0.input_quantizer" in tracker.after_step(0)


def test_channels_of_little_power_that_were_rewritten_count():
    """A norm behind the layer may make them as large as the others."""
    model = calibrate(attach(net(), CPQConfig(weight_bits=4)), [X])
    channels = len(model[2].weight)
    with torch.no_grad():
        model[2].weight[: channels // 20].mul_(0.02)
        assert rewritten_weights(model) == []
        model[2].weight[: channels // 2].mul_(0.02)
    assert rewritten_weights(model) == ["2"]
    assert refit_rewritten(model) == ["2"]
    error = (model[2].weight - model[2].weight_quantizer(model[2].weight)).square().sum(1)
    assert (error < 0.05 * model[2].weight.square().sum(1)).all()


def test_a_weight_that_is_dense_again_gets_the_grid_of_a_dense_one():
    config = CPQConfig(weight_bits=2, weight_grid="balanced", first_last_bits=None)
    model = net()
    dense = model[2].weight.detach().clone()
    with torch.no_grad():
        model[2].weight[:, ::2] = 0
    attach(model, config)
    calibrate(model, [X])
    assert model[2].weight_quantizer.zero_point == 2
    with torch.no_grad():
        model[2].weight.copy_(dense)
    calibrate(model, [X])
    fresh = calibrate(attach(detached(model), config), [X])
    assert model[2].weight_quantizer.zero_point == 1.5
    # All channels have scales of the new grid.
    assert model[2].weight_quantizer.scale().equal(fresh[2].weight_quantizer.scale())


def test_a_mask_in_a_hook_keeps_its_level_when_the_weight_is_fitted_again():
    """The optimizer moves what the hook masks: the weight that is checked has no zeros, the next forward's has."""
    model = net()
    masked = False

    def mask(layer, args):
        if masked:
            layer.weight.data[:, ::2].zero_()

    model[2].register_forward_pre_hook(mask)
    attach(model, CPQConfig(weight_bits=1, act_bits=None, first_last_bits=None))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model.train()(X).square().mean().backward()
            optimizer.step()

    train(2)
    assert model[2].weight_quantizer.zero_point == 0.5
    masked = True
    with pytest.warns(UserWarning, match=r"grid had no level 0.*: 2\. At one bit this grid is \{-1, 0\}"):
        # A check of one step is made in the next forward.
        train(2)
    for _ in range(24):
        assert model[2].weight_quantizer.zero_point == 1
        train(1)
