"""A tied weight is one tensor of codes in every format, and what is tied to it reads that."""

import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, export_model, load_quantized
from cpq_lightning.attach.layers import quantized_layers
from cpq_lightning.export.read import read_packed
from cpq_lightning.report.levels import manifest
from tests.attach.test_tied import EMBEDDINGS, Text, text
from tests.marks import thorough
from tests.models import quantized_weight

# Rows enough for the table to be nearly all of the file.
ROWS = 4000
TOKENS = torch.randint(ROWS, (16, 5), generator=torch.Generator().manual_seed(0))


class Large(Text):
    def __init__(self, untied=False):
        super().__init__(nn.Embedding(ROWS, 16))
        self.head = nn.Linear(16, ROWS)
        if not untied:
            self.head.weight = self.embedding.weight


@pytest.fixture(scope="module", params=[False, True], ids=["tensor", "per channel"])
def model(request):
    torch.manual_seed(0)
    config = CPQConfig(weight_bits=4, act_bits=8, first_last_bits=None, per_channel=request.param)
    return calibrate(attach(Large(), config), [TOKENS]).eval()


def shipped(model, folder, format, container="int8"):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    return export_model(model, folder, format=format, container=container, samples=TOKENS)


@pytest.mark.parametrize(
    ("format", "container", "bits"),
    [("packed", "int8", 4), ("torch", "int8", 8), ("onnx", "int4", 4), *thorough(("onnx", "int8", 8))],
)
def test_a_file_holds_one_set_of_codes_and_computes_what_the_model_computes(model, format, container, bits, tmp_path):
    written = shipped(model, tmp_path, format, container)
    assert written.verification.largest_difference < 1e-4
    codes, steps = ROWS * 16 * bits // 8, len(model.head.weight_quantizer.log_scale)
    # The biases, and what a program says of itself: in text, each step too.
    assert codes < written.file_bytes < codes + 4 * ROWS + 50_000 + 50 * (steps - 1)


def test_a_packed_file_ties_the_network_that_it_is_loaded_into(model, tmp_path):
    path = shipped(model, tmp_path, "packed").path
    for plain in (Large(), Large(untied=True)):
        loaded = load_quantized(path, plain)
        assert loaded.embedding.weight is loaded.head.weight
        assert torch.equal(loaded.head.weight, quantized_weight(model.head))
        assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert path.stat().st_size == manifest(model)["totals"]["size_bytes"]


@pytest.mark.parametrize("size", [8, 6], ids=["complete groups", "incomplete groups"])
@pytest.mark.parametrize(("format", "container"), [("packed", "int8"), ("torch", "int8"), ("onnx", "int4")])
def test_a_table_with_groups_is_looked_up_with_the_scales_of_its_row(size, format, container, tmp_path):
    torch.manual_seed(0)
    tokens = torch.randint(40, (16, 5))
    config = CPQConfig(weight_bits=3, act_bits=8, first_last_bits=None, group_size=size)
    model = calibrate(attach(Text(), config), [tokens]).eval()
    written = export_model(model, tmp_path, format=format, container=container, samples=tokens)
    assert written.verification.largest_difference < 1e-4


@pytest.mark.parametrize("format", ["packed", "torch", "onnx"])
def test_one_that_is_left_out_stays_in_float32_beside_the_codes(format, tmp_path):
    torch.manual_seed(0)
    config = CPQConfig(weight_bits=4, first_last_bits=None, ignore=["embedding"])
    model = calibrate(attach(Large(), config), [TOKENS]).eval()
    written = shipped(model, tmp_path, format)
    assert written.verification.largest_difference < 1e-4
    assert written.file_bytes > 4 * ROWS * 16
    if format == "packed":
        assert written.file_bytes == manifest(model)["totals"]["size_bytes"]
        loaded = load_quantized(written.path, Large())
        assert torch.equal(loaded.embedding.weight, model.embedding.weight)
        assert torch.equal(loaded.head.weight, quantized_weight(model.head))


@pytest.mark.parametrize("format", ["packed", "torch", "onnx"])
@pytest.mark.parametrize("kind", ["bag", "own"])
def test_whatever_reads_it(kind, format, tmp_path):
    if (kind, format) == ("bag", "onnx"):
        pytest.skip("torch writes no EmbeddingBag of varying length as ONNX")
    model = text(embedding=EMBEDDINGS[kind]()).eval()
    tokens = torch.arange(40).reshape(8, 5)
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    written = export_model(model, tmp_path, format=format, samples=tokens)
    assert written.verification.largest_difference < 1e-4
    if format == "packed":
        assert sum(name.endswith("weight_codes") for name in read_packed(written.path).tensors) == 2
        loaded = load_quantized(written.path, Text(EMBEDDINGS[kind]()))
        assert next(loaded.embedding.parameters()) is loaded.head.weight


def test_layers_that_share_a_weight_share_its_codes(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    x = torch.randn(8, 64)
    model = calibrate(attach(Pair(), CPQConfig(first_last_bits=None)), [x]).eval()
    loaded = load_quantized(export_model(model, tmp_path, samples=x).path, Pair())
    assert loaded.a.weight is loaded.b.weight
    program = export_model(model, tmp_path, format="torch", samples=x)
    assert program.verification.weights == len(list(quantized_layers(model))) == 2


def test_a_tie_that_was_undone_is_counted_and_written_as_two(tmp_path):
    model = text().eval()
    model.embedding.weight = nn.Parameter(model.embedding.weight.detach().flip(0).clone())
    tokens = torch.arange(40).reshape(8, 5)
    written = export_model(model, tmp_path, samples=tokens)
    assert written.verification.largest_difference < 1e-5
    assert written.file_bytes == manifest(model)["totals"]["size_bytes"]
