"""CPQConfig(attention=True) in a Trainer."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from cpq_lightning import CPQCallback, CPQConfig, QuantizedModule, load_quantized
from cpq_lightning.attach.products import quantized_operands
from cpq_lightning.export.sample_file import SAMPLES_FILE
from tests.models import Classifier, data, run_of, with_own_forward

CONFIG = CPQConfig(attention=True)
ARGUMENTS = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def _trainer(tmp_path, callback, **settings):
    settings = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, **settings}
    return pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", callbacks=[callback], **settings)


def test_a_run_learns_its_operands_writes_them_and_restores_them(tmp_path):
    torch.manual_seed(0)
    module = QuantizedModule("test_vit", num_classes=4, quantization=CONFIG, backbone_args=ARGUMENTS)
    trainer = _trainer(tmp_path, CPQCallback(CONFIG, export=["packed"]))
    trainer.fit(module, data(), data(shuffle=False))
    operands = dict(quantized_operands(module))
    assert len(operands) == 8
    assert [n for n, q in operands.items() if not q.fitted or not q.log_scale.any()] == []
    [companion] = trainer.callbacks[0]._companions
    held = [id(p) for p in companion.parameters]
    assert all(held.count(id(p)) == 1 for q in operands.values() for p in q.parameters())

    content = json.loads((run_of(tmp_path) / "levels.json").read_text())
    assert [entry["name"] for entry in content["products"]] == list(operands)
    assert all(entry["used_levels"] >= 1 for entry in content["products"])

    checkpoint = tmp_path / "end.ckpt"
    trainer.save_checkpoint(checkpoint)
    restored = QuantizedModule.load_from_checkpoint(checkpoint, weights_only=True).eval()
    images = next(iter(data(shuffle=False)))[0]
    with torch.no_grad():
        expected = module.eval()(images)
        assert torch.equal(restored(images), expected)
        [path] = (p for p in run_of(tmp_path).glob("*.safetensors") if p.name != SAMPLES_FILE)
        torch.testing.assert_close(load_quantized(path)(images), expected)


class Plain(Classifier):
    """Anybody's module: it has a forward, and attention that nobody told us of."""

    def __init__(self, example=None):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(2), nn.Linear(64, 16), nn.TransformerEncoderLayer(16, 2, 16), nn.Flatten(), nn.Linear(48, 4)
        )
        self.net[2].self_attn = with_own_forward(nn.MultiheadAttention)(16, 2)
        self.gram = Gram()
        if example is not None:
            self.example_input_array = example

    def forward(self, x):
        return self.net(self.gram(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Gram(nn.Module):
    def forward(self, x):
        return x + x @ x.transpose(-2, -1) @ x * 0.01


def test_anybodys_module_says_what_it_is_called_with(tmp_path):
    with pytest.raises(MisconfigurationException, match="example_input_array"):
        _trainer(tmp_path, CPQCallback(CONFIG)).fit(Plain(), data())
    module = Plain(torch.randn(2, 3, 8, 8))
    with pytest.warns(UserWarning, match=r"multi_head_attention_forward: input and weight"):
        _trainer(tmp_path, CPQCallback(CONFIG), limit_val_batches=0).fit(module, data())
    assert [name.rpartition(".product")[0] for name, _ in quantized_operands(module)] == ["gram"] * 4
