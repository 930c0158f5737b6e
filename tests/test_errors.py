"""Errors of the package may be caught by kind, and as the builtin exceptions that they also are."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cpq_lightning import CPQError, attach, export_model, load_quantized
from cpq_lightning.attach.levels_file import read_levels
from cpq_lightning.errors import ExportError, ResumeError, StateDictError, UnreadableFileError
from cpq_lightning.export import read_samples
from cpq_lightning.trainer.lightning_names import MisconfigurationException, NotResumable

PACKAGE = Path(__file__).parent.parent / "cpq_lightning"
# Caught where they are raised: ``cpq doctor`` gives the reason why kernels are not used.
INTERNAL = {"Unavailable", "_NoCache"}


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def test_every_error_of_the_package_has_the_base_class():
    own = set()
    for path in PACKAGE.rglob("*.py"):
        names = re.findall(r"^class (\w+)\([^)]*(?:Error|Exception)[^)]*\):", path.read_text(), re.MULTILINE)
        for name in names:
            module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            own.add(getattr(importlib.import_module(module), name))
    assert {c.__name__ for c in own} >= {"MismatchError", "MissingDataError", "FailedElsewhere", "UnreadableFileError"}
    assert {c.__name__ for c in own if not issubclass(c, CPQError)} == INTERNAL


@pytest.mark.parametrize("read", [read_levels, read_samples, load_quantized])
def test_a_foreign_file_is_unreadable(read, tmp_path):
    path = tmp_path / "foreign"
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(UnreadableFileError) as caught:
        read(path)
    assert isinstance(caught.value, CPQError)
    assert isinstance(caught.value, ValueError)


def test_a_model_that_is_not_quantized_cannot_be_exported(tmp_path):
    with pytest.raises(ExportError, match="is not quantized"):
        export_model(net(), tmp_path, samples=torch.ones(2, 4))


def test_a_state_of_a_quantized_model_does_not_fit_a_plain_one():
    with pytest.raises(StateDictError, match=r"cpq_lightning\.loading") as caught:
        net().load_state_dict(attach(net()).state_dict())
    assert isinstance(caught.value, RuntimeError)


def test_a_run_that_cannot_be_resumed_is_misconfigured_too():
    assert issubclass(NotResumable, ResumeError)
    assert issubclass(NotResumable, MisconfigurationException)
    assert issubclass(MisconfigurationException, CPQError)
