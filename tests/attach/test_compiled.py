"""Compiled code computes what eager code does: outputs, gradients, and for any batch."""

import copy
import warnings

import pytest
import timm
import torch
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate
from cpq_lightning.attach.attach import full_precision_copy, set_noise_step
from cpq_lightning.export.integer_model import evaluated
from tests.marks import TORCH, thorough
from tests.models import IMAGES, Classifier, convnet


def _encoder():
    return nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), nn.Linear(6, 2))


def _two_layers():
    # Each layer takes seconds to compile.
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


class Pruned(nn.Sequential):
    """Layers whose weights are computed: by a parametrization, by a mask, by the layer's own forward."""

    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        nn.utils.parametrizations.weight_norm(self[0])
        nn.utils.prune.l1_unstructured(self[2], "weight", 0.3)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.mixed = nn.LSTM(6, 4, batch_first=True, bidirectional=True), nn.Bilinear(8, 8, 2)

    def forward(self, x):
        x = self.rnn(x)[0][:, -1]
        return self.mixed(x, x)


NETWORKS = {
    "one layer": (lambda: nn.Sequential(nn.Linear(6, 2)), (6,), CPQConfig(first_last_bits=None)),
    "layers": (_two_layers, (3, 8, 8), CPQConfig(first_last_bits=None)),
    "own forwards": (
        lambda: nn.Sequential(timm.layers.ScaledStdConv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 2, 2)),
        (3, 8, 8),
        CPQConfig(first_last_bits=None),
    ),
    "computed weights": (Pruned, (6,), CPQConfig(first_last_bits=None)),
    "encoder": (_encoder, (5, 6), CPQConfig()),
    "recurrent": (Recurrent, (3, 6), CPQConfig()),
    "learned widths": (
        _two_layers,
        (3, 8, 8),
        CPQConfig(weight_bits=6, min_bits=2, learn_bits=True, first_last_bits=None),
    ),
    "a scale a channel": (_two_layers, (3, 8, 8), CPQConfig(per_channel=True)),
}


def _attached(name, weights_only=False):
    make, shape, config = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    calibrate(attach(model, config), [torch.randn(4, *shape)])
    set_noise_step(model, 7)
    # Draws of gates go on with each forward of the model: here each is the first one.
    for handle, hook in list(model._forward_pre_hooks.items()):
        if hook.__name__ == "_advance_noise":
            del model._forward_pre_hooks[handle]
    return model.train(), shape


def _step(model, x, run):
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    return out.detach(), x.grad, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# The setting of torch.compile, and batches to train on.
SHAPES = {
    "automatic": (None, (4, 3, 5)),
    "dynamic": (True, (4, 3, 5)),
    "static": (False, (4, 3, 5)),
    # What compiles fastest.
    "one batch": (False, (4,)),
}
QUICK = {name: "one batch" for name in NETWORKS if name != "one layer"}
QUICK |= {"layers": "automatic", "learned widths": "dynamic"}
OTHERS = [(name, shapes) for name in QUICK for shapes in SHAPES if shapes not in ("one batch", QUICK[name])]


@pytest.mark.parametrize(("name", "shapes"), [*QUICK.items(), *thorough(*OTHERS)])
def test_compiled_whole(name, shapes):
    model, shape = _attached(name)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    dynamic, batches = SHAPES[shapes]
    # torch compiles no recurrent layers, its own neither, and runs these as they are.
    compiled = torch.compile(twin, backend="aot_eager", dynamic=dynamic, fullgraph=name != "recurrent")
    for batch in batches:
        x = torch.randn(batch, *shape)
        own, other = _step(model, x, model), _step(twin, x, compiled)
        # torch 2.8 compiles sums in another order, and a gradient of learned widths is a small rest of large ones.
        rtol, atol = (1e-4, 1e-5) if TORCH >= (2, 9) else (1e-3, 1e-4)
        torch.testing.assert_close(other, own, rtol=rtol, atol=atol)
    with torch.no_grad():
        x = torch.randn(6, *shape)
        torch.testing.assert_close(compiled.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_compiled_block_by_block():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(3)]
    model = attach(nn.Sequential(*blocks), CPQConfig(first_last_bits=None))
    calibrate(model, [torch.randn(4, 6)])
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    for block in twin:
        block.compile(backend="aot_eager", fullgraph=True)
    for batch in (4, 3):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(_step(twin, x, twin), _step(model, x, model), rtol=1e-4, atol=1e-5)


def test_compiled_before_its_ranges_are_known():
    model, twin = (attach(_two_layers(), CPQConfig()).train() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(4, 3, 8, 8)
        torch.testing.assert_close(_step(twin, x, compiled), _step(model, x, model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "mode"), [("one layer", "default"), *thorough(("layers", "default"), ("layers", "reduce-overhead"))]
)
def test_compiled_by_inductor(name, mode):
    model, shape = _attached(name)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(twin, mode=mode)
    for batch in (4, 3):
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(_step(twin, x, compiled), _step(model, x, model), rtol=1e-3, atol=1e-4)


def test_what_is_written_after_compilation_counts():
    model, shape = _attached("layers")
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), backend="aot_eager")
    x = torch.randn(4, *shape)
    before = compiled(x)
    with torch.no_grad():
        nn.init.normal_(model[0].weight)
    assert not compiled(x).equal(before)
    torch.testing.assert_close(compiled(x), model(x))


class WithForward(Classifier):
    def forward(self, x):
        return self.net(x)


def test_a_copy_of_a_compiled_lightning_module_runs_its_own_layers():
    """Lightning binds compiled methods to the module: a copy would run the layers of the original."""
    module = WithForward()
    expected = module.eval()(IMAGES)
    module = from_compiled(torch.compile(module, backend="eager"))
    attach(module, CPQConfig(weight_bits=2, act_bits=2))
    calibrate(module, [IMAGES])
    quantized = module.eval()(IMAGES)
    assert not torch.allclose(quantized, expected)
    torch.testing.assert_close(full_precision_copy(module).eval()(IMAGES), expected)
    exported = evaluated(module)
    nn.init.zeros_(module.net[0].weight)
    torch.testing.assert_close(exported(IMAGES), quantized)
    assert not module(IMAGES).equal(quantized)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", [name for name in QUICK if name != "encoder"])
def test_a_trace_is_the_model_from_the_first_forward_on(name, grad, tmp_path):
    make, shape, config = NETWORKS[name]
    model = attach(make(), config)
    calibrate(model, [torch.randn(8, *shape)])
    model.eval()
    x = torch.randn(4, *shape)
    with torch.set_grad_enabled(grad), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(model, x)
        torch.jit.save(traced, tmp_path / "model.pt")
    assert not [warning for warning in caught if "cpq_lightning" in warning.filename]
    other = torch.randn(4, *shape)
    with torch.no_grad():
        assert torch.jit.load(tmp_path / "model.pt")(other).equal(model(other))


def test_a_trace_in_training_mode_is_warned_of():
    model = attach(convnet(), CPQConfig())
    calibrate(model, [torch.randn(8, 3, 8, 8)])
    with pytest.warns(UserWarning, match=r"traced in training mode.*model\.eval\(\)"):
        torch.jit.trace(model.train(), torch.randn(2, 3, 8, 8), check_trace=False)
