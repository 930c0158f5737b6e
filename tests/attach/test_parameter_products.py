"""Modules that multiply by matrices among their Parameters, without a layer."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from cpq_lightning import CPQConfig, attach, calibrate, coverage, detach, export_model, levels, load_quantized
from cpq_lightning.attach import loading, parameter_products, quantized_layers, quantizers
from cpq_lightning.attach.attach import set_active
from cpq_lightning.attach.matrix_products import as_layer_call
from cpq_lightning.export.packed import write_packed
from cpq_lightning.packing.size import packed_size

CONFIG = CPQConfig(weight_bits=4, act_bits=4, attention=True, first_last_bits=None)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = draw(3, 5, 8)
TOKENS = torch.tensor([[1, 2, 3, 0], [4, 4, 1, 2]])


class Matrix(nn.Module):
    """A module with a matrix and a bias."""

    def __init__(self, *shape):
        super().__init__()
        self.weight, self.bias = nn.Parameter(draw(*shape) / 3), nn.Parameter(draw(6))


class Functional(Matrix):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Matmul(Matrix):
    def forward(self, x):
        return x @ self.weight.to(x.dtype) + self.bias


class Left(Matrix):
    def forward(self, x):
        return torch.matmul(self.weight, x.mT).mT + self.bias


class Addmm(Matrix):
    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight, beta=0.5).unflatten(0, x.shape[:2])


class Einsum(Matrix):
    def forward(self, x):
        return torch.einsum("...d,df->...f", x, self.weight) + self.bias


class Several(nn.Module):
    """A list of matrices, used in another order, one of them twice, and a product of activations."""

    def __init__(self):
        super().__init__()
        self.matrices = nn.ParameterList([draw(8, 6), draw(6, 6, seed=1), draw(6, 6, seed=2)])
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        x = self.norm(x @ self.matrices[0])
        x = x + (x @ x.mT).softmax(-1) @ x.relu()
        return ((x @ self.matrices[2]).relu() @ self.matrices[1]).relu() @ self.matrices[1]


class LoRA(nn.Linear):
    """As in loralib."""

    def __init__(self):
        super().__init__(8, 6)
        self.lora_a, self.lora_b = nn.Parameter(draw(2, 8)), nn.Parameter(draw(6, 2))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + (x @ self.lora_a.transpose(0, 1) @ self.lora_b.T) * 0.5


class Tied(nn.Module):
    """A head that multiplies by the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, tokens):
        return F.linear(self.body(self.embed(tokens)), self.embed.weight)


class OwnTable(nn.Module):
    """The same with a Parameter of its own."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Parameter(draw(9, 8)), nn.Linear(8, 8)

    def forward(self, tokens):
        return self.body(F.embedding(tokens, self.table)) @ self.table.t()


# What makes the module, its input, and the layers beside those that it has.
CASES = {
    "linear": (lambda: Functional(6, 8), X, ["weight_linear"]),
    "matmul": (lambda: Matmul(8, 6), X, ["weight_matmul"]),
    "on the left": (lambda: Left(6, 8), X, ["weight_linear"]),
    "addmm": (lambda: Addmm(8, 6), X, ["weight_matmul"]),
    "einsum": (lambda: Einsum(8, 6), X, ["weight_matmul"]),
    "several": (Several, X, ["matrices_0_matmul", "matrices_1_matmul", "matrices_2_matmul"]),
    "LoRA": (LoRA, X, ["lora_a_linear", "lora_b_linear"]),
    "tied": (Tied, TOKENS, ["embed_weight_linear"]),
    "own table": (OwnTable, TOKENS, ["table_linear"]),
}


def made(name):
    torch.manual_seed(0)
    return nn.Sequential(CASES[name][0]()), CASES[name][1]


def quantized(name, config=CONFIG):
    module, x = made(name)
    return calibrate(attach(module, config, example_inputs=x), [x]), x


@pytest.mark.parametrize("name", CASES)
def test_the_products_are_layers_which_compute_the_same_while_quantizers_are_inactive(name):
    model, x = quantized(name)
    plain, _ = made(name)
    added = {f"0.{layer}" for layer in CASES[name][2]}
    assert {n for n, _ in quantized_layers(model)} == added | {
        n for n, m in plain.named_modules() if isinstance(m, nn.Linear)
    }
    assert coverage(model, example_inputs=x).macs == 1
    set_active(model, False)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-6, atol=1e-6)
    assert [n for n, _ in model.named_parameters() if "quantizer" not in n] == [n for n, _ in plain.named_parameters()]


@pytest.mark.parametrize("name", CASES)
def test_every_quantizer_and_parameter_has_a_gradient(name):
    model, x = quantized(name)
    with warnings.catch_warnings():
        # Nothing stays in full precision.
        warnings.simplefilter("error")
        model.train()(x).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(q.log_scale.grad.abs().sum() > 0 for _, q in quantizers(model))


@pytest.mark.parametrize("name", CASES)
def test_copies_pickles_and_states_compute_the_same(name):
    model, x = quantized(name)
    model.eval()
    with loading():
        fresh, _ = made(name)
        fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model), fresh.eval()):
        assert other(x).equal(model(x))
        assert other.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", CASES)
def test_detach_leaves_the_quantized_weights_in_the_plain_module(name):
    model, x = quantized(name, CPQConfig(weight_bits=4, act_bits=None, first_last_bits=None))
    expected = model.eval()(x)
    detach(model)
    plain, _ = made(name)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", CASES)
def test_the_packed_file_has_the_size_that_was_told_and_computes_the_same(name, tmp_path):
    model, x = quantized(name)
    path = tmp_path / "model.safetensors"
    write_packed(model.eval(), path)
    assert path.stat().st_size == packed_size(model)
    loaded = load_quantized(path, made(name)[0])
    # A matrix of another memory layout is multiplied in another order.
    for other in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)


class Networks(nn.ModuleDict):
    """All cases beside each other: an export takes as long for all of them as for one."""

    def forward(self, x, tokens):
        return tuple(module(x if CASES[name][1] is X else tokens) for name, module in self.items())


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_exports_are_verified(form, tmp_path):
    model = attach(Networks({name: made(name)[0] for name in CASES}), CONFIG, example_inputs=(X, TOKENS))
    calibrate(model, [((X, TOKENS),)])
    samples = (draw(8, 5, 8, seed=3), torch.randint(0, 9, (8, 4), generator=torch.Generator().manual_seed(0)))
    written = export_model(model.eval(), tmp_path, format=form, samples=samples)
    assert written.verification.largest_difference < 1e-4


WEIGHT = draw(6, 8)
W, WT = WEIGHT, WEIGHT.t()
A, B = draw(2, 4, 6, seed=1), draw(2, 4, 8, seed=2)
PRODUCTS = {
    "x @ W": lambda: A @ W,
    "x @ W.T": lambda: B @ WT,
    "linear": lambda: F.linear(input=B, weight=W, bias=torch.arange(6.0)),
    "linear, transposed": lambda: F.linear(A, WT),
    "W @ x": lambda: W @ B.mT,
    "W.T @ x": lambda: WT @ A.mT,
    "W @ vector": lambda: W @ B[0, 0],
    "vector @ W": lambda: A[0, 0] @ W,
    "mv": lambda: torch.mv(W, vec=B[0, 0]),
    "mm": lambda: torch.mm(A[0], mat2=W),
    "mm, on the left": lambda: W.mm(B[0].t()),
    "addmm": lambda: torch.addmm(torch.ones(8), A[0], W, beta=0.5, alpha=2),
    "addmm, on the left": lambda: torch.ones(4).addmm(W, B[0].t(), beta=0),
    "addmv": lambda: torch.addmv(torch.ones(6), W, B[0, 0]),
    "inner": lambda: torch.inner(B, W),
    "inner, on the left": lambda: torch.inner(W, B),
    "einsum": lambda: torch.einsum("bnd,df->bnf", A, W),
    "einsum, ellipsis": lambda: torch.einsum("...d,df->f...", A, W),
    "einsum, ellipsis before": lambda: torch.einsum("fd,b...d->b...f", W, B),
    "einsum, no result": lambda: torch.einsum("bnd,df", A, W),
    "einsum, spaces, a list": lambda: torch.einsum("b n d, f d -> n f b", [B, W]),
}
OTHERS = {
    "einsum, summed": lambda: torch.einsum("bnd,df->bf", A, W),
    "einsum, diagonal": lambda: torch.einsum("bdd,df->bf", A[:, :1, :1].expand(2, 6, 6), W),
    "einsum, one letter twice": lambda: torch.einsum("bf,ff->bf", A[0], W[:, :6]),
    "two matrices": lambda: W @ WT,
    "batched": lambda: torch.bmm(A, W.expand(2, 6, 8)),
}


@pytest.mark.parametrize("name", [*PRODUCTS, *OTHERS])
def test_a_product_with_a_matrix_is_the_call_of_a_layer(name):
    made_calls = []

    class Calling(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            call = as_layer_call(func, args, kwargs or {}, lambda value: value is W or value is WT)
            if call is None:
                return func(*args, **kwargs or {})
            made_calls.append(call)
            return call.finish(F.linear(call.input, call.matrix if call.outputs_first else call.matrix.t()))

    product = (PRODUCTS | OTHERS)[name]
    with Calling():
        out = product()
    torch.testing.assert_close(out, product())
    assert len(made_calls) == (name in PRODUCTS)


def named(model, x):
    """What the first forward says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train()(x)
    return " ".join(str(w.message) for w in caught)


class BothLayouts(Matrix):
    def forward(self, x):
        return F.linear(F.linear(x, self.weight), self.weight.t())


class Outside(nn.Module):
    """Two modules multiply by one matrix."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Functional(6, 8), Functional(6, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("make", [lambda: BothLayouts(6, 8), Outside])
def test_a_matrix_that_cannot_have_one_layer_is_left_alone_and_named(make):
    model = attach(nn.Sequential(nn.Linear(8, 8), make()), CPQConfig(), example_inputs=X)
    assert [name for name, _ in quantized_layers(model)] == ["0"]
    assert "stayed unquantized in the first forward: 1" in named(model, X)


def test_without_inputs_nothing_is_found_and_the_first_forward_names_it():
    model = attach(nn.Sequential(nn.Linear(8, 8), Functional(6, 8)), CPQConfig())
    assert "1 (linear: input and weight)" in named(model, X)


def test_inputs_that_the_forward_refuses_are_an_error_that_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), Functional(6, 8))
    with pytest.raises(ValueError, match="example inputs fails"):
        attach(model, CPQConfig(), example_inputs=draw(3, 7))
    assert type(model[1]) is Functional
    assert not list(quantizers(model))


@pytest.mark.parametrize("pattern", ["1.weight_linear", "1", "*.weight_linear", "Functional"])
def test_ignore_leaves_a_matrix_in_full_precision(pattern):
    model = nn.Sequential(nn.Linear(8, 8), Functional(6, 8))
    attach(model, CPQConfig(ignore=[pattern]), example_inputs=X)
    assert [name for name, _ in quantized_layers(model)] == ["0"]
    assert type(model[1]) is Functional


def test_what_is_left_out_does_not_disturb_the_other_products_of_its_module():
    model, x = made("several")
    attach(model, CPQConfig(attention=True, ignore=["0.matrices_1_matmul"]), example_inputs=x)
    calibrate(model, [x])(x)
    assert [name for name, _ in quantized_layers(model)] == ["0.matrices_0_matmul", "0.matrices_2_matmul"]
    with loading():
        fresh, _ = made("several")
        fresh.load_state_dict(model.state_dict())
    assert fresh.eval()(x).equal(model.eval()(x))


def test_overrides_and_levels_name_the_layer():
    model, x = made("linear")
    attach(model, CPQConfig(overrides={"0.weight_linear": {"weight_bits": 2}}), example_inputs=x)
    records = [(r.name, r.kind, r.bits) for r in levels(model)]
    assert records == [("0.weight_linear", "weight", 2), ("0.weight_linear", "activation", 8)]


def test_an_embedding_is_left_out_only_together_with_the_head_that_multiplies_by_it():
    with pytest.raises(ValueError, match="leave out both or neither"):
        attach(Tied(), CPQConfig(ignore=["embed"]), example_inputs=TOKENS)
    model = attach(Tied(), CPQConfig(ignore=["embed", "embed_weight_linear"]), example_inputs=TOKENS)
    assert [name for name, _ in quantized_layers(model)] == ["body"]


def test_a_tied_table_is_one_tensor_of_codes_and_is_looked_up_quantized():
    for name in ("tied", "own table"):
        model, x = quantized(name)
        table = model[0].embed.weight if name == "tied" else model[0].table
        layer = dict(quantized_layers(model))[f"0.{CASES[name][2][0]}"]
        seen = []
        model[0].body.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        model.eval()(x)
        assert seen[0].equal(layer.weight_quantizer(table)[x])
        assert coverage(model, example_inputs=x).weights == 1


def test_another_operation_reads_the_matrix_quantized():
    class Scaled(Matrix):
        def forward(self, x):
            return F.linear(x, self.weight) + F.linear(x, 2 * self.weight)

    model = attach(nn.Sequential(Scaled(6, 8)), CPQConfig(act_bits=None), example_inputs=X).eval()
    torch.testing.assert_close(model(X), 3 * F.linear(X, model[0].weight_linear.weight_quantizer(model[0].weight)))


@pytest.mark.parametrize("how", ["pruned", "weight norm"])
def test_a_matrix_that_is_computed_afterwards_is_read_as_computed(how):
    model, x = quantized("linear", CPQConfig(weight_bits=8, act_bits=None, first_last_bits=None))
    if how == "pruned":
        prune.l1_unstructured(model[0], "weight", amount=0.5)
    else:
        parametrizations.weight_norm(model[0], "weight")
        with torch.no_grad():
            model[0].parametrizations.weight.original0.mul_(2)
    calibrate(model, [x])
    torch.testing.assert_close(model.eval()(x), F.linear(x, model[0].weight, model[0].bias), atol=0.1, rtol=0.1)
    model.train()(x).sum().backward()
    expected = model.eval()(x)
    detach(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "matmul", "einsum", "tied", "LoRA", "several"])
def test_compiled_code_calls_the_layers(name):
    model, x = quantized(name)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


class Checkpointed(Matrix):
    def forward(self, x):
        if not self.training:
            return F.linear(x, self.weight).relu()
        return checkpoint(lambda v: F.linear(v, self.weight).relu(), x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_part_of_a_forward_which_backward_would_compute_in_full_precision_fails(reentrant):
    module = Checkpointed(6, 8)
    module.reentrant = reentrant
    model = calibrate(attach(nn.Sequential(module), CPQConfig(), example_inputs=X), [X]).train()
    with pytest.raises(RuntimeError, match="full precision" if reentrant else "different number of tensors"):
        model(X.clone().requires_grad_()).square().sum().backward()
    with torch.no_grad():
        model(X)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_module_that_is_checkpointed_from_outside_has_the_same_gradients(reentrant):
    model, x = quantized("several")
    model.train()
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        given = x.clone().requires_grad_()
        run(given).square().sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)


def test_a_product_in_half_precision_under_autocast():
    model, x = quantized("matmul")
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype is torch.float32  # as for the plain module, which adds a bias in float32
    torch.testing.assert_close(out, model(x), rtol=0.05, atol=0.05)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), out, rtol=0.05, atol=0.1)


def test_functional_call_reads_the_given_matrix():
    model, x = quantized("linear")
    given = {**dict(model.named_parameters()), "0.weight": torch.zeros(6, 8), "0.bias": torch.ones(6)}
    assert (torch.func.functional_call(model, given, (x,)) - 1).abs().max() < 1


class Children(Matrix):
    """It calls all its children, among which a layer would be."""

    def __init__(self):
        super().__init__(8, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x @ self.weight


class Chain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6))
        self.weight = nn.Parameter(draw(6, 3))

    def forward(self, x):
        return super().forward(x) @ self.weight


class Rewritten(Matrix):
    """As prototypes are normalized."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=-1))
        return F.linear(x, self.weight)


class Codebook(Matrix):
    def forward(self, x):
        with torch.no_grad():
            nearest = (x @ self.weight.t()).argmax(-1)
        return x + F.embedding(nearest, self.weight)


class ByAnotherName(Matrix):
    def __init__(self):
        super().__init__(8, 8)
        self.other = self.weight

    def forward(self, x):
        return (x @ self.weight).relu() @ self.other


class Masked(Matrix):
    def forward(self, x):
        weight = self.weight.clone()
        weight.fill_diagonal_(0)
        return x @ weight


class Wider(Matrix):
    def forward(self, x):
        return F.linear(x.double(), self.weight.double())


class Spectral(Matrix):
    def forward(self, x):
        return (torch.fft.fft(x, dim=1) @ self.weight.to(torch.complex64)).real


@pytest.mark.parametrize(
    "make",
    [
        Children, Chain, lambda: Rewritten(6, 8), lambda: Codebook(6, 8), ByAnotherName, lambda: Masked(8, 8),
        lambda: Wider(6, 8), lambda: Spectral(8, 6),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The products with")
def test_what_a_layer_would_change_stays_as_it_is_and_is_named(make):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), make()).eval()
    model = attach(copy.deepcopy(plain), CPQConfig(act_bits=None), example_inputs=X)
    assert not any("weight_" in name or "other_" in name for name, _ in quantized_layers(model))
    assert "stayed unquantized" in named(model, X)
    set_active(model.eval(), False)
    torch.testing.assert_close(model(X), plain(X), rtol=1e-6, atol=1e-6)
    set_active(model.train(), True)
    model(X).sum().backward()
    assert all(p.grad is not None for _, q in quantizers(model) for p in q.parameters())


def test_a_matrix_that_training_alone_rewrites_is_rewritten_in_full_precision():
    class Prototypes(Rewritten):
        def forward(self, x):
            return super().forward(x) if self.training else F.linear(x, self.weight)

    model = attach(nn.Sequential(Prototypes(6, 8)), CPQConfig(weight_bits=2, first_last_bits=None), example_inputs=X)
    expected = F.normalize(model[0].weight.detach().clone(), dim=-1)
    model.train()(X).sum().backward()
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_a_bias_does_not_change_the_type_under_autocast():
    model, x = quantized("linear")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype is torch.bfloat16


def test_gradients_reach_what_the_forward_first_computes_without_them():
    class Centered(Matrix):
        def __init__(self):
            super().__init__(8, 6)
            self.inner = parametrizations.weight_norm(nn.Linear(8, 8))

        def forward(self, x):
            with torch.no_grad():
                mean = self.inner(x).mean()
            return (self.inner(x) - mean) @ self.weight

    model = attach(nn.Sequential(Centered()), CPQConfig(ignore=["*.inner"]), example_inputs=X).train()
    model(X).sum().backward()
    assert all(p.grad is not None for p in model[0].inner.parameters())


def test_a_loop_over_a_transposed_matrix_follows_one_view(monkeypatch):
    class Loop(Matrix):
        def forward(self, x):
            for _ in range(50):
                x = (x @ self.weight.t()).tanh()
            return x

    model = attach(nn.Sequential(Loop(8, 8)), CPQConfig(act_bits=None), example_inputs=X)
    modes, init = [], parameter_products._Calling.__init__
    monkeypatch.setattr(
        parameter_products._Calling, "__init__", lambda mode, module: (init(mode, module), modes.append(mode))[0]
    )
    model(X)
    assert [len(mode.weights) for mode in modes] == [2]


def test_a_module_with_two_names_is_written_and_read(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Functional(8, 8)
            self.first.bias = nn.Parameter(draw(8))
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    model = calibrate(attach(Twice(), CONFIG, example_inputs=X), [X]).eval()
    path = write_packed(model, tmp_path / "model.safetensors")
    loaded = load_quantized(path, Twice())
    torch.testing.assert_close(loaded(X), model(X))
    assert loaded.first.weight.view(-1).shape == (64,)


def test_a_pattern_may_name_the_parameter_and_a_class_keeps_its_name():
    model = nn.Sequential(nn.Linear(8, 8), Functional(6, 8))
    attach(model, CPQConfig(overrides={"1.weight": {"weight_bits": 3}}), example_inputs=X)
    assert model[1].weight_linear.weight_quantizer.bits == 3
    assert type(model[1]).__name__ == "Functional"
    assert type(model[1])(6, 8)(X).shape == (3, 5, 6)


def test_the_reason_why_nothing_was_searched_for_is_told():
    class Refusing(Functional):
        def forward(self, x):
            if not self.training:
                raise RuntimeError("only in training")
            return super().forward(x)

    model = nn.Sequential(nn.Linear(8, 8), Refusing(6, 8))
    model.example_input_array = X
    assert "only in training" in named(attach(model, CPQConfig()), X)
