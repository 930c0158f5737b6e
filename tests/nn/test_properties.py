"""What holds for every quantizer and every attached model, whatever the settings, shapes, dtypes and layouts."""

import copy
import pickle
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, detach
from cpq_lightning.attach.attach import set_active
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.functional.categorical import quantize
from tests.strategies import DENSE_LAYOUTS, QuantizerCase, examples, layout, quantizer_cases, settings_of_layers

# Of the largest entry: layouts add in another order, and halves round.
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def differentiate(quantizer, x, upstream):
    """The output, and the gradients with respect to x and to each parameter, by its name."""
    quantizer.zero_grad()
    leaf = x.detach().requires_grad_()
    out = quantizer(leaf)
    out.backward(upstream)
    return out.detach(), {"x": leaf.grad} | {name: p.grad for name, p in quantizer.named_parameters()}


def assert_alike(got, want):
    assert got.keys() == want.keys()
    for name, w in want.items():
        atol = ROUNDING[w.dtype] * w.double().abs().max().item() if w.numel() else 0
        torch.testing.assert_close(got[name], w, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# The quantizer -------------------------------------------------------------------------------------------------------


@examples(120)
@given(quantizer_cases(empty=True))
@example(QuantizerCase(kind="activation", shape=()))
@example(QuantizerCase(shape=(0, 3)))
@example(QuantizerCase(shape=(6, 5), exponent=-140, settings={"weight_range": "max"}))
def test_training_gives_a_finite_value_like_x_and_a_finite_gradient_to_x_and_to_every_parameter(case):
    quantizer, x = case.fresh(), case.x()
    for step in range(2):
        # The first forward fits, the second finds what was fitted.
        if quantizer.has_gates:
            quantizer.noise_step.fill_(step)
        out, gradients = differentiate(quantizer, x, case.upstream())
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        assert out.isfinite().all()
        for name, leaf in {"x": x, **dict(quantizer.named_parameters())}.items():
            assert gradients[name] is not None, name
            assert (gradients[name].shape, gradients[name].dtype) == (leaf.shape, leaf.dtype), name
            assert gradients[name].isfinite().all(), name
    assert quantizer.scale().isfinite().all()
    assert (quantizer.scale() > 0).all()


@examples(60)
@given(quantizer_cases(), st.booleans())
def test_the_layout_in_memory_changes_neither_the_fit_nor_values_nor_gradients(case, training):
    x = case.x()
    plain = x.clone(memory_format=torch.contiguous_format)
    odd, even = case.fresh(), case.fresh()
    odd(x)
    even(plain)
    torch.testing.assert_close(odd.start_scale, even.start_scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(odd.width_scale, even.width_scale, rtol=1e-5, atol=0)
    quantizer = case.trained().train(training)
    got, gradients = differentiate(quantizer, x, case.upstream())
    want, plain_gradients = differentiate(copy.deepcopy(quantizer), plain, case.upstream())
    assert torch.equal(got, want)
    assert_alike(gradients, plain_gradients)


@examples(40)
@given(quantizer_cases(layouts=DENSE_LAYOUTS), st.booleans())
def test_dense_layouts_are_kept(case, training):
    x = case.x()
    assert layout(case.trained().train(training)(x)) == layout(x)


@examples(80)
@given(quantizer_cases(), st.booleans())
def test_what_a_quantizer_hands_on_meets_the_conditions_that_quantize_checks(case, training):
    quantizer, x = case.trained().train(training), case.x()
    # Of zeros alone there is no range: they are passed on as they are.
    assume(quantizer.fitted)
    scale, sigma = (quantizer.along_channels(t.detach(), x) for t in quantizer._scale_and_sigma(quantizer.settings))
    masks = quantizer._masks(x, quantizer.settings)
    min_bits = quantizer.bits if masks is None else quantizer.min_bits
    grid = {"bits": quantizer.bits, "zero_point": quantizer.zero_point, "estimator": quantizer.estimator}
    out = quantize(x, scale, sigma, masks, **grid, min_bits=min_bits)
    if quantizer.nesting == "range" or masks is None:
        assert torch.equal(quantizer(x), out)


@examples(80)
@given(quantizer_cases())
def test_evaluation_gives_levels_of_the_grid_that_it_reports(case):
    quantizer, x = case.trained().eval(), case.x()
    out = quantizer(x).detach().double()
    scale, low, high = (quantizer.along_channels(t.detach(), x) for t in quantizer.grid())
    codes = out / scale
    half = low % 1
    # Of a level that the dtype rounded, and of a step that is a product in another order.
    slack = 1e-4 + torch.finfo(case.dtype).eps * codes.abs()
    assert ((codes - half - (codes - half).round()).abs() <= slack).all()
    assert ((codes >= low - slack) & (codes <= high + slack)).all()


@examples(60)
@given(quantizer_cases())
def test_widths_stay_within_their_bounds_and_fixing_them_changes_nothing_in_evaluation(case):
    quantizer, x = case.trained().eval(), case.x()
    narrowest, widest = quantizer.min_bits, quantizer.bits
    for widths in (quantizer.decided_widths(), quantizer.expected_widths()):
        assert ((widths >= narrowest) & (widths <= widest)).all()
    decided = quantizer.decided_widths()
    before = quantizer(x).detach()
    quantizer.fix_widths(decided.tolist())
    assert torch.equal(quantizer.decided_widths().expand_as(decided), decided)
    assert not quantizer.has_gates
    torch.testing.assert_close(quantizer(x).detach(), before, rtol=2 * torch.finfo(case.dtype).eps + 1e-6, atol=0)


@examples(60)
@given(quantizer_cases(empty=True), st.booleans())
@example(QuantizerCase(shape=(1, 2, 3, 3), layout="channels_last"), True)
def test_while_inactive_x_passes_unchanged_and_every_parameter_gets_zeros(case, training):
    quantizer, x = case.fresh().train(training), case.x()
    quantizer.configure(active=False)
    out, gradients = differentiate(quantizer, x, case.upstream())
    assert torch.equal(out, x)
    # All of them: a kernel may be chosen by the stride of a dimension of size 1.
    with torch.no_grad():
        assert out.stride() == quantizer(x).stride() == x.stride()
    assert torch.equal(gradients.pop("x"), case.upstream())
    for name, p in quantizer.named_parameters():
        assert gradients[name].shape == p.shape, name
        assert not gradients[name].any(), name
    assert not quantizer.fitted


COPIES = ("state_dict", "deepcopy", "pickle")


def copied(how, original, fresh):
    if how == "deepcopy":
        return copy.deepcopy(original)
    if how == "pickle":
        return pickle.loads(pickle.dumps(original))
    twin = fresh()
    twin.load_state_dict(original.state_dict())
    return twin


@pytest.mark.parametrize("how", COPIES)
@examples(30)
@given(quantizer_cases())
def test_a_copy_gives_the_same_values_and_gradients(how, case):
    quantizer, x = case.trained(), case.x()
    twin = copied(how, quantizer, case.fresh)
    for training in (True, False):
        want, want_gradients = differentiate(quantizer.train(training), x, case.upstream())
        got, gradients = differentiate(twin.train(training), x, case.upstream())
        assert torch.equal(got, want)
        assert gradients.keys() == want_gradients.keys()
        for name, w in want_gradients.items():
            assert torch.equal(gradients[name], w), name


# Attached models -----------------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass(frozen=True)
class ModelCase:
    """A small network of everything that can be quantized, and its input."""

    dims: int = 2
    width: int = 2
    groups: int = 1
    batch: int = 1
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        convolution, transposed = CONVOLUTIONS[self.dims]
        channels = self.width * self.groups
        model = nn.Sequential(
            convolution(2, channels, 3, padding=1),
            nn.ReLU(),
            convolution(channels, channels, 1, groups=self.groups, bias=False),
            transposed(channels, 3, 2),
            nn.Flatten(),
            nn.Linear(3 * 4**self.dims, 2),
        )
        return self.placed(model.to(self.dtype))

    def x(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return self.placed(torch.randn(self.batch, 2, *[3] * self.dims, generator=generator).to(self.dtype))

    def placed(self, what):
        """In channels-last memory, where there is one."""
        if not self.channels_last or self.dims not in FORMATS:
            return what
        return what.to(memory_format=FORMATS[self.dims])

    def attached(self) -> nn.Module:
        """The model in training, its activation ranges known."""
        with warnings.catch_warnings():
            # What cannot be quantized is said, and is not what these tests are about.
            warnings.simplefilter("ignore")
            return calibrate(attach(self.model(), CPQConfig(**self.settings)), [self.x()])


@st.composite
def model_cases(draw):
    settings = draw(settings_of_layers())
    settings["first_last_bits"] = draw(st.sampled_from((None, 8)))
    if draw(st.booleans()):
        settings |= {"act_bits": None, "learn_act_bits": False}
    return ModelCase(
        dims=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 2)),
        batch=draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16))),
        channels_last=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        settings=settings,
    )


@examples(30)
@given(model_cases())
@example(ModelCase(width=1, channels_last=True))
def test_an_attached_model_trains_with_finite_gradients_for_all_parameters(case):
    model = case.attached()
    out = model(case.x())
    assert out.dtype == case.dtype
    assert out.isfinite().all()
    out.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@examples(25)
@given(model_cases(), st.booleans())
@example(ModelCase(width=1, channels_last=True, settings={"act_bits": None}), True)
def test_an_inactive_model_is_the_plain_one_in_values_and_gradients(case, training):
    plain, model = case.model().train(training), attach(case.model().train(training), CPQConfig(**case.settings))
    set_active(model, False)
    want, got = plain(case.x()), model(case.x())
    assert torch.equal(got, want)
    want.sum().backward()
    got.sum().backward()
    parameters = dict(model.named_parameters())
    for name, p in plain.named_parameters():
        assert torch.equal(parameters[name].grad, p.grad), name


@examples(25)
@given(model_cases(), st.booleans())
def test_detaching_gives_the_plain_model_back_with_weights_that_evaluate_as_they_did(case, training):
    plain = case.model()
    keys, parameters, kinds = list(plain.state_dict()), list(plain.parameters()), [type(m) for m in plain.modules()]
    model = attach(plain, CPQConfig(**case.settings))
    for _, quantizer in quantizers(model):
        quantizer.configure(active=quantizer.kind == "weight")
    want = model.eval()(case.x())
    # In training, gates are drawn: what is written is what evaluation had.
    detach(model.train(training))
    assert torch.equal(model.eval()(case.x()), want)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize("how", COPIES)
@examples(10)
@given(model_cases())
def test_a_copy_of_an_attached_model_evaluates_and_trains_alike(how, case):
    model = case.attached()
    twin = copied(how, model, lambda: attach(case.model(), CPQConfig(**case.settings)))
    for training in (False, True, True):
        want, got = model.train(training)(case.x()), twin.train(training)(case.x())
        assert torch.equal(got, want)
    assert want.isfinite().all()
