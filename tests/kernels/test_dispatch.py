"""Which implementation a question names, and which one a forward runs."""

import pytest
import torch

from cpq_lightning import CPQConfig
from cpq_lightning.kernels import dispatch
from cpq_lightning.kernels.cpu_build import library, use_kernels
from cpq_lightning.kernels.dispatch import choose
from cpq_lightning.kernels.fused import quantize
from cpq_lightning.nn.quantizer import Quantizer

needs_library = pytest.mark.skipif(library() is None, reason=dispatch.describe())
X = torch.linspace(-1, 1, 48).reshape(4, 3, 4)
# The tensor, the dimension of the scales (None for a single one), and words of the reason against the kernel.
CASES = {
    "one scale": (X, None, None),
    "bfloat16": (X.bfloat16(), None, None),
    "rows": (X, 0, None),
    "rows of a transposed tensor": (X.transpose(0, 2), 0, "gaps in memory"),
    "columns": (X, 1, "one for each row"),
    "float64": (X.double(), None, "torch.float32 and torch.bfloat16"),
    "no element": (X[:0], None, "is empty"),
    "masks": (X, None, "masks"),
}


@needs_library
@pytest.mark.parametrize("name", CASES)
def test_a_forward_runs_what_the_question_names(name, monkeypatch):
    x, dim, words = CASES[name]
    launches = []
    monkeypatch.setattr(dispatch.cpu, "forward", lambda x, *others: launches.append(x) or torch.empty_like(x))
    scale = torch.full([x.shape[d] if d == dim else 1 for d in range(x.dim())], 0.25)
    masks = torch.tensor([1.0, 0.5]).reshape(2, 1, 1, 1) if name == "masks" else None
    quantize(x, scale, scale / 3, masks, bits=4, min_bits=3, zero_point=8, estimator="argmax")
    choice = choose(x.to("meta"), scale.numel(), dim or 0, masks is not None, device="cpu")
    assert choice.implementation == ("cpu" if launches else "functional")
    assert (words is None) == bool(launches)
    assert words is None or any(words in reason for reason in choice.reasons["cpu"])
    assert choice.reasons["triton"] == ["kernels for cuda do not run on cpu"]


def test_all_reasons_are_given_for_any_device():
    with use_kernels(False):
        assert choose(X.double(), 3, 1).reasons["cpu"] == [
            "kernels take one scale, or one for each row (dimension 0)",
            "kernels for cpu take torch.float32 and torch.bfloat16, and the tensor is torch.float64",
        ]
        assert choose(X, device="cuda").reasons["triton"] == ["kernels are switched off"]


@needs_library
@pytest.mark.parametrize(
    ("settings", "shape", "implementation"),
    [
        ({}, {}, "cpu"),
        ({"min_bits": 2}, {}, "functional"),
        ({"min_bits": 2, "nesting": "resolution"}, {}, "cpu"),
        ({"per_channel": True}, {"channels": 4}, "cpu"),
        ({"per_channel": True}, {"channels": 3, "channel_dim": 1}, "functional"),
    ],
)
def test_a_quantizer_names_its_implementation_before_it_has_a_range(settings, shape, implementation):
    quantizer = Quantizer("weight", CPQConfig(**settings), **shape)
    assert quantizer.implementation(X).implementation == implementation
    expected = implementation if shape else "cpu"
    assert quantizer.eval().implementation(X).implementation == expected
