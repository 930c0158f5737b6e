"""Running means of what gates hand over."""

import pytest
import torch

from cpq_lightning import CPQConfig
from cpq_lightning.functional import WidthCost
from cpq_lightning.nn import Quantizer
from cpq_lightning.optim import Budget, GateTrainer
from cpq_lightning.optim.values import Curved, Drawn

OPEN = torch.tensor([[0.9, 0.8], [0.7, 0.6], [0.5, 0.4]], dtype=torch.float64)
ALL = torch.ones(2, dtype=torch.float64)


def column(*losses):
    return -torch.tensor(losses, dtype=torch.float64)[:, None].expand(-1, 2)


@pytest.mark.parametrize("steps", [1, 5, 300])
def test_what_each_step_tells_is_the_mean(steps):
    values = Curved((3, 2))
    for _ in range(steps):
        values.update(column(1.0, 0.25, 0.1), ALL)
    torch.testing.assert_close(values.worth()[:, 0], torch.tensor([1.0, 0.25, 0.1]).double())


def test_a_rare_step_that_tells_of_a_thousand_times_as_much_is_one_of_many():
    values = Curved((1, 2))
    for step in range(400):
        values.update(column(1000.0 if step % 50 == 0 else 1.0), ALL)
    assert values.worth()[0, 0] < 2


def test_a_bit_that_was_never_there_is_guessed():
    values = Curved((3, 2))
    values.update(column(1.0, 0.0, 0.0), ALL)
    assert values.worth()[:, 0].tolist() == pytest.approx([1.0, 0.25, 0.0625])


def test_a_step_without_gradients_changes_nothing():
    for values in (Curved((3, 2)), Drawn((3, 2))):
        values.update(column(1.0, 0.5, 0.2), ALL)
        before = values.of(OPEN, 1.0)
        values.update(column(9.0, 9.0, 9.0), torch.zeros(2).double())
        for a, b in zip(values.of(OPEN, 1.0), before, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_no_scale_of_the_loss_sets_the_pace(scale):
    for kind in (Curved, Drawn):
        values = kind((3, 2))
        for step in range(20):
            values.update(scale * column(1.0, 0.5, 0.2 + 0.01 * step), ALL)
        gradient, unit = values.of(OPEN, 1.0)
        assert (gradient / unit).abs().min() > 0.5
        assert (gradient / unit).abs().max() < 1.1


def test_a_restored_state_goes_on_as_it_was():
    for kind in (Curved, Drawn):
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
        GateTrainer(kinds, [Budget(cost)])
