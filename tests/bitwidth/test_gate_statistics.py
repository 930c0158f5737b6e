"""Running means of what gates hand over."""

import pytest
import torch

from cpq_lightning import CPQConfig
from cpq_lightning.bitwidth.cost import WidthCost
from cpq_lightning.bitwidth.gate_statistics import ConcreteStatistics, CurvatureStatistics
from cpq_lightning.bitwidth.gate_update import Budget, GateUpdate
from cpq_lightning.functional.dropbits import BETA
from cpq_lightning.nn.quantizer import Quantizer

OPEN = torch.tensor([[0.9, 0.8], [0.7, 0.6], [0.5, 0.4]], dtype=torch.float64)
ALL = torch.ones(2, dtype=torch.float64)


def column(*losses):
    return -torch.tensor(losses, dtype=torch.float64)[:, None].expand(-1, 2)


@pytest.mark.parametrize("steps", [1, 5, 300])
def test_what_each_step_tells_is_the_mean(steps):
    values = CurvatureStatistics((3, 2))
    for _ in range(steps):
        values.update(column(1.0, 0.25, 0.1), ALL)
    torch.testing.assert_close(values.saliency()[:, 0], torch.tensor([1.0, 0.25, 0.1]).double())


def test_a_rare_step_that_tells_of_a_thousand_times_as_much_is_one_of_many():
    values = CurvatureStatistics((1, 2))
    for step in range(400):
        values.update(column(1000.0 if step % 50 == 0 else 1.0), ALL)
    assert values.saliency()[0, 0] < 2


def test_steps_in_which_nothing_depended_on_a_bit_count_as_their_share():
    values = CurvatureStatistics((1, 2))
    for step in range(500):
        values.update(column(1e-30 if step % 10 == 0 else 1e-9), ALL)
    assert values.saliency()[0, 0] == pytest.approx(0.9e-9, rel=0.1)
    nothing = CurvatureStatistics((1, 2))
    assert nothing.update(column(1e-30), ALL).tolist() == [True, True]
    assert nothing.saliency().max() == 0


def test_rows_whose_bits_were_never_there_are_told_nothing():
    values = CurvatureStatistics((3, 2))
    gradient = column(1.0, 0.2, 0.1).clone()
    gradient[:, 1] = 0
    assert values.update(gradient, ALL).tolist() == [True, False]
    assert values.saliency()[:, 1].tolist() == [0, 0, 0]


def test_a_bit_that_was_never_there_is_guessed():
    values = CurvatureStatistics((3, 2))
    values.update(column(1.0, 0.0, 0.0), ALL)
    assert values.saliency()[:, 0].tolist() == pytest.approx([1.0, 0.25, 0.0625])


def test_a_step_without_gradients_changes_nothing():
    for values in (CurvatureStatistics((3, 2)), ConcreteStatistics((3, 2))):
        values.update(column(1.0, 0.5, 0.2), ALL)
        before = values.of(OPEN, 1.0)
        values.update(column(9.0, 9.0, 9.0), torch.zeros(2).double())
        for a, b in zip(values.of(OPEN, 1.0), before, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def trainer(estimator="curvature"):
    config = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, gate_estimator=estimator)
    kinds = [Quantizer("weight", config, key=key, numel=8) for key in range(2)]
    cost = WidthCost(torch.tensor([0.5, 0.5]).double(), torch.arange(2), torch.full((2,), 2), 0.0)
    return GateUpdate(kinds, [Budget(cost)])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_bits_of_more_worth_stay_open_at_any_scale_of_the_loss(scale):
    gates = trainer()
    cost = gates.budgets[0].cost(gates.expected(1.0, BETA))
    worths = 4.0 ** -torch.arange(6.0)[:, None] * scale
    for _ in range(200):
        cost = max(4.0, cost - 0.03)
        gates.step([-100 * worths, -worths], [cost], 0.2, 1.0, BETA)
        assert gates.budgets[0].cost(gates.expected(1.0, BETA)) == pytest.approx(cost, abs=1e-3)
    first, second = gates.expected(1.0, BETA).tolist()
    # Each bit is worth a quarter of the one before it: a hundred is three bits and a third.
    assert first - second == pytest.approx(3.32, abs=0.5)


def test_means_of_another_estimator_are_learned_anew():
    drawn, curved = trainer("concrete"), trainer()
    gradients = [-torch.ones(6, 1), -torch.ones(6, 1)]
    drawn.step(gradients, [7.0], 0.2, 1.0, BETA)
    curved.load_state_dict(drawn.state_dict())
    assert not curved.updated
    curved.step(gradients, [7.0], 0.2, 1.0, BETA)
    other = trainer()
    other.load_state_dict(curved.state_dict())
    assert other.updated
    assert other.values.saliency().equal(curved.values.saliency())


def test_a_restored_state_goes_on_as_it_was():
    for kind in (CurvatureStatistics, ConcreteStatistics):
        values, restored = kind((3, 2)), kind((3, 2))
        values.update(column(1.0, 0.5, 0.2), ALL)
        restored.load_state_dict(values.state_dict())
        for each in (values, restored):
            each.update(column(0.3, 0.2, 0.1), ALL)
        for a, b in zip(values.of(OPEN, 1.0), restored.of(OPEN, 1.0), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_gates_that_compete_have_one_estimator():
    learn = {"weight_bits": 8, "min_bits": 2, "learn_bits": True}
    kinds = [Quantizer("weight", CPQConfig(**learn, gate_estimator=e), numel=8) for e in ("curvature", "concrete")]
    cost = WidthCost(torch.tensor([0.5, 0.5]).double(), torch.arange(2), torch.full((2,), 2), 0.0)
    with pytest.raises(ValueError, match=r"gate_estimator must be the same .* \['concrete', 'curvature'\]"):
        GateUpdate(kinds, [Budget(cost)])
