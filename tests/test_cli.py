import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.processes import run_program
from cpq_lightning import QuantizedModule, __version__, levels
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.cli.main import _shipped, main
from cpq_lightning.extras import unmet
from cpq_lightning.kernels.dispatch import choose
from tests.marks import thorough

ROOT = Path(__file__).parent.parent
CPQ = Path(sys.executable).with_name("cpq")
ENVIRONMENT = {**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}


def test_the_digits_recipe_reaches_its_accuracy(tmp_path):
    command = ("cpq_lightning", "fit", "--config", "recipes/digits.yaml")
    result = run_program(*command, cwd=tmp_path, environment=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "lightning_logs" / "version_0"
    content = json.loads((run / "levels.json").read_text())
    assert content["totals"]["weight_bits_avg"] == 4
    assert content["totals"]["act_bits_avg"] == 4
    (checkpoint,) = run.rglob("*.ckpt")
    metrics = torch.load(checkpoint, weights_only=True)["cpq_lightning"]["metrics"]
    assert metrics["quantized"]["val_acc"] >= 0.96
    shown = ("conv1.0 *", "relative to model", "before quantization", "quantized", "val_acc", "times smaller", "error")
    for expected in shown:
        assert expected in result.stdout, expected
    restored = QuantizedModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert {q.bits for _, q in quantizers(restored)} == {4, 8}


@pytest.mark.thorough
@pytest.mark.pictures
def test_the_learned_recipe_ends_at_its_target_and_reports_again(tmp_path, cpq):
    result = cpq("fit", "--config", "recipes/digits_learned.yaml")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "lightning_logs" / "version_0"
    content = json.loads((run / "levels.json").read_text())
    assert abs(content["totals"]["weight_bits_avg"] - 3) <= 0.05
    widths = {layer["weight"]["bits"] for layer in content["layers"] if not layer["weight"]["first_or_last"]}
    assert len(widths) >= 3
    (checkpoint,) = run.rglob("*.ckpt")
    metrics = torch.load(checkpoint, weights_only=True)["cpq_lightning"]["metrics"]
    assert metrics["quantized"]["val_acc"] >= 0.96
    restored = QuantizedModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert [r.bits for r in levels(restored) if r.kind == "weight"] == [x["weight"]["bits"] for x in content["layers"]]
    pictures = ["levels.csv", "levels.png", "weight_histograms.png", "trajectory.png"]
    for name in pictures:
        (run / name).unlink()
    again = cpq("report", run)
    assert again.returncode == 0, again.stderr
    assert "model.layer4.0.conv1" in again.stdout
    assert all((run / name).stat().st_size > 1000 and name in again.stdout for name in pictures)


def test_doctor_tells_which_computation_runs(cpq):
    lines = cpq("doctor").stdout.splitlines()
    assert lines[0] == f"cpq-lightning {__version__}"
    assert any(line.startswith("CPU: ") for line in lines)


def test_doctor_names_the_kernel_of_each_layer_and_the_reason_against_a_faster_one(cpq):
    settings = (
        "--quantization.min_bits=2",
        "--quantization.ignore=[conv1.0]",
        "--quantization.overrides={fc: {act_bits: null}}",
    )
    result = cpq("doctor", "--model=test_resnet", *settings)
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
    assert rows["layer1.0.conv1"] == ["2-4", "functional", "4", choose(torch.empty(1)).implementation, "1"]
    assert "masks" in " ".join(rows["1"])
    assert rows["fc"][2:] == ["fp32", "2"]
    assert rows["2"] == ["input:", "act_bits=None"]
    assert rows["conv1.0"] == ["fp32", "fp32", "3"]
    assert rows["3"] == ["ignore", "has", "'conv1.0'"]


def test_doctor_answers_for_a_device_that_is_absent_and_refuses_what_it_cannot_answer(cpq):
    assert "kernels for cpu do not run on xla" in cpq("doctor", "--model=test_resnet", "--device=xla").stdout
    assert "'resnet81' is no timm model" in cpq("doctor", "--model=resnet81").stderr
    assert "give a --model" in cpq("doctor", "--quantization.weight_bits=2").stderr


def test_a_report_of_no_run_is_refused_in_a_sentence(tmp_path, cpq):
    result = cpq("report", tmp_path)
    assert result.returncode != 0
    assert "levels.json is missing" in result.stderr
    (tmp_path / "levels.json").write_text("{}")
    assert "is no levels.json" in cpq("report", tmp_path).stderr
    layers = [{"name": "fc", "weight": {"bits": 4}, "activation": None}]
    (tmp_path / "levels.json").write_text(json.dumps({"format": "cpq-levels", "layers": layers, "totals": {}}))
    result = cpq("report", tmp_path)
    assert "has no scale, low" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_and_print_config(cpq):
    top = cpq("--help")
    assert top.returncode == 0
    assert all(name in top.stdout for name in ("fit", "validate", "test", "predict", "export", "report", "doctor"))
    printed = cpq("fit", "--config", "recipes/digits.yaml", "--print_config")
    assert printed.returncode == 0, printed.stderr
    config = yaml.safe_load(printed.stdout)
    assert config["model"]["quantization"]["weight_bits"] == 4
    assert config["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert [c["class_path"] for c in config["trainer"]["callbacks"]] == [
        "cpq_lightning.CPQCallback",
        "cpq_lightning.callbacks.ClusterPull",
    ]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("backbone", "resnet81", "'resnet81' is no timm model. Near matches: ['resnet18'"),
        ("quantization.weight_bits", "9", "weight_bits must be from 1 to 8 bits, got 9"),
        ("quantization.ignore", "[nowhere.*]", "the pattern 'nowhere.*' matches no layer"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(cpq, setting, value, message):
    recipe = "recipes/digits.yaml"
    result = cpq("fit", "--config", recipe, f"--model.{setting}", value)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


FRAGMENTS = sorted((ROOT / "callbacks").glob("*.yaml"))


def test_fragments_add_to_another_apps_config(tmp_path):
    """Somebody else's LightningCLI app, their config, and ours as a second one, in either order."""
    (tmp_path / "app.py").write_text(
        "from lightning.pytorch.cli import LightningCLI\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "LightningCLI(BoringModel)\n"
    )
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text(
        "trainer:\n  max_epochs: 1\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: {monitor: x}\n"
    )
    arguments = [f"--config={path}" for path in (theirs, *FRAGMENTS)]
    result = run_program("app.py", "fit", *arguments, "--print_config", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    callbacks = yaml.safe_load(result.stdout)["trainer"]["callbacks"]
    assert len(callbacks) == 1 + len(FRAGMENTS)
    assert callbacks[0]["class_path"].endswith("EarlyStopping")


@pytest.mark.parametrize("with_optimizer", [True, *thorough(False)])
def test_a_fragment_quantizes_another_apps_run(tmp_path, with_optimizer):
    (tmp_path / "app.py").write_text(
        "from lightning.pytorch.cli import LightningCLI\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "class Boring(BoringModel):\n"
        "    def on_train_end(self):\n"
        "        groups = self.trainer.optimizers[0].param_groups\n"
        "        assert [len(g['params']) for g in groups] == [2], groups\n"
        "        assert self.layer.weight_quantizer.log_scale.any()\n"
        "LightningCLI(Boring)\n"
    )
    fragment = ROOT / "callbacks" / "cpq.yaml"
    optimizer = ["--optimizer=AdamW", "--optimizer.lr=0.01"] if with_optimizer else []
    result = run_program(
        "app.py", "fit", f"--config={fragment}", "--trainer.max_epochs=1", "--trainer.logger=false",
        "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=2", *optimizer,
        cwd=tmp_path, environment=ENVIRONMENT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "cpq_runs" / "version_0" / "levels.json").exists()


def test_the_wheel_runs_outside_of_the_checkout(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        content.extractall(site)
    for shipped in ("recipes/digits.yaml", "callbacks/cpq.yaml"):
        assert f"cpq_lightning/shipped/{shipped}" in names
    assert "cpq_lightning/kernels/quantize.c" in names
    assert not [n for n in names if n.split("/")[0] in ("tests", "recipes", "callbacks", "benchmarks")]

    (points,) = site.glob("*.dist-info/entry_points.txt")
    module, _, function = points.read_text().partition("cpq = ")[2].strip().partition(":")
    code = f"import sys, {module} as c, cpq_lightning; print(cpq_lightning.__file__, file=sys.stderr); c.{function}()"
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "fit", "--config", "recipes/digits.yaml", "--print_config"],
        cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    assert str(site) in printed.stderr
    assert yaml.safe_load(printed.stdout)["model"]["backbone"] == "test_resnet"


def test_main_takes_arguments(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.split() == ["cpq", __version__]


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(_shipped("recipes/digits.yaml")).read_text() == (ROOT / "recipes" / "digits.yaml").read_text()
    assert _shipped("--config=callbacks/cpq.yaml").startswith("--config=/")
    assert _shipped("recipes/nowhere.yaml") == "recipes/nowhere.yaml"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "digits.yaml").write_text("mine")
    assert _shipped("recipes/digits.yaml") == "recipes/digits.yaml"


def test_python_m_is_the_same_command(tmp_path):
    ran = run_program("cpq_lightning", "--version", cwd=tmp_path, environment=ENVIRONMENT)
    assert ran.stdout.split() == ["cpq", __version__]


def test_completion_in_bash(tmp_path):
    """What pressing the tabulator key would offer."""
    if unmet("completion"):
        pytest.skip(f"completion needs {', '.join(map(str, unmet('completion')))}")
    ran = run_program("cpq_lightning", "--print_completion=shtab-bash", cwd=tmp_path, environment=ENVIRONMENT)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout) < 2_000_000
    (tmp_path / "cpq.bash").write_text(ran.stdout)
    (tmp_path / "try.bash").write_text(
        "source cpq.bash\n"
        'offer() { COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()\n'
        "  $(complete -p cpq | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo \"${COMPREPLY[@]}\"; }\n"
        "offer cpq exp\noffer cpq fit --trainer.max_e\noffer cpq export --form\noffer cpq fit --model.lr_interval ''\n"
        "offer cpq fit --data ''\n"
    )
    offered = subprocess.run(["bash", "try.bash"], cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()
    assert offered[:4] == ["export", "--trainer.max_epochs", "--format", "epoch step"]
    assert "cpq_lightning.data.CIFAR10DataModule" in offered[4]


SHORT = (
    "--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
)  # fmt: skip


def test_a_run_folder_is_not_overwritten(cpq):
    where = ("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=here", "--trainer.logger.version=mine")
    digits = ("fit", "--config", "recipes/digits.yaml", *SHORT, "--trainer.callbacks=null", *where)
    first = cpq(*digits)
    assert first.returncode == 0, first.stderr
    run = first.folder / "here" / "lightning_logs" / "mine"
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}
    again = cpq(*digits)
    assert again.returncode == 2
    assert "is the folder of a run already, with config.yaml, levels.json, checkpoints" in again.stderr
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()} == before
    # Without a version it counts up.
    assert cpq(*digits[:-1]).returncode == 0
    assert (run.parent / "version_0" / "levels.json").exists()


def test_what_the_model_leaves_open_the_data_say(cpq):
    result = cpq("fit", "--config", "recipes/digits.yaml", *SHORT, "--model.num_classes=null")
    assert result.returncode == 0, result.stderr
    (path,) = result.folder.rglob("config.yaml")
    # Saved as it was given: with other data it is open again.
    settings = yaml.safe_load(path.read_text())["model"]
    assert settings["num_classes"] is settings["class_names"] is None
    (checkpoint,) = result.folder.rglob("*.ckpt")
    hparams = QuantizedModule.load_from_checkpoint(checkpoint).hparams
    assert (hparams["num_classes"], hparams["class_names"]) == (10, list("0123456789"))
    # The run's own config runs again, and its checkpoint is evaluated.
    arguments = ("validate", "--config", path, "--ckpt_path", checkpoint, "--trainer.enable_progress_bar=false")
    assert cpq(*arguments).returncode == 0
    crowded = cpq("fit", "--config", "recipes/digits.yaml", *SHORT, "--data.batch_size=5000")
    assert "batch_size=5000 is more than the 1438 images that train" in crowded.stderr
    refused = cpq("fit", "--config", "recipes/digits.yaml", "--model.num_classes=3")
    assert "model.num_classes is 3, and the data has 10" in refused.stderr
