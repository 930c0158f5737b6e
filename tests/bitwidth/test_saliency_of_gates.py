"""What gates are told in the backward of what they quantize."""

import pytest
import torch

from cpq_lightning import CPQConfig
from cpq_lightning.functional.saliency import bit_saliency
from cpq_lightning.nn.quantizer import Quantizer

LEARN = {"weight_bits": 5, "min_bits": 2, "learn_bits": True, "act_bits": 5, "min_act_bits": 2, "learn_act_bits": True}


def quantizer(kind, **settings):
    q = Quantizer(kind, CPQConfig(**LEARN | settings), numel=64, channels=8)
    with torch.no_grad():
        q.gates.logits().fill_(20.0)
    return q.train()


def values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def backward(q, x, gradient):
    x = x.clone().requires_grad_()
    q(x).backward(gradient)
    return x.grad, q.gates.logit.grad


def expected(q, x, gradient, **settings):
    widths = range(q.min_bits, q.bits + 1)
    steps = q.scale().detach() * q.width_scale[q.min_bits - 1 : q.bits]
    return -bit_saliency(x, gradient, steps, widths, zero_points=[q.settings.zero_point(k) for k in widths], **settings)


@pytest.mark.parametrize("sharing", ["tensor", "channel"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_gates_of_a_weight_get_what_their_bits_are_worth(sharing, per_channel):
    x, gradient = values(8, 8), torch.randn(8, 8)
    q = quantizer("weight", gate_sharing=sharing, per_channel=per_channel)
    _, found = backward(q, x, gradient)
    wanted = expected(q, x, gradient, by_block=sharing == "channel")
    torch.testing.assert_close(found.reshape(wanted.shape), wanted)


def test_gates_of_an_activation_get_it_from_eight_samples():
    x, gradient = values(32, 3, 4), torch.randn(32, 3, 4)
    q = quantizer("activation")
    q(x)
    _, found = backward(q, x, gradient)
    torch.testing.assert_close(found[:, None], 4 * expected(q, x[::4], gradient[::4]))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("channel_dim", [0, 1])
def test_gates_of_a_large_weight_get_it_from_some_of_its_channels(channel_dim, per_channel):
    shape = (256, 512) if channel_dim == 0 else (512, 256)
    x, gradient = values(*shape), torch.randn(*shape)
    config = CPQConfig(**LEARN, per_channel=per_channel)
    q = Quantizer("weight", config, numel=x.numel(), channels=256, channel_dim=channel_dim)
    with torch.no_grad():
        q.gates.logits().fill_(20.0)
    _, found = backward(q.train(), x, gradient)
    wanted = expected(q, x, gradient, channel_dim=channel_dim, blocks=channel_dim)
    torch.testing.assert_close(found[:, None], wanted, rtol=0.5, atol=0)
    assert not torch.equal(found[:, None], wanted)


def test_what_is_quantized_has_the_gradient_that_it_has_at_a_fixed_width():
    x, gradient = values(8, 8), torch.randn(8, 8)
    fixed = Quantizer("weight", CPQConfig(weight_bits=5), numel=64, channels=8).train()
    found, _ = backward(quantizer("weight"), x, gradient)
    own = x.clone().requires_grad_()
    fixed(own).backward(gradient)
    torch.testing.assert_close(found, own.grad)


def test_of_a_bit_that_is_not_there_nothing_is_told():
    q = quantizer("weight")
    with torch.no_grad():
        q.gates.logits()[1] = -20.0
    _, found = backward(q, values(8, 8), torch.randn(8, 8))
    assert found[0] < 0
    assert found[1:].tolist() == [0, 0]


def test_where_nothing_depends_on_a_bit_it_is_told_so():
    """Or its row would count as one that was never seen, and keep its bits."""
    _, found = backward(quantizer("weight"), values(8, 8), torch.zeros(8, 8))
    assert (found < 0).all()
    assert (found > -1e-20).all()


def test_gates_by_what_is_drawn_have_their_own_gradient():
    x, gradient = values(8, 8), torch.randn(8, 8)
    q = quantizer("weight", gate_estimator="concrete")
    with torch.no_grad():
        q.gates.logits().fill_(0.0)
    _, found = backward(q, x, gradient)
    assert found.abs().max() > 1e-3


def test_one_gate_an_element_and_no_gradient_wanted():
    q = quantizer("weight", gate_sharing="element")
    _, found = backward(q, values(8, 8), torch.randn(8, 8))
    assert (found < 0).all()
    with torch.no_grad():
        assert not q(values(8, 8)).requires_grad


def test_compiled():
    x, gradient = values(8, 8), torch.randn(8, 8)
    q = quantizer("weight")
    _, eager = backward(q, x, gradient)
    q.zero_grad()
    own = x.clone().requires_grad_()
    torch.compile(q, backend="aot_eager")(own).backward(gradient)
    torch.testing.assert_close(q.gates.logit.grad, eager)
