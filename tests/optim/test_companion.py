import torch
from torch import nn

from cpq_lightning.optim import Companion


def setup(make=lambda p: torch.optim.SGD(p, lr=0.1), **settings):
    weight, step = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(1))
    optimizer = make([weight])
    return weight, step, optimizer, Companion(optimizer, [step], lr=0.01, **settings)


def backward(weight, step, factor=1.0):
    loss = factor * ((weight.sum() - 1) ** 2 + (step.sum() - 1) ** 2)
    loss.backward()
    return loss


def test_steps_with_the_users_optimizer():
    weight, step, optimizer, _ = setup()
    backward(weight, step)
    optimizer.step()
    torch.testing.assert_close(step.detach(), torch.tensor([0.01]))
    optimizer.zero_grad()
    assert step.grad is None


def test_the_rate_follows_the_users_in_proportion():
    weight, step, optimizer, companion = setup()
    optimizer.param_groups[0]["lr"] = 0.05
    backward(weight, step)
    optimizer.step()
    assert companion.optimizer.param_groups[0]["lr"] == 0.005


def test_closures_that_are_evaluated_often_do_not_pile_up_gradients():
    weight, step, optimizer, _ = setup(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=5))
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = backward(weight, step)
        seen.append(step.grad.item())
        return loss

    optimizer.step(closure)
    assert len(seen) > 1
    assert len(set(seen)) == 1
    assert step.item() != 0


def test_scaled_gradients_are_unscaled_and_a_skipped_step_moves_nothing():
    moved = []
    for scale in (1.0, 1024.0):
        weight, step, optimizer, companion = setup(grad_scale=lambda scale=scale: scale)
        companion.optimizer = torch.optim.SGD([step], lr=0.01)
        backward(weight, step, factor=scale)
        optimizer.step()
        moved.append(step.item())
    assert moved[0] == moved[1] != 0
    weight, step, optimizer, _ = setup()
    backward(weight, step)
    step.grad.fill_(float("nan"))
    optimizer.step()
    assert step.item() == 0


def test_removed_it_leaves_the_optimizer_as_it_was():
    weight, step, optimizer, companion = setup()
    companion.remove()
    backward(weight, step)
    optimizer.step()
    optimizer.zero_grad()
    assert step.item() == 0
    assert step.grad is not None
