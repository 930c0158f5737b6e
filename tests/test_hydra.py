"""Hydra's configs: every public class is instantiated from one, and keeps nothing of them."""

import pickle

import pytest
import torch

import cpq_lightning
import cpq_lightning.callbacks
import cpq_lightning.data
from cpq_lightning import CPQCallback, CPQConfig

OmegaConf = pytest.importorskip("omegaconf").OmegaConf
instantiate = pytest.importorskip("hydra.utils").instantiate

QUANTIZATION = {
    "weight_bits": 3,
    "ignore": ["*.head"],
    "overrides": {"*.a": {"weight_bits": 5}},
    "levels_from": {"a": {"weight": [3, 4], "activation": None}},
}
CONFIG = {"_target_": "cpq_lightning.CPQConfig", **QUANTIZATION}
# Arguments of the public classes, where they need some or have containers among them.
ARGUMENTS = {
    "CPQConfig": QUANTIZATION,
    "CPQCallback": {"config": CONFIG, "export": ["packed", "torch"]},
    "QuantizedModule": {
        "backbone": "test_resnet",
        "class_names": ["a", "b", "c", "d"],
        "num_classes": 4,
        "quantization": {"weight_bits": 3, "overrides": {"*conv1*": {"weight_bits": 5}}},
        "backbone_args": {"block_args": {"attn_layer": None}},
        "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1},
    },
    "BitBudget": {"target": 3.0},
    "ImageFolderDataModule": {"augmentation": {"scale": [0.5, 1.0]}},
    "DistillationCallback": {"teacher": "self"},
}
BASES = {"ImageDataModule", "DataError", "MissingDataError"}


def public():
    for package in (cpq_lightning, cpq_lightning.callbacks, cpq_lightning.data):
        for name in dir(package):
            thing = getattr(package, name)
            if isinstance(thing, type) and thing.__module__.startswith("cpq_lightning") and name not in BASES:
                yield pytest.param(thing, f"{package.__name__}.{name}", id=name)


def containers(value, seen):
    """The types of what an object holds, far down."""
    if id(value) in seen or isinstance(value, torch.Tensor | torch.nn.Module):
        return set()
    seen.add(id(value))
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    inner = [*inner, *getattr(value, "__dict__", {}).values()]
    return {type(value).__module__.split(".")[0]}.union(*(containers(v, seen) for v in inner))


@pytest.mark.parametrize(("cls", "path"), [*public()])
def test_every_public_class_is_instantiated(cls, path):
    arguments = ARGUMENTS.get(cls.__name__, {})
    made = instantiate(OmegaConf.create({"_target_": path, **arguments}))
    assert type(made) is cls
    assert "omegaconf" not in containers(vars(made), set())
    hparams = dict(getattr(made, "hparams", {}))
    assert "omegaconf" not in containers(hparams, set())
    pickle.dumps(hparams)


def test_what_is_instantiated_is_what_python_makes():
    assert instantiate(OmegaConf.create(CONFIG)) == CPQConfig(**QUANTIZATION)
    for config in (CONFIG, QUANTIZATION):
        made = instantiate(OmegaConf.create({"_target_": "cpq_lightning.CPQCallback", "config": config}))
        assert made.config == CPQConfig(**QUANTIZATION)
    assert CPQCallback(OmegaConf.create(QUANTIZATION)).config == CPQConfig(**QUANTIZATION)


def test_a_checkpoint_of_such_a_module_loads_without_unpickling_classes(tmp_path):
    module = instantiate(
        OmegaConf.create({"_target_": "cpq_lightning.QuantizedModule", **ARGUMENTS["QuantizedModule"]})
    )
    torch.save({"hyper_parameters": dict(module.hparams)}, tmp_path / "a.ckpt")
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert loaded["quantization"]["overrides"] == {"*conv1*": {"weight_bits": 5}}


def test_wrong_keys_are_told_as_by_the_class_itself():
    with pytest.raises(Exception, match=r"Did you mean 'weight_bits'\?"):
        instantiate(OmegaConf.create({"_target_": "cpq_lightning.CPQCallback", "config": {"weight_bit": 3}}))
