"""The ONNX graph: what is folded, what holds the codes, and that ONNX Runtime computes what the model computes."""

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, export_model
from cpq_lightning.attach.layers import quantized_layers
from cpq_lightning.export.onnx import integer
from cpq_lightning.export.onnx.runtime import OnnxArtefact
from cpq_lightning.export.onnx.store import KEY
from cpq_lightning.report.levels import weight_codes
from tests.marks import thorough
from tests.models import Branches

SIZE = 12


def images(count=8, channels=32, size=SIZE, seed=0):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def shipped(model, x, folder, config=None, **settings):
    """The graph of a model that has been quantized as it is, verified, and the model."""
    attach(model, config or CPQConfig(first_last_bits=None))
    calibrate(model, [x])
    model.eval()
    written = export_model(model, folder, format="onnx", samples=x, **settings)
    return onnx.load(written.path), written


def kinds(graph):
    return Counter(node.op_type for node in graph.graph.node)


def initializers(graph):
    return {i.name: onnx.numpy_helper.to_array(i) for i in graph.graph.initializer}


def run(graph, x):
    return onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"input": x.numpy()})[0]


def with_norm(gain, bits=4):
    model = nn.Sequential(nn.Conv2d(32, 4, 3, bias=True), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(gain))
        model[1].bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.5]))
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model


# Batch norms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["int8", "int4"])
def test_a_norm_becomes_scale_and_bias_and_codes_stay(container, tmp_path):
    model = with_norm([0.5, 2.0, -1.5, 0.0])
    x = images()
    graph, written = shipped(model, x, tmp_path, container=container)
    codes = weight_codes(model[0])
    assert "BatchNormalization" not in kinds(graph)
    found = OnnxArtefact(written.path)
    sign = torch.tensor([1, 1, -1, 0]).reshape(4, 1, 1, 1)
    assert torch.equal(found.weight_codes()["0"].short(), codes * sign)
    assert found.negated_by() == {"0": "1"}
    gain = (model[1].weight / (model[1].running_var + model[1].eps).sqrt()).detach()
    step = model[0].weight_quantizer.grid()[0].detach()
    expected = step * torch.where(gain == 0, 1.0, gain.abs())
    torch.testing.assert_close(torch.tensor(initializers(graph)["0.weight_scale"]), expected)
    result = torch.from_numpy(run(graph, x))
    torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result[:, 3], torch.full_like(result[:, 3], 0.5))


def test_a_norm_stays_where_a_code_has_no_counterpart(tmp_path):
    model, x = with_norm([0.5, 2.0, -1.5, 1.0]), images()
    with torch.no_grad():
        model[0].weight[2, 0, 0, 0] = -50.0
    graph, _ = shipped(model, x, tmp_path, CPQConfig(weight_bits=8, weight_range="max", first_last_bits=None))
    assert weight_codes(model[0])[2].min() == -128
    assert kinds(graph)["BatchNormalization"] == 1
    np.testing.assert_allclose(run(graph, x), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_of_four_bits_only_the_smaller_container_lacks_the_counterpart(tmp_path):
    for container, expected in (("int8", 0), ("int4", 1)):
        torch.manual_seed(0)
        model, x = with_norm([-0.5, 2.0, -1.5, 1.0]), images()
        with torch.no_grad():
            model[0].weight[0, 0, 0, 0] = -50.0
        config = CPQConfig(weight_bits=4, weight_range="max", first_last_bits=None)
        graph, _ = shipped(model, x, tmp_path, config, container=container)
        assert weight_codes(model[0])[0].min() == -8
        assert kinds(graph)["BatchNormalization"] == expected


def test_norms_that_something_else_reads_through_stay(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    graph, _ = shipped(Both().eval(), images(), tmp_path)
    assert kinds(graph)["BatchNormalization"] == 1


@pytest.mark.parametrize(("affine", "per_channel"), [(False, False), *thorough((True, False), (True, True))])
def test_norms_of_every_kind_of_convolution(affine, per_channel, tmp_path):
    makers = {
        "grouped": lambda: nn.Conv2d(32, 8, 3, groups=4, dilation=2, padding=2),
        "depthwise": lambda: nn.Conv2d(32, 32, 3, groups=32, stride=2),
        "transposed": lambda: nn.ConvTranspose2d(32, 8, 2, stride=2),
        "transposed_by_groups": lambda: nn.ConvTranspose2d(32, 8, 2, stride=2, groups=2),
        "uneven": lambda: nn.Conv2d(32, 8, (1, 3), stride=(2, 1), padding=(0, 2)),
        "without_bias": lambda: nn.Conv2d(32, 8, 3, padding="same", bias=False),
        "reflected": lambda: nn.Conv2d(32, 8, 3, padding=1, padding_mode="reflect"),
    }
    branches = {}
    for name, make in makers.items():
        conv = make()
        norm = nn.BatchNorm2d(conv.out_channels, affine=affine)
        norm.running_var.uniform_(0.5, 2)
        if affine:
            norm.weight.data.uniform_(-1, 1)
        branches[name] = nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(conv.out_channels, 4, 1))
    config = CPQConfig(first_last_bits=None, per_channel=per_channel)
    graph, written = shipped(Branches(branches).eval(), images(), tmp_path, config)
    # Only that of the transposed convolution by groups stays.
    (stays,) = (node for node in graph.graph.node if node.op_type == "BatchNormalization")
    (made,) = (node for node in graph.graph.node if stays.input[0] in node.output)
    assert made.op_type == "ConvTranspose"
    assert written.verification.activations == 2 * len(makers)


# Activations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_activations_are_unsigned_bytes_with_a_zero_point(signed, tmp_path):
    x = images() if signed else images().relu()
    widths = (1, 3, 4, 8)
    model = Branches({f"bits{bits}": nn.Conv2d(32, 4, 3) for bits in widths})
    overrides = {f"bits{bits}": {"act_bits": bits} for bits in widths}
    graph, _ = shipped(model, x, tmp_path, CPQConfig(first_last_bits=None, overrides=overrides))
    zeros = [initializers(graph)[n.input[2]] for n in graph.graph.node if n.op_type == "QuantizeLinear"]
    assert all(zero.dtype == np.uint8 for zero in zeros)
    assert sorted(map(int, zeros)) == ([2 ** (bits - 1) for bits in widths] if signed else [0] * len(widths))
    # Bytes of 8 bits need none.
    assert kinds(graph)["Clip"] == len(widths) - 1
    assert graph.opset_import[0].version >= 21


def test_a_relu_before_a_quantizer_is_part_of_it(tmp_path):
    activations = {"relu": nn.ReLU(), "relu6": nn.ReLU6(), "hardtanh": nn.Hardtanh(-0.1, 0.2), "gelu": nn.GELU()}
    model = Branches(
        {name: nn.Sequential(nn.Conv2d(32, 32, 3), act, nn.Conv2d(32, 4, 3)) for name, act in activations.items()}
    )
    graph, written = shipped(model, images(), tmp_path)
    found = kinds(graph)
    assert found["Relu"] == 0
    assert written.verification.mismatched <= 2e-4
    # One Clip of codes for each quantizer, of which the first layers share one; none of floats.
    assert found["Clip"] == 1 + len(activations)


def test_quantizers_that_do_the_same_are_found_by_their_products(tmp_path):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(32, 8, 3, padding=1), nn.Conv2d(32, 8, 1)

        def forward(self, x):
            return self.a(x) + self.b(x)

    graph, written = shipped(Fork(), images(), tmp_path)
    assert kinds(graph)["QuantizeLinear"] == 1
    assert written.verification.activations == 2


# Integer kernels -----------------------------------------------------------------------------------------------------


def optimized(path, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options)
    return kinds(onnx.load(options.optimized_model_filepath))


def residual():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, stride=1, padding=1)
            self.head = nn.Linear(32, 4)

        def forward(self, x):
            x = torch.relu(x + self.conv2(torch.relu(self.conv1(x))))
            return self.head(x.mean((2, 3)))

    return Block()


def test_onnx_runtime_computes_with_integers(tmp_path):
    _, written = shipped(residual(), images(), tmp_path, CPQConfig(first_last_bits=None, per_channel=False))
    found = optimized(written.path, tmp_path)
    assert found["QLinearConv"] == 1
    assert found["MatMulIntegerToFloat"] == 2
    assert found["Conv"] == found["FusedConv"] == found["MatMul"] == found["Gemm"] == 0


def test_codes_are_shifted_up_under_an_integer_bias_and_compare_equal(tmp_path):
    config = CPQConfig(first_last_bits=None, per_channel=False)
    graph, written = shipped(residual(), images(), tmp_path, config)
    assert np.abs(initializers(graph)["conv1.weight_codes"]).max() > 8
    assert initializers(graph)["conv1.bias_codes"].dtype == np.int32
    assert OnnxArtefact(written.path).weight_codes()["conv1"].abs().max() <= 8


def test_no_integer_bias_where_its_rounding_would_move_codes(tmp_path, monkeypatch):
    monkeypatch.setattr(integer, "_MAX_CHANGED", 0.0)
    _, written = shipped(residual(), images(), tmp_path)
    assert optimized(written.path, tmp_path)["QLinearConv"] == 0
    assert written.verification.mismatched <= 2e-4


def test_no_transposition_between_products(tmp_path):
    straight = nn.Sequential(*(residual().conv1 for _ in range(4)))
    with_gelu = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.GELU(), nn.Conv2d(32, 4, 3))
    for network in (straight, with_gelu):
        graph, _ = shipped(network, images(), tmp_path)
        assert kinds(graph)["Transpose"] == 2


def test_any_number_of_samples(tmp_path):
    model = residual()
    graph, _ = shipped(model, images(1), tmp_path)
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for count in (1, 3, 20):
        x = images(count, seed=count)
        np.testing.assert_allclose(run(graph, x), model(x).detach(), rtol=1e-3, atol=1e-3)


# The file ------------------------------------------------------------------------------------------------------------


def test_int4_holds_two_codes_in_a_byte(tmp_path):
    config = CPQConfig(weight_bits=4, first_last_bits=None, overrides={"2": {"weight_bits": 6}})
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    graph, small = shipped(model, images(), tmp_path / "small", config, container="int4")
    types = {i.name: i.data_type for i in graph.graph.initializer}
    assert types["0.weight_codes"] == onnx.TensorProto.INT4
    assert types["2.weight_codes"] == onnx.TensorProto.INT8
    large = export_model(model, tmp_path / "large", format="onnx", samples=images())
    assert large.file_bytes - small.file_bytes > 0.45 * 64 * 32 * 9


def test_metadata_carries_the_levels_and_no_trace_of_the_machine(tmp_path):
    graph, written = shipped(residual(), images(), tmp_path, architecture={"timm": "x", "arguments": {}})
    (entry,) = graph.metadata_props
    content = json.loads(entry.value)
    assert entry.key == KEY
    assert (content["format"], content["version"], content["container"]) == ("cpq-lightning-onnx", 1, "int8")
    assert [layer["name"] for layer in content["levels"]["layers"]] == ["conv1", "conv2", "head"]
    assert b"site-packages" not in written.path.read_bytes()
    assert str(tmp_path).encode() not in written.path.read_bytes()
    assert b".py" not in written.path.read_bytes()


def test_weights_are_named_after_their_layers(tmp_path):
    model = residual()
    graph, _ = shipped(model, images(), tmp_path)
    assert {f"{name}.weight_codes" for name, _ in quantized_layers(model)} <= set(initializers(graph))


def test_weights_alone(tmp_path):
    graph, written = shipped(residual(), images(), tmp_path, CPQConfig(act_bits=None, first_last_bits=None))
    assert kinds(graph)["QuantizeLinear"] == 0
    assert written.verification.weights == 3
    assert written.verification.activations == 0


class Two(nn.Module):
    """Two inputs, a dict of outputs, a layer called twice, a linear layer on matrices."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x, y):
        z = self.b(torch.relu(self.b(torch.relu(self.a(x)))))
        return {"scores": z.mean(1), "parts": (z, y * 2)}


@pytest.mark.parametrize("format", ["packed", "torch", "onnx"])
def test_several_inputs_and_outputs(format, tmp_path):
    model = attach(Two(), CPQConfig(first_last_bits=None))
    x, y = torch.randn(8, 5, 6), torch.randn(8, 3)
    model(x, y)
    written = export_model(model.eval(), tmp_path, format=format, samples=(x, y))
    assert written.verification.activations == 3
    assert written.verification.agreement == 1


# What else a network may do -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers with one weight, each in front of a sum."""

    def __init__(self, make):
        super().__init__()
        self.a, self.b = make(), make()
        self.b.weight = self.a.weight

    def forward(self, x):
        x = x + self.a(x).relu()
        return x + self.b(x)


@pytest.mark.parametrize(
    ("make", "x"),
    [(lambda: nn.Linear(16, 16), torch.randn(32, 16)), (lambda: nn.Conv2d(32, 32, 3, padding=1), images())],
    ids=["linear", "convolution"],
)
@pytest.mark.parametrize("container", ["int8", *thorough("int4")])
def test_layers_with_one_weight_read_one_set_of_codes(make, x, container, tmp_path):
    model = Tied(make)
    graph, written = shipped(model, x, tmp_path, container=container)
    codes = [i.name for i in graph.graph.initializer if i.name.endswith("weight_codes")]
    assert codes == ["a.weight_codes"]
    assert written.verification.weights == written.verification.activations == 2
    found = OnnxArtefact(written.path).weight_codes()
    for name, layer in quantized_layers(model):
        assert torch.equal(found[name].short(), weight_codes(layer))
    np.testing.assert_allclose(run(graph, x), model(x).detach(), rtol=1e-3, atol=1e-3)


def test_of_layers_with_one_weight_the_one_that_needs_unsigned_codes_decides(tmp_path):
    model, x = Tied(lambda: nn.Linear(16, 16)), torch.randn(32, 16)
    config = CPQConfig(weight_bits=8, act_bits=8, first_last_bits=None, overrides={"b": {"act_bits": 4}})
    graph, _ = shipped(model, x, tmp_path, config)
    (codes,) = (v for name, v in initializers(graph).items() if name.endswith("weight_codes"))
    assert codes.dtype == np.uint8


@pytest.mark.parametrize(
    ("first", "container"), [("down", "int8"), ("up", "int4"), *thorough(("down", "int4"), ("up", "int8"))]
)
def test_a_weight_that_two_kinds_of_layers_share(first, container, tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(32, 32, 3, padding=1), nn.ConvTranspose2d(32, 32, 3, padding=1)
            self.up.weight = self.down.weight
            self.norm = nn.BatchNorm2d(32)
            self.norm.weight.data.uniform_(-1, 1)

        def forward(self, x):
            return self.norm(self.up(torch.relu(self.down(x))))

    model = Shared()
    if first == "up":
        model._modules = dict(reversed(model._modules.items()))
    config = CPQConfig(per_channel=True, first_last_bits=None)
    graph, written = shipped(model, images(), tmp_path, config, container=container)
    np.testing.assert_allclose(run(graph, images()), model(images()).detach(), rtol=1e-2, atol=5e-2)
    assert written.verification.mismatched <= 1e-3


def test_a_forward_for_one_number_of_samples_is_refused(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(32 * SIZE * SIZE, 4)

        def forward(self, x):
            return self.head(x.view(len(x), -1))

    with pytest.raises(ValueError, match="works for one number of samples only"):
        shipped(Fixed(), images(2), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_features_beside_logits(tmp_path):
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(32, 32, 3), nn.Conv2d(32, 8, 3)

        def forward(self, x):
            features = torch.relu(self.a(x))
            return features, self.b(features), None

    _, written = shipped(Features(), images(), tmp_path)
    assert written.verification.activations == 2


def test_an_input_by_name_and_attention(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.b = nn.Linear(16, 4)

        def forward(self, x):
            x = self.a(input=x)
            return self.b(self.attention(x, x, x, need_weights=False)[0].mean(1))

    x = torch.randn(8, 5, 16)
    model = attach(Attention(), CPQConfig(first_last_bits=None))
    calibrate(model, [x])
    for format in ("packed", "torch", "onnx"):
        written = export_model(model.eval(), tmp_path, format=format, samples=x)
        # The layers, the projections of queries, keys and values, and the one behind them.
        assert written.verification.activations == 6


def test_shifted_codes_stay_within_what_processors_without_vnni_add_up(tmp_path):
    config = CPQConfig(weight_bits=4, act_bits=8, first_last_bits=None, overrides={"2": {"act_bits": 4}})
    graph, _ = shipped(nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3)), images(), tmp_path, config)
    content = initializers(graph)
    assert "0.bias_codes" in content
    assert 2 * 255 * np.abs(content["0.weight_codes"].astype(int)).max() <= 2**15 - 1
