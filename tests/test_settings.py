"""One way: a setting has one name, one default and one place, wherever it can be given."""

import inspect
import re
from collections import defaultdict
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from cpq_lightning import CPQConfig
from cpq_lightning.cli.main import _parser_of

ROOT = Path(__file__).parent.parent
PUBLIC = ["", ".attach", ".callbacks", ".data", ".export", ".functional", ".report"]
GIVEN = inspect.Parameter.POSITIONAL_OR_KEYWORD

# Owners of a setting for whom its name or its default is another, and why.
OTHERWISE = {
    ("attach", "config"): "None leaves the settings of a model that is attached already as they are",
    ("QuantizedModule", "teacher"): "None is training without a teacher",
    ("CPQCallback", "samples"): "the number of samples to keep; exports take the samples, or their file",
    ("ClusterPull", "start"): "dampening is for the end of a run",
    ("OscillationFreezing", "first"): "a frequency of reversals",
    ("OscillationFreezing", "last"): "a frequency of reversals",
    ("OscillationFreezing", "shape"): "that of the paper",
    ("ProgressiveWidths", "end"): "the last widths need half of the run",
    ("DropBitsSchedule", "end"): "that of the figures in benchmarks/findings, see its docstring",
    ("DropBitsSchedule", "first"): "a probability, and no temperature",
    ("DropBitsSchedule", "last"): "a probability, and no temperature",
    ("DigitsDataModule", "image_size"): "8 pixels are too few, see its docstring",
    ("DigitsDataModule", "val_fraction"): "there are only 1,797 images, see its docstring",
    ("DigitsDataModule", "num_workers"): "its images are in memory, see its docstring",
    ("ImageDataModule", "num_workers"): "the base class of data in memory too",
    ("cpq report", "out"): "None is the folder that contains all runs",
}
# One setting under two names, where the shorter one would not say whose it is.
RENAMED = {
    ("CPQConfig", "weight_estimator"): "estimator",
    ("CPQConfig", "act_estimator"): "estimator",
    ("QuantizedModule", "quantization"): "config",
    ("QuantizedModule", "distillation_weight"): "weight",
    ("QuantizedModule", "distillation_temperature"): "temperature",
}
# What has a default and may be given without its name.
POSITIONAL = {
    ("CPQCallback", "config"), ("DistillationCallback", "teacher"), ("BatchNormReestimation", "batches"),
    ("attach", "config"), ("RangeTracker", "optimizers"), ("load_quantized", "model"), ("quantize", "masks"),
    *((name, "root") for name in (
        "CIFAR10DataModule", "CIFAR100DataModule", "FashionMNISTDataModule", "ImageFolderDataModule",
    )),
}  # fmt: skip
# The signature of torch's scaled_dot_product_attention.
OF_TORCH = {"attention"}
DOCUMENTS = [ROOT / "README.md", ROOT / "callbacks" / "README.md"]


def owners():
    """The parameters of everything public that takes settings: functions, callbacks, modules, the config."""
    for package in (import_module(f"cpq_lightning{name}") for name in PUBLIC):
        for name in package.__all__:
            thing = getattr(package, name)
            # Other classes are records and exceptions.
            if (
                inspect.isfunction(thing)
                or name.endswith(("Callback", "Module", "Config", "Tracker"))
                or (package.__name__.endswith(".callbacks"))
            ):
                yield name, inspect.signature(thing).parameters


def settings():
    """``(owner, setting, default)`` of every setting that has a default; the owner may be a command."""
    found = {(o, n): p.default for o, ps in owners() for n, p in ps.items() if p.default is not p.empty}
    for command in ("export", "report"):
        options = _parser_of(command).get_defaults().as_dict()
        found |= {(f"cpq {command}", n): value for n, value in options.items() if n not in ("runs", "ckpt", "help")}
    return found


def disagreements(found):
    """The owners and defaults of each setting that has several defaults."""
    by_name = defaultdict(dict)
    for (owner, name), default in found.items():
        by_name[RENAMED.get((owner, name), name)][owner] = default
    return {name: found for name, found in by_name.items() if any(a != b for a, b in pairwise(found.values()))}


def test_a_setting_has_one_default():
    found = settings()
    assert found["calibrate", "calibration_batches"] == found["CPQCallback", "calibration_batches"] == 8
    assert found["export_model", "verify"] is found["cpq export", "verify"] is True
    compared = {key: default for key, default in found.items() if key not in OTHERWISE}
    assert not disagreements(compared)
    for key in OTHERWISE:
        assert key[1] in disagreements(compared | {key: found[key]}), f"{key} is no exception any more"


def test_another_default_is_noticed():
    changed = settings() | {("calibrate", "calibration_batches"): 16, ("quantize", "estimator"): "argmax"}
    assert {"calibration_batches", "estimator"} <= set(disagreements(changed))


def test_what_is_a_setting_is_a_keyword():
    given = {(o, n) for o, ps in owners() for n, p in ps.items() if p.kind == GIVEN and p.default is not p.empty}
    assert {(owner, name) for owner, name in given if owner not in OF_TORCH} == POSITIONAL


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_fragment_has_the_defaults_of_its_callback(path):
    """What a fragment spells out is what the callback does without it. A budget has no default target."""
    (entry,) = yaml.safe_load(path.read_text())["trainer"].values()
    callback, found = entry["class_path"].rsplit(".", 1)[-1], settings()
    for name, value in entry["init_args"].items():
        value = CPQConfig.of(value) if name == "config" else tuple(value) if isinstance(value, list) else value
        assert (callback, name) == ("BitBudget", "target") or value == found[callback, name], name


def defaults_in_documents():
    """``(owner, setting, default)`` of the rows of the table of settings, and of sentences that name a default."""
    text = "".join(path.read_text() for path in DOCUMENTS)
    table = text.partition("| setting | default |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    named = [pair for names, values in rows for pair in zip(names.split("`, `"), values.split(", "), strict=True)]
    named += re.findall(r"`([^`]+)=(\S+)`, the default", text)
    for setting, value in named:
        owner, _, name = setting.strip(" `").removesuffix("=...)").rpartition("(")
        value = value.strip(' `"')
        yield owner or "CPQConfig", name, None if value.startswith("as `") else yaml.safe_load(value)


def test_documents_name_the_defaults():
    found, named = settings(), list(defaults_in_documents())
    assert {("CPQConfig", "act_bits", 4), ("CPQCallback", "lr_factor", 1.0)} <= set(named)
    assert ("CPQConfig", "gate_estimator", "curvature") in named
    for owner, name, default in named:
        assert found[owner, name] == default, (owner, name)
