"""How a model is called with tensors, tuples, dicts and batches of them."""

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate
from cpq_lightning.attach.calls import as_batch_call, as_call
from cpq_lightning.attach.layers import quantizers

X, Y = torch.randn(4, 5), torch.zeros(4)
Pair = namedtuple("Pair", "u v")


def model(forward):
    net = nn.Module()
    net.forward = forward
    return net


ONE = model(lambda batch: None)
TWO = model(lambda x, lengths: None)
NAMED = model(lambda x, *, mask=None: None)
ANY = model(lambda *args, **kwargs: None)


@pytest.mark.parametrize(
    ("net", "inputs", "expected"),
    [
        (ONE, X, ((X,), {})),
        (TWO, (X, Y), ((X, Y), {})),
        (TWO, [X, Y], ((X, Y), {})),
        (TWO, {"x": X, "lengths": Y}, ((), {"x": X, "lengths": Y})),
        (NAMED, UserDict(x=X, mask=Y), ((), {"x": X, "mask": Y})),
        (ANY, {"a": X}, ((), {"a": X})),
        # What the forward takes as its one argument.
        (ONE, {"image": X, "mask": Y}, (({"image": X, "mask": Y},), {})),
        (ONE, {1: X}, (({1: X},), {})),
        (ONE, (X, Y), (((X, Y),), {})),
        (ONE, Pair(X, Y), ((Pair(X, Y),), {})),
        (ONE, [{"image": X}], (({"image": X},), {})),
    ],
)
def test_inputs_are_arguments_or_the_one_argument(net, inputs, expected):
    assert as_call(net, inputs) == expected


@pytest.mark.parametrize(
    ("net", "batch", "expected"),
    [
        (ONE, X, ((X,), {})),
        (ONE, (X, Y), ((X,), {})),
        (ONE, ({"image": X}, Y), (({"image": X},), {})),
        (ONE, {"image": X}, (({"image": X},), {})),
        (ONE, ((X, Y), Y), (((X, Y),), {})),
        (TWO, ((X, Y), Y), ((X, Y), {})),
        (TWO, ({"x": X, "lengths": Y}, Y), ((), {"x": X, "lengths": Y})),
        (NAMED, {"x": X, "mask": Y}, ((), {"x": X, "mask": Y})),
    ],
)
def test_the_first_element_of_a_batch_is_the_input(net, batch, expected):
    assert as_batch_call(net, batch) == expected


@pytest.mark.parametrize("call", [as_call, as_batch_call])
def test_a_key_of_a_parameters_name_means_arguments_by_name(call):
    with pytest.raises(TypeError, match=r"cannot be called with \(x: Tensor, msk: Tensor\) .*'msk'"):
        call(NAMED, {"x": X, "msk": Y})


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, batch, *, scale=1.0):
        (x,) = batch["x"]
        return self.b(self.a(x).relu()) @ (batch["y"] * scale).mT


def test_calibration_and_example_inputs_take_containers():
    inputs = {"x": [torch.randn(4, 3, 5)], "y": torch.randn(4, 3, 5)}
    for example in (inputs, {"batch": inputs, "scale": 2.0}, (inputs,)):
        net = attach(Nested(), CPQConfig(attention=True), example_inputs=example)
        assert [q.kind for name, q in quantizers(net) if "operand" in name] == ["activation"] * 2
        for batch in (inputs, (inputs, Y), {"batch": inputs}):
            calibrate(net, [batch])
            assert all(q.fitted for _, q in quantizers(net))


def test_calibration_says_what_the_forward_takes_instead():
    with pytest.raises(TypeError, match=r"^batches: Nested.forward\(batch, \*, scale=1.0\) cannot .*forward="):
        calibrate(attach(Nested()), [{"batch": {}, "other": X}])
    with pytest.raises(ValueError, match="a batch is an empty tuple"):
        calibrate(attach(Nested()), [()])
