"""Gates: their distribution, and noise that is a pure function of its counters."""

import itertools
import math

import pytest
import torch

from cpq_lightning.functional.dropbits import hard_concrete, keyed_uniform, logit_of, masks_from_gates, open_probability

DRAWS = 200_000


def uniform(shape, step=0, key=0, seed=0):
    return keyed_uniform(shape, seed, torch.tensor([step]), key)


@pytest.mark.parametrize("logit", [-4.0, -1.6, -0.5, 0.0, 1.0, 3.0])
def test_the_open_probability_is_the_frequency_of_gates_over_zero(logit):
    u = torch.rand(DRAWS, generator=torch.Generator().manual_seed(1)).clamp(1e-7, 1 - 1e-7)
    p = open_probability(torch.tensor(logit)).item()
    frequency = (hard_concrete(torch.tensor(logit), u) > 0).double().mean().item()
    assert abs(frequency - p) < 5 * math.sqrt(p * (1 - p) / DRAWS)


@pytest.mark.parametrize("logit", [-1.0, 0.0, 2.0])
def test_gates_follow_the_stretched_concrete_distribution(logit):
    """P(z <= c) = S(beta logit((c - gamma)/(zeta - gamma)) - logit), with gamma = -0.1, zeta = 1.1, beta = 2/3."""
    z = hard_concrete(torch.tensor(logit), uniform((DRAWS,)))
    for c in (0.0, 0.25, 0.5, 0.75, 0.999):
        p = torch.sigmoid(torch.logit(torch.tensor((c + 0.1) / 1.2)) * 2 / 3 - logit).item()
        assert abs((z <= c).double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / DRAWS)
    assert z.min() == 0
    assert z.max() == 1


def test_logit_of_inverts_open_probability():
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    torch.testing.assert_close(open_probability(logit_of(p)), p, rtol=1e-13, atol=0)
    logits = torch.linspace(-6, 6, 99, dtype=torch.float64)
    torch.testing.assert_close(logit_of(open_probability(logits)), logits, rtol=0, atol=1e-12)


def test_probabilities_of_zero_and_one_are_certain():
    noise = uniform((1000,))
    assert open_probability(logit_of(torch.tensor([0.0, 1.0]))).tolist() == [0, 1]
    assert (hard_concrete(logit_of(torch.tensor(1.0)), noise) == 1).all()
    assert (hard_concrete(logit_of(torch.tensor(0.0)), noise) == 0).all()


def test_gates_have_gradients_in_their_logit_where_they_are_neither_shut_nor_open():
    logit = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    u = torch.tensor([1e-6, 0.3, 0.5, 0.7, 1 - 1e-6], dtype=torch.float64)
    z = hard_concrete(logit, u)
    z.sum().backward()
    assert (z[0].item(), z[4].item()) == (0, 1)
    assert (logit.grad > 0).tolist() == [False, True, True, True, False]
    assert torch.autograd.gradcheck(lambda t: hard_concrete(t, u[1:4]), logit.detach()[1:4].requires_grad_())


def test_masks_are_nested_products_of_the_gates():
    gates = hard_concrete(torch.tensor(0.5), uniform((5, 40, 3)))
    masks = masks_from_gates(gates)
    assert masks.shape == (6, 40, 3)
    assert (masks[0] == 1).all()
    assert (masks[1:] <= masks[:-1]).all()
    assert ((masks >= 0) & (masks <= 1)).all()
    for k in range(1, 6):
        torch.testing.assert_close(masks[k], math.prod(gates[:k]))
    dropped = (gates == 0).any(0)
    assert dropped.any()
    assert (masks[-1][dropped] == 0).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
def test_without_a_gate_there_is_one_mask_of_one(shape):
    assert torch.equal(masks_from_gates(torch.empty(0, *shape)), torch.ones(1, *shape))


def test_the_same_counters_give_the_same_noise_and_any_other_counter_gives_other_noise():
    counters = [
        (0, 0, 0), (1, 0, 0), (2, 0, 0), (12345, 0, 0), (2**32 - 1, 0, 0), (-1, 0, 0),
        (0, 1, 0), (0, 2, 0), (0, 2**31, 0), (0, 2**32, 0), (0, 2**40 + 1, 0),
        (0, 0, 1), (0, 0, 2), (0, 0, 1000), (1, 1, 1), (1, 2, 3), (3, 2, 1),
    ]  # fmt: skip
    noise = {c: uniform((1000,), seed=c[0], step=c[1], key=c[2]) for c in counters}
    for a, b in itertools.combinations(counters, 2):
        assert (noise[a] == noise[b]).double().mean() < 0.01, (a, b)
    for c in counters:
        assert torch.equal(uniform((1000,), seed=c[0], step=c[1], key=c[2]), noise[c])


def test_noise_leaves_torch_s_generator_alone_and_does_not_depend_on_it():
    state = torch.get_rng_state()
    first = uniform((100,))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    assert torch.equal(uniform((100,)), first)


def test_noise_depends_on_the_index_of_an_element_and_not_on_the_shape():
    flat = uniform((24,), step=3)
    assert torch.equal(uniform((2, 3, 4), step=3).flatten(), flat)
    assert torch.equal(uniform((10,), step=3), flat[:10])
    assert uniform((), step=3).shape == ()
    assert uniform((0, 3)).shape == (0, 3)


@pytest.mark.parametrize("axis", ["index", "step", "key", "seed"])
def test_noise_is_uniform_along_every_counter(axis):
    if axis == "index":
        u = uniform((2**16,)).double()
    else:
        u = torch.cat([uniform((64,), **{axis: i}) for i in range(2**10)]).double()
    n = len(u)
    assert u.min() > 0
    assert u.max() < 1
    # Kolmogorov-Smirnov: sqrt(n) D exceeds 2.2 with probability 1.2e-4.
    ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
    ordered = u.sort().values
    distance = torch.maximum((ranks - ordered).max(), (ordered - ranks + 1 / n).max())
    assert math.sqrt(n) * distance < 2.2
    # 256 cells: chi-squared with 255 degrees of freedom exceeds 355 with probability 3e-5.
    counts = torch.histc(u, 256, 0, 1)
    assert ((counts - n / 256).square() / (n / 256)).sum() < 355
    # The bits at the end must be as random as those at the front.
    for bit in (12, 16, 20, 22):
        ones = (torch.floor(u * 2**bit) % 2).mean().item()
        assert abs(ones - 0.5) < 5 * math.sqrt(1 / 4 / n), bit


@pytest.mark.parametrize("axis", ["index", "step", "key", "seed"])
def test_neighbouring_counters_are_uncorrelated(axis):
    n = 2**16
    a = uniform((n + 1,)).double() - 0.5
    a, b = (a[:-1], a[1:]) if axis == "index" else (a[:n], uniform((n,), **{axis: 1}).double() - 0.5)
    correlation = (a * b).mean() * 12
    assert abs(correlation) < 5 / math.sqrt(n)


def test_noise_can_reach_neither_zero_nor_one_however_much_is_drawn():
    """Every number is the middle of a cell of 2^-23 or 2^-24, so 0 and 1 are not merely rare: there are none."""
    u = uniform((2**18,))
    assert u.dtype == torch.float32
    assert torch.logit(u).isfinite().all()
    in_cells = u.double() * 2**23
    assert (in_cells % 1 == 0.5).all() or (in_cells * 2 % 1 == 0.5).all()
