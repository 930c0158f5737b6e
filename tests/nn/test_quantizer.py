"""The quantizer as a module: its state, its dtypes, its ranges, its noise."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig
from cpq_lightning.functional.categorical import quantize
from cpq_lightning.functional.grid import level_bounds, nearest_level
from cpq_lightning.functional.ranges import mse_scale
from cpq_lightning.nn.observer import RangeObserver
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.state import SIGNED, UNSIGNED, read

SHARINGS = ("tensor", "channel", "element")
NESTINGS = ("range", "resolution")


def weight_quantizer(weight=None, key=0, **settings):
    """A quantizer for weights of 6 output channels, fitted to the weight if one is given."""
    config = CPQConfig(**{"weight_bits": 4, **settings})
    numel = 6 * 5 * 3 if weight is None else weight.numel()
    quantizer = Quantizer("weight", config, key=key, numel=numel, channels=6)
    if weight is not None:
        quantizer.fit_weight(weight)
    return quantizer


def act_quantizer(**settings):
    return Quantizer("activation", CPQConfig(**settings))


def weights(shape=(6, 5, 3)):
    return torch.randn(shape) * torch.logspace(-1, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


def least_error(values, bits, zero_point):
    """Squared error of the best of 3000 steps."""
    low, high = level_bounds(bits, zero_point)
    scales = values.abs().max() * torch.logspace(-11, 1, 3000, base=2)
    return min(
        (values - nearest_level(values / scale, low, high) * scale).square().sum().item() for scale in scales.tolist()
    )


# Step and noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_scale", [1e9, -1e9, math.inf, -math.inf, 50.0, -50.0, 0.0])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_scale_stays_positive_and_finite_wherever_an_update_throws_its_parameter(scale, log_scale):
    weight = weights() * scale
    q = weight_quantizer(weight, per_channel=True)
    q.log_scale.data.fill_(log_scale)
    out = q(weight)
    assert (q.scale() > 0).all()
    assert q.scale().isfinite().all()
    assert out.isfinite().all()
    factor = q.scale() / q.start_scale
    assert ((factor >= 1 / 1001) & (factor <= 1001)).all()


def test_a_small_move_of_the_parameter_is_a_relative_move_of_the_scale():
    q = weight_quantizer(weights(), per_channel=True)
    before = q.scale().detach()
    q.log_scale.data.add_(0.01)
    torch.testing.assert_close(q.scale().detach(), before * math.exp(0.01), rtol=1e-5, atol=0)


def sigma_of(q):
    return q._scale_and_sigma(q.settings)[1].detach()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.01])
def test_the_noise_is_positive_and_at_most_the_scale(temperature):
    q = Quantizer("weight", CPQConfig(per_channel=True, temperature=temperature), numel=4000, channels=1000)
    q._write_ranges(torch.rand(1000) * torch.logspace(-6, 6, 1000), q.width_scale)
    for logit in (-math.inf, -1e9, -20.0, -1.0, 0.0, 3.0, 10.0, 17.0, 20.0, 1e9, math.inf):
        q.noise_logit.data.fill_(logit)
        assert (sigma_of(q) > 0).all()
        assert (sigma_of(q) <= q.scale()).all()


def test_the_noise_starts_at_a_third_of_the_scale_times_the_temperature():
    for temperature in (1.0, 0.25):
        q = weight_quantizer(weights(), temperature=temperature)
        torch.testing.assert_close(sigma_of(q), q.scale().detach() * temperature / 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e-4, 1.0, 1e4, 1e10])
def test_gradients_of_the_parameters_are_finite_whatever_the_scale_of_the_weight(scale, per_channel):
    """Weight decay takes the weights of dead channels to any depth."""
    weight = (weights() * scale).requires_grad_()
    q = weight_quantizer(weight, per_channel=per_channel)
    (q(weight) * torch.randn(weight.shape)).sum().backward()
    for name, p in [("weight", weight), *q.named_parameters()]:
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


def test_a_weight_of_zeros_is_quantized_to_zeros_with_finite_gradients():
    weight = torch.zeros(6, 5, requires_grad=True)
    q = weight_quantizer(weight, per_channel=True)
    out = q(weight)
    out.sum().backward()
    assert not out.any()
    assert (q.scale() == 1).all()
    assert all(p.grad.isfinite().all() for p in (weight, *q.parameters()))


def test_both_parameters_learn():
    """A few updates against the squared error: the step finds back from twice what it should be."""
    weight = torch.randn(6, 50)
    q = weight_quantizer(weight, weight_bits=3, per_channel=False)
    q.log_scale.data.fill_(math.log(2))
    optimizer = torch.optim.Adam(q.parameters(), lr=0.05)
    errors = []
    for _ in range(60):
        loss = (q(weight) - weight).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert min(errors[-10:]) < 0.6 * errors[0]
    assert abs(q.log_scale.item()) < 0.4


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["argmax", "expectation"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_quantized_weights_lie_on_the_grid(bits, nesting, per_channel, estimator):
    weight = weights()
    q = weight_quantizer(weight, weight_bits=bits, nesting=nesting, per_channel=per_channel, weight_estimator=estimator)
    scale = q.scale().detach().reshape(-1, 1, 1)
    assert len(scale) == (6 if per_channel else 1)
    levels = (q(weight) / scale).detach()
    low, high = level_bounds(bits, q.zero_point)
    assert (low, high) == ((-0.5, 0.5) if bits == 1 else level_bounds(bits))
    torch.testing.assert_close(levels, nearest_level(weight / scale, low, high), rtol=0, atol=1e-4)


@pytest.mark.parametrize("channel_dim", [0, 1])
def test_every_channel_has_the_scale_that_fits_it_best(channel_dim):
    weight = weights((6, 40)).movedim(0, channel_dim).contiguous()
    config = CPQConfig(weight_bits=3, per_channel=True)
    q = Quantizer("weight", config, numel=weight.numel(), channels=6, channel_dim=channel_dim)
    out = q(weight).detach()
    for i in range(6):
        row = weight.select(channel_dim, i)
        assert q.scale()[i].item() == pytest.approx(mse_scale(row[None], bits=3).item(), rel=1e-6)
        quantized = quantize(row, q.scale()[i], sigma_of(q)[i], bits=3)
        torch.testing.assert_close(out.select(channel_dim, i), quantized.detach(), rtol=1e-6, atol=0)


def test_a_large_weight_is_fitted_on_a_sample_that_is_enough():
    weight = torch.randn(300, 1000)
    q = Quantizer("weight", CPQConfig(weight_bits=3), numel=weight.numel(), channels=300)
    got = (q(weight) - weight).square().sum().item()
    best = mse_scale(weight.reshape(1, -1), bits=3)
    assert got <= 1.01 * (weight - quantized_with(weight, best, 3)).square().sum()


def quantized_with(values, scale, bits):
    return (values / scale).round().clamp(*level_bounds(bits)) * scale


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_range_max_clips_no_weight_and_wastes_no_level(bits, per_channel):
    weight = weights()
    q = weight_quantizer(weight, weight_bits=bits, weight_range="max", per_channel=per_channel)
    scale = q.scale().detach().reshape(-1, 1, 1)
    assert ((q(weight) - weight).abs() <= scale * 0.5001).all()
    low, high = level_bounds(bits)
    levels = (q(weight) / scale).detach().round()
    levels = levels.flatten(1) if per_channel else levels.reshape(1, -1)
    assert ((levels.amax(1) == high) | (levels.amin(1) == low)).all()


def test_a_new_fit_forgets_what_was_learned():
    q = weight_quantizer(weights())
    q.log_scale.data.fill_(0.7)
    q.noise_logit.data.fill_(2.0)
    weight = weights() * 3
    q.fit_weight(weight)
    fresh = weight_quantizer(weight)
    assert torch.equal(q.scale(), fresh.scale())
    assert torch.equal(sigma_of(q), sigma_of(fresh))


# Activations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "eval with gradients off"])
def test_an_evaluation_before_the_range_is_known_says_what_to_do(mode):
    q = act_quantizer().eval()
    with torch.set_grad_enabled(mode == "eval"), pytest.raises(RuntimeError) as raised:
        q(torch.randn(3, 4))
    for word in ("range", "calibrate(model, batches)", "checkpoint", "train for one step"):
        assert word in str(raised.value)
    assert not q.fitted


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize(
    ("signed", "batch"),
    [(True, lambda: torch.randn(32, 7, 5)), (False, lambda: torch.randn(32, 7, 5).relu())],
    ids=["signed", "unsigned"],
)
def test_the_first_batch_of_training_sets_sign_size_and_a_nearly_best_scale(batch, signed, bits):
    x = batch()
    q = act_quantizer(act_bits=bits)
    out = q(x)
    assert q.fitted
    assert q.signed is signed
    assert q.numel == 35
    assert (out - x).square().sum().item() <= 1.02 * least_error(x, bits, q.zero_point)
    levels = (out / q.scale()).detach()
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert levels.min() >= q.level_bounds[0]

    start = q.start_scale.clone()
    q(x * 100 - 50)
    assert torch.equal(q.start_scale, start)
    assert q.signed is signed
    assert torch.equal(q.eval()(x), out)


@pytest.mark.parametrize("rule", ["mse", "max"])
def test_batches_seen_one_by_one_give_the_range_of_all_of_them_together(rule):
    batches = [torch.randn(8, 6) * scale + shift for scale, shift in ((1.0, 0.0), (3.0, 1.0), (0.1, -2.0))]
    at_once, parts = (act_quantizer(act_range=rule) for _ in range(2))
    for q, seen in ((at_once, [torch.cat(batches)]), (parts, batches)):
        observer = RangeObserver()
        for _ in range(2):
            for batch in seen:
                observer.update(batch)
            if observer.counts is None:
                observer.close_range(torch.device("cpu"))
        q.fit_activation(observer)
    assert torch.equal(at_once.start_scale, parts.start_scale)
    assert at_once.signed is parts.signed is True


@pytest.mark.parametrize("signed", [True, False])
def test_the_range_max_clips_no_activation(signed):
    x = torch.randn(100, 9) if signed else torch.rand(100, 9)
    q = act_quantizer(act_range="max")
    levels = (q(x) / q.scale()).round()
    assert ((q(x) - x).abs() <= q.scale() * 0.5001).all()
    assert levels.min() == q.level_bounds[0] or levels.max() == q.level_bounds[1]


def test_values_that_are_not_finite_do_not_spoil_the_range():
    x = torch.randn(50, 4)
    spoilt = torch.cat([x, torch.tensor([[math.nan, math.inf, -math.inf, 0.0]])])
    clean, dirty = act_quantizer(), act_quantizer()
    clean(torch.cat([x, torch.zeros(1, 1).expand(1, 4)]))
    dirty(spoilt)
    assert dirty.scale().isfinite().all()
    assert dirty.scale().item() == pytest.approx(clean.scale().item(), rel=0.05)


def test_a_quantizer_for_no_bits_is_refused():
    with pytest.raises(ValueError, match="act_bits=None"):
        act_quantizer(act_bits=None)


# State ---------------------------------------------------------------------------------------------------------------

SETTINGS = ("bits", "min_bits", "doubled_zero_points", "fitted", "active", "numel", "first_or_last")


def test_a_state_dict_restores_everything_in_a_quantizer_of_other_settings():
    weight = weights()
    q = weight_quantizer(weight, weight_bits=5, min_bits=3, temperature=0.3, keep_prob=0.8, per_channel=True)
    q.configure(bits=4, min_bits=2, doubled_zero_points=UNSIGNED, first_or_last=True, numel=123)
    q.log_scale.data.normal_()
    q.noise_logit.data.normal_()
    q.noise_step.fill_(2**40)
    buffer = io.BytesIO()
    torch.save(q.state_dict(), buffer)
    buffer.seek(0)

    other = weight_quantizer(weight_bits=8, min_bits=6, per_channel=True)
    assert not other.fitted
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for name in SETTINGS:
        assert getattr(other.settings, name) == getattr(q.settings, name), name
        assert type(getattr(other.settings, name)) is type(getattr(q.settings, name)), name
    assert (other.bits, other.min_bits, other.signed, other.first_or_last, other.numel) == (4, 2, False, True, 123)
    for name, value in q.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert torch.equal(other(weight), q(weight))
    assert torch.equal(other.eval()(weight), q.eval()(weight))


def test_the_host_reads_what_the_state_says():
    q = weight_quantizer(weights())
    q.configure(bits=3, min_bits=1, fitted=False, active=False, numel=7, first_or_last=True)
    settings, _ = read(q.state_dict()["state"])
    assert [getattr(settings, name) for name in SETTINGS] == [3, 1, SIGNED, False, False, 7, True]
    assert settings == q.settings


def test_an_inactive_uncalibrated_quantizer_is_restored_as_such():
    q = act_quantizer()
    q.configure(active=False)
    other = act_quantizer()
    other(torch.randn(4, 4))
    other.load_state_dict(q.state_dict())
    assert not other.fitted
    assert not other.active


@pytest.mark.parametrize(
    "narrow",
    [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu", torch.float16)],
    ids=["half", "bfloat16", "to bfloat16", "to cpu, float16"],
)
def test_narrow_dtypes_leave_the_state_in_float32(narrow):
    weight = weights()
    q = weight_quantizer(weight, per_channel=True)
    model = narrow(nn.Sequential(nn.Linear(5, 6), q))
    assert model[0].weight.dtype in (torch.float16, torch.bfloat16)
    fresh = weight_quantizer(weight, per_channel=True)
    for name, value in q.state_dict().items():
        assert value.dtype == fresh.state_dict()[name].dtype, name
        assert torch.equal(value, fresh.state_dict()[name]), name
    x = weight.to(model[0].weight.dtype)
    out = q(x)
    assert out.dtype == x.dtype
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in q.parameters())


def test_double_widens_the_state_and_the_values_survive_the_way_back():
    weight = weights()
    q = weight_quantizer(weight)
    scale = q.scale().detach()
    q.double()
    dtypes = {name: t.dtype for name, t in q.state_dict().items()}
    # The state is whole numbers and starting steps, read as float32.
    assert dtypes.pop("state") == torch.float32
    assert set(dtypes.values()) == {torch.float64}
    out = q(weight.double())
    assert out.dtype == torch.float64
    out.sum().backward()
    assert q.log_scale.grad.dtype == torch.float64
    torch.testing.assert_close(q.scale().detach(), scale.double(), rtol=1e-6, atol=0)
    q.float()
    torch.testing.assert_close(q.scale().detach().float(), scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("training", [True, False])
def test_copies_behave_alike_and_share_nothing(clone, training):
    weight = weights()
    q = weight_quantizer(weight, weight_bits=4, min_bits=2, keep_prob=0.5, per_channel=True).train(training)
    q.log_scale.data.normal_()
    twin = clone(q)
    before = q(weight)
    assert torch.equal(twin(weight), before)
    assert twin.training is training
    twin.configure(bits=2, min_bits=1)
    twin.log_scale.data.add_(1)
    twin.state.mul_(3)
    assert (q.bits, q.min_bits, read(q.state_dict()["state"])[0].bits) == (4, 2, 4)
    assert torch.equal(q(weight), before)


# DropBits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("nesting", NESTINGS)
def test_evaluation_uses_all_bits_and_no_noise(nesting, sharing):
    weight = weights()
    settings = {"weight_bits": 4, "min_bits": 2, "nesting": nesting, "gate_sharing": sharing, "per_channel": False}
    q = weight_quantizer(weight, keep_prob=0.3, **settings).eval()
    want = quantize(weight, q.scale(), sigma_of(q), bits=4)
    for step in range(5):
        q.noise_step.fill_(step)
        assert torch.equal(q(weight), want)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("nesting", NESTINGS)
def test_gates_kept_for_certain_change_nothing(nesting, sharing):
    weight = weights()
    q = weight_quantizer(weight, weight_bits=4, min_bits=2, keep_prob=1.0, nesting=nesting, gate_sharing=sharing)
    training = q(weight)
    assert torch.equal(training, q.eval()(weight))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("nesting", NESTINGS)
def test_training_draws_gates_by_the_noise_step_and_by_nothing_else(nesting, sharing):
    weight = weights()
    settings = {"weight_bits": 4, "min_bits": 2, "nesting": nesting, "gate_sharing": sharing, "keep_prob": 0.5}
    q = weight_quantizer(weight, **settings)

    def draw(quantizer, step):
        quantizer.noise_step.fill_(step)
        return quantizer(weight).detach()

    state = torch.get_rng_state()
    first = [draw(q, step) for step in range(30)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1234)
    assert all(torch.equal(draw(q, step), first[step]) for step in reversed(range(30)))
    assert len({tuple(out.flatten().tolist()) for out in first}) > 3
    # Other quantizers and other seeds draw differently, a twin does not.
    for change in ({"key": 1}, {"seed": 1}):
        other = weight_quantizer(weight, **settings, **change)
        assert any(not torch.equal(draw(other, step), first[step]) for step in range(30))
    twin = weight_quantizer(weight, **settings)
    assert all(torch.equal(draw(twin, step), first[step]) for step in range(30))


@pytest.mark.parametrize("nesting", NESTINGS)
def test_a_smaller_keep_probability_costs_more(nesting):
    weight = torch.randn(6, 50)
    errors = []
    for keep_prob in (0.95, 0.6, 0.1):
        q = weight_quantizer(weight, weight_bits=4, min_bits=2, nesting=nesting, keep_prob=keep_prob)
        total = 0.0
        for step in range(100):
            q.noise_step.fill_(step)
            total += (q(weight) - weight).square().mean().item()
        errors.append(total)
    assert errors[0] < errors[1] < errors[2]
    best = (weight_quantizer(weight)(weight) - weight).square().mean().item() * 100
    assert best < errors[0]


@pytest.mark.parametrize(("sharing", "dropped_together"), [("tensor", 6 * 40), ("channel", 40), ("element", 1)])
def test_gates_are_shared_by_what_the_setting_says(sharing, dropped_together):
    """Every weight needs the outer ring, so each that lies inside it shows a dropped or half open bit."""
    weight = torch.full((6, 40), 1.0)
    q = weight_quantizer(weight, weight_bits=2, min_bits=1, weight_range="max", gate_sharing=sharing, keep_prob=0.5)
    patterns = []
    for step in range(200):
        q.noise_step.fill_(step)
        patterns.append(q(weight).detach() == 1)
    open_ = torch.stack(patterns)
    groups = open_.reshape(200, -1, dropped_together)
    assert (groups == groups[..., :1]).all()
    per_group = groups[..., 0].double()
    assert 0.2 < per_group.mean() < 0.8
    if groups.shape[1] > 1:
        assert not (per_group == per_group[:, :1]).all()


def test_without_a_gap_between_the_widths_nothing_is_random():
    weight = weights()
    q = weight_quantizer(weight, keep_prob=0.1)
    assert not q.has_gates
    want = q(weight)
    assert "noise_step" not in dict(q.gates.named_buffers())
    for _ in range(5):
        assert torch.equal(q(weight), want)


# Inactive ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "training"), [*itertools.product(["weight", "activation"], [True, False])])
def test_while_inactive_x_passes_and_parameters_get_gradients_of_zero(kind, training):
    q = Quantizer(kind, CPQConfig(min_bits=2, keep_prob=0.5, per_channel=True), numel=90, channels=6).train(training)
    q.configure(active=False)
    x = weights().requires_grad_()
    out = q(x)
    upstream = torch.randn(x.shape)
    out.backward(upstream)
    assert torch.equal(out, x)
    assert torch.equal(x.grad, upstream)
    for name, p in q.named_parameters():
        assert p.grad is not None, name
        assert p.grad.shape == p.shape
        assert not p.grad.any(), name
    assert not q.fitted


def test_what_is_active_again_goes_on_where_it_was():
    weight = weights()
    q = weight_quantizer(weight)
    want = q(weight)
    q.configure(active=False)
    q(weight * 10)
    q.configure(active=True)
    assert torch.equal(q(weight), want)
