"""Networks of different make go through all formats and their verification."""

import pytest
import torch

from cpq_lightning import export_model, load_quantized
from cpq_lightning.attach.layers import quantized_layers
from tests.export.trained import NETWORKS, architecture, network, samples
from tests.models import quantized_weight

# Of a graph, whatever the weights.
GRAPH_BYTES = 40_000
# Through each format once: the command's tests take test_resnet through all of them.
USUAL = [
    ("test_resnet", "packed", "int8"), ("test_resnet", "onnx", "int4"), ("mobilenetv3_small_050", "onnx", "int8"),
    ("vit_tiny_patch16_224", "torch", "int8"),
]  # fmt: skip


def _marks(name, format, container):
    usual = (name, format, container) in USUAL
    return [pytest.mark.xdist_group(f"export-{name}"), *([] if usual else [pytest.mark.thorough])]


CASES = [
    pytest.param(name, format, container, marks=_marks(name, format, container))
    for name in NETWORKS
    for format, container in (("packed", "int8"), ("torch", "int8"), ("onnx", "int8"), ("onnx", "int4"))
    # Each traces the network, which takes a while: some of them stand for the others.
    if (format, container) in (("packed", "int8"), ("onnx", "int8"))
    or (name, format, container) in USUAL
    or name in ("test_resnet", "vit_tiny_patch16_224" if format == "torch" else "mobilenetv3_small_050")
]


@pytest.mark.parametrize(("name", "format", "container"), CASES)
def test_a_trained_network_ships_in_each_format(name, format, container, tmp_path):
    model = network(name)
    written = export_model(
        model,
        tmp_path,
        format=format,
        container=container,
        samples=samples(name, 32),
        name=name,
        architecture=architecture(name),
    )
    proof = written.verification
    layers = len(list(quantized_layers(model)))
    assert (proof.weights, proof.activations) == (layers, layers)
    assert proof.agreement >= 0.99
    assert proof.mismatched <= 1e-3
    assert proof.real
    assert written.file_bytes == written.path.stat().st_size
    # A program holds its graph as text, which of a small network is more than its weights.
    assert format == "torch" or written.file_bytes < written.float_bytes / 3 + GRAPH_BYTES
    assert [p.name for p in tmp_path.iterdir()] == [written.path.name]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet"])
@pytest.mark.xdist_group("export-vit_tiny_patch16_224")
def test_a_packed_network_is_the_trained_one(name, tmp_path):
    model = network(name)
    path = export_model(
        model, tmp_path, samples=samples(name), name=name, architecture=architecture(name), verify=False
    ).path
    loaded, x = load_quantized(path), samples(name, 32)
    for layer_name, layer in quantized_layers(model):
        assert torch.equal(loaded.get_submodule(layer_name).weight, quantized_weight(layer))
    assert (loaded(x) - model(x)).abs().max() <= 1e-5
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
