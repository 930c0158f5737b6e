from functools import partial
from itertools import pairwise

import pytest
import torch
from timm.optim import Lars, Lion, Lookahead
from torch import nn

from cpq_lightning.optim.auxiliary import AuxiliaryOptimizer
from cpq_lightning.optim.update_clamp import BOUND, UpdateClamp

OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "SGD, momentum": partial(torch.optim.SGD, momentum=0.9),
    "SGD, Nesterov, one by one": partial(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=False),
    "SGD, fused": partial(torch.optim.SGD, momentum=0.9, fused=True),
    "AdamW": torch.optim.AdamW,
    "AdamW, fused": partial(torch.optim.AdamW, fused=True),
    "NAdam": torch.optim.NAdam,
    "RMSprop": partial(torch.optim.RMSprop, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "Adafactor": torch.optim.Adafactor,
    "Lion": Lion,
    "LARS": partial(Lars, momentum=0.9),
}
NAMES = pytest.mark.parametrize("name", OPTIMIZERS)


def parameters(**settings):
    """A weight, and two quantizers' parameters: one value, and one a channel."""
    weight = nn.Parameter(torch.ones(2, 2, **settings))
    return [weight, *(nn.Parameter(torch.zeros(size, **settings)) for size in (1, 3))]


def run(optimizer, params, scale=1.0, steps=12, seed=0):
    """Steps on random gradients; the values of all parameters behind each."""
    generator = torch.Generator().manual_seed(seed)
    path = [[p.detach().clone() for p in params]]
    for _ in range(steps):
        for p in params:
            p.grad = scale * torch.randn(p.shape, generator=generator)
        optimizer.step()
        path.append([p.detach().clone() for p in params])
    return path


def moves(path, index):
    return torch.stack([(b[index] - a[index]).abs().max() for a, b in pairwise(path)])


@NAMES
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_no_update_goes_further_than_the_bound_whatever_the_rate(name, scale):
    params = parameters()
    optimizer = OPTIMIZERS[name](params, lr=1e3)
    UpdateClamp(optimizer, params[1:])
    path = run(optimizer, params, scale)
    for index in (1, 2):
        assert 0 < moves(path, index).max() <= BOUND * (1 + 1e-5)
    assert moves(path, 0).max() > 3 * BOUND, "the weight is not among its parameters"
    assert all(p.isfinite().all() for p in params)


@NAMES
def test_within_the_bound_not_a_bit_of_a_value_or_of_a_state_is_changed(name):
    free, held = parameters(), parameters()
    optimizers = [OPTIMIZERS[name](params, lr=1e-3) for params in (free, held)]
    UpdateClamp(optimizers[1], held[1:])
    paths = [run(o, params) for o, params in zip(optimizers, (free, held), strict=True)]
    assert moves(paths[0], 2).max() < BOUND
    for one, other in zip(*paths, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for a, b in zip(free, held, strict=True):
        states = [o.state[p] for o, p in zip(optimizers, (a, b), strict=True)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][k])) for k, v in states[0].items())


def test_each_element_is_held_by_itself():
    step = nn.Parameter(torch.tensor([0.5, -2.0, 0.0]))
    optimizer = torch.optim.SGD([step], lr=1.0, momentum=0.9)
    UpdateClamp(optimizer, [step])
    step.grad = torch.tensor([0.01, -5.0, 0.2])
    optimizer.step()
    expected = torch.tensor([0.5, -2.0, 0.0]) + torch.tensor([-0.01, BOUND, -BOUND])
    torch.testing.assert_close(step.detach(), expected, rtol=0, atol=1e-6)
    # As if the gradient had been what moves it to the bound.
    torch.testing.assert_close(optimizer.state[step]["momentum_buffer"], torch.tensor([0.01, -BOUND, BOUND]))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, lr=10.0, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=10.0),
    ],
    ids=["SGD", "RMSprop", "Adam"],
)
def test_one_gradient_far_too_large_does_not_drive_a_parameter_on(make):
    gone = []
    for bounded in (False, True):
        step = nn.Parameter(torch.zeros(1))
        optimizer = make([step])
        if bounded:
            UpdateClamp(optimizer, [step])
        for gradient in [1e4] + [0.0] * 100:
            step.grad = torch.tensor([gradient])
            optimizer.step()
        gone.append(abs(step.item()))
    # All that momentum makes of one update at the bound.
    assert gone[1] <= 10 * BOUND < 10 < gone[0]


@pytest.mark.parametrize("keyword", [False, True])
def test_where_the_closure_fits_a_range_anew_the_update_counts_from_there(keyword):
    step = nn.Parameter(torch.tensor([5.0]))
    optimizer = torch.optim.SGD([step], lr=1.0)
    UpdateClamp(optimizer, [step])

    def closure():
        with torch.no_grad():
            step.zero_()
        step.grad = torch.ones(1)
        return 7.0

    result = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert result == 7.0
    assert step.item() == pytest.approx(-BOUND)


def test_probes_on_the_way_are_free_and_the_update_counts_from_where_it_began():
    class Probing(torch.optim.SGD):
        def step(self, closure):
            (step,) = self.param_groups[0]["params"]
            with torch.no_grad():
                for _ in range(4):
                    closure()
                    step += 3.0

    step = nn.Parameter(torch.zeros(1))
    optimizer = Probing([step], lr=1.0)
    UpdateClamp(optimizer, [step])
    seen = []
    optimizer.step(lambda: seen.append(step.item()))
    assert seen == [0.0, 3.0, 6.0, 9.0]
    assert step.item() == pytest.approx(BOUND)


def test_the_optimizer_inside_lookahead_is_bounded():
    params = parameters()
    optimizer = Lookahead(torch.optim.SGD(params, lr=1e3, momentum=0.9), k=5)
    UpdateClamp(optimizer, params[1:])
    path = run(optimizer, params, steps=5)
    assert moves(path[:5], 2).max() <= BOUND * (1 + 1e-5)
    # Where it averages it goes back among the values that there were.
    assert path[5][2].abs().max() <= 5 * BOUND


def test_a_companion_is_bounded_too():
    weight, step = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    AuxiliaryOptimizer(optimizer, [step], lr_factor=1e3)
    weight.grad, step.grad = torch.ones(2, 2), torch.ones(1)
    optimizer.step()
    assert step.item() == pytest.approx(-BOUND)


def test_what_is_not_a_number_is_not_hidden():
    step = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([step], lr=1.0)
    UpdateClamp(optimizer, [step])
    step.grad = torch.tensor([float("nan"), float("inf")])
    optimizer.step()
    assert step[0].isnan()
    assert step[1].item() == pytest.approx(-BOUND)


def test_nothing_is_read_back_from_the_device():
    params = parameters(device="meta")
    optimizer = torch.optim.SGD(params, lr=1.0, momentum=0.9)
    UpdateClamp(optimizer, params[1:])
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step(lambda: None)
