"""A first forward is like every other: in threads, under activation checkpointing, before a backward."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from cpq_lightning import CPQConfig, attach, calibrate
from cpq_lightning.attach.attach import set_noise_step
from cpq_lightning.attach.audit import Audit
from cpq_lightning.attach.layers import quantized_layers
from tests.models import IMAGES, convnet, with_own_forward

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))


def test_a_loaded_model_answers_from_eight_threads_at_once():
    torch.manual_seed(0)
    state = calibrate(attach(convnet()), [IMAGES]).state_dict()
    for _ in range(8):
        model = attach(convnet())
        model.load_state_dict(state)
        model.eval()
        with ThreadPoolExecutor(8) as pool:
            found = [future.result() for future in [pool.submit(model, IMAGES[:8]) for _ in range(16)]]
        assert all(output.equal(found[0]) for output in found)


def test_calibration_in_a_thread_changes_nothing_in_another():
    model = calibrate(attach(convnet()), [IMAGES]).eval()
    wanted, twin = model(IMAGES), copy.deepcopy(model)
    seen = []

    def forward(batch):
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(twin, IMAGES).result())
        return twin(batch)

    calibrate(twin, [IMAGES], forward=forward)
    assert all(output.equal(wanted) for output in seen)


class Blocks(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3))
        self.how = how

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.how is None else checkpoint(block, x, use_reentrant=self.how)
        return x


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_from_the_first_step_on(reentrant, calibrated):
    steps = []
    for how in (None, reentrant):
        torch.manual_seed(0)
        model = attach(Blocks(how), CPQConfig(weight_bits=4, min_bits=3, keep_prob=0.7))
        if calibrated:
            calibrate(model, [X])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            x = X.clone().requires_grad_()
            optimizer.zero_grad()
            out = model.train()(x)
            out.square().mean().backward()
            steps.append((out.detach(), x.grad, {n: p.grad.clone() for n, p in model.named_parameters()}))
            optimizer.step()
    for plain, checkpointed in zip(steps[:3], steps[3:], strict=True):
        torch.testing.assert_close(checkpointed, plain)


class OtherOrder(nn.Module):
    """Registered in another order than called, and called twice before a backward."""

    def __init__(self):
        super().__init__()
        self.last, self.stem, self.body = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.body(self.stem(x).relu()).relu())


@pytest.mark.parametrize("act_bits", [4, None])
def test_nothing_changes_between_a_forward_and_its_backward(act_bits):
    torch.manual_seed(0)
    model = attach(OtherOrder(), CPQConfig(act_bits=act_bits)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    widths = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(X).square().mean() + model(-X).square().mean()
        inside = {n: layer.weight_quantizer.bits for n, layer in quantized_layers(model)}
        loss.backward()
        optimizer.step()
        widths.append(inside)
    # Guessed by registration at first, as called from the second step on.
    assert widths[0] == {"last": 8, "stem": 4, "body": 8}
    assert widths[1] == widths[2] == {"last": 8, "stem": 8, "body": 4}


# What multiplies by a weight is known or named ----------------------------------------------------------------------


@torch.library.custom_op("cpq_tests::times", mutates_args=())
def times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return F.linear(x, weight)


class Holder(nn.Module):
    """A Parameter, and what is done with it."""

    def __init__(self, multiply, *shape):
        super().__init__()
        self.matrix, self.multiply = nn.Parameter(torch.randn(*shape or (8, 8))), multiply

    def forward(self, x):
        return self.multiply(x, self.matrix)


class Cell(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        out = self.cell(x)
        return out[0] if isinstance(out, tuple) else out


class Deformed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torchvision.ops.DeformConv2d(1, 1, 1)

    def forward(self, x):
        images = x[:, None, None, :]
        return self.conv(images, torch.zeros(len(x), 2, 1, 8))[:, 0, 0]


def _grouped(x, w):
    ends = torch.tensor([4, 8], dtype=torch.int32)
    try:
        return torch._grouped_mm(x.bfloat16(), w.bfloat16(), offs=ends).float()
    except NotImplementedError:
        pytest.skip("torch 2.8 has no grouped products on CPUs")


NAMED = {
    "LSTMCell": lambda: Cell(with_own_forward(nn.LSTMCell)(8, 8)),
    "GRUCell": lambda: Cell(with_own_forward(nn.GRUCell)(8, 8)),
    "RNNCell": lambda: Cell(with_own_forward(nn.RNNCell)(8, 8)),
    "Bilinear": lambda: Holder(lambda x, w: F.bilinear(x, x, w), 8, 8, 8),
    "DeformConv2d": Deformed,
    "custom operator": lambda: Holder(times),
    "autograd.Function": lambda: Holder(Function.apply),
    "addmm": lambda: Holder(lambda x, w: torch.addmm(torch.zeros(8), x, w)),
    "einsum": lambda: Holder(lambda x, w: torch.einsum("bi,ij->bj", x, w)),
    "grouped products": lambda: Holder(_grouped, 2, 8, 8),
    "experts": lambda: Holder(lambda x, w: torch.bmm(x[None].expand(2, -1, -1), w[[1, 0]])[0], 2, 8, 8),
    "scaled": lambda: Holder(lambda x, w: F.linear(x, w * 0.5)),
    "stacked": lambda: Holder(lambda x, w: x @ torch.stack([w, w])[1]),
    "cast and turned": lambda: Holder(lambda x, w: (x.double() @ w.double().t()).float()),
}


@pytest.mark.parametrize("name", NAMED)
def test_products_that_no_layer_stands_for_are_named(name):
    model = attach(nn.Sequential(nn.Linear(8, 8), NAMED[name](), nn.Linear(8, 2)))
    with pytest.warns(UserWarning, match=r"matrix products with a weight stayed unquantized.* 1"):
        calibrate(model, [X])
    with Audit(model) as audit:
        model(X)
    assert {where.partition(".")[0] for where, _, what in audit.report.unquantized if "weight" in what} == {"1"}


def test_what_multiplies_by_no_weight_is_not_named():
    quiet = [
        nn.LayerNorm(8),
        nn.BatchNorm1d(8),
        nn.PReLU(8),
        Holder(lambda x, w: x * w[0] + w[1]),
        Holder(lambda x, w: x + F.embedding(torch.arange(len(x)) % 8, w)),
        nn.Dropout(0.1),
    ]
    model = attach(nn.Sequential(nn.Linear(8, 8), *quiet, nn.Linear(8, 2)), CPQConfig(first_last_bits=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [X])
        model.train()(X).sum().backward()
        model.eval()(X)


@pytest.mark.parametrize("how", ["calibrated", "called"])
@pytest.mark.parametrize(
    ("config", "nowhere"),
    [
        (CPQConfig(weight_bits=4, act_bits=4), "weight_bits=4 or act_bits=4"),
        (CPQConfig(weight_bits=8, act_bits=4), "act_bits=4"),
        (CPQConfig(weight_bits=4, act_bits=None), "weight_bits=4"),
        (CPQConfig(weight_bits=8, act_bits=8), None),
        (CPQConfig(first_last_bits=None), None),
        (CPQConfig(overrides={"0": {"weight_bits": 4}}), None),
        (CPQConfig(levels_from={n: {"weight": 3, "activation": 4} for n in ("0", "2")}), None),
    ],
)
def test_a_warning_says_where_no_layer_has_the_bits_that_the_config_asks_for(how, config, nowhere):
    model = attach(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            calibrate(model, [X]) if how == "calibrated" else model(X)
    said = [str(w.message) for w in caught if "first or last ones" in str(w.message)]
    assert len(said) == (nowhere is not None)
    assert nowhere is None or f"first_last_bits=8: no layer has {nowhere}. Set first_last_bits=None" in said[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_that_is_checkpointed_whole_draws_the_same_gates_again(reentrant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    attach(model, CPQConfig(min_bits=2, keep_prob=0.5, first_last_bits=None))
    x = torch.randn(4, 8)
    calibrate(model, [x]).train()
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        set_noise_step(model, 5)
        given = x.clone().requires_grad_()
        run(given).square().sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)
