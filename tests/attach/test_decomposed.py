"""Modules that multiply by Parameters of their own, computed through quantized layers."""

import abc
import copy
import os
import pickle
import warnings
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks.processes import run_processes
from cpq_lightning import CPQConfig, attach, calibrate, coverage, detach, export_model, levels
from cpq_lightning.attach import full_precision_copy, loading, quantized_layers, quantizers
from cpq_lightning.attach.attach import set_active
from cpq_lightning.attach.decomposed import Decomposed
from cpq_lightning.attach.layers import parameter_of
from cpq_lightning.attach.origin import full_precision_layers, late_layers
from cpq_lightning.bitwidth.model_cost import float_bytes
from cpq_lightning.export.load import load_quantized
from cpq_lightning.export.packed import write_packed
from cpq_lightning.nn.sharding import full_tensor, is_sharded
from cpq_lightning.optim.dampening import Dampening
from cpq_lightning.packing.size import packed_size

CONFIG = CPQConfig(weight_bits=4, act_bits=4, attention=True, first_last_bits=None)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaves(value):
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for v in value for t in leaves(v)] if isinstance(value, tuple | list) else [value]


NOTHING = torch.zeros(1, 1)
X, Y = draw(3, 5, 8), draw(3, 6, 8, seed=1)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
PADDING = torch.arange(6)[None] >= torch.tensor([6, 4, 1])[:, None]


def attention(**settings):
    return nn.MultiheadAttention(8, 2, **{"batch_first": True, **settings})


# A module, positional arguments, and arguments by name.
ATTENTION = {
    "self": (attention, (X, X, X), {}),
    "self, no weights": (attention, (X, X, X), {"need_weights": False}),
    "cross": (attention, (X, Y, Y), {"need_weights": False}),
    "weights of each head": (attention, (X, Y, Y), {"average_attn_weights": False}),
    "no bias": (lambda: attention(bias=False), (X, X, X), {}),
    "other sizes": (lambda: attention(kdim=4, vdim=6), (X, draw(3, 7, 4), draw(3, 7, 6)), {}),
    "bias of keys and values": (lambda: attention(add_bias_kv=True), (X, Y, Y), {"key_padding_mask": PADDING}),
    "a key of zeros": (lambda: attention(add_zero_attn=True), (X, Y, Y), {"need_weights": False}),
    "sequence first": (lambda: attention(batch_first=False), (X, X, X), {}),
    "unbatched": (attention, (X[0], Y[0], Y[0]), {"key_padding_mask": PADDING[1]}),
    "padding": (attention, (X, Y, Y), {"key_padding_mask": PADDING, "need_weights": False}),
    "added padding": (attention, (X, Y, Y), {"key_padding_mask": torch.zeros(3, 6).masked_fill(PADDING, -1e4)}),
    "mask": (attention, (X, X, X), {"attn_mask": CAUSAL}),
    "causal": (attention, (X, X, X), {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "boolean mask": (attention, (X, X, X), {"attn_mask": CAUSAL.isinf(), "need_weights": False}),
    "a mask each head": (attention, (X, Y, Y), {"attn_mask": draw(6, 5, 6), "key_padding_mask": PADDING}),
}


class OwnAttention(nn.MultiheadAttention):
    """With a forward of its own, around the one of torch."""

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class OwnStates(abc.ABC, nn.RNNBase):
    """A mixin whose forward is found first, with an argument of its own."""

    def forward(self, x, states=None, scale=1.0):
        out, states = super().forward(x * scale, hx=states)
        return out, states


class OwnLSTM(OwnStates, nn.LSTM):
    """As forecasters define theirs."""


ATTENTION["a forward of its own"] = (lambda: OwnAttention(8, 2, batch_first=True), (X,), {})


def recurrent(kind, **settings):
    return lambda: kind(8, 6, **settings)


PACKED = pack_padded_sequence(X, [5, 2, 4], batch_first=True, enforce_sorted=False)
RECURRENT = {
    "LSTM": (recurrent(nn.LSTM), (X,), {}),
    "LSTM, batch first": (recurrent(nn.LSTM, batch_first=True), (X,), {}),
    "LSTM, both directions, two layers": (recurrent(nn.LSTM, num_layers=2, bidirectional=True), (X,), {}),
    "LSTM, projected": (recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=3), (X,), {}),
    "LSTM, no bias": (recurrent(nn.LSTM, bias=False), (X,), {}),
    "LSTM, with states": (recurrent(nn.LSTM), (X, (draw(1, 5, 6), draw(1, 5, 6, seed=2))), {}),
    "LSTM, unbatched": (recurrent(nn.LSTM, bidirectional=True), (X[0],), {}),
    "LSTM, packed": (recurrent(nn.LSTM, num_layers=2, bidirectional=True), (PACKED,), {}),
    "LSTM, packed with states": (recurrent(nn.LSTM), (PACKED, (draw(1, 3, 6), draw(1, 3, 6, seed=2))), {}),
    "GRU": (recurrent(nn.GRU, num_layers=2, bidirectional=True), (X,), {}),
    "GRU, packed": (recurrent(nn.GRU, bidirectional=True), (PACKED,), {"hx": draw(2, 3, 6)}),
    "RNN": (recurrent(nn.RNN, num_layers=2), (X,), {}),
    "RNN, relu, unbatched": (recurrent(nn.RNN, nonlinearity="relu"), (X[0], draw(1, 6)), {}),
    "LSTM, a forward of its own": (recurrent(OwnLSTM), (X,), {"scale": 0.5}),
    "LSTMCell": (recurrent(nn.LSTMCell), (X[0],), {}),
    "LSTMCell, with states": (recurrent(nn.LSTMCell), (X[0], (draw(5, 6), draw(5, 6, seed=2))), {}),
    "GRUCell": (recurrent(nn.GRUCell), (X[0], draw(5, 6)), {}),
    "RNNCell": (recurrent(nn.RNNCell, nonlinearity="relu"), (X[0, 0],), {}),
}
BILINEAR = {
    "Bilinear": (lambda: nn.Bilinear(8, 8, 4), (X, X + 1), {}),
    "Bilinear, no bias": (lambda: nn.Bilinear(8, 8, 4, bias=False), (X[0], X[1]), {}),
}


class Conv1D(nn.Module):
    """As Hugging Face has it."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, 8), self.weight).view(*x.shape[:-1], 6)


CASES = {**ATTENTION, **RECURRENT, **BILINEAR, "Conv1D": (Conv1D, (X,), {})}


class Wrapped(nn.Module):
    """A module with the arguments that it is called with, whatever the input."""

    def __init__(self, module, args, kwargs):
        super().__init__()
        self.module, self.args, self.kwargs = module, args, kwargs

    def forward(self, x):
        return self.module(*self.args, **self.kwargs)


def made(name):
    torch.manual_seed(0)
    make, args, kwargs = CASES[name]
    return Wrapped(make(), args, kwargs)


def quantized(name, config=CONFIG, **changes):
    model = made(name)
    config = CPQConfig(**{**config.to_dict(), **changes})
    return calibrate(attach(model, config, example_inputs=NOTHING), [NOTHING])


@pytest.mark.parametrize("name", CASES)
def test_with_quantizers_inactive_the_module_computes_what_torch_computes(name):
    model, plain = quantized(name), made(name)
    assert isinstance(model.module, Decomposed)
    for layer in (m for m in model.module.children() if isinstance(m, nn.Linear)):
        # A hook keeps torch's fused kernel from running.
        layer.register_forward_hook(lambda *_: None)
    set_active(model, False)
    for training in (True, False):
        results = [leaves(net.train(training)(NOTHING)) for net in (model, plain)]
        assert [None if t is None else t.shape for t in results[0]] == [
            None if t is None else t.shape for t in results[1]
        ]
        for ours, theirs in zip(*results, strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_everything_is_quantized_and_every_quantizer_has_a_gradient(name):
    model = quantized(name)
    result = coverage(model, example_inputs=NOTHING)
    assert result.macs == 1.0, result
    # The bias of keys and values has three dimensions, and is no weight that multiplies.
    assert result.weights == 1.0 or name == "bias of keys and values", result
    model.train()
    sum(t.square().sum() for t in leaves(model(NOTHING)) if t is not None).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    for quantizer_name, quantizer in quantizers(model):
        if "operands" not in quantizer_name:
            assert quantizer.macs or quantizer.kind == "activation", quantizer_name


@pytest.mark.parametrize("name", CASES)
def test_state_and_class_are_those_of_the_plain_module_again(name):
    plain, model = made(name), quantized(name)
    state = model.state_dict()
    assert {k for k in state if "quantizer" not in k and "product_state" not in k} == set(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert value.equal(state[key])
    model.eval()
    before = [layer.weight_quantizer(layer.weight).detach().clone() for _, layer in quantized_layers(model)]
    assert type(full_precision_copy(model).module) is type(plain.module)
    names = [n for n, _ in quantized_layers(model)]
    detach(model)
    assert type(model.module) is type(plain.module)
    assert list(model.state_dict()) == list(plain.state_dict())
    # The quantized weights are in the Parameters.
    again = attach(model, CPQConfig(weight_bits=8, act_bits=None, first_last_bits=None))
    for (n, layer), weight in zip(quantized_layers(again), before, strict=True):
        assert layer.weight.equal(weight), n
    assert [n for n, _ in quantized_layers(again)] == names


@pytest.mark.parametrize("name", ["cross", "other sizes", "LSTM, packed", "GRUCell", "Bilinear"])
def test_copies_pickles_and_states_compute_the_same(name):
    model = quantized(name).eval()
    expected = leaves(model(NOTHING))
    with loading():
        fresh = made(name).eval()
        fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert [type(m).__name__ for m in other.modules()] == [type(m).__name__ for m in model.modules()]
        for ours, theirs in zip(leaves(other(NOTHING)), expected, strict=True):
            assert ours is theirs is None or ours.equal(theirs)
        owners = {layer.owner for _, layer in quantized_layers(other) if hasattr(layer, "owner")}
        assert owners == {other.module}


@pytest.mark.parametrize(
    "name", ["cross", "self, no weights", "other sizes", "LSTM, projected", "GRU", "RNNCell", "Bilinear", "Conv1D"]
)
def test_the_packed_file_has_the_size_that_was_told_and_computes_the_same(name, tmp_path):
    model = quantized(name).eval()
    size = packed_size(model)
    path = write_packed(model, tmp_path / "model.safetensors")
    assert path.stat().st_size == size
    loaded = load_quantized(path, made(name))
    with torch.no_grad():
        for ours, theirs in zip(leaves(loaded(NOTHING)), leaves(model(NOTHING)), strict=True):
            assert ours is theirs is None or torch.allclose(ours, theirs, atol=1e-6)
    assert float_bytes(model) == 4 * sum(p.numel() for p in made(name).parameters())


def test_patterns_for_the_module_hold_for_its_layers():
    model = nn.ModuleDict({"a": nn.LSTM(4, 4), "b": nn.LSTM(4, 4), "c": attention()})
    attach(model, CPQConfig(ignore=["a", "MultiheadAttention"], overrides={"LSTM": {"weight_bits": 3}}))
    assert {name: layer.weight_quantizer.bits for name, layer in quantized_layers(model)} == {
        "b.ih_l0": 3,
        "b.hh_l0": 3,
    }
    assert type(model["a"]) is nn.LSTM
    assert type(model["c"]) is nn.MultiheadAttention


def test_one_projection_may_stay_in_full_precision(tmp_path):
    model = Wrapped(attention(), (X, X, X), {"need_weights": False})
    attach(model, CPQConfig(ignore=["*.k_proj"], attention=True, first_last_bits=None), example_inputs=NOTHING)
    calibrate(model, [NOTHING]).eval()
    assert sorted(name for name, _ in quantized_layers(model)) == [
        "module.out_proj", "module.q_proj", "module.v_proj",
    ]  # fmt: skip
    result = coverage(model, example_inputs=NOTHING)
    assert result.weights == 0.75
    assert list(result.left) == ["module.k_proj"]
    size = packed_size(model)
    path = write_packed(model, tmp_path / "model.safetensors")
    assert path.stat().st_size == size
    loaded = load_quantized(path, Wrapped(attention(), (X, X, X), {"need_weights": False}))
    torch.testing.assert_close(loaded(NOTHING)[0], model(NOTHING)[0])
    k = model.module.in_proj_weight[8:16].detach().clone()
    detach(model)
    assert model.module.in_proj_weight[8:16].equal(k)
    assert not model.module.in_proj_weight[:8].equal(k)


def test_the_hidden_state_may_stay_in_full_precision():
    model = attach(nn.LSTM(8, 6), CPQConfig(overrides={"*hh*": {"act_bits": None}}, first_last_bits=None))
    assert [name for name, _ in quantizers(model)] == [
        "ih_l0.weight_quantizer", "ih_l0.input_quantizer", "hh_l0.weight_quantizer",
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()(X)


def test_torch_runs_its_own_kernel_while_nothing_is_quantized():
    model = attach(nn.LSTM(8, 6), CPQConfig(first_last_bits=None))
    calibrate(model, [X]).eval()
    called = []
    model.ih_l0.register_forward_hook(lambda *_: called.append(1))
    model(X)
    assert len(called) == 1
    set_active(model, False)
    out, _ = model(X)
    assert len(called) == 1
    # DistributedDataParallel needs a gradient of each parameter.
    out.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_nested_tensor_and_a_missing_mask_are_refused():
    model = attach(nn.Sequential(attention()), CPQConfig())[0]
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    with pytest.raises(ValueError, match="no nested tensors: give padded tensors and a key_padding_mask"):
        model(nested, nested, nested)
    with pytest.raises(ValueError, match="give the causal mask"):
        model(X, X, X, is_causal=True)


def test_a_forward_that_does_not_call_super_is_left_to_itself():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return nn.MultiheadAttention.forward(self, x, x, x, need_weights=False)[0]

    model = attach(nn.Sequential(nn.Linear(8, 8), Own(8, 2, batch_first=True)), CPQConfig())
    assert not isinstance(model[1], Decomposed)
    with pytest.warns(UserWarning, match="multi_head_attention_forward"):
        calibrate(model, [X])


def test_a_parameter_of_two_modules_is_left_alone_and_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Bilinear(8, 8, 8), nn.Bilinear(8, 8, 8))
    model[2].weight = model[1].weight
    attach(model, CPQConfig())
    assert [name for name, _ in quantized_layers(model)] == ["0"]


def test_a_failed_attach_leaves_the_classes_alone():
    model = nn.Sequential(attention(), nn.LSTM(8, 8))
    with torch.no_grad():
        model[0].out_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        attach(model, CPQConfig())
    assert [type(m) for m in model] == [nn.MultiheadAttention, nn.LSTM]
    assert "_cpq_owner" not in model[0].out_proj.__dict__


def test_dampening_moves_each_part_to_its_own_grid():
    model = quantized("cross", weight_bits=2).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    layers = [layer for _, layer in quantized_layers(model)]
    owners = {}
    for layer in layers:
        parameter, view = parameter_of(layer)
        owners.setdefault(id(parameter), []).append((view, layer.weight_quantizer))
    points = [layer.weight_quantizer.nearest(layer.weight.detach()) for layer in layers]
    Dampening(optimizer, owners, lambda: 1.0)
    model(NOTHING)[0].sum().backward()
    optimizer.step()
    for layer, point in zip(layers, points, strict=True):
        torch.testing.assert_close(layer.weight, point)
    assert len(levels(model)) == 12


# What other people's code does to such modules ------------------------------------------------------------------------


def _tie(module, name, other):
    setattr(module, name, getattr(module, other))


COMPUTED = {
    "pruned weight": (nn.LSTM, lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.5)),
    "pruned bias": (nn.LSTM, lambda m: prune.l1_unstructured(m, "bias_hh_l0", 0.25)),
    "parametrized weight": (nn.LSTM, lambda m: nn.utils.parametrizations.weight_norm(m, "weight_hh_l0")),
    "pruned weight of a cell": (nn.GRUCell, lambda m: prune.l1_unstructured(m, "weight_hh", 0.5)),
    "pruned bias of a cell": (nn.LSTMCell, lambda m: prune.identity(m, "bias_hh")),
    "shared weight": (nn.GRU, lambda m: _tie(m, "weight_hh_l0", "weight_ih_l0")),
    "pruned attention": (attention, lambda m: prune.l1_unstructured(m, "in_proj_weight", 0.5)),
    "pruned bilinear": (nn.Bilinear, lambda m: prune.l1_unstructured(m, "weight", 0.5)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed_before_is_left_alone_and_named(name):
    cls, change = COMPUTED[name]
    module = cls() if cls is attention else cls(8, 8, 8) if cls is nn.Bilinear else cls(8, 8)
    change(module)
    model = nn.Sequential(nn.Linear(8, 8), module)
    attach(model, CPQConfig())
    assert not isinstance(module, Decomposed)
    assert [layer.name for layer in full_precision_layers(model)] == ["1"]


def test_a_shared_bias_is_kept():
    model = nn.GRU(8, 8, bidirectional=True)
    nn.init.normal_(model.bias_hh_l0)
    model.bias_hh_l0_reverse = model.bias_hh_l0
    expected = model(X)[0]
    attach(model, CPQConfig())
    calibrate(model, [X])
    set_active(model, False)
    assert model.hh_l0_reverse.bias is model.bias_hh_l0
    with patch.object(type(model), "runs_fused", False):
        torch.testing.assert_close(model(X)[0], expected)


# The Parameter that changes, the module, and what it is called with.
AFTERWARDS = {
    "recurrent": ("weight_hh_l0", lambda: nn.LSTM(8, 8), (X,)),
    "attention": ("in_proj_weight", attention, (X, X, X)),
    "bilinear": ("weight", lambda: nn.Bilinear(8, 8, 8), (X, X)),
}


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
@pytest.mark.parametrize("kind", AFTERWARDS)
def test_what_is_computed_afterwards_works_unchanged(kind, how, tmp_path):
    name, build, args = AFTERWARDS[kind]

    def make():
        torch.manual_seed(0)
        return Wrapped(build(), args, {})

    model = make()
    calibrate(attach(model, CPQConfig(weight_bits=4)), [NOTHING])
    if how == "pruned":
        prune.random_unstructured(model.module, name, 0.5)
    else:
        nn.utils.parametrizations.weight_norm(model.module, name)
    calibrate(model, [NOTHING])
    leaves(model.train()(NOTHING))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert coverage(model, example_inputs=NOTHING).weights == 1
    with torch.no_grad():
        expected = leaves(model.eval()(NOTHING))[0]
        size = packed_size(model)
        path = write_packed(model, tmp_path / "model.safetensors")
        assert path.stat().st_size == size
        torch.testing.assert_close(leaves(load_quantized(path, make())(NOTHING))[0], expected)
    quantized = [layer.weight_quantizer(layer.read_weight()).detach().clone() for _, layer in quantized_layers(model)]
    detach(model)
    for (_, layer), weight in zip(quantized_layers(attach(model, CPQConfig(act_bits=None))), quantized, strict=True):
        assert layer.weight.equal(weight)


def test_a_shallow_copy_has_layers_of_its_own():
    model = quantized("self, no weights").eval()
    original = model.module
    other = copy.copy(original)
    other._parameters = dict(original._parameters)
    other.in_proj_weight = nn.Parameter(torch.zeros(24, 8))
    before = original.q_proj.weight.clone()
    assert other(X, X, X)[0].isfinite().all()
    assert original.q_proj.weight.equal(before)
    assert original.q_proj.owner is original
    assert other.q_proj.owner is other


def test_projections_with_one_input_are_first_together_and_directions_too():
    model = attach(nn.Sequential(attention(), nn.Linear(8, 8)), CPQConfig())
    wide = {name for name, layer in quantized_layers(model) if layer.weight_quantizer.bits == 8}
    assert wide == {"0.q_proj", "0.k_proj", "0.v_proj", "1"}
    model = calibrate(attach(nn.LSTM(8, 6, 2, bidirectional=True), CPQConfig()), [X])
    wide = {name for name, layer in quantized_layers(model) if layer.weight_quantizer.bits == 8}
    assert wide == {"ih_l0", "ih_l0_reverse", "hh_l1", "hh_l1_reverse"}


def test_a_gate_is_no_linear_layer_to_a_pattern():
    model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8))
    attach(model, CPQConfig(ignore=["Linear"]))
    assert [name for name, _ in quantized_layers(model)] == ["1.ih_l0", "1.hh_l0"]


@pytest.mark.filterwarnings("ignore")
def test_a_recurrent_layer_that_is_added_later_is_late(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    attach(model, CPQConfig())
    model["b"] = nn.LSTM(8, 8)
    assert list(late_layers(model)) == ["b"]
    with pytest.raises(ValueError, match=r"full precision.*: b"):
        export_model(model, tmp_path, samples=X, verify=False)
    attach(model)
    assert [name for name, _ in quantized_layers(model)] == ["a", "b.ih_l0", "b.hh_l0"]
    assert not late_layers(model)
    plain = attach(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.LSTM(8, 8)}), CPQConfig(ignore=["b.*"]))
    assert not late_layers(plain)


REFUSED = {
    "key_padding_mask of bytes": {"key_padding_mask": PADDING.byte()},
    "key_padding_mask, transposed": {"key_padding_mask": PADDING.T},
    "key_padding_mask, too short": {"key_padding_mask": PADDING[:, :5]},
    "attn_mask, too short": {"attn_mask": torch.zeros(5, 5)},
    "attn_mask, too long": {"attn_mask": torch.zeros(5, 7)},
    "attn_mask of one column": {"attn_mask": torch.zeros(5, 1)},
    "attn_mask of integers": {"attn_mask": torch.zeros(5, 6, dtype=torch.int64)},
    "attn_mask of a batch": {"attn_mask": torch.zeros(3, 5, 6)},
    "attn_mask of four dimensions": {"attn_mask": torch.zeros(3, 2, 5, 6)},
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_torch_refuses_are_refused(name, need_weights):
    model = quantized("cross").module
    with pytest.raises(ValueError, match=name.partition(",")[0].partition(" ")[0]):
        model(X, Y, Y, need_weights=need_weights, **REFUSED[name])


def test_inputs_that_torch_refuses_are_refused():
    model = quantized("cross").module
    for shapes in ((X[:1], Y, Y), (X, Y[:1], Y[:1]), (X, Y, X), (X[0], Y, Y), (X[None], Y[None], Y[None])):
        with pytest.raises(ValueError, match="got the shapes"):
            model(*shapes)
    rnn = quantized("LSTM").module
    with pytest.raises(ValueError, match="LSTM: expected at least one step"):
        rnn(X[:0])
    with pytest.raises(ValueError, match=r"LSTM: expected 2-D or 3-D with 8 features"):
        rnn(draw(3, 5, 7))


class Three(nn.Module):
    """One decomposed module of each kind, one behind the other."""

    def __init__(self):
        super().__init__()
        self.attention, self.lstm, self.bilinear = attention(), nn.LSTM(8, 6, batch_first=True), nn.Bilinear(6, 8, 3)

    def forward(self, x):
        attended, _ = self.attention(x, x, x, need_weights=False)
        states, _ = self.lstm(attended)
        return self.bilinear(states[:, -1], x[:, 0])


def gradients_of_processes(folder):
    """In each of two processes: the gradients of its half of a batch, averaged, are those of the whole batch."""
    rank, x = int(os.environ["RANK"]), draw(4, 5, 8)

    def gradients(distribute, inputs):
        torch.manual_seed(0)
        model = Three()
        if distribute is fully_shard:
            # Sharded modules are quantized, and quantized ones are wrapped.
            fully_shard(model)
        attach(model, CONFIG, example_inputs=x)
        calibrate(model, [x])
        model.train()
        called = DistributedDataParallel(model) if distribute is DistributedDataParallel else model
        called(inputs).square().mean().backward()
        full = {name: full_tensor(p.grad) for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            # Quantizers are not sharded; CPQCallback averages their gradients.
            if distribute is fully_shard and not is_sharded(p):
                torch.distributed.all_reduce(full[name])
                full[name] /= 2
        return full

    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    expected = gradients(None, x)
    assert all(grad.any() for name, grad in expected.items() if "noise" not in name)
    for distribute in (DistributedDataParallel, fully_shard):
        found = gradients(distribute, x[2 * rank : 2 * rank + 2])
        torch.testing.assert_close(found, expected)
    torch.distributed.destroy_process_group()


def test_two_processes_get_the_gradients_of_one(tmp_path):
    ended = run_processes(gradients_of_processes, tmp_path, environments=[{"RANK": "0"}, {"RANK": "1"}])
    assert [done.returncode for done in ended] == [0, 0], ended[0].stderr
