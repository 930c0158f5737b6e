"""``nn.Bilinear`` through a layer: the second input times all matrices of the weight, then times the first input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cpq_lightning.attach.decomposed import Decomposed, Part


class BilinearByLayers(Decomposed):
    r"""Mixin that computes ``nn.Bilinear`` through ``linear``, a layer with the rows of all matrices of the weight.

    .. math:: y_k = x_1^\top (W_k x_2) + b_k

    The inner product, by far the larger one, is the layer's. The outer one is a product of two activations, which
    ``attention=True`` quantizes.
    """

    stock: ClassVar[tuple[type[nn.Module], ...]] = (nn.Bilinear,)

    @classmethod
    def parts_of(cls, module: nn.Module) -> dict[str, Part]:
        return {"linear": Part("weight")}

    @classmethod
    def forward_for(cls, stock: type[nn.Module]) -> Callable[..., Any]:
        def forward(self: Any, input1: Tensor, input2: Tensor) -> Tensor:
            self.claim_layers()
            inner = self.linear(input2).unflatten(-1, (self.out_features, self.in1_features))
            out = torch.matmul(inner, input1.unsqueeze(-1)).squeeze(-1)
            return out if self.bias is None else out + self.bias

        return forward
