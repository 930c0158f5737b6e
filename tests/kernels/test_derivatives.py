"""Derivatives beyond one backward: penalties on gradients, ``torch.func``, many gradients at once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from cpq_lightning import CPQConfig, attach, calibrate
from cpq_lightning.attach.attach import set_noise_step
from cpq_lightning.functional.categorical import quantize
from cpq_lightning.functional.grid import along_channels
from cpq_lightning.kernels.cpu_build import use_kernels

LINEAR = (
    lambda: nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)),
    (8, 6),
)
CONVOLUTIONS = (
    lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)
    ),
    (4, 3, 8, 8),
)
CONFIGS = {
    "default": CPQConfig(first_last_bits=None),
    "argmax": CPQConfig(weight_estimator="argmax", act_estimator="argmax", first_last_bits=None),
    "one step a channel": CPQConfig(weight_bits=3, per_channel=True, first_last_bits=None),
    # Of 6 inputs the second group is not complete, of 8 it is.
    "groups": CPQConfig(weight_bits=3, group_size=4, first_last_bits=None),
    "weights only": CPQConfig(act_bits=None, first_last_bits=None),
    "DropBits": CPQConfig(min_bits=2, keep_prob=0.7, first_last_bits=None),
    "learned": CPQConfig(weight_bits=6, min_bits=2, learn_bits=True, first_last_bits=None),
    "learned by drawn gates": CPQConfig(
        weight_bits=6, min_bits=2, learn_bits=True, gate_estimator="concrete", first_last_bits=None
    ),
}


def quantized(make, shape, config=CONFIGS["default"]):
    torch.manual_seed(0)
    x = torch.randn(shape)
    return calibrate(attach(make(), config), [x]).train(), x


def penalty(model, x):
    """The penalty on gradients that keeps a critic Lipschitz, beside a loss: its gradients in all parameters and x."""
    x = x.clone().requires_grad_()
    set_noise_step(model, 0)
    model.zero_grad()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (((slope.flatten(1).norm(dim=1) - 1) ** 2).mean() + out.square().mean()).backward()
    return {"x": x.grad} | {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(actual, wanted, tolerance=1e-4):
    assert actual.keys() == wanted.keys()
    for name in wanted:
        apart = float((actual[name] - wanted[name]).detach().norm())
        assert apart <= tolerance * max(float(wanted[name].norm()), 1e-3), (name, apart, wanted[name].norm())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("network", [LINEAR, CONVOLUTIONS], ids=["linear", "convolutions"])
def test_a_gradient_penalty_is_that_of_pytorch_operations(network, config):
    model, x = quantized(*network, CONFIGS[config])
    actual = penalty(model, x)
    with use_kernels(False):
        assert_close(actual, penalty(model, x), 2e-3)


def _constant_slopes(x, scale, sigma, **settings):
    """The quantizer as a sum whose derivatives are its first ones, held: all that a second derivative has."""
    given = [t.detach().expand(x.shape).clone().requires_grad_() for t in (x, scale, sigma)]
    out = quantize(*given, **settings)
    slopes = torch.autograd.grad(out.sum(), given)
    return out.detach() + sum(slope * (t - t.detach()) for slope, t in zip(slopes, (x, scale, sigma), strict=True))


@pytest.mark.parametrize("config", ["default", "argmax", "one step a channel"])
def test_a_second_derivative_holds_the_estimators_slopes(config):
    model, x = quantized(*LINEAR, CONFIGS[config])

    def by_hand(x):
        for layer in model:
            if not isinstance(layer, nn.Linear):
                x = layer(x)
                continue
            sides = []
            for q, value in ((layer.input_quantizer, x), (layer.weight_quantizer, layer.weight)):
                root = (max(1, q.numel // q.settings.channels) * q.level_bounds[1]) ** 0.5
                factor = 1 / (q.start_scale * root)
                parameters = [p.detach() + (p - p.detach()) * factor for p in (q.log_scale, q.noise_logit)]
                reach = 6.907755278982137
                scale = q.start_scale * torch.exp(reach * torch.tanh(parameters[0] / reach))
                sigma = scale * (0.02 + 0.98 * torch.sigmoid(parameters[1])) * q.temperature
                scale, sigma = (along_channels(t, value.dim(), 0) for t in (scale, sigma))
                estimator = q.estimator
                sides.append(
                    _constant_slopes(value, scale, sigma, bits=q.bits, zero_point=q.zero_point, estimator=estimator)
                )
            x = F.linear(*sides, layer.bias)
        return x

    actual = penalty(model, x)
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = by_hand(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (((slope.norm(dim=1) - 1) ** 2).mean() + out.square().mean()).backward()
    assert_close(actual, {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()}, 1e-3)


def test_a_gradient_penalty_is_near_that_of_full_precision():
    model, x = quantized(*LINEAR, CPQConfig(weight_bits=8, act_bits=8))
    plain, _ = LINEAR[0](), torch.manual_seed(0)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "quantizer" not in name})
    actual, wanted = penalty(model, x), penalty(plain, x)
    for name in ("0.weight", "2.weight", "4.weight", "x"):
        assert torch.cosine_similarity(actual[name].flatten(), wanted[name].flatten(), 0) > 0.98


def test_a_gradient_penalty_trains():
    model, x = quantized(*LINEAR)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    norms = []
    for _ in range(60):
        batch = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(batch)[:, 0].sum(), batch, create_graph=True)
        norms.append(float(slope.detach().norm(dim=1).mean()))
        loss = ((slope.norm(dim=1) - 1) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(norms[-1] - 1) < 0.2 < abs(norms[0] - 1)


@pytest.mark.parametrize("network", [LINEAR, CONVOLUTIONS], ids=["linear", "convolutions"])
def test_many_gradients_at_once_are_those_one_by_one(network):
    model, x = quantized(*network)
    x = x[:2].requires_grad_()
    out = model(x)
    rows = torch.eye(out.numel()).reshape(-1, *out.shape)
    (actual,) = torch.autograd.grad(out, x, rows, is_grads_batched=True, retain_graph=True)
    wanted = [torch.autograd.grad(out, x, row, retain_graph=True)[0] for row in rows]
    torch.testing.assert_close(actual, torch.stack(wanted), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("network", [LINEAR, CONVOLUTIONS], ids=["linear", "convolutions"])
@pytest.mark.parametrize("config", ["default", "one step a channel", "learned by drawn gates"])
def test_torch_func_gives_the_gradients_of_a_backward(network, config, training):
    model, x = quantized(*network, CONFIGS[config])
    model.train(training)
    labels = torch.arange(len(x)) % 3
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters, x, labels):
        return F.cross_entropy(functional_call(model, (parameters, buffers), (x,)), labels)

    set_noise_step(model, 0)
    loss(parameters, x, labels).backward()
    wanted = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
    set_noise_step(model, 0)
    assert_close(grad(loss)(parameters, x, labels), wanted, 2e-3)
    set_noise_step(model, 0)
    single = vmap(grad(lambda p, a, b: loss(p, a[None], b[None])), in_dims=(None, 0, 0))(parameters, x, labels)
    assert_close({name: value.mean(0) for name, value in single.items()}, wanted, 2e-3)


@pytest.mark.parametrize("network", [LINEAR, CONVOLUTIONS], ids=["linear", "convolutions"])
def test_torch_func_gives_derivatives_in_the_input(network):
    model, x = quantized(*network)
    x = x[:2]
    wanted = torch.autograd.functional.jacobian(model, x)
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(model)(x), wanted, rtol=1e-4, atol=1e-6)
    tangent = torch.ones_like(x)
    value, slope = jvp(model, (x,), (tangent,))
    assert value.equal(model(x))
    torch.testing.assert_close(slope, (wanted * tangent).flatten(2).sum(2), rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(dual.tangent, slope)
    bent = hessian(lambda x: model(x).square().sum())(x[:1])
    torch.testing.assert_close(bent, torch.autograd.functional.hessian(lambda x: model(x).square().sum(), x[:1]))


def test_an_infinite_input_has_its_level_within_a_transform():
    model, x = quantized(*LINEAR)
    x[0, 0] = torch.inf
    assert vmap(lambda row: model(row[None])[0])(x).equal(model(x))


def test_gates_are_drawn_anew_within_transforms():
    model, x = quantized(*LINEAR, CONFIGS["DropBits"])
    drawn = [vmap(lambda row: model(row[None])[0])(x) for _ in range(4)]
    assert len({tuple(out.flatten().tolist()) for out in drawn}) > 1
    set_noise_step(model, 7)
    first = model(x)
    set_noise_step(model, 7)
    assert vmap(lambda row: model(row[None])[0])(x).equal(first)


def test_models_that_are_computed_as_one_have_the_same_settings():
    models = [quantized(*CONVOLUTIONS)[0] for _ in range(3)]
    for factor, model in enumerate(models, start=1):
        with torch.no_grad():
            model[0].weight.mul_(factor)
    x = quantized(*CONVOLUTIONS)[1]

    def together():
        stacked = stack_module_state(models)
        base = copy.deepcopy(models[0]).to("meta")
        return vmap(lambda p, b: functional_call(base, (p, b), (x,)))(*stacked)

    torch.testing.assert_close(together(), torch.stack([model(x) for model in models]))
    models[1][2].input_quantizer.configure(doubled_zero_points=(2,) * 8)
    with pytest.raises(ValueError, match=r"zero point .* 0 1 3 7 and 1 1 1 1: .*act_grid='signed'"):
        together()


def test_what_torch_func_cannot_have_is_refused_with_the_cure():
    model, x = quantized(*LINEAR, CONFIGS["learned"])
    with pytest.raises(RuntimeError, match=r"loss.backward\(\) while they are learned"):
        jacrev(model)(x)
    jacrev(model.eval())(x)
    fresh = attach(LINEAR[0]())
    state = copy.deepcopy(fresh.state_dict())
    with pytest.raises(RuntimeError, match=r"call calibrate\(model, batches\) first"):
        jacrev(fresh)(x)
    assert all(value.equal(state[name]) for name, value in fresh.state_dict().items())
