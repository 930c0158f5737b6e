"""A quantized layer's product as one operation: the same numbers as the ordinary path, and nothing more kept."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cpq_lightning import CPQConfig, attach, calibrate
from cpq_lightning.attach import layers
from cpq_lightning.attach.attach import set_noise_step
from cpq_lightning.kernels.cpu_build import library, use_kernels
from cpq_lightning.kernels.dispatch import QuantGrid, describe
from cpq_lightning.kernels.product import Convolution, Operand, product
from tests.marks import TORCH

pytestmark = pytest.mark.skipif(library() is None, reason=describe())

LAYERS = {
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (4, 6, 9, 7)),
    "strided, dilated, grouped": (
        lambda: nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2, groups=2, bias=False),
        (4, 6, 9, 7),
    ),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (4, 6, 9, 7)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), (4, 6, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 8, 2), (2, 3, 4, 5, 3)),
    "linear": (lambda: nn.Linear(6, 8), (10, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 8), (4, 5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), (4, 5, 6)),
}
CONFIGS = {
    "default": CPQConfig(first_last_bits=None),
    "argmax": CPQConfig(first_last_bits=None, weight_estimator="argmax", act_estimator="argmax"),
    "weights only": CPQConfig(first_last_bits=None, act_bits=None),
    "one step a channel": CPQConfig(first_last_bits=None, per_channel=True, weight_bits=2),
    "learned": CPQConfig(first_last_bits=None, weight_bits=8, min_bits=2, learn_bits=True),
}


@contextmanager
def ordinary_path(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(layers, "_is_plain_product", lambda layer, stock, input: False)
        yield


def is_taken_over(layer, x, monkeypatch):
    """Whether a forward runs as one operation."""
    calls = []
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(layers, "product", lambda *operands: calls.append(operands) or product(*operands))
        layer(x)
    return bool(calls)


def quantized(make, shape, config=CONFIGS["default"], **to):
    torch.manual_seed(0)
    x = torch.randn(shape).relu().to(**to)
    model = calibrate(attach(nn.Sequential(make()), config), [x.float()]).train().to(**to)
    with torch.no_grad():
        model(x)
    return model, x


def step(model, x, context=nullcontext):
    """Output, input's gradient and all parameters' gradients."""
    x = x.clone().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    set_noise_step(model, 0)
    with context():
        out = model(x)
    torch.manual_seed(1)
    (out * torch.randn_like(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_equal(actual, same):
    for a, b in zip(actual, same, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_same_to_the_bit(layer, config, monkeypatch):
    model, x = quantized(*LAYERS[layer], CONFIGS[config])
    # What only the weight's quantizer does has derivatives of all orders in the input, for penalties on gradients.
    assert is_taken_over(model[0], x, monkeypatch) == (config != "weights only")
    actual = step(model, x)
    with ordinary_path(monkeypatch):
        assert_equal(actual, step(model, x))


@pytest.mark.parametrize("layer", ["conv2d", "linear on tokens"])
@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_halves(layer, kind, monkeypatch):
    autocast = kind == "autocast"
    model, x = quantized(*LAYERS[layer], dtype=torch.float32 if autocast else torch.bfloat16)
    assert is_taken_over(model[0], x, monkeypatch)
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else nullcontext
    actual = step(model, x, context)
    assert actual[0].dtype == torch.bfloat16
    with ordinary_path(monkeypatch):
        assert_equal(actual, step(model, x, context))


@pytest.mark.parametrize("config", ["default", "one step a channel"])
def test_channels_last(config, monkeypatch):
    model, x = quantized(*LAYERS["conv2d"], CONFIGS[config])
    model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    actual = step(model, x)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    with ordinary_path(monkeypatch):
        assert_equal(actual, step(model, x))


def test_an_input_without_a_gradient_and_a_frozen_weight():
    model, x = quantized(*LAYERS["conv2d"])
    model[0].weight.requires_grad_(False)
    model(x).sum().backward()
    assert model[0].weight.grad is None
    assert all(
        p.grad is not None for q in (model[0].weight_quantizer, model[0].input_quantizer) for p in q.parameters()
    )


class Masks(TorchDispatchMode):
    """Which gradients a convolution's backward is asked for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.seen.append(list(args[-1]))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("frozen", ["layer", "input"])
def test_no_gradient_is_computed_that_nobody_wants(frozen):
    model, x = quantized(lambda: nn.Conv2d(6, 8, 3, bias=False), (4, 6, 9, 7))
    if frozen == "layer":
        model.requires_grad_(False)
    else:
        model[0].input_quantizer.requires_grad_(False)
    with Masks() as masks:
        model(x.requires_grad_(frozen == "layer")).sum().backward()
    assert masks.seen == [[True, False, False] if frozen == "layer" else [False, True, False]]


@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_a_bias_alone_is_trained(name, monkeypatch):
    model, x = quantized(*LAYERS[name])
    model.requires_grad_(False)
    model[0].bias.requires_grad_(True)

    def gradient():
        model[0].bias.grad = None
        model(x).square().sum().backward()
        return model[0].bias.grad

    actual = gradient()
    with ordinary_path(monkeypatch):
        torch.testing.assert_close(actual, gradient())


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [2, (2,), (2, 1)])
def test_geometry_in_all_the_ways_that_torch_takes_it(name, value, monkeypatch):
    model, x = quantized(lambda: nn.Conv2d(6, 8, 3), (4, 6, 9, 7))
    setattr(model[0], name, value)
    actual = step(model, x)
    with ordinary_path(monkeypatch):
        assert_equal(actual, step(model, x))


def test_a_bias_that_is_no_parameter():
    model, x = quantized(*LAYERS["conv2d"])
    expected = model(x)
    bias = model[0].bias.detach()
    del model[0].bias
    model[0].register_buffer("bias", bias)
    assert torch.equal(model(x), expected)


def test_an_input_that_is_not_contiguous(monkeypatch):
    model, x = quantized(*LAYERS["linear on tokens"])
    x = torch.randn(5, 4, 6).transpose(0, 1)
    actual = step(model, x)
    with ordinary_path(monkeypatch):
        assert_equal(actual, step(model, x))


def test_parameters_that_mixed_precision_has_cast():
    model, x = quantized(*LAYERS["conv2d"])
    q = model[0].input_quantizer
    grads = []
    for kernels in (True, False):
        halves = {n: p.detach().bfloat16().requires_grad_() for n, p in q.named_parameters()}
        with use_kernels(kernels):
            torch.func.functional_call(q, halves, (x,)).square().sum().backward()
        grads.append([p.grad.float() for p in halves.values()])
    torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-4)


def test_a_recomputed_forward_takes_the_same_way_as_the_first_one_that_fits_ranges():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 9, 7, requires_grad=True)
    model = attach(nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), CONFIGS["default"]).train()
    model(x)
    for layer in (model[0], model[2]):
        layer.input_quantizer.configure(fitted=False)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert x.grad.isfinite().all()


def test_what_is_begun_with_kernels_ends_with_them():
    model, x = quantized(*LAYERS["conv2d"])
    out = model(x).sum()
    with use_kernels(False):
        out.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_checkpointed_and_copied(monkeypatch):
    model, x = quantized(*LAYERS["conv2d"])
    actual = step(model, x)
    again = copy.deepcopy(model)
    assert_equal(actual, step(again, x))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = again

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    assert_equal(actual, step(Checkpointed(), x))


class Same(nn.Conv2d):
    """A layer with a forward of its own."""

    def forward(self, input):
        return super().forward(input)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Same(6, 8, 3),
        lambda: nn.Conv2d(6, 8, 3, padding="same"),
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
        lambda: nn.ConvTranspose2d(6, 8, 3),
    ],
)
def test_layers_that_do_more_take_the_ordinary_path(make, monkeypatch):
    model, x = quantized(make, (4, 6, 9, 7))
    assert not is_taken_over(model[0], x, monkeypatch)
    assert all(g is not None for g in step(model, x))


def test_what_watches_a_quantizer_or_changes_what_it_does_is_obeyed(monkeypatch):
    model, x = quantized(*LAYERS["conv2d"])
    layer = model[0]
    seen = []
    handles = [
        q.register_forward_hook(lambda *_: seen.append(1)) for q in (layer.weight_quantizer, layer.input_quantizer)
    ]
    assert not is_taken_over(layer, x, monkeypatch)
    assert len(seen) == 2
    handles[0].remove()
    assert is_taken_over(layer, x, monkeypatch)
    assert len(seen) == 3
    handles[1].remove()
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        quantizer.configure(active=False)
    assert not is_taken_over(layer, x, monkeypatch)
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        quantizer.configure(active=True)
    assert is_taken_over(layer, x, monkeypatch)
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        quantizer.register_full_backward_hook(lambda *_: None)
    assert not is_taken_over(layer, x, monkeypatch)
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        quantizer._backward_hooks.clear()
        quantizer.forward = quantizer.forward
    assert not is_taken_over(layer, x, monkeypatch)
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        del quantizer.forward
    with use_kernels(False):
        assert not is_taken_over(layer, x, monkeypatch)
    assert not is_taken_over(layer, x[:0], monkeypatch)
    assert model(x[:0]).shape[0] == 0


# Guards that ask no clock ---------------------------------------------------------------------------------------------


def kept_bytes(model, x, labels):
    """Bytes of unique storages that autograd keeps, parameters, buffers and the batch left out."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x, labels)}
    kept = {}

    def note(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        cross_entropy(model(x), labels).backward()
    return sum(kept.values())


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_no_more_is_kept_for_backward_than_in_full_precision(name):
    torch.manual_seed(0)
    x, labels = torch.randn(8, 3, 64, 64), torch.randint(0, 10, (8,))
    size = {"img_size": 64} if "vit" in name else {}
    plain = timm.create_model(name, num_classes=10, **size).train()
    model = calibrate(attach(copy.deepcopy(plain), CPQConfig()), [x]).train()
    model(x)
    assert kept_bytes(model, x, labels) <= 1.05 * kept_bytes(plain, x, labels)


class Calls(TorchDispatchMode):
    """Counts what the dispatcher is asked for, and what of it is as large as the input."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.count = self.large = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = out if isinstance(out, tuple | list) else (out,)
        self.count += 1
        self.large += sum(isinstance(t, torch.Tensor) and t.numel() >= self.size for t in made)
        return out


def test_a_quantizer_costs_few_calls_and_one_of_the_tensor_s_size_each_way():
    model, x = quantized(*LAYERS["conv2d"])
    plain = nn.Sequential(LAYERS["conv2d"][0]())
    counts, large = [], []
    for m in (model, plain):
        leaf = x.clone().requires_grad_()
        # The layer alone: what the model's hooks look at in its first forwards is no part of it.
        with Calls(x.numel()) as forward:
            out = m[0](leaf)
        with Calls(x.numel()) as backward:
            out.sum().backward()
        counts.append((forward.count, backward.count))
        large.append((forward.large, backward.large))
    (forward, backward), (plain_forward, plain_backward) = counts
    # The quantized input, once for the product and once for its backward; gradients take each other's places.
    assert [a - b for a, b in zip(*large, strict=True)] == [1, 1]
    # Steps and noises of two quantizers are a few numbers each, but each number takes a call; with torch 2.8 two more.
    assert forward - plain_forward <= 2 * 20
    assert backward - plain_backward <= 2 * 32


def test_compiled_it_is_one_graph_that_is_compiled_once_and_gives_the_same():
    make = lambda: nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 35, 4))  # noqa: E731
    model, x = quantized(make, (4, 6, 9, 7))
    actual = step(model, x)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    names = ["out", "x", *(name for name, _ in model.named_parameters())]
    for _ in range(3):
        for name, a, b in zip(names, actual, step(compiled, x), strict=True):
            # The last step to the quantizer's own parameters is a few operations of torch here, and one of C there.
            tolerance = {"rtol": 1e-5, "atol": 1e-9} if "quantizer" in name else {"rtol": 0, "atol": 0}
            if TORCH < (2, 9):
                # It compiles a convolution's gradient to another order of sums.
                tolerance = {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(a, b, **tolerance)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("convolution", [True, False])
def test_operators_are_well_defined(convolution):
    ops = torch.ops.cpq_lightning
    x, weight = (
        (torch.randn(3, 4, 5, 5), torch.randn(6, 4, 3, 3)) if convolution else (torch.randn(3, 4), torch.randn(6, 4))
    )
    scale = torch.tensor([0.3])
    scales = torch.full((6, *[1] * (weight.dim() - 1)), 0.3)
    grid = [4, 16, 1]
    geometry = [1, 1, 0, 0, 1, 1, 1] if convolution else []
    args = (x, weight, torch.randn(6), scale, scales, grid, grid, geometry, None)
    # None of them has an autograd formula: they are called within one.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.product, args, test_utils=checks)
    out = ops.product(*args)
    sides = (x, weight, scale, scale / 3, scales, scales / 3, grid, grid, geometry, None)
    torch.library.opcheck(ops.product_backward, (torch.randn_like(out), *sides, [True] * 3), test_utils=checks)
    torch.library.opcheck(ops.quantize, (x, scale, *grid[:2]), test_utils=checks)
    torch.library.opcheck(ops.quantize_backward, (x, x.clone(), scale, scale / 3, *grid[:2], True), test_utils=checks)


def test_operands_may_come_quantized():
    x, weight, scale = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([[0.3]])
    grid = QuantGrid.of(4, 8, "expectation")
    both = product(Operand(x, scale, scale / 3, grid), Operand(weight, scale, scale / 3, grid), None, None)
    mixed = product(
        Operand((x / scale).round().clamp(-8, 7) * scale), Operand(weight, scale, scale / 3, grid), None, None
    )
    assert torch.equal(both, mixed)
    plain = product(Operand(x[..., None]), Operand(weight[..., None]), None, Convolution((1,), (0,), (1,), 1))
    assert torch.equal(plain, torch.nn.functional.conv1d(x[..., None], weight[..., None]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (2, 3, 5, 4)])
def test_what_a_linear_layer_returns_may_be_changed_in_place(shape, bias):
    """As timm's beit does: qkv = self.qkv(x); qkv += bias."""
    layer = nn.Linear(4, 6, bias=bias)
    net = attach(nn.Sequential(layer), CPQConfig())
    x = torch.randn(shape)
    calibrate(net, [x])
    y = net(x)
    expected = y.detach() + 1
    y += torch.ones(6)
    torch.testing.assert_close(y.detach(), expected)
    y.square().sum().backward()
    gradient_of_weight = layer.weight.grad.clone()
    layer.weight.grad = None
    (net(x) + 1).square().sum().backward()
    torch.testing.assert_close(gradient_of_weight, layer.weight.grad)
