"""The torch.export program: plain operations on integer codes, read without unpickling code."""

import pickle
import zipfile

import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, export_model
from cpq_lightning.export.program import LEVELS_ENTRY, read_program
from cpq_lightning.report.levels import weight_codes

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def shipped(tmp_path):
    model = attach(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)), CPQConfig())
    calibrate(model, [X])
    return model.eval(), export_model(model, tmp_path, format="torch", samples=X).path


def test_it_runs_without_this_package(shipped):
    model, path = shipped
    program = torch.export.load(path)
    names = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert names == {"aten"}
    for count in (1, 3, 8):
        assert torch.equal(program.module()(X[:count]), model(X[:count]))
    assert torch.equal(program.state_dict["0.weight_codes"].short(), weight_codes(model[0]))
    assert program.state_dict["0.weight_codes"].dtype == torch.int8


def test_it_carries_the_levels(shipped):
    extra = {LEVELS_ENTRY: ""}
    torch.export.load(shipped[1], extra_files=extra)
    assert '"format"' in extra[LEVELS_ENTRY]


class Bomb:
    """What runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_program_is_not_run(shipped, tmp_path):
    _, path = shipped
    fired, bad = tmp_path / "fired", tmp_path / "bad.pt2"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bad, "w") as target:
        names = [name for name in source.namelist() if "sample_inputs" in name]
        assert names
        for name in source.namelist():
            content = source.read(name)
            if name in names:
                torch.save((Bomb(fired),), tmp_path / "bomb.pt")
                content = (tmp_path / "bomb.pt").read_bytes()
            target.writestr(name, content)
    with pytest.raises(pickle.UnpicklingError):
        read_program(bad)
    assert not fired.exists()
    read_program(path)
