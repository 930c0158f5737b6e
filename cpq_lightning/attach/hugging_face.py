"""``Conv1D`` of Hugging Face's transformers, a linear layer with the weight of its transposed, through a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cpq_lightning.attach.decomposed import Decomposed, Part

# Known by name, because the package is not needed otherwise.
_MODULES = ("transformers.pytorch_utils", "transformers.modeling_utils")


class Conv1DByLayer(Decomposed):
    """Mixin that computes ``transformers.pytorch_utils.Conv1D``, of GPT-2 for example, through ``linear``."""

    @classmethod
    def is_stock(cls, candidate: type) -> bool:
        return candidate.__name__ == "Conv1D" and candidate.__module__ in _MODULES

    @classmethod
    def parts_of(cls, module: nn.Module) -> dict[str, Part]:
        return {"linear": Part("weight", "bias", transposed=True)}

    @classmethod
    def forward_for(cls, stock: type[nn.Module]) -> Callable[..., Any]:
        def forward(self: Any, x: Tensor) -> Tensor:
            self.claim_layers()
            return self.linear(x)

        return forward
