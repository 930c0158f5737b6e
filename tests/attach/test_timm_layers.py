"""Every layer class of timm.layers that holds a weight: quantized whole, trained, written and read back, detached."""

import copy
import inspect
import re
import warnings

import pytest
import timm.layers
import torch
from timm.layers import PatchEmbed
from timm.models.mobilevit import LinearSelfAttention
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, detach, load_quantized
from cpq_lightning.attach.audit import Audit
from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.attach.origin import quantizable_layers
from cpq_lightning.export.packed import write_packed

IMAGES = (8, 14, 14)
TOKENS = (9, 16)
CONFIG = CPQConfig(first_last_bits=None)


class Routed(nn.Module):
    """A conditional convolution with the routing that timm's blocks give it."""

    def __init__(self, padding=""):
        super().__init__()
        self.routing = nn.Linear(8, 4)
        self.conv = timm.layers.CondConv2d(8, 6, 3, padding=padding, stride=2, num_experts=4)

    def forward(self, x):
        return self.conv(x, self.routing(x.mean((2, 3))).sigmoid())


class Bias(nn.Module):
    """A module that makes a bias of positions, added to a product of its own."""

    def __init__(self, positions):
        super().__init__()
        self.positions, self.fc = positions, nn.Linear(16, 16)

    def forward(self, x):
        scores = self.fc(x) @ x.transpose(-2, -1)
        return self.positions(scores.unsqueeze(1))


def _layer(name, *args, **kwargs):
    return lambda: _class(name, *kwargs)(*args, **kwargs)


def _class(name, *settings):
    """A class of timm.layers. An older timm lacks some, or settings of theirs."""
    cls = getattr(timm.layers, name, None)
    if cls is None or not inspect.signature(cls).parameters.keys() >= set(settings):
        pytest.skip(f"timm {timm.__version__} has no {name}({', '.join(settings)})")
    return cls


# By name: what makes the layer, and the shape of a sample.
LAYERS = {
    "Attention": (_layer("Attention", 16, num_heads=2), TOKENS),
    "Attention gated and normed": (
        _layer("Attention", 16, num_heads=2, gated=True, qk_norm=True, norm_layer=nn.LayerNorm),
        TOKENS,
    ),
    "Attention2d": (_layer("Attention2d", 8, num_heads=2), IMAGES),
    "AttentionPool2d": (_layer("AttentionPool2d", 8, feat_size=14, num_heads=2), IMAGES),
    "AttentionPoolLatent": (_layer("AttentionPoolLatent", 16, num_heads=2), TOKENS),
    "AttentionRope": (_layer("AttentionRope", 16, num_heads=2), TOKENS),
    "AttentionRope of separate projections": (_layer("AttentionRope", 16, num_heads=2, qkv_fused=False), TOKENS),
    "BatNonLocalAttn": (_layer("BatNonLocalAttn", 8, block_size=7), IMAGES),
    "CecaModule": (_layer("CecaModule", 8), IMAGES),
    "CircularEfficientChannelAttn": (_layer("CircularEfficientChannelAttn", 8), IMAGES),
    "ClNormMlpClassifierHead": (_layer("ClNormMlpClassifierHead", 8, 5, hidden_size=6), (14, 14, 8)),
    "CondConv2d": (Routed, IMAGES),
    "CondConv2d with dynamic padding": (lambda: Routed("same"), (8, 13, 15)),
    "Conv2dSame": (_layer("Conv2dSame", 8, 6, 3, stride=2), (8, 13, 15)),
    "Conv2dSame in groups": (_layer("Conv2dSame", 8, 8, 3, groups=4), IMAGES),
    "Conv2dSame depthwise": (_layer("Conv2dSame", 8, 8, 5, groups=8), IMAGES),
    "ConvBnAct": (_layer("ConvBnAct", 8, 6), IMAGES),
    "ConvMlp": (_layer("ConvMlp", 8, 12), IMAGES),
    "ConvNormAct": (_layer("ConvNormAct", 8, 6), IMAGES),
    "ConvNormActAa": (_layer("ConvNormActAa", 8, 6, stride=2), IMAGES),
    "DiffAttention": (_layer("DiffAttention", 16, num_heads=2), TOKENS),
    "EcaModule": (_layer("EcaModule", 8), IMAGES),
    "EffectiveSEModule": (_layer("EffectiveSEModule", 8), IMAGES),
    "EffectiveSqueezeExcite": (_layer("EffectiveSqueezeExcite", 8), IMAGES),
    "EfficientChannelAttn": (_layer("EfficientChannelAttn", 8), IMAGES),
    "GatedMlp": (_layer("GatedMlp", 16, 24), TOKENS),
    "GlobalContext": (_layer("GlobalContext", 8, rd_channels=6), IMAGES),
    "GlobalResponseNormMlp": (_layer("GlobalResponseNormMlp", 16, 24), TOKENS),
    "GluMlp": (_layer("GluMlp", 16, 24), TOKENS),
    "HybridEmbed": (lambda: timm.layers.HybridEmbed(nn.Conv2d(8, 6, 3), img_size=14, in_chans=8, embed_dim=16), IMAGES),
    "Linear": (_layer("Linear", 16, 8), TOKENS),
    "MixedConv2d": (_layer("MixedConv2d", 8, 8, [3, 5]), IMAGES),
    "MixedConv2d depthwise": (_layer("MixedConv2d", 8, 8, [3, 5, 7], depthwise=True, padding="same"), IMAGES),
    "Mlp": (_layer("Mlp", 16, 24), TOKENS),
    "MultiQueryAttention2d": (_layer("MultiQueryAttention2d", 8, num_heads=2), IMAGES),
    "MultiQueryAttentionV2": (_layer("MultiQueryAttentionV2", 8, num_heads=2), IMAGES),
    "NonLocalAttn": (_layer("NonLocalAttn", 8), IMAGES),
    "NormMlpClassifierHead": (_layer("NormMlpClassifierHead", 8, 5, hidden_size=6), IMAGES),
    "PatchEmbed": (lambda: PatchEmbed(14, 7, in_chans=8, embed_dim=16), IMAGES),
    "RelPosMlp": (lambda: Bias(timm.layers.RelPosMlp((3, 3), num_heads=1)), TOKENS),
    "RotAttentionPool2d": (_layer("RotAttentionPool2d", 8, ref_feat_size=14, num_heads=2), IMAGES),
    "SEModule": (_layer("SEModule", 8), IMAGES),
    "ScaledStdConv2d": (_layer("ScaledStdConv2d", 8, 6, 3), IMAGES),
    "ScaledStdConv2dSame": (_layer("ScaledStdConv2dSame", 8, 6, 3, stride=2), (8, 13, 15)),
    "SelectiveKernel": (_layer("SelectiveKernel", 8), IMAGES),
    "SeparableConv2d": (_layer("SeparableConv2d", 8, 6), IMAGES),
    "SeparableConvNormAct": (_layer("SeparableConvNormAct", 8, 6), IMAGES),
    "SimPool1d": (_layer("SimPool1d", 16), TOKENS),
    "SimPool2d": (_layer("SimPool2d", 8), IMAGES),
    "SplitAttn": (_layer("SplitAttn", 8), IMAGES),
    "SqueezeExcite": (_layer("SqueezeExcite", 8), IMAGES),
    "StdConv2d": (_layer("StdConv2d", 8, 6, 3), IMAGES),
    "StdConv2d in groups": (_layer("StdConv2d", 8, 8, 3, groups=4), IMAGES),
    "StdConv2dSame": (_layer("StdConv2dSame", 8, 6, 3, stride=2), (8, 13, 15)),
    "SwiGLU": (_layer("SwiGLU", 16, 24), TOKENS),
    "a transposed convolution": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), IMAGES),
}
# Norms, embeddings, gains: nothing in them multiplies matrices. (TestTimePoolHead wraps a model.)
LEFT_ALONE = {
    "EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2", "EvoNorm2dS0", "EvoNorm2dS1", "EvoNorm2dS2", "FilterResponseNormAct2d",
    "FilterResponseNormTlu2d", "InplaceAbn", "LayerScale", "LayerScale2d", "LsePlus1d", "LsePlus2d", "RelPosBias",
    "RelPosBiasTf", "RmsNorm", "RmsNorm2d", "RmsNorm2dFp32", "RmsNormFp32", "RotaryEmbeddingMixed", "SimpleNorm",
    "SimpleNorm2d", "SimpleNorm2dFp32", "SimpleNormFp32", "TestTimePoolHead",
}  # fmt: skip
# What stays in full precision, and why.
EXCEPTIONS = {
    "CondConv2d": ("matmul", "input"),  # the routing's weights, a few numbers a sample, mix quantized experts
    "CondConv2d with dynamic padding": ("matmul", "input"),
    "MultiQueryAttentionV2": ("einsum", "input and weight"),  # Parameters without layers; no model of timm has it
}


def _makes_weights(cls):
    makes = r"Linear\(|nn\.Conv|create_conv2d|nn\.Parameter\(|ConvNormAct\(|Mlp\(|linear_layer|conv_layer"
    return issubclass(cls, nn.Linear | nn.Conv2d) or bool(re.search(makes, inspect.getsource(cls)))


def test_no_layer_of_timm_that_holds_a_weight_is_missing_here():
    classes = {name: cls for name, cls in vars(timm.layers).items() if inspect.isclass(cls)}
    holding = {n for n, c in classes.items() if issubclass(c, nn.Module) and _makes_weights(c)}
    covered = {name.split(" ")[0] for name in LAYERS} | LEFT_ALONE | {"GatherExcite"}
    assert holding - covered == set()


def test_gather_excite_cannot_be_built_with_weights_in_timm_itself():
    """When it can again, as in timm 1.0.16, it belongs into LAYERS."""
    if tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 20):
        pytest.skip(f"timm {timm.__version__} may")
    with pytest.raises(TypeError, match="multiple values"):
        timm.layers.GatherExcite(8)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_timm_is_quantized_whole(name, tmp_path):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    net = nn.Sequential(make())
    if not quantizable_layers(net):
        net.append(nn.Conv2d(8, 8, 1))
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.5)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    untouched = copy.deepcopy(net)
    full = net.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrate(attach(net, CONFIG).train(), [x])
    with Audit(net.eval()) as audit, torch.no_grad():
        quantized = net(x)
    kinds = {(op, operand) for _, op, operand in audit.report.unquantized}
    assert kinds == ({EXCEPTIONS[name]} if name in EXCEPTIONS else set())
    assert audit.report.never_called == []
    assert (quantized - full).norm() > 1e-3 * full.norm()

    net.train()(x).square().sum().backward()
    grads = {f"{n}.{p}": v.grad for n, q in quantizers(net) for p, v in q.named_parameters()}
    assert [n for n, g in grads.items() if g is None or not g.isfinite().all() or not g.any()] == []

    net.eval()
    path = write_packed(net, tmp_path / "layer.safetensors")
    with torch.no_grad():
        loaded = load_quantized(path, untouched)
        torch.testing.assert_close(loaded(x), net(x))
        for _, quantizer in quantizers(net):
            quantizer.configure(active=quantizer.kind == "weight")
        expected = net(x)
        detach(net)
        torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("name", sorted(LEFT_ALONE - {"TestTimePoolHead", "InplaceAbn"}))
def test_norms_and_embeddings_are_left_alone(name):
    cls = _class(name)
    values = {"window_size": (2, 2), "num_heads": 2, "dim": 16, "depth": 2, "num_features": 8, "channels": 8}
    given = {k: values[k] for k in inspect.signature(cls).parameters if k in values}
    assert quantizable_layers(nn.Sequential(cls(**given))) == {}


def test_a_standardized_weight_has_no_more_values_a_channel_than_levels():
    torch.manual_seed(0)
    conv = timm.layers.ScaledStdConv2d(8, 6, 3)
    net = nn.Sequential(conv)
    calibrate(attach(net, CPQConfig(weight_bits=2, first_last_bits=None)), [torch.randn(4, 8, 9, 9)])
    seen = []
    with torch.no_grad():
        weight = conv.weight_quantizer(conv.weight).flatten(1)
        standardized = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)
    for row in standardized:
        values = row.unique()
        gaps = values.diff().unique()
        seen.append(len(values))
        assert len(values) <= 4
        assert torch.allclose(gaps / gaps.min(), (gaps / gaps.min()).round(), atol=1e-4)
    assert max(seen) > 2


def test_experts_of_a_conditional_convolution_may_have_steps_of_their_own():
    torch.manual_seed(0)
    net = attach(Routed(), CPQConfig(per_channel=True, first_last_bits=None))
    assert len(net.conv.weight_quantizer.scale()) == 4


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_tiny_patch16_dinov3_qkvb", "swinv2_tiny_window8_256"])
def test_attention_that_multiplies_by_itself_quantizes_its_input(name):
    """beit, eva and swin_transformer_v2 join biases, and call F.linear on their qkv layer's weight."""
    shrunk = {"depth": 2} if "swin" not in name else {"depths": (1, 1, 1, 1)}
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model = timm.create_model(name, **shrunk)
    attentions = [m for m in model.modules() if hasattr(m, "qkv_bias_separate")]
    assert attentions
    assert all(m.qkv_bias_separate is False for m in attentions)
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    full = model.eval()(x)
    attach(model)
    for _, layer in quantized_layers(model):
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            quantizer.configure(active=False)
    with torch.no_grad():
        torch.testing.assert_close(model(x), full, atol=1e-4, rtol=1e-4)
        detach(model)
        assert all(m.qkv_bias_separate is False for m in attentions)
        attach(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            calibrate(model, [x])
    assert all(m.qkv.input_quantizer.fitted for m in attentions)


def test_mobilevits_cross_attention_does_not_run_in_timm_itself():
    """It slices qkv_proj's weight for F.conv2d, to three dimensions: when it runs, it has to be covered here."""
    attention, x = LinearSelfAttention(8), torch.randn(2, 8, 4, 9)
    with pytest.raises(RuntimeError, match="stride"):
        attention(x, x)
