"""Files of every format hold offset and balanced grids, and groups of inputs with a scale each."""

import json
from io import StringIO

import onnx
import pytest
import torch
from rich.console import Console
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, export_model, load_quantized
from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.export.packed import write_packed
from cpq_lightning.export.read import read_packed
from cpq_lightning.export.table import export_table
from cpq_lightning.packing.layout import grid_name, grid_of_name
from cpq_lightning.packing.size import packed_size
from tests.export.test_packed import resigned


class Mobile(nn.Sequential):
    """Depthwise, Hardswish, SiLU, and a linear layer."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Hardswish(), nn.Conv2d(16, 16, 3, 1, 1, groups=16),
            nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 24, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(24, 32), nn.SiLU(), nn.Linear(32, 5),
        )  # fmt: skip


X = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def trained(**settings):
    torch.manual_seed(0)
    model = calibrate(attach(Mobile(), CPQConfig(**{"first_last_bits": None, **settings})), [X])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(X).square().mean().backward()
        optimizer.step()
    return model.eval()


def shown(export):
    """The table of an export as text."""
    console = Console(width=200, file=StringIO(), record=True)
    console.print(export_table(export))
    return console.export_text()


SETTINGS = {
    "W4A4": {},
    "W1A3": {"weight_bits": 1, "act_bits": 3},
    "balanced W2A2": {"weight_bits": 2, "act_bits": 2, "weight_grid": "balanced"},
    "balanced W7A8 by channel": {"weight_bits": 7, "act_bits": 8, "weight_grid": "balanced", "per_channel": True},
    # Of 24 inputs the second group is not complete.
    "groups of W2A4": {"weight_bits": 2, "group_size": 16},
    "ends of W8A8": {"weight_bits": 2, "act_bits": 4, "first_last_bits": 8, "weight_grid": "balanced"},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("form", ["packed", "int8", "int4", "torch"])
def test_a_file_computes_what_the_model_does(name, form, tmp_path):
    model = trained(**SETTINGS[name])
    assert any(0 < q.zero_point < 2 ** (q.bits - 1) for _, q in quantizers(model) if q.kind == "activation")
    container = {"container": form} if form.startswith("int") else {}
    result = export_model(model, tmp_path, format="onnx" if container else form, samples=X, **container)
    verification = result.verification
    assert verification.weights == len(list(quantized_layers(model)))
    # Values half-way between two levels may be rounded in another way.
    assert verification.mismatched < 1e-3
    assert verification.agreement == 1


def test_a_packed_file_gives_back_the_weights_to_the_bit_at_b_bits_a_weight(tmp_path):
    for name, settings in SETTINGS.items():
        model = trained(**settings)
        path = write_packed(model, tmp_path / f"{name}.safetensors")
        assert path.stat().st_size == packed_size(model)
        loaded = load_quantized(path, Mobile())
        for layer_name, layer in quantized_layers(model):
            assert torch.equal(loaded.get_submodule(layer_name).weight, layer.weight_quantizer(layer.weight).detach())
        torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-5)


def test_channels_of_one_layer_may_have_both_kinds_of_grids(tmp_path):
    config = {"weight_bits": 4, "min_bits": 1, "learn_bits": True, "gate_sharing": "channel"}
    model = calibrate(attach(Mobile(), CPQConfig(first_last_bits=None, **config)), [X])
    for _, layer in quantized_layers(model):
        q = layer.weight_quantizer
        q.fix_widths([1 + i % 4 for i in range(q.settings.width_count)])
    model.eval()
    path = write_packed(model, tmp_path / "model.safetensors")
    assert path.stat().st_size == packed_size(model)
    layers = read_packed(path).header["layers"]
    assert {tuple(layer["weight"]["balanced"]) for layer in layers} == {(1,)}
    loaded = load_quantized(path, Mobile())
    for name, layer in quantized_layers(model):
        assert torch.equal(loaded.get_submodule(name).weight, layer.weight_quantizer(layer.weight).detach())
    result = export_model(model, tmp_path, format="onnx", samples=X)
    assert result.verification.mismatched == 0


def test_a_balanced_grid_of_two_bits_takes_four_in_onnx_and_the_file_says_so(tmp_path):
    model = trained(weight_bits=2, weight_grid="balanced")
    result = export_model(model, tmp_path, format="onnx", samples=X, container="int4")
    assert result.code_types == {"INT4": ["0", "3", "6", "10", "12"]}
    assert "INT4 (5 layers); codes of a balanced grid are odd and take one bit more than the width: 0, 3, 6" in shown(
        result
    )
    proto = onnx.load(result.path)
    [codes] = [t for t in proto.graph.initializer if t.name == "6.weight_codes"]
    assert codes.data_type == onnx.TensorProto.INT4
    assert set(onnx.numpy_helper.to_array(codes).astype(int).flatten().tolist()) == {-3, -1, 1, 3}
    [entry] = [p.value for p in proto.metadata_props if p.key == "cpq_lightning"]
    layer = next(layer for layer in json.loads(entry)["levels"]["layers"] if layer["name"] == "6")
    assert (layer["weight"]["low"], layer["weight"]["high"], layer["weight"]["zero_point"]) == (-1.5, 1.5, 1.5)
    assert layer["activation"]["zero_point"] == model[6].input_quantizer.zero_point


def test_a_balanced_grid_of_four_bits_takes_eight_and_the_table_says_so(tmp_path):
    model = trained(weight_grid="balanced", overrides={"10": {"weight_grid": "signed"}})
    result = export_model(model, tmp_path, format="onnx", samples=X, container="int4", verify=False)
    assert result.code_types == {"INT8": ["0", "3", "6", "12"], "INT4": ["10"]}
    assert "INT4 (1 layer), INT8 (4 layers); codes of a balanced grid are odd" in shown(result)
    # Packed codes have the width of their layer, whatever the grid.
    packed = export_model(model, tmp_path, samples=X, verify=False)
    assert not packed.code_types
    assert "stored as" not in shown(packed)


class SiluAttention(nn.Module):
    """Attention whose queries, keys and values have negative tails."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(nn.functional.scaled_dot_product_attention(*nn.functional.silu(self.qkv(x)).chunk(3, -1)))


@pytest.mark.parametrize("form", ["packed", "int8", "int4", "torch"])
def test_operands_of_attention_have_offsets(form, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 6, 8)
    model = attach(nn.Sequential(SiluAttention(), nn.Linear(8, 3)), CPQConfig(attention=True), example_inputs=x)
    calibrate(model, [x]).eval()
    zero_points = {name: q.zero_point for name, q in quantizers(model) if "product_operands" in name}
    query, key, weights, value = zero_points.values()
    assert weights == 0
    assert all(0 < z < 8 for z in (query, key, value))
    container = {"container": form} if form.startswith("int") else {}
    result = export_model(model, tmp_path, format="onnx" if container else form, samples=x, **container)
    # The inputs of three layers, and the four operands.
    assert result.verification.activations == 7
    assert result.verification.mismatched < 1e-3
    assert result.verification.largest_difference < 1e-4


@pytest.mark.parametrize(("bits", "zero_point", "name"), [(4, 8, "s4"), (4, 0, "u4"), (4, 3, "o4:3"), (1, 1, "s1")])
def test_names_of_grids(bits, zero_point, name):
    assert grid_name(bits, zero_point) == name
    assert grid_of_name(name) == (bits, zero_point)


@pytest.mark.parametrize("name", ["", "s", "x4", "o4", "o4:", "o4:16", "o:3", "s4:1", "u4x", "o99999999999:1", "4"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="not the name of a grid"):
        grid_of_name(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["layers"][2].update(balanced=[3]),
        lambda h: h["layers"][2].update(balanced=2),
        lambda h: h["layers"][2].update(input="o4:99"),
        lambda h: h["layers"][2].update(input="z4"),
    ],
)
def test_a_header_with_a_grid_that_does_not_exist_is_refused(change, tmp_path):
    path = write_packed(trained(weight_bits=2, weight_grid="balanced"), tmp_path / "model.safetensors")
    resigned(path, change)
    with pytest.raises(ValueError, match="does not describe a model"):
        load_quantized(path, Mobile())
