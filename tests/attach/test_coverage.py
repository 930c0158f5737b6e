"""How much of a model runs quantized, held against torch's own count of operations."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cpq_lightning import CPQConfig, attach, calibrate, coverage, detach, export_model, levels
from cpq_lightning.attach.audit import Audit
from cpq_lightning.bitwidth.model_cost import bit_operations
from cpq_lightning.report.levels import manifest
from tests.models import with_own_forward

TOKENS = torch.arange(21).reshape(3, 7)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.positions = nn.Parameter(torch.randn(1, 7, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.lstm = with_own_forward(nn.LSTM)(16, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens):
        return self.head(self.lstm(self.encoder(self.embedding(tokens) + self.positions))[0])


def swin():
    build = torchvision.models.swin_transformer.SwinTransformer
    return build([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=5)


class Reader(nn.Module):
    """Multiplies by the weights of its layers in a function of its own."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = nn.functional.linear(x.flatten(2).mT, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        out = nn.functional.linear((q @ k.mT).softmax(-1) @ v, self.proj.weight, self.proj.bias)
        return out.mean(1)


def around():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), Reader(), nn.Linear(8, 5))


NETWORKS = {
    "convolutions": (lambda: timm.create_model("test_resnet", num_classes=5), IMAGES),
    "depthwise": (lambda: timm.create_model("test_convnext", num_classes=5), IMAGES),
    "attention": (lambda: timm.create_model("test_vit", num_classes=5, img_size=32), IMAGES),
    "windows": (swin, IMAGES),
    "around": (around, IMAGES),
    "transposed": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3, groups=2)), IMAGES),
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def counted(model, inputs):
    """Multiply-accumulates of one forward in full precision, as torch counts them."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs)
    return counter.get_total_flops() // 2


def total(model, inputs):
    with torch.no_grad(), Audit(model) as audit:
        model(inputs)
    return sum(macs for macs, _ in audit.report.products.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_denominator_is_what_torch_counts_in_full_precision(name):
    build, inputs = NETWORKS[name]
    model = build().eval()
    expected = counted(model, inputs)
    attach(model, CPQConfig())
    calibrate(model, [inputs])
    assert total(model, inputs) == pytest.approx(expected, rel=0.01)
    with torch.inference_mode():
        assert total(model, inputs) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", [*NETWORKS, "words"])
def test_what_runs_and_what_is_left_is_everything(name):
    build, inputs = NETWORKS.get(name, (Words, TOKENS))
    model = attach(build().eval(), CPQConfig())
    found = coverage(model, example_inputs=inputs)
    assert found.weights + sum(part.weights for part in found.left.values()) == pytest.approx(1)
    assert found.macs + sum(part.macs for part in found.left.values()) == pytest.approx(1)
    calibrate(model, [inputs])
    assert coverage(model) == found
    assert set(found.left) <= {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}


def test_embeddings_recurrent_layers_and_attention_count_as_what_they_are():
    model = attach(Words().eval(), CPQConfig())
    found = coverage(model, example_inputs=TOKENS)
    matrices = {n: p.numel() for n, p in Words().named_parameters() if p.dim() > 1}
    for name, parameters in (
        ("embedding", ["embedding.weight"]),
        ("positions", ["positions"]),
        ("lstm", ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]),
    ):
        own = sum(matrices[parameter] for parameter in parameters)
        assert found.left[name].weights == pytest.approx(own / sum(matrices.values()))
    steps = TOKENS.numel()
    # Without attention=True, the products of two activations are left.
    attention = steps * 2 * 7 * 16
    everything = attention + steps * 4 * 16 * 16 + steps * (2 * 16 * 32 + 2 * 4 * 16 * 16 + 16 * 5)
    assert found.left["encoder.self_attn"].macs == pytest.approx(attention / everything)
    assert found.left["lstm"].macs == pytest.approx(steps * 2 * 4 * 16 * 16 / everything)


def test_attention_true_covers_its_products():
    model = timm.create_model("test_vit", num_classes=5, img_size=32).eval()
    plain, with_products = copy.deepcopy(model), model
    attach(plain, CPQConfig())
    attach(with_products, CPQConfig(attention=True))
    assert coverage(plain, example_inputs=IMAGES).macs < coverage(with_products, example_inputs=IMAGES).macs == 1


def test_both_operands_have_to_be_quantized():
    model = attach(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), CPQConfig(act_bits=None))
    found = coverage(model, example_inputs=torch.randn(3, 4))
    assert (found.weights, found.macs) == (1, 0)
    assert list(found.left) == ["0", "1"]
    ignored = attach(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), CPQConfig(ignore=["1"]))
    found = coverage(ignored, example_inputs=torch.randn(3, 4))
    assert (found.weights, found.macs) == (pytest.approx(32 / 48), pytest.approx(32 / 48))


def test_it_changes_nothing_of_the_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(3600, 2))
    attach(model, CPQConfig()).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    coverage(model, example_inputs=IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match=r"No forward of Sequential was recorded.*example_inputs"):
        coverage(model)


def test_copies_and_pickles_know_it_and_detached_models_do_not():
    model = attach(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), CPQConfig())
    calibrate(model, [torch.randn(3, 4)])
    assert coverage(copy.deepcopy(model)) == coverage(pickle.loads(pickle.dumps(model))) == coverage(model)
    assert coverage(torch.nn.DataParallel(model)) == coverage(model)
    assert not any("_cpq_forward" in module.__dict__ for module in detach(copy.deepcopy(model)).modules())
    with pytest.raises(ValueError, match="is not quantized"):
        coverage(nn.Linear(2, 2))


def test_claims_follow_the_forward_where_it_goes_around_layers():
    model = attach(around().eval(), CPQConfig(first_last_bits=None))
    calibrate(model, [IMAGES])
    not_called = {r.name for r in levels(model) if r.kind == "weight" and not r.quantizing}
    assert not_called == {"1.qkv", "1.proj"}
    assert not not_called & {r.name for r in levels(model) if r.kind == "activation"}
    content = manifest(model)
    read = [r for r in levels(model) if r.kind == "weight" and r.quantizing]
    assert content["totals"]["bops"] == pytest.approx(sum(r.macs * 16 for r in read)) == bit_operations(model)
    assert content["coverage"]["macs"] == coverage(model).macs


def test_what_attention_reads_of_its_out_projection_is_told():
    words = Words()
    words.encoder.self_attn = with_own_forward(nn.MultiheadAttention)(16, 2, batch_first=True)
    model = attach(words.eval(), CPQConfig(first_last_bits=None))
    calibrate(model, [TOKENS])
    records = {(r.name, r.kind): r for r in levels(model)}
    assert ("encoder.self_attn.out_proj", "activation") not in records
    out = records["encoder.self_attn.out_proj", "weight"]
    # Of one sample: seven tokens.
    assert (out.quantizing, out.macs, out.bops) == (True, 7 * 16 * 16, 7 * 16 * 16 * 4 * 32)


@pytest.mark.parametrize("format", ["packed", "torch"])
def test_a_file_multiplies_in_full_precision_where_the_forward_does(tmp_path, format):
    model = attach(around().eval(), CPQConfig())
    calibrate(model, [IMAGES])
    written = export_model(model, tmp_path, format=format, samples=torch.randn(4, 3, 32, 32))
    assert written.verification.largest_difference <= 1e-6
    weight = model[1].qkv.weight.detach().clone()
    assert torch.equal(detach(model)[1].qkv.weight, weight)


def test_a_sentence_never_rounds_to_all_or_nothing():
    model = attach(Words().eval(), CPQConfig())
    text = coverage(model, example_inputs=TOKENS).sentence()
    assert text.startswith("41.8 % of the weights and ")
    assert "; in full precision: lstm (" in text
    big = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400), nn.Linear(400, 1))
    text = coverage(attach(big, CPQConfig(ignore=["2"])), example_inputs=torch.randn(1, 400)).sentence()
    assert text.startswith("99.8 % of the weights and 99.8 % of the multiply-accumulates run quantized")
