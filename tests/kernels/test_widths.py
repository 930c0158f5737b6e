"""Widths that are drawn, computed by kernels: functional's numbers, and only the weight kept."""

import pytest
import torch

from cpq_lightning import CPQConfig
from cpq_lightning.functional.resolution import quantize_resolution
from cpq_lightning.kernels.cpu_build import library, use_kernels
from cpq_lightning.kernels.dispatch import QuantGrid, describe
from cpq_lightning.kernels.widths import quantize_widths
from cpq_lightning.nn.quantizer import Quantizer
from tests.grids import zero_point

pytestmark = pytest.mark.skipif(library() is None, reason=describe())

MASKS = {
    "one width": [1, 1, 0, 0],
    "the widest": [1, 1, 1, 1],
    "the narrowest": [1, 0, 0, 0],
    "between two": [1, 1, 0.3, 0],
    "between all": [1, 0.9, 0.5, 0.2],
}


@pytest.mark.parametrize("kind", ["signed", "balanced"])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masks", MASKS)
def test_functional_s_values_and_gradients(masks, dtype, rows, kind):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(6, 700, generator=generator).to(dtype) for _ in range(2))
    shape = (rows, 1)
    scale = torch.linspace(0.1, 0.2, rows).reshape(shape)
    width_scales = torch.tensor([8.3, 4.1, 1.9, 1.0]).reshape(4, 1, 1).expand(4, *shape)
    results = []
    for fused in (True, False):
        leaf = x.clone().requires_grad_()
        a, s = scale.clone().requires_grad_(), (scale / 3).requires_grad_()
        m = torch.tensor(MASKS[masks], dtype=torch.float32).reshape(4, 1, 1).requires_grad_()
        if fused:
            grids = [QuantGrid.of(k, zero_point(kind, k), "expectation") for k in range(2, 6)]
            out = quantize_widths(leaf, a.reshape(-1), s.reshape(-1), m, width_scales.reshape(4, -1), grids)
        else:
            settings = {
                "bits": 5,
                "min_bits": 2,
                "zero_points": [zero_point(kind, k) for k in range(2, 6)],
                "estimator": "expectation",
            }
            out = quantize_resolution(leaf, a, s, m, width_scales=width_scales, **settings)
        out.backward(grad)
        results.append((out, leaf.grad, a.grad, s.grad, m.grad))
    (out, *actual), (expected, *same) = results
    assert torch.equal(out, expected)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 2e-4, "atol": 2e-3}
    torch.testing.assert_close(
        actual[0], same[0], rtol=tolerance["rtol"], atol=2e-5 if dtype == torch.float32 else 2e-2
    )
    for a, b in zip(actual[1:3], same[1:3], strict=True):
        assert float((a - b).abs().max()) <= tolerance["rtol"] * float(grad.float().abs().sum() / rows)
    assert float((actual[3] - same[3]).abs().max()) <= 1e-2 * float(grad.float().abs().sum() * 0.1)


def test_a_learning_quantizer_keeps_its_weight_only():
    weight = torch.nn.Parameter(torch.randn(16, 8, 3, 3))
    config = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True)
    quantizer = Quantizer("weight", config, numel=weight.numel(), channels=16)
    quantizer.fit_weight(weight)
    kept = set()

    def note(t):
        if t.numel() >= weight.numel():
            kept.add(t.untyped_storage().data_ptr())
        return t

    for step in range(8):
        quantizer.noise_step.fill_(step)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = quantizer(weight)
        out.sum().backward()
        with use_kernels(False):
            assert torch.equal(out, quantizer(weight))
    assert kept == {weight.untyped_storage().data_ptr()}
    assert quantizer.gates.logit.grad.abs().max() > 0
