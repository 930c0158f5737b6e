"""Knowledge distillation: divergence of a student's class probabilities from its teacher's."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


def distillation_loss(logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``tau^2 · KL(softmax(t / tau) || softmax(s / tau))``, the mean over samples (and positions), in nats.

    The factor ``tau^2`` keeps the magnitude of the gradient about the same for every ``tau``. At ``tau = 1`` the
    gradient is that of cross-entropy with the teacher's probabilities as labels. Computed in float32 or float64.

    Source: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015, section 2.

    Args:
        logits: ``s``, the student's logits, shape (batch, classes, ...).
        teacher_logits: ``t``, same shape; it gets no gradient.
        temperature: ``tau``, over 0.

    Returns:
        A scalar; 0 if both distributions are equal.

    Raises:
        ValueError: the shapes differ, or the temperature is not over 0.

    Example:
        >>> import torch
        >>> float(distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])))
        0.0
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be over 0, got {temperature}.")
    if logits.shape != teacher_logits.shape or logits.dim() < 2:
        raise ValueError(
            "logits and teacher_logits must both be of shape (batch, classes, ...), got "
            f"{tuple(logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    student, teacher = (_classes_last(t) / temperature for t in (logits, teacher_logits.detach()))
    divergence = kl_div(log_softmax(student, 1), log_softmax(teacher, 1), reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def _classes_last(logits: Tensor) -> Tensor:
    """Reshape to (samples × positions, classes), in float32 or float64."""
    logits = logits if logits.element_size() >= 4 else logits.float()
    return logits.movedim(1, -1).flatten(0, -2)
