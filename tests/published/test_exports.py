"""Published models are exported from a training step on, and the files verified: by their own calls and outputs."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.model_coverage import MODELS
from cpq_lightning import CPQConfig, attach, calibrate, export_model

pytestmark = [pytest.mark.published, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("BertForSequenceClassification", "packed"),
        ("BertForSequenceClassification", "torch"),
        ("BertForSequenceClassification", "onnx"),
        ("GPT2LMHeadModel", "onnx"),
        ("ViTForImageClassification", "onnx"),
    ],
)
def test_a_model_of_transformers_is_exported_after_a_step(name, format, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[bench-coverage]'")
    torch.manual_seed(0)
    model, inputs = MODELS[name][1]()
    attach(model, CPQConfig(weight_bits=4, act_bits=8, attention=True), example_inputs=inputs)
    calibrate(model, [(inputs,)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()(**inputs).logits.square().mean().backward()
    optimizer.step()
    written = export_model(model, tmp_path, format=format, samples=inputs)
    assert written.verification.weights > 8
    assert written.verification.agreement in (None, 1)


def test_the_detector_of_the_recipe(tmp_path):
    """As a reader runs it."""
    if importlib.util.find_spec("rfdetr") is None:
        pytest.skip("rfdetr is not installed: pip install -e '.[published-rfdetr]'")
    program = [sys.executable, ROOT / "recipes" / "rf_detr.py", "out"]
    ran = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "100 % of the multiply-accumulates run quantized" in ran.stdout
    assert "left out, as unused" in ran.stdout
    assert (tmp_path / "out" / "rf_detr.onnx").stat().st_size > 10_000_000
