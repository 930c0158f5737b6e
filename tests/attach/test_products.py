import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import lightning.pytorch as pl
import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, detach, levels
from cpq_lightning.attach.audit import Audit
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.attach.products import modules_with_products, quantized_operands
from cpq_lightning.bitwidth.model_cost import bit_operations, width_cost
from cpq_lightning.report.levels import manifest, write_levels
from tests.marks import thorough

CONFIG = CPQConfig(attention=True)


class Attention(nn.Module):
    """One head, with a product that does not depend on the input, as rotary frequencies are made by."""

    def __init__(self, width=8, fused=True):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fused = fused

    def forward(self, x):
        places = torch.arange(x.shape[1], dtype=x.dtype)
        x = x + torch.outer(places, torch.ones(2)) @ torch.ones(2, x.shape[2]) * 0.01
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return self.proj(F.scaled_dot_product_attention(q, k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return self.proj(scores.softmax(-1) @ v)


class Outer(nn.Module):
    """Multiplies by itself around a module that does, and calls that one twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = Attention(), nn.Linear(8, 3)

    def forward(self, x):
        x = self.inner(self.inner(x))
        return self.head(torch.einsum("bnc,bmc->bnm", x, x) @ x).mean(1)


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        y = self.fc(x)
        y = torch.baddbmm(y, torch.bmm(y, x.transpose(1, 2)), x)
        y = torch.matmul(y, x.mT) @ y
        return torch.stack([torch.mm(row, self.table.t()) for row in y])


X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(3))


def _attached(net, config=CONFIG, x=X):
    return calibrate(attach(net, config, example_inputs=x), [x]).eval()


def _audit(net, x=X):
    with Audit(net) as audit, torch.no_grad():
        net(x)
    return audit.report


def test_without_it_attention_stays_torchs_own():
    net = Attention()
    classes = [type(m) for m in net.modules() if not isinstance(m, nn.Linear)]
    attach(net)
    assert [type(m) for m in net.modules() if type(m).__module__ == __name__] == classes
    calibrate(net, [X])
    assert ("", "scaled_dot_product_attention") in _audit(net.eval()).activation_products


@pytest.mark.parametrize("make", [Attention, lambda: Attention(fused=False), Outer, Kinds])
def test_every_product_of_activations_is_quantized(make):
    torch.manual_seed(0)
    net = _attached(make())
    report = _audit(net)
    assert report.unquantized == []
    # What positions alone make is none of the network's activations.
    assert {op for _, op in report.activation_products} <= {"matmul"}
    assert len(report.activation_products) == {Attention: 1, Outer: 2}.get(net.base_class, 0)
    assert report.never_called == []
    net.train()(X).square().sum().backward()
    assert [n for n, q in quantizers(net) if q.log_scale.grad is None or not q.log_scale.grad.any()] == []


def test_what_is_multiplied_lies_on_the_grids():
    torch.manual_seed(0)
    net = _attached(Attention())
    seen = {}
    for name, part in net.product_operands.items():
        part.register_forward_hook(lambda m, i, o, name=name: seen.update({name: (i[0], o, m.input_quantizer)}))
    net(X)
    # The first product is of positions.
    assert list(seen) == ["1_left", "1_right", "2_left", "2_right"]
    for x, out, quantizer in seen.values():
        step, low, high = quantizer.grid()
        torch.testing.assert_close(out, torch.clamp((x / step).round(), low, high) * step)
    signs = {name: quantizer.signed for name, (_, _, quantizer) in seen.items()}
    assert signs == {"1_left": True, "1_right": True, "2_left": False, "2_right": True}


def test_fused_and_written_out_attention_are_the_same_network():
    torch.manual_seed(0)
    fused = _attached(Attention())
    written = _attached(Attention(fused=False))
    written.load_state_dict(fused.state_dict())
    for quantizer, other in zip(written.modules(), fused.modules(), strict=True):
        assert type(quantizer).__name__ == type(other).__name__
    torch.testing.assert_close(written(X), fused(X))
    fused.fused = False
    torch.testing.assert_close(fused(X), written(X))


def test_it_leaves_modes_gradients_and_random_state_alone():
    net = nn.Sequential(Attention(), nn.Dropout(), nn.BatchNorm1d(6), nn.Linear(8, 2))
    net[3].requires_grad_(False)
    net[0].eval()
    before = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    random = torch.get_rng_state()
    attach(net, CONFIG, example_inputs=X)
    assert torch.equal(random, torch.get_rng_state())
    assert not net[3].weight.requires_grad
    assert not net[3].bias.requires_grad
    assert all(p.requires_grad for p in net[0].qkv._parameters.values())
    detach(net)
    assert [m.training for m in net.modules()] == before[1]
    assert type(net[0]) is Attention
    assert list(net.state_dict()) == list(before[0])
    assert torch.equal(net[2].running_mean, before[0]["2.running_mean"])


def test_copies_and_pickles_compute_the_same():
    net = _attached(Outer())
    assert torch.equal(copy.deepcopy(net)(X), net(X))
    assert torch.equal(pickle.loads(pickle.dumps(net))(X), net(X))
    fresh = attach(Outer(), CONFIG, example_inputs=X)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(X), net(X))


@pytest.mark.parametrize("backend", ["aot_eager", *thorough("inductor")])
def test_compiled_whole(backend):
    torch.manual_seed(0)
    net = _attached(Outer())
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend=backend)(X), net(X))


def test_a_module_may_be_left_out_by_name_by_type_or_by_width():
    for config in (
        CPQConfig(attention=True, ignore=("inner",)),
        CPQConfig(attention=True, ignore=("Attention",)),
        CPQConfig(attention=True, overrides={"inner": {"act_bits": None}}),
    ):
        net = _attached(Outer(), config)
        assert [name for name, _ in quantized_operands(net)] == [
            f"product_operands.{i}_{side}" for i in range(2) for side in ("left", "right")
        ]
        # Not quantized as its caller's either.
        assert ("inner", "scaled_dot_product_attention") in _audit(net).activation_products
    wide = _attached(Outer(), CPQConfig(attention=True, overrides={"inner": {"act_bits": 8}}))
    assert {q.bits for n, q in quantized_operands(wide) if n.startswith("inner.")} == {8}
    with pytest.raises(ValueError, match="matches no layer"):
        attach(Outer(), CPQConfig(attention=True, ignore=("inner.product",)), example_inputs=X)


def test_where_it_finds_its_inputs():
    class Module(pl.LightningModule):
        def __init__(self, example=None):
            super().__init__()
            self.net, self.example_input_array = Attention(), example

        def forward(self, x):
            return self.net(x)

    assert [name for name, _ in modules_with_products(attach(Module(X), CONFIG))] == ["net"]
    module = Module()
    with pytest.raises(ValueError, match=r"example_inputs=batch.*example_input_array"):
        attach(module, CONFIG)
    assert list(quantizers(module)) == []
    with pytest.raises(ValueError, match="forward with the example inputs fails"):
        attach(module, CONFIG, example_inputs=X[..., :3])
    attach(module, CONFIG, example_inputs={"x": X})


@pytest.mark.parametrize("shape", [(3, 160, 160), (1, 32, 32)])
def test_a_timm_backbone_brings_its_own_inputs(shape):
    given = {"img_size": shape[1:], "in_chans": shape[0], "patch_size": 8 if shape[0] == 1 else 16}
    net = nn.Module()
    net.backbone = timm.create_model("test_vit", **given)
    attach(net, CONFIG)
    found = dict(modules_with_products(net))
    assert list(found) == [f"backbone.blocks.{i}.attn" for i in range(6)]
    assert all(module.product_plan == (True, True) for module in found.values())


def test_unfused_attention_of_timm_has_the_same_operands():
    timm.layers.set_fused_attn(False)
    try:
        net = attach(timm.create_model("test_vit"), CONFIG)
    finally:
        timm.layers.set_fused_attn(True)
    fused = attach(timm.create_model("test_vit"), CONFIG)
    assert list(net.state_dict()) == list(fused.state_dict())


class Regularized(Attention):
    def forward(self, x):
        extra = (50 * x @ x.mT).mean() if self.training else 0
        return super().forward(x) + extra


def test_a_forward_that_multiplies_otherwise_says_so():
    net = attach(Regularized(), CONFIG, example_inputs=X)
    with pytest.raises(RuntimeError, match=r"Regularized multiplies 4 times, and \[3\] times .*ignore"):
        calibrate(net.train(), [X])
    calibrate(net.eval(), [X])(X)


def test_what_only_training_multiplies_is_warned_of():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.beside = Attention(), Gram()

        def forward(self, x):
            return self.main(x) + (self.beside(x).mean() if self.training else 0)

    net = attach(Net(), CONFIG, example_inputs=X)
    with pytest.warns(UserWarning, match=r"attention=True: 1 products .* beside \(matmul\).*example_inputs"):
        calibrate(net.train(), [X])


class Gram(nn.Module):
    def forward(self, x):
        return x @ x.mT


class Frozen(nn.Module):
    """A frozen backbone that runs without gradients, behind a head."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = Attention(), nn.Linear(8, 2)

    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x)


class Tokens(nn.Module):
    """Whole numbers first, and a mask of floats."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.second = nn.Embedding(9, 8), Attention(), Attention()

    def forward(self, tokens, mask):
        return self.second(self.first(self.embedding(tokens)) * mask)


class Own(torch.autograd.Function):
    """What no function of torch shows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class ThroughOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.attention = nn.Module(), Attention()
        self.act.forward = Own.apply

    def forward(self, x):
        return self.attention(self.act(x.sub_(1)))


@pytest.mark.parametrize(
    ("net", "inputs", "modules"),
    [
        (Frozen(), X, ["backbone"]),
        (Tokens(), (torch.arange(6).expand(2, 6), torch.ones(2, 6, 1)), ["first", "second"]),
        (ThroughOwn(), X, ["attention"]),
    ],
)
def test_what_depends_on_the_input_is_followed_by_value(net, inputs, modules):
    attach(net, CONFIG, example_inputs=inputs)
    assert [name for name, module in modules_with_products(net) if any(module.product_plan)] == modules


def test_threads_do_not_meet():
    torch.manual_seed(0)
    net = _attached(Outer(), CPQConfig(attention=True, act_bits=2))
    batches = [X + i for i in range(40)]
    expected = [net(x) for x in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(net, batches))
    assert all(map(torch.equal, found, expected))


class LoRA(nn.Linear):
    """A layer that multiplies by more than its weight."""

    def __init__(self):
        super().__init__(8, 8)
        self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))
        self.merged = False

    def train(self, mode=True):
        self.merged = self.merged or not mode
        return super().train(mode)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + x @ self.a @ self.b


def test_a_layer_that_also_multiplies_by_parameters_is_quantized_whole():
    torch.manual_seed(0)
    layer = LoRA()
    net = nn.Sequential(layer, Attention())
    attach(net, CONFIG, example_inputs=X)
    assert not layer.merged
    calibrate(net, [X])
    assert torch.equal(pickle.loads(pickle.dumps(net.eval()))(X), net(X))
    assert torch.equal(copy.deepcopy(net)(X), net(X))
    assert _audit(net).unquantized == []
    assert type(detach(net)[0]) is LoRA


def test_where_attaching_fails_the_model_is_as_it_was():
    class Chain(nn.Sequential):
        def forward(self, x):
            return super().forward(x) @ x.mT

    class Closed(Attention):
        product_plan = property(lambda self: None)

    for net in (Chain(Attention(), nn.Linear(8, 8)), nn.Sequential(Attention(), nn.Linear(8, 8), Closed())):
        before = [type(m) for m in net.modules()], list(net.state_dict())
        with pytest.raises((ValueError, AttributeError)):
            attach(net, CONFIG, example_inputs=X)
        assert ([type(m) for m in net.modules()], list(net.state_dict())) == before
        attach(net, CPQConfig())
    chain = Chain(Attention(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"Chain multiplies activations and is a container.*ignore"):
        attach(chain, CONFIG, example_inputs=X)
    attach(chain, CPQConfig(attention=True, ignore=("Chain",)), example_inputs=X)
    assert calibrate(chain, [X])(X).shape == (4, 6, 6)


def test_a_compiled_part_is_refused():
    with pytest.raises(ValueError, match="compile the model afterwards"):
        attach(nn.Sequential(torch.compile(Attention())), CONFIG, example_inputs=X)


def test_products_of_one_or_three_tensors_stay_as_they_are():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            y = torch.einsum("bnc->bcn", self.fc(x))
            return torch.einsum("bcn,bnd,bde->bce", y, x, y @ x) + torch.linalg.matmul(y, x)

    net = _attached(Sums())
    assert [name for name, _ in quantized_operands(net)] == [
        f"product_operands.{i}_{side}" for i in (1, 3) for side in ("left", "right")
    ]
    assert _audit(net).activation_products == [("", "einsum")]


def test_random_numbers_of_the_forward_are_given_back():
    class Noisy(Attention):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    net = Noisy()
    before = torch.get_rng_state()
    attach(net, CONFIG, example_inputs=X)
    assert torch.equal(torch.get_rng_state(), before)
    net.eval()
    calibrate(net, [X])(X)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_network_without_such_products_is_quantized_as_without():
    net = attach(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), CONFIG, example_inputs=X)
    assert list(quantized_operands(net)) == []


def test_levels_hold_the_operands_and_give_them_back(tmp_path):
    torch.manual_seed(0)
    net = _attached(Outer())
    names = [name for name, _ in quantized_operands(net)]
    records = [r for r in levels(net) if r.name in names]
    assert [(r.kind, r.bits, r.numel) for r in records[:2]] == [("activation", 4, 48)] * 2
    content = manifest(net)
    assert [entry["name"] for entry in content["products"]] == names
    assert all(entry["name"] not in names for entry in content["layers"])
    path = write_levels(net, tmp_path / "levels.json")
    for quantizer in (q for n, q in quantized_operands(net) if n.startswith("inner")):
        quantizer.configure(bits=3, min_bits=3)
    narrow = write_levels(net, tmp_path / "narrow.json")
    again = attach(Outer(), CPQConfig(attention=True, levels_from=str(narrow)), example_inputs=X)
    assert [q.bits for _, q in quantized_operands(again)] == [4] * 4 + [3] * 4
    with pytest.raises(ValueError, match="levels_from"):
        attach(Outer(), CPQConfig(levels_from=str(path)))


def test_learned_widths_of_operands_are_searched_too():
    config = CPQConfig(attention=True, learn_act_bits=True, min_bits=2, learn_bits=True)
    net = _attached(Outer(), config)
    assert all(q.learns_bits for _, q in quantized_operands(net))
    net.train()(X).sum().backward()
    assert all(q.gates.logit.grad is not None for _, q in quantized_operands(net))


def test_without_widths_of_activations_it_is_refused():
    with pytest.raises(ValueError, match="attention=True quantizes activations"):
        CPQConfig(attention=True, act_bits=None)
    with pytest.raises(TypeError, match="attention must be True or False"):
        CPQConfig(attention="yes")


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _attached(Outer())(X)


def test_bit_operations_count_both_sides_of_a_product():
    torch.manual_seed(0)
    net = _attached(Attention(), CPQConfig(attention=True, overrides={"Attention": {"act_bits": 3}}))
    plain = _attached(Attention(), CPQConfig())
    # 6 tokens of width 8, attention in two products, each of 6 * 6 * 8.
    assert bit_operations(net) - bit_operations(plain) == 2 * 6 * 6 * 8 * 3 * 3
    outer = _attached(Outer())
    einsum = outer.product_operands["0_left"].input_quantizer
    assert einsum.macs == 6 * 6 * 8


def test_a_budget_of_bit_operations_prices_operands():
    config = CPQConfig(attention=True, learn_act_bits=True, act_bits=8, min_bits=2)
    net = _attached(Outer(), config)
    learners = [q for _, q in quantizers(net) if q.learns_bits]
    cost = width_cost(net, learners, "bops")
    widest = [float(q.bits) for q in learners]
    assert cost(torch.tensor(widest)) == bit_operations(net)
    for place, learner in enumerate(learners):
        narrower = [bits - (i == place) for i, bits in enumerate(widest)]
        assert cost(torch.tensor(narrower)) < cost(torch.tensor(widest)), learner
