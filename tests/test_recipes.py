"""Each recipe, run for a few steps on data in their real format, made on the spot; and the tutorial."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

from benchmarks.processes import run_program
from cpq_lightning import QuantizedModule, load_quantized
from cpq_lightning.attach.layers import quantizers
from tests.images import CLASSES, cifar10, image_folder
from tests.marks import thorough

ROOT = Path(__file__).parent.parent
FEW_STEPS = (
    "--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=2",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--data.num_workers=0",
)  # fmt: skip
# What a machine without GPUs has to change of the recipes for several.
ONE_CPU = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto")


def ended(result):
    """The module and the content of levels.json of a run that has just ended."""
    assert result.returncode == 0, result.stderr
    (path,) = result.folder.rglob("levels.json")
    (checkpoint,) = result.folder.rglob("*.ckpt")
    return QuantizedModule.load_from_checkpoint(checkpoint, weights_only=True), json.loads(path.read_text())


@pytest.mark.parametrize("name", ["cifar10_resnet20", *thorough("cifar10_vgg7")])
def test_cifar10(cpq, tmp_path, monkeypatch, name):
    root = cifar10(tmp_path / "data", monkeypatch)
    small = ("--data.batch_size=8", f"--data.root={root}", "--data.download=false")
    module, content = ended(cpq("fit", "--config", f"recipes/{name}.yaml", *FEW_STEPS, *small))
    assert content["run"]["metrics"]["quantized"].keys() >= {"val_acc", "val_loss"}
    # The first and the last layer too, as the paper has it.
    assert {layer["weight"]["bits"] for layer in content["layers"]} == {3}
    assert {layer["activation"]["bits"] for layer in content["layers"]} == {3}
    assert module.hparams["class_names"][:2] == ["airplane", "automobile"]
    assert all(q.active and torch.isfinite(q.scale()).all() for _, q in quantizers(module))


@pytest.mark.parametrize(
    ("name", "bits", "smaller"),
    [
        *thorough(
            ("imagenet_resnet18", 4, "--data.image_size=64"), ("imagenet_mobilenetv2", 3, "--data.image_size=64")
        ),
        # Of its twelve blocks, which are all alike, one that is narrower.
        ("imagenet_vit_small", 4, "--model.backbone_args={depth: 1, embed_dim: 96, num_heads: 3}"),
    ],
)
def test_imagenet(cpq, tmp_path, name, bits, smaller):
    attention = "vit" in name
    root = image_folder(tmp_path / "imagenet", ("train", "val"), ("n01440764", "n01443537", "n01484850"), count=8)
    small = ("--data.batch_size=4", f"--data.root={root}", "--model.pretrained=false")
    module, content = ended(cpq("fit", "--config", f"recipes/{name}.yaml", *FEW_STEPS, *ONE_CPU, *small, smaller))
    assert bits in {layer["weight"]["bits"] for layer in content["layers"]}
    assert ("products" in content) == attention
    assert all(torch.isfinite(q.scale()).all() for _, q in quantizers(module))
    (run,) = (tmp_path / "lightning_logs").iterdir()
    assert (run / "teacher.pt").exists() == attention


@pytest.mark.parametrize("name", ["imagenet_resnet18", "imagenet_mobilenetv2", "imagenet_vit_small"])
def test_the_head_of_a_recipe_says_how_many_images_a_step_has(name):
    trainer = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())["trainer"]
    assert (trainer["strategy"], trainer["precision"]) == ("ddp", "bf16-mixed")
    head = (ROOT / "recipes" / f"{name}.yaml").read_text().split("seed_everything")[0]
    said, gpus, images, steps = map(
        int, re.search(r"A batch of (\d+) is (\d+) GPUs x (\d+) images\n# x (\d+) accumulated", head).groups()
    )
    data = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())["data"]["init_args"]
    assert (gpus, images, steps) == (trainer["devices"], data["batch_size"], trainer["accumulate_grad_batches"])
    assert said == gpus * images * steps


@pytest.mark.xdist_group("ddp")
def test_two_processes(tmp_path):
    root = image_folder(tmp_path / "imagenet", ("train", "val"), count=8)
    command = [
        Path(sys.executable).with_name("cpq"), "fit", "--config", "recipes/imagenet_resnet18.yaml", *FEW_STEPS,
        "--trainer.accelerator=cpu", "--trainer.devices=2", "--data.batch_size=4", "--data.image_size=32",
        f"--data.root={root}", "--model.pretrained=false", "--model.backbone=test_resnet",
    ]  # fmt: skip
    settings = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "MEMBER: 2/2" in ran.stderr
    (path,) = tmp_path.rglob("levels.json")
    assert json.loads(path.read_text())["totals"]["weight_bits_avg"] == 4


def test_a_backbone_on_ones_own_images(cpq, tmp_path):
    root = image_folder(tmp_path / "images", count=40)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    command = (
        "fit", "--config", "recipes/finetune_resnet.yaml", f"--data.root={root}", "--model.backbone=test_resnet",
        f"--model.pretrained={tmp_path / 'weights.pth'}", *FEW_STEPS, "--trainer.max_epochs=6", "--data.image_size=32",
        "--data.batch_size=16",
    )  # fmt: skip
    first = cpq(*command)
    module, content = ended(first)
    assert module.hparams["class_names"] == list(CLASSES)
    assert module.model.num_classes == 3
    assert abs(content["totals"]["weight_bits_avg"] - 4) <= 0.05
    for word in ("Runs of test_resnet", "before quantization", "quantized", "size", "version_0", "Exported to"):
        assert word in first.stdout, word
    (packed,) = tmp_path.rglob("test_resnet.safetensors")
    assert load_quantized(packed)(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    second = cpq(*command, "--trainer.callbacks.target=2.5")
    table = second.stdout.split("Runs of test_resnet")[1]
    rows = [line.split() for line in table.splitlines() if line.startswith("version_")]
    assert [row[0] for row in rows] == ["version_0", "version_1"]
    assert float(rows[1][-2]) == pytest.approx(2.5, abs=0.05)
    again = cpq("report", "lightning_logs")
    assert [line.split() for line in again.stdout.splitlines() if line.startswith("version_")] == rows
    made = {path.name for path in (tmp_path / "lightning_logs").iterdir()}
    assert made == {"version_0", "version_1", "runs.csv", "accuracy_over_size.png"}
    # The config that a run has saved has all that an export needs for its data.
    (checkpoint,) = (tmp_path / "lightning_logs" / "version_0").rglob("*.ckpt")
    config = checkpoint.parents[1] / "config.yaml"
    exported = cpq("export", "--ckpt", checkpoint, "--data", config, "--out", "shipped")
    assert exported.returncode == 0, exported.stderr
    assert "agrees on" in exported.stdout


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("mobilenetv2", "mobilenetv2_035"),
        ("efficientnet", "test_efficientnet"),
        ("vit", "test_vit"),
        *thorough(("efficientnet", "mobilenetv3_small_050"), ("vit", "test_convnext")),
    ],
)
def test_a_recipe_for_each_kind_of_backbone(cpq, tmp_path, name, backbone):
    root = image_folder(tmp_path / "images", count=40)
    small = ("--trainer.max_epochs=5", "--data.image_size=32", "--data.batch_size=16")
    size = ("--model.backbone_args={img_size: 32}",) if backbone == "test_vit" else ()
    result = cpq(
        "fit", "--config", f"recipes/finetune_{name}.yaml", f"--data.root={root}", f"--model.backbone={backbone}",
        "--model.pretrained=false", *FEW_STEPS, *small, *size,
    )  # fmt: skip
    module, content = ended(result)
    assert abs(content["totals"]["weight_bits_avg"] - 4) <= 0.05
    # SiLU and GELU leave short negative tails.
    offsets = [q for _, q in quantizers(module) if q.kind == "activation" and 0 < q.zero_point < 2 ** (q.bits - 1)]
    assert offsets or name == "mobilenetv2"
    assert ("products" in content) == (backbone == "test_vit")
    (packed,) = tmp_path.rglob(f"{backbone}.safetensors")
    assert load_quantized(packed)(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.pictures
@pytest.mark.parametrize(("epochs", "least"), [((2, 4), 0.5), *thorough(((5, 10), 0.95))])
def test_the_tutorial(tmp_path, epochs, least):
    """As a reader runs it: a script in a process of its own; for fewer epochs, or for all of them."""
    text = (ROOT / "recipes" / "tutorial.py").read_text()
    for written, used in zip((5, 10), epochs, strict=True):
        assert text.count(f"max_epochs={written},") == 1
        text = text.replace(f"max_epochs={written},", f"max_epochs={used},")
    (tmp_path / "tutorial.py").write_text(text)
    ran = run_program("tutorial.py", "out", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    run = tmp_path / "out" / "lightning_logs" / "version_0"
    assert json.loads((run / "levels.json").read_text())["totals"]["weight_bits_avg"] == pytest.approx(3, abs=0.05)
    for name in ("levels.png", "weight_histograms.png", "trajectory.png", "Classifier.onnx"):
        assert (run / name).stat().st_size > 10_000
        assert name in ran.stdout
    accuracy = float(re.search(r"accuracy ([\d.]+) on 359 images in ONNX Runtime", ran.stdout)[1])
    quantized = float(re.search(r"([\d.]+) at 3 bits on average", ran.stdout)[1])
    assert accuracy >= least
    assert accuracy == pytest.approx(quantized, abs=0.01)
