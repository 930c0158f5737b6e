"""Learned and fixed widths of one quantizer."""

import pytest
import torch

from cpq_lightning import CPQConfig
from cpq_lightning.functional.ranges import mse_scale
from cpq_lightning.nn.quantizer import Quantizer

WEIGHT = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))


def quantizer(**settings):
    config = CPQConfig(**({"weight_bits": 8, "min_bits": 2, "learn_bits": True} | settings))
    q = Quantizer("weight", config, numel=WEIGHT.numel(), channels=6)
    q.fit_weight(WEIGHT)
    return q


def decide(q, width):
    """Open the gates up to a width, shut the others."""
    index = torch.arange(q.bits - q.min_bits)[:, None]
    with torch.no_grad():
        q.gates.logits().copy_(torch.where(index < torch.as_tensor(width) - q.min_bits, 9.0, -9.0))


@pytest.mark.parametrize("nesting", ["range", "resolution"])
@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_fixing_a_width_changes_nothing_in_evaluation(width, nesting):
    q = quantizer(nesting=nesting).eval()
    with torch.no_grad():
        q.log_scale.fill_(0.1)
    decide(q, width)
    assert q.decided_widths().tolist() == [width]
    before, grid = q(WEIGHT), q.grid()
    q.fix_widths([width])
    torch.testing.assert_close(q(WEIGHT), before, rtol=1e-5, atol=1e-6)
    for now, was in zip(q.grid(), grid, strict=True):
        torch.testing.assert_close(now, was)
    assert (q.bits, q.min_bits, q.has_gates) == (width, width, False)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("nesting", ["range", "resolution"])
def test_channels_of_different_widths_evaluate_as_fixed(nesting, per_channel):
    q = quantizer(gate_sharing="channel", per_channel=per_channel, nesting=nesting).eval()
    widths = [2, 3, 3, 5, 4, 2]
    decide(q, widths)
    assert q.decided_widths().tolist() == widths
    before = q(WEIGHT)
    q.fix_widths(widths)
    torch.testing.assert_close(q(WEIGHT), before, rtol=1e-5, atol=1e-6)
    assert (q.bits, q.min_bits, q.fixed) == (5, 2, True)
    scale, low, high = (q.along_channels(t, WEIGHT) for t in q.grid())
    codes = q(WEIGHT) / scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert (codes.round() >= low).all()
    assert (codes.round() <= high).all()
    for row, width in zip(codes.round(), widths, strict=True):
        assert len(row.unique()) <= 2**width
    # And trains.
    q.train()(WEIGHT).square().sum().backward()
    assert q.log_scale.grad.abs().sum() > 0


@pytest.mark.parametrize("width", [2, 3, 4, 6])
def test_each_width_has_the_scale_that_fits_it_best(width):
    """Of the step of the widest grid, doubled for every bit, a narrow grid has little use."""
    q = quantizer(per_channel=False).eval()
    decide(q, width)
    scale = mse_scale(WEIGHT.reshape(1, -1), bits=width)
    torch.testing.assert_close(q.grid()[0], scale, rtol=1e-5, atol=0)
    doubled = q.scale() * 2 ** (8 - width)
    error = (WEIGHT - q(WEIGHT)).square().sum()
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    assert error < (WEIGHT - (WEIGHT / doubled).round().clamp(low, high) * doubled).square().sum()


@pytest.mark.parametrize("sharing", ["tensor", "channel"])
@pytest.mark.parametrize("nesting", ["range", "resolution"])
def test_gates_get_the_gradient_of_the_loss(nesting, sharing):
    q = quantizer(weight_bits=4, nesting=nesting, gate_sharing=sharing, gate_estimator="concrete").train()
    total = torch.zeros_like(q.gates.logit)
    for step in range(30):
        q.noise_step.fill_(step)
        q.gates.logit.grad = None
        (q(WEIGHT) - WEIGHT).square().sum().backward()
        total += q.gates.logit.grad
    # To open a gate makes the error smaller.
    assert (total.reshape(2, -1).sum(1) < 0).all()


def test_a_sparse_evaluation_has_the_gradients_of_all_terms(monkeypatch):
    q = quantizer(gate_estimator="concrete").train()
    for step in range(20):
        q.noise_step.fill_(step)
        results = []
        for compiling in (False, True):
            q.zero_grad()
            with monkeypatch.context() as patch:
                if compiling:
                    patch.setattr("cpq_lightning.functional.resolution.torch.compiler.is_compiling", lambda: True)
                x = WEIGHT.clone().requires_grad_()
                out = q(x)
            (out * torch.arange(240).reshape(6, 40).sin()).sum().backward()
            results.append([out.detach(), x.grad, *(p.grad.clone() for p in q.parameters())])
        for sparse, dense in zip(*results, strict=True):
            torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-6)


def test_state_restores_fixed_widths():
    q = quantizer(gate_sharing="channel").eval()
    q.fix_widths([2, 3, 4, 4, 4, 4])
    other = quantizer(gate_sharing="channel").eval()
    other.load_state_dict(q.state_dict())
    assert torch.equal(q(WEIGHT), other(WEIGHT))
    assert other.decided_widths().tolist() == [2, 3, 4, 4, 4, 4]
    assert not other.has_gates


def test_expected_widths_follow_the_gates():
    q = quantizer()
    # Each gate is open with probability 0.95, and a bit counts if its gate and all narrower ones are open.
    assert q.expected_widths().item() == pytest.approx(2 + sum(0.95**k for k in range(1, 7)), rel=1e-5)
    q.fix_widths([4])
    assert q.expected_widths().item() == 4
