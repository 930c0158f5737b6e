"""The update of learned gates."""

import pytest
import torch

from cpq_lightning import CPQConfig
from cpq_lightning.bitwidth.cost import WidthCost
from cpq_lightning.bitwidth.gate_update import Budget, GateUpdate
from cpq_lightning.functional.dropbits import BETA
from cpq_lightning.nn.quantizer import Quantizer

CONFIG = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, gate_estimator="concrete")


def trainer(numels=(100, 100), config=CONFIG, channels=4):
    quantizers = [Quantizer("weight", config, key=i, numel=n, channels=channels) for i, n in enumerate(numels)]
    rows = [q.gates.rows for q in quantizers]
    shares = torch.tensor([n / r for n, r in zip(numels, rows, strict=True) for _ in range(r)]).double()
    n = len(shares)
    budget = Budget(WidthCost(shares / shares.sum(), torch.arange(n), torch.full((n,), n), 0.0))
    return GateUpdate(quantizers, [budget]), budget


def silence(gates):
    return [torch.zeros_like(q.gates.logit) for q in gates.quantizers]


def test_every_step_arrives_at_its_target():
    gates, budget = trainer((300, 100, 20))
    cost = budget.cost(gates.expected(1.0, BETA))
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        cost = max(3.0, cost - 0.03)
        noise = [0.1 * torch.randn(q.gates.logit.shape, generator=generator) for q in gates.quantizers]
        gates.step(noise, [cost], 0.3, 1.0, BETA)
        assert budget.cost(gates.expected(1.0, BETA)) == pytest.approx(cost, abs=1e-3)
    assert cost == 3.0


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_logits_move_at_a_pace_that_no_share_and_no_scale_of_the_loss_sets(scale):
    gates, _ = trainer((10, 100_000))
    before = gates.theta()
    for _ in range(5):
        gates.step([g + scale for g in silence(gates)], [8.0], 0.1, 1.0, BETA)
    gone = before - gates.theta()
    assert gone.abs().max() > 0.1
    # With nothing but the penalty, a layer of ten weights keeps pace with one of a hundred thousand.
    gates, _ = trainer((10, 100_000))
    before = gates.theta()
    for _ in range(5):
        gates.step(silence(gates), [2.0], 0.1, 1.0, BETA)
    gone = before - gates.theta()
    torch.testing.assert_close(gone, torch.full_like(gone, 0.5), rtol=1e-5, atol=0)


def test_what_the_loss_needs_stays_open_and_the_rest_pays():
    gates, budget = trainer((100, 100))
    cost = budget.cost(gates.expected(1.0, BETA))
    for _ in range(200):
        cost = max(4.0, cost - 0.05)
        needed, useless = silence(gates)
        gates.step([needed - 1.0, useless + 0.01 * torch.randn_like(useless)], [cost], 0.2, 1.0, BETA)
    first, second = gates.expected(1.0, BETA).tolist()
    assert first > 5.5
    assert second < 2.6


def test_a_target_above_opens_gates_again():
    gates, budget = trainer()
    for target in (3.0, 6.0):
        for _ in range(100):
            gates.step(silence(gates), [target], 0.3, 1.0, BETA)
        assert budget.cost(gates.expected(1.0, BETA)) == pytest.approx(target, abs=0.01)


def test_settled_gates_are_certain():
    gates, _ = trainer()
    widths = torch.tensor([5.0, 2.0]).double()
    for _ in range(100):
        gates.settle(widths, 0.2, 0.05, 0.2)
    torch.testing.assert_close(gates.expected(0.05, 0.2), widths, rtol=0, atol=1e-9)
    assert torch.equal(gates.decided(0.05, 0.2), widths)


def test_channels_have_rows_of_their_own():
    config = CPQConfig(weight_bits=4, min_bits=2, learn_bits=True, gate_sharing="channel", per_channel=True)
    gates, _budget = trainer((40, 80), config, channels=4)
    assert gates.theta().shape == (2, 8)
    gates.write(torch.arange(16).reshape(2, 8).double())
    assert torch.equal(gates.theta(), torch.arange(16).reshape(2, 8).double())
    gates.fix(torch.tensor([2, 3, 4, 2, 4, 4, 4, 4]).double())
    assert gates.quantizers[0].decided_widths().tolist() == [2, 3, 4, 2]
    assert gates.quantizers[1].decided_widths().tolist() == [4]


def test_its_state_goes_on_where_it_was():
    one, _ = trainer()
    two, _ = trainer()
    push = [torch.full_like(g, 0.3) for g in silence(one)]
    for _ in range(3):
        one.step(push, [5.0], 0.1, 1.0, BETA)
    two.load_state_dict(one.state_dict())
    two.write(one.theta())
    for gates in (one, two):
        gates.step(push, [4.9], 0.1, 1.0, BETA)
    assert torch.equal(one.theta(), two.theta())


def test_rows_that_never_had_a_gradient_follow_the_mean_of_the_others():
    """A teacher under ``no_grad`` takes no bits from the network that trains."""
    gates, budget = trainer((300, 100, 400))
    for step in range(300):
        target = max(4.0, 7.5 - 0.02 * step)
        # The first row needs its bits, the second does not, the third is never heard of.
        gates.step([torch.full_like(gates.quantizers[0].gates.logit, -1.0), *silence(gates)[1:2], None],
                   [target], 0.3, 1.0, BETA)  # fmt: skip
    widths = gates.expected(1.0, BETA)
    assert budget.cost(widths) == pytest.approx(4.0, abs=1e-3)
    mean = (300 * widths[0] + 100 * widths[1]) / 400
    assert widths[2] == pytest.approx(float(mean), abs=0.1)
    assert widths[0] > widths[1] + 1
    assert gates.updates.tolist() == [300, 300, 0]


def test_nothing_moves_before_there_is_any_gradient():
    gates, _ = trainer()
    before = gates.theta()
    gates.step([None, None], [3.0], 0.3, 1.0, BETA)
    assert torch.equal(gates.theta(), before)
    assert not gates.updated


def test_a_changed_width_costs_what_its_bit_is_worth_where_that_is_told():
    gates, _ = trainer((100, 100, 100), CPQConfig(weight_bits=5, min_bits=2, learn_bits=True))
    gates.step([-torch.tensor([4.0, 2.0, 1.0]), -torch.tensor([0.4, 0.2, 0.1]), None], [4.0], 0.1, 1.0, BETA)
    widths = torch.tensor([4.0, 3.0, 4.0]).double()
    less, more = gates.prices(widths, -1, BETA), gates.prices(widths, 1, BETA)
    assert less[:2].tolist() == pytest.approx([2.0, 0.4])
    assert more[:2].tolist() == pytest.approx([-1.0, -0.2])
    # Of the third nothing was told.
    assert less[2] > 0
    assert more[2] > 0
    # Drawn gates tell how far logits have gone.
    gates, _ = trainer()
    gates.step([g + 1.0 for g in silence(gates)], [4.0], 0.1, 1.0, BETA)
    assert gates.prices(widths[:2], 1, BETA).min() > 0
