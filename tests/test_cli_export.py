"""cpq export: from a checkpoint alone to a file, and what it says."""

import shutil
import warnings

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from cpq_lightning import CPQCallback, CPQConfig, QuantizedModule, load_quantized
from cpq_lightning.cli.export import fill_in, find_samples, samples_of
from cpq_lightning.cli.main import main
from cpq_lightning.data import DigitsDataModule
from cpq_lightning.export.sample_file import write_samples
from cpq_lightning.export.samples import Samples
from tests.models import run_of

# What its tests share takes seconds to make.
pytestmark = pytest.mark.xdist_group("shipping")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on the digits: its checkpoint, and the config that LightningCLI saves."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    module = QuantizedModule(
        "test_resnet", num_classes=10, backbone_args={"in_chans": 1}, quantization=CPQConfig(weight_bits=4)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=folder, callbacks=[CPQCallback(table=False)],
        )  # fmt: skip
        trainer.fit(module, DigitsDataModule(image_size=16))
    trainer.save_checkpoint(folder / "last.ckpt")
    chosen = {"class_path": "cpq_lightning.data.DigitsDataModule", "init_args": {"image_size": 16}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 0, "data": chosen}))
    (folder / "data.yaml").write_text(yaml.safe_dump(chosen))
    return folder, module


def export(run, capsys, *arguments, out="out"):
    folder, _ = run
    main(["export", "--ckpt", str(folder / "last.ckpt"), "--out", str(folder / out), *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize(("format", "ending"), [("packed", ".safetensors"), ("onnx", ".onnx"), ("torch", ".pt2")])
def test_one_file_a_call_named_after_the_model(run, capsys, format, ending):
    text = export(run, capsys, "--format", format, out=format)
    (path,) = (run[0] / format).iterdir()
    assert path.name == f"test_resnet{ending}"
    for word in ("instead of 1.5 MB in float32", "weights 4.00 bits, activations 4.00 bits", "16 of 16 layers",
                 "agrees on 100.0% of 16 samples"):  # fmt: skip
        assert word in text
    assert ("times as fast" in text) == (format == "onnx")


def test_the_packed_file_is_the_checkpoint(run, capsys):
    export(run, capsys)
    loaded = load_quantized(run[0] / "out" / "test_resnet.safetensors")
    x = torch.randn(4, 1, 16, 16)
    assert (loaded(x) - run[1].eval()(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("config", ["config.yaml", "data.yaml"])
def test_verification_on_the_runs_own_data(run, capsys, config):
    text = export(run, capsys, "--data", str(run[0] / config), "--data_samples", "100")
    assert "of 100 samples" in text
    assert "synthetic" not in text


class Described(pl.LightningDataModule):
    """Batches that are dicts, in a part of which a network takes its arguments by name."""

    def val_dataloader(self):
        batches = [{"images": [torch.full((3, 4), float(i))], "mask": torch.ones(3, 1)} for i in range(4)]
        return DataLoader(batches, batch_size=None)


class OfDicts(torch.nn.Module):
    def forward(self, images, mask):
        return images[0] * mask


def test_data_give_samples_of_any_form(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"class_path": f"{__name__}.Described"}))
    samples = samples_of(OfDicts(), str(path), 5)
    assert samples.places(OfDicts()) == (["images.0", "mask"], {})
    assert samples.inputs[0][:, 0].tolist() == [0, 0, 0, 1, 1]


def test_switching_verification_off_says_so(run, capsys):
    assert "switched off: the file was not compared" in export(run, capsys, "--verify", "false")


def test_the_samples_are_found_from_the_checkpoint_and_named(run, capsys):
    assert f"Samples of the input: 16, of samples={run_of(run[0]) / 'samples.safetensors'}" in export(run, capsys)


@pytest.fixture
def alone(run, tmp_path):
    """The run's checkpoint, away from its folder."""
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    return str(shutil.copy(run[0] / "last.ckpt", tmp_path / "a" / "b" / "c" / "last.ckpt"))


def test_without_samples_an_export_is_refused_with_what_to_give(alone, tmp_path):
    text = refusal(["--ckpt", alone, "--out", str(tmp_path / "out")])
    for words in ("comes without samples of its input", "--samples FILE", "--data CONFIG", "--verify false"):
        assert words in text
    assert not (tmp_path / "out").exists()


def test_samples_may_be_given_as_a_file(run, alone, tmp_path, capsys):
    path = write_samples(Samples.of(torch.rand(5, 1, 16, 16)), tmp_path / "own.safetensors")
    main(["export", "--ckpt", alone, "--out", str(tmp_path / "out"), "--samples", str(path)])
    assert "of 5 samples" in capsys.readouterr().out
    both = ["--ckpt", alone, "--samples", str(path), "--data", str(run[0] / "data.yaml")]
    assert "both give samples of the input" in refusal(both)


def test_what_needs_no_samples_is_written_without(alone, tmp_path, capsys):
    unverified = ["--ckpt", alone, "--out", str(tmp_path / "out"), "--verify", "false"]
    main(["export", *unverified])
    assert "switched off" in capsys.readouterr().out
    assert load_quantized(tmp_path / "out" / "test_resnet.safetensors")(torch.rand(1, 1, 16, 16)).shape == (1, 10)
    # These are traced with samples.
    assert "--samples FILE" in refusal([*unverified, "--format", "torch"])


def test_samples_of_another_model_are_refused(run, tmp_path):
    known = ["--ckpt", str(run[0] / "last.ckpt"), "--out", str(tmp_path / "out"), "--samples"]
    for inputs, shape in (([torch.rand(3, 3, 16, 16)], "(3, 16, 16)"), ([torch.rand(3, 1, 16, 16)] * 2, "(1, 16, 16)")):
        path = write_samples(Samples.of(inputs), tmp_path / "other.safetensors")
        text = refusal([*known, str(path)])
        assert f"samples={path} does not fit the model test_resnet" in text
        assert f"the shape {shape}" in text
    assert "is no file: expected a file of samples" in refusal([*known, str(tmp_path / "nothing")])
    path.write_bytes(b"junk")
    assert "is no file of samples, or is damaged" in refusal([*known, str(path)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("there", "mark", "found"),
    [
        ("version_0/checkpoints", None, True),
        ("version_0", None, True),
        # A logger's own folder of checkpoints, within the run's.
        (".", None, True),
        # The samples of another run, whose folder holds this one's.
        (".", "version_0/hparams.yaml", False),
        ("version_0", "version_0/hparams.yaml", True),
        ("../..", None, False),
    ],
)
def test_samples_are_looked_for_up_to_the_runs_folder(tmp_path, monkeypatch, there, mark, found):
    root = tmp_path / "home" / "work" / "logs"
    (root / "version_0" / "checkpoints").mkdir(parents=True)
    path = (root / there / "samples.safetensors").resolve()
    path.touch()
    if mark:
        (root / mark).touch()
    monkeypatch.chdir(root)
    if found:
        assert find_samples("version_0/checkpoints/last.ckpt").resolve() == path
        assert find_samples(str(root / "version_0" / "checkpoints" / "last.ckpt")) == path
    else:
        with pytest.raises(FileNotFoundError, match="comes without samples"):
            find_samples("version_0/checkpoints/last.ckpt")


def test_a_checkpoint_that_carries_samples_loads_and_they_are_not_read(alone, tmp_path):
    content = torch.load(alone, weights_only=True)
    assert "cpq_lightning_samples" not in content
    torch.save({**content, "cpq_lightning_samples": [torch.rand(2, 1, 16, 16)]}, alone)
    QuantizedModule.load_from_checkpoint(alone, weights_only=True)
    assert "comes without samples" in refusal(["--ckpt", alone, "--out", str(tmp_path)])


@pytest.mark.thorough
def test_containers(run, capsys):
    sizes = {}
    for container in ("int8", "int4"):
        export(run, capsys, "--format", "onnx", "--container", container, out=container)
        sizes[container] = (run[0] / container / "test_resnet.onnx").stat().st_size
    assert sizes["int4"] < 0.6 * sizes["int8"]


def refusal(arguments):
    with pytest.raises(SystemExit) as raised:
        main(["export", *arguments])
    return str(raised.value)


def test_what_is_wrong_is_a_sentence(run, tmp_path):
    folder, _ = run
    assert "is no file: expected a checkpoint" in refusal(["--ckpt", str(tmp_path / "nothing.ckpt")])
    junk = tmp_path / "junk.ckpt"
    junk.write_bytes(b"junk")
    assert "is no checkpoint that can be read without unpickling code" in refusal(["--ckpt", str(junk)])
    torch.save(torch.zeros(3), junk)
    assert "is no checkpoint of a QuantizedModule" in refusal(["--ckpt", str(junk)])
    torch.save({"state_dict": {}, "hyper_parameters": None}, junk)
    assert "is no checkpoint of a QuantizedModule" in refusal(["--ckpt", str(junk)])
    known = ["--ckpt", str(folder / "last.ckpt"), "--out", str(tmp_path)]
    assert "is no file: expected a YAML config" in refusal([*known, "--data", "nothing.yaml"])
    other = tmp_path / "other.yaml"
    other.write_text("trainer: {}")
    assert "has neither 'data:' nor 'class_path:'" in refusal([*known, "--data", str(other)])
    other.write_text("class_path: cpq_lightning.data.DigitsDataModule\ninit_args: {sides: 3}")
    assert "sides" in refusal([*known, "--data", str(other)])
    none = ["--data", str(folder / "data.yaml"), "--data_samples", "0"]
    assert "data_samples must be at least 1" in refusal([*known, *none])


def test_a_full_precision_run_has_nothing_to_export(tmp_path):
    torch.save(
        {"state_dict": {}, "hyper_parameters": {"backbone": "resnet18", "backbone_args": {}, "quantization": None}},
        tmp_path / "a.ckpt",
    )
    assert "is of a run in full precision" in refusal(["--ckpt", str(tmp_path / "a.ckpt")])


class OnlyCounted(DigitsDataModule):
    class_names = None
    num_classes = 10


class OnlyNamed:
    class_names = ("a", "b")


@pytest.mark.parametrize(
    ("data", "classes"), [("OnlyCounted", (10, None)), ("OnlyNamed", (2, ["a", "b"])), ("dict", (None, None))]
)
def test_what_is_left_open_is_filled_in(data, classes, monkeypatch):
    monkeypatch.setattr("cpq_lightning.cli.export.data_module", lambda settings: globals()[data]())
    model = {"backbone": "resnet18", "num_classes": None, "class_names": None, "backbone_args": {"img_size": 96}}
    path = "builtins.dict" if data == "dict" else f"tests.test_cli_export.{data}"
    settings = {"class_path": path, "init_args": {"backbone": None, "image_size": None}}
    fill_in(model, settings)
    assert (model["num_classes"], model["class_names"]) == classes
    assert settings["init_args"] == {"backbone": "resnet18", "image_size": 96}
    own = {"class_path": path, "init_args": {"backbone": "vit_tiny_patch16_224", "image_size": 64}}
    fill_in(dict(model), own)
    assert own["init_args"] == {"backbone": "vit_tiny_patch16_224", "image_size": 64}
