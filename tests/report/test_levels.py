import copy
import json
import os

import numpy as np
import pytest
import timm
import torch
from rich.console import Console
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, levels
from cpq_lightning.attach.attach import set_active
from cpq_lightning.attach.calibrate import recording
from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.attach.range_tracking import refit_rewritten
from cpq_lightning.bitwidth.model_cost import learning_quantizers
from cpq_lightning.export.packed import write_packed
from cpq_lightning.packing.size import byte_cost, packed_size
from cpq_lightning.report.levels import grid_mark, manifest, write_levels
from cpq_lightning.report.run_files import report_levels, write_csv
from cpq_lightning.report.table import levels_table, metrics_table
from cpq_lightning.report.weight_histograms import weight_histograms
from tests.attach.test_products import Outer, X
from tests.models import convnet, quantized_weight


@pytest.fixture
def model():
    return calibrate(attach(convnet(), CPQConfig(weight_bits=3, act_bits=5)), [torch.randn(4, 3, 8, 8)])


def test_a_record_a_quantizer(model):
    records = levels(model)
    assert [(r.name, r.kind, r.bits, r.low, r.high, r.first_or_last) for r in records] == [
        ("0", "weight", 8, -128, 127, True),
        ("0", "activation", 8, -115, 140, True),
        ("3", "weight", 3, -4, 3, False),
        ("3", "activation", 5, 0, 31, False),
        ("6", "weight", 8, -128, 127, True),
        ("6", "activation", 8, 0, 255, True),
    ]
    assert [r.numel for r in records] == [3 * 8 * 9, 3 * 64, 8 * 8 * 9, 8 * 64, 4 * 128, 128]


def test_relative_error_and_levels_are_those_of_the_weight_itself(model):
    record = levels(model)[2]
    weight, quantized = model[3].weight.detach(), quantized_weight(model[3])
    assert record.relative_error == pytest.approx(
        ((weight - quantized).norm() / weight.norm()).square().item(), rel=1e-5
    )
    assert record.used_levels == len(model[3].weight_quantizer.levels(weight).unique())


def test_totals_add_up(model, tmp_path):
    totals = manifest(model)["totals"]
    first, middle, last = 216, 576, 512
    rest = 8 + 8 + 4 + 16 + 16  # biases, batch norm's weight and bias, its mean and variance
    assert totals["weight_bits_avg"] == 3
    assert totals["weight_bits_avg_all"] == pytest.approx((8 * first + 3 * middle + 8 * last) / (first + middle + last))
    assert totals["act_bits_avg"] == 5
    assert totals["fp32_bytes"] == 4 * (first + middle + last + rest)
    # Codes, steps, the rest, and batch norm's count of batches; the header comes on top.
    content = first + middle * 3 // 8 + last + 4 * 6 + 4 * rest + 8
    assert content < totals["size_bytes"] < content + 1500
    assert totals["size_bytes"] == write_packed(model, tmp_path / "model.safetensors").stat().st_size


class Text(nn.Module):
    """An embedding and the head that is tied to it."""

    def __init__(self, embedding=None, head=None, layers=1):
        super().__init__()
        self.embedding = nn.Embedding(40, 16) if embedding is None else embedding
        self.body = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
        self.head = nn.Linear(16, 40) if head is None else head
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


def prepared(model):
    """Networks whose weights are computed from other tensors, with tensors of every type beside them."""
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.spectral_norm(model[3])
    nn.utils.prune.l1_unstructured(model[6], "weight", 0.5)
    for index, dtype in enumerate((torch.bool, torch.float16, torch.int32, torch.complex64, torch.uint8)):
        model[1].register_buffer(f"buffer_{index}_ü", torch.ones(3, dtype=dtype))
    model[1].register_buffer("nothing", torch.ones(0, 2))
    return model


IMAGES, TOKENS = torch.randn(4, 3, 8, 8), torch.arange(40).reshape(8, 5)
LEARNED = {"learn_bits": True, "weight_bits": 8, "min_bits": 4}
SIZED = {
    "small": (lambda: convnet(), IMAGES, {}),
    "learned": (lambda: convnet(), IMAGES, {**LEARNED, "learn_act_bits": True, "act_bits": 4, "min_act_bits": 3}),
    "learned by channel": (lambda: convnet(), IMAGES, {**LEARNED, "gate_sharing": "channel", "per_channel": True}),
    "steps of channels": (lambda: convnet(), IMAGES, {"per_channel": True}),
    "a layer left out": (lambda: convnet(), IMAGES, {"ignore": ["3"], "act_bits": None}),
    "computed weights": (lambda: prepared(convnet()), IMAGES, {}),
    "in bfloat16": (lambda: convnet().bfloat16(), IMAGES.bfloat16(), {}),
    "timm": (lambda: timm.create_model("test_efficientnet"), torch.randn(2, 3, 32, 32), {}),
    "attention": (lambda: Outer(), X, {"attention": True}),
    "tied": (lambda: Text(), TOKENS, {}),
    "tied, left out": (lambda: Text(), TOKENS, {"ignore": ["embedding"]}),
    "tied, learned by channel": (lambda: Text(), TOKENS, {**LEARNED, "gate_sharing": "channel"}),
}


@pytest.mark.parametrize("name", SIZED)
def test_the_size_that_is_counted_is_that_of_the_file(name, tmp_path):
    make, x, settings = SIZED[name]
    config = CPQConfig(first_last_bits=None, **settings)
    model = calibrate(attach(make(), config, example_inputs=x), [x])
    for _, quantizer in quantizers(model):
        if quantizer.gates.logit is not None:
            quantizer.gates.logit.data.uniform_(-4, 4)
    known = {"timm": "some_network", "arguments": {"num_classes": 10}}
    for architecture in (None, known):
        path = write_packed(model.eval(), tmp_path / "model.safetensors", architecture=architecture)
        assert packed_size(model, architecture) == path.stat().st_size


@pytest.mark.parametrize("sharing", ["tensor", "channel"])
@pytest.mark.parametrize("make", [convnet, Text])
@pytest.mark.parametrize("nesting", ["range", "resolution"])
def test_what_widths_cost_is_the_size_of_the_file_that_has_them(make, sharing, nesting, tmp_path):
    settings = {"learn_bits": True, "weight_bits": 8, "min_bits": 6, "gate_sharing": sharing, "nesting": nesting}
    model = calibrate(attach(make(), CPQConfig(first_last_bits=None, **settings)), [TOKENS if make is Text else IMAGES])
    learners = [q for _, q in learning_quantizers(model)]
    cost = byte_cost(model, learners)
    rows = [q.gates.rows for q in learners]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        widths = [torch.randint(6, 9 if seed else 7, (n,), generator=generator) for n in rows]
        other = copy.deepcopy(model)
        for (_, quantizer), own in zip(learning_quantizers(other), widths, strict=True):
            quantizer.fix_widths(own.tolist())
        # Without training behind them, narrower widths have ranges that do not suit them.
        refit_rewritten(other)
        size = write_packed(other.eval(), tmp_path / "model.safetensors").stat().st_size
        assert cost.of_integer_widths(torch.cat(widths).double()) == packed_size(other) == size
        # On the way it is a sum, of channels that differ.
        assert not seed or cost(torch.cat(widths).double()) == pytest.approx(size, rel=0.01)


def test_averages_of_nothing_are_null():
    model = attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), CPQConfig(act_bits=None))
    totals = manifest(model)["totals"]
    assert totals["weight_bits_avg"] is None
    assert totals["act_bits_avg"] is None


def test_the_file_holds_the_manifest_and_is_replaced_whole(model, tmp_path):
    path = write_levels(model, tmp_path / "deep" / "levels.json")
    content = json.loads(path.read_text())
    assert content == json.loads(json.dumps(manifest(model)))
    assert set(content["layers"][1]) == {"name", "weight", "activation"}
    write_levels(model, path)
    assert os.listdir(path.parent) == ["levels.json"]


def test_a_write_that_fails_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = write_levels(model, tmp_path / "levels.json")
    before = path.read_text()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_levels(model, path)
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["levels.json"]


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_table_fits_a_narrow_terminal(per_channel, capsys):
    x = torch.randn(4, 3, 8, 8)
    model = calibrate(attach(convnet(), CPQConfig(per_channel=per_channel)), [x])
    with recording(model):
        model(x)
    Console(width=80).print(levels_table(manifest(model)))
    printed = capsys.readouterr().out
    assert "…" not in printed
    header = printed.partition("─")[0].split()
    assert (
        header.count("bits")
        == header.count("scale")
        == header.count("used")
        == header.count("error")
        == header.count("clip")
        == 2
    )
    rows = [line.split() for line in printed.splitlines() if line[:2] in ("0 ", "3 ", "6 ")]
    assert [len([cell for cell in row if cell != "*"]) for row in rows] == [11, 11, 11]
    assert "* first or last layer" in printed


def test_inactive_quantizers_are_shown_as_full_precision(model, capsys):
    set_active(model, False)
    Console(width=100).print(levels_table(manifest(model)))
    assert capsys.readouterr().out.count("fp32") == 6


def test_metrics_stand_side_by_side(capsys):
    Console(width=80).print(
        metrics_table({"metrics": {"before quantization": {"val_acc": 0.9}, "quantized": {"val_acc": 0.85}}})
    )
    row = next(line for line in capsys.readouterr().out.splitlines() if "val_acc" in line)
    assert row.split() == ["val_acc", "0.9000", "0.8500", "-0.0500"]


def test_counting_takes_no_step_of_what_computes_a_weight():
    """Spectral normalization moves its vectors each time that a weight is read in training."""
    model = attach(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), CPQConfig(act_bits=None)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    packed_size(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_report_of_a_folder_without_a_levels_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"levels\.json is missing: expected the folder of a run"):
        report_levels(tmp_path)


def test_histograms_are_of_weights_in_units_of_their_scale():
    model = attach(convnet(), CPQConfig(weight_bits=3, per_channel=True, first_last_bits=None))
    calibrate(model, [torch.randn(8, 3, 8, 8)])
    found = weight_histograms(model)
    assert list(found) == ["0", "3", "6"]
    layer = model[3]
    scale = layer.weight_quantizer.scale().detach()
    levels = layer.weight.detach() / scale.reshape(-1, 1, 1, 1)
    # A grid of 3 bits from -4 to 3, and a level more at both ends.
    low, high, counts = found["3"]["low"], found["3"]["high"], np.array(found["3"]["counts"])
    assert (low, high, len(counts)) == (-5, 4, 720)
    assert found["3"]["scale"] == pytest.approx(float(scale.mean()))
    expected, _ = np.histogram(levels.clamp(low, high).numpy(), 720, (low, high))
    assert counts.sum() == levels.numel()
    # Values next to an edge may fall on either side of it.
    assert np.abs(counts - expected).sum() <= 4


def test_channels_of_several_widths_have_a_zero_point_each(tmp_path):
    config = CPQConfig(weight_bits=2, min_bits=1, learn_bits=True, gate_sharing="channel", first_last_bits=None)
    model = calibrate(attach(convnet(), config), [torch.randn(8, 3, 8, 8)])
    quantizer = dict(quantized_layers(model))["3"].weight_quantizer
    quantizer.fix_widths([1, 2] * 4)
    record = next(r for r in levels(model) if (r.name, r.kind) == ("3", "weight"))
    assert (record.bits, record.zero_point) == ([1, 2] * 4, [0.5, 2] * 4)
    assert (record.low, record.high) == (-2, 1)
    content = manifest(model)
    weight = next(layer["weight"] for layer in content["layers"] if layer["name"] == "3")
    assert grid_mark(weight) == "(±)"
    # As an earlier release wrote it.
    assert grid_mark({"bits": [1, 2], "low": -2, "high": 1}) == ""
    write_csv(content, tmp_path / "levels.csv")
    assert ",1 2 1 2 1 2 1 2,True,0.5 2 0.5 2 0.5 2 0.5 2," in (tmp_path / "levels.csv").read_text()
