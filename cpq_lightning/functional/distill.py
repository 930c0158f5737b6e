"""Knowledge distillation: how far a network's class probabilities are from a teacher's."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``tau^2 · KL(softmax(t / tau) || softmax(s / tau))``, the mean over samples (and places), in nats.

    The factor ``tau^2`` keeps the size of the gradient where it is at ``tau = 1``. At 1 it has the same gradient as
    cross-entropy with the teacher's probabilities as labels. Computed in float32 at least.

    Source: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015, section 2.

    Args:
        logits: s, shape (batch, classes, ...).
        teacher_logits: t, of the same shape; no gradient flows to it.
        temperature: tau, over 0.

    Returns:
        A scalar, 0 where both agree.

    Raises:
        ValueError: shapes that differ, or a temperature that is not over 0.

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
    own, teacher = (_classes_last(t) / temperature for t in (logits, teacher_logits.detach()))
    divergence = kl_div(log_softmax(own, 1), log_softmax(teacher, 1), reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def _classes_last(logits: Tensor) -> Tensor:
    """Shape (samples and places, classes)."""
    logits = logits if logits.element_size() >= 4 else logits.float()
    return logits.movedim(1, -1).flatten(0, -2)
