"""Oscillations of weights, against the definition written out for one element."""

import copy
import itertools

import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.sharding import whole
from cpq_lightning.optim.oscillation import OSCILLATES, Oscillation, OscillationHook

MOMENTUM = 0.1


def quantizer_of(weight, **settings):
    config = CPQConfig(**{"weight_bits": 3, "per_channel": False, **settings})
    q = Quantizer("weight", config, numel=weight.numel(), channels=len(weight))
    q.fit_weight(weight)
    return q


def expected(path):
    """Frequency and mean of one element from its codes."""
    frequency, direction, mean = 0.0, 0, float(path[0])
    for before, now in itertools.pairwise(path):
        change = now - before
        reversal = change != 0 and direction != 0 and (change > 0) != (direction > 0)
        frequency += MOMENTUM * (reversal - frequency)
        mean += MOMENTUM * (now - mean)
        direction = change if change else direction
    return frequency, mean


@pytest.mark.parametrize("settings", [{}, {"per_channel": True}, {"weight_grid": "balanced"}])
def test_frequency_and_mean_level_are_those_of_the_definition(settings):
    g = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 6, generator=g))
    q, oscillation, codes = quantizer_of(weight, **settings), Oscillation(MOMENTUM), []
    for _ in range(40):
        with torch.no_grad():
            weight.add_(0.3 * torch.randn(4, 6, generator=g))
        oscillation.update(weight, q, None)
        low = q.grid()[1].reshape(-1, 1)
        codes.append((q.levels(weight) - low).long())
    paths = torch.stack(codes).flatten(1).T.tolist()
    state = oscillation.state_dict()["tensors"]
    frequency, mean = torch.tensor([expected(path) for path in paths]).T
    torch.testing.assert_close(state["frequency"].flatten(), frequency)
    torch.testing.assert_close(state["mean_code"].flatten(), mean)
    assert oscillation.share() == float((frequency > OSCILLATES).double().mean()) > 0
    assert oscillation.frozen_share() == 0


def swing(weight, q, step):
    """Element 0 jumps across the boundary above the level at which it is in two of three steps."""
    scale = q.scale().detach()
    with torch.no_grad():
        weight.view(-1)[0] = scale * (1.6 if step % 3 == 0 else 1.4)


def test_a_frozen_weight_stays_on_its_most_frequent_level_while_the_scale_trains():
    weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    q, oscillation = quantizer_of(weight), Oscillation(MOMENTUM)
    others = weight.detach().flatten()[1:].clone()
    for step in range(61):
        swing(weight, q, step)
        oscillation.update(weight, q, 0.3 if step == 60 else None)
    assert oscillation.frozen_share() == 1 / 12
    for factor in (1.0, 1.02, 0.97):
        with torch.no_grad():
            q.log_scale.add_(torch.tensor(factor).log())
        swing(weight, q, 0)
        oscillation.update(weight, q, 0.3)
        torch.testing.assert_close(weight.detach().flatten()[0], q.scale().detach()[0] * 1.0)
        assert q.levels(weight.detach()).flatten()[0] == 1
    assert torch.equal(weight.detach().flatten()[1:], others)


def test_a_new_range_sets_weights_free():
    weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    q, oscillation = quantizer_of(weight), Oscillation(MOMENTUM)
    for step in range(60):
        swing(weight, q, step)
        oscillation.update(weight, q, 0.1)
    assert oscillation.frozen_share() > 0
    q.fit_weight(weight * 3)
    oscillation.update(weight, q, 0.1)
    assert (oscillation.frozen_share(), oscillation.share()) == (0, 0)


def test_a_restored_state_continues_exactly():
    g = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 6, generator=g))
    q, first = quantizer_of(weight, per_channel=True), Oscillation(MOMENTUM)
    moves = [0.3 * torch.randn(4, 6, generator=g) for _ in range(40)]

    def run(oscillation, weight, steps):
        for move in steps:
            with torch.no_grad():
                weight.add_(move)
            oscillation.update(weight, q, 0.05)

    run(first, weight, moves[:20])
    second, other = Oscillation(MOMENTUM), copy.deepcopy(weight)
    second.load_state_dict(copy.deepcopy(first.state_dict()), weight.device)
    run(first, weight, moves[20:])
    run(second, other, moves[20:])
    assert first.frozen_share() > 0
    assert torch.equal(weight, other)
    for name, value in first.state_dict()["tensors"].items():
        assert torch.equal(value, second.state_dict()["tensors"][name]), name


def test_the_hook_leaves_alone_what_has_no_gradient_or_learns_its_width():
    weights = [nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    q = [quantizer_of(w, **({"learn_bits": True, "min_bits": 2} if i == 1 else {})) for i, w in enumerate(weights)]
    tracked = {id(w): [(whole, quantizer, Oscillation(MOMENTUM))] for w, quantizer in zip(weights, q, strict=True)}
    optimizer = torch.optim.SGD(weights, lr=0.1)
    hook = OscillationHook(optimizer, tracked, lambda: None)
    weights[0].grad, weights[1].grad = torch.ones(3, 4), torch.ones(3, 4)
    optimizer.step()
    assert [o.share() is not None for ((_, _, o),) in tracked.values()] == [True, False, False]
    hook.remove()
    weights[2].grad = torch.ones(3, 4)
    optimizer.step()
    assert tracked[id(weights[2])][0][2].share() is None
