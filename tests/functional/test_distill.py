import pytest
import torch
from torch.nn.functional import cross_entropy, softmax

from cpq_lightning.functional.distill import distillation_loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4)])
def test_it_is_the_mean_divergence_times_the_temperature_squared(shape, temperature):
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    p, q = softmax(teacher / temperature, 1), softmax(student / temperature, 1)
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, temperature=temperature), expected)


def test_at_temperature_1_its_gradient_is_that_of_cross_entropy_with_the_teachers_probabilities():
    student = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(distillation_loss(student, teacher), student)
    (expected,) = torch.autograd.grad(cross_entropy(student, softmax(teacher, 1).detach()), student)
    torch.testing.assert_close(gradient, expected)
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, teacher.detach(), temperature=2.0), student)
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None


def test_half_precision_is_computed_in_float32():
    student, teacher = torch.randn(2, 6, 5)
    loss = distillation_loss(student.bfloat16(), teacher.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distillation_loss(student.bfloat16().float(), teacher.bfloat16().float()))


def test_bad_arguments():
    with pytest.raises(ValueError, match="temperature must be over 0, got 0"):
        distillation_loss(torch.ones(2, 3), torch.ones(2, 3), temperature=0)
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 4\)"):
        distillation_loss(torch.ones(2, 3), torch.ones(2, 4))
