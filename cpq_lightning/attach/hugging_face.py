"""``Conv1D`` of Hugging Face's transformers, a linear layer with the weight of its transposed, through a layer."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from cpq_lightning.attach.decomposed import Decomposed, Part

# Known by name, because the package is not needed otherwise.
_MODULES = ("transformers.pytorch_utils", "transformers.modeling_utils")


class Conv1DByLayer(Decomposed):
    """Mixin that computes ``transformers.pytorch_utils.Conv1D``, of GPT-2 for example, through ``linear``."""

    @classmethod
    def parts_of(cls, module: nn.Module) -> dict[str, Part] | None:
        known = type(module).__name__ == "Conv1D" and type(module).__module__ in _MODULES
        return {"linear": Part("weight", "bias", transposed=True)} if known else None

    @classmethod
    def made_for(cls, base: type[nn.Module]) -> dict[str, Any]:
        @functools.wraps(base.forward)
        def forward(self: Any, x: Tensor) -> Tensor:
            self.claim_layers()
            return self.linear(x)

        return {"forward": forward}
