import json
import os

import pytest
import torch
from rich.console import Console

from cpq_lightning import CPQConfig, attach, calibrate, levels
from cpq_lightning.attach import recording, set_active
from cpq_lightning.export import levels_table, manifest, metrics_table, write_levels
from tests.models import convnet, quantized_weight


@pytest.fixture
def model():
    return calibrate(attach(convnet(), CPQConfig(weight_bits=3, act_bits=5)), [torch.randn(4, 3, 8, 8)])


def test_a_record_a_quantizer(model):
    records = levels(model)
    assert [(r.name, r.kind, r.bits, r.low, r.high, r.exempt) for r in records] == [
        ("0", "weight", 8, -128, 127, True),
        ("0", "activation", 8, -128, 127, True),
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
    assert record.used_levels == len(quantized.unique())


def test_totals_add_up(model):
    totals = manifest(model)["totals"]
    first, middle, last = 216, 576, 512
    rest = 8 + 8 + 4 + 16 + 16  # biases, batch norm's weight and bias, its mean and variance
    assert totals["weight_bits_avg"] == 3
    assert totals["weight_bits_avg_all"] == pytest.approx((8 * first + 3 * middle + 8 * last) / (first + middle + last))
    assert totals["act_bits_avg"] == 5
    assert totals["fp32_bytes"] == 4 * (first + middle + last + rest)
    assert totals["size_bytes"] == first + middle * 3 // 8 + last + 4 * 6 + 4 * rest


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
        == header.count("step")
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
    Console(width=80).print(metrics_table({"full precision": {"val_acc": 0.9}, "quantized": {"val_acc": 0.85}}))
    row = next(line for line in capsys.readouterr().out.splitlines() if "val_acc" in line)
    assert row.split() == ["val_acc", "0.9000", "0.8500", "-0.0500"]
