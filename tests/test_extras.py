import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from packaging.requirements import Requirement

from cpq_lightning import extras


def test_an_extra_is_what_pyproject_says_of_it():
    assert {r.name.replace("_", "-") for r in extras.requirements("onnx")} == {
        "onnx", "onnxscript", "onnxruntime", "ml-dtypes"
    }  # fmt: skip
    assert "jsonargparse" in {r.name for r in extras.requirements("recipes")}
    assert extras.unmet("cli") == []


@pytest.mark.parametrize(
    ("needed", "said"),
    [
        ("rich>=99", r"rich>=99 \(installed: [\d.]+\): pip install 'rich>=99'"),
        ("no-such>=1", r"no-such>=1 \(not installed\): pip install 'no-such>=1'"),
    ],
)
def test_what_is_missing_or_too_old_is_named(monkeypatch, needed, said):
    monkeypatch.setattr(extras, "requirements", lambda extra: [Requirement(needed)])
    with pytest.raises(ImportError, match=f"This needs {said}$"):
        extras.require("This", "any")


def test_what_a_requirements_own_extra_lacks_counts(monkeypatch):
    real = extras._version
    monkeypatch.setattr(extras, "_version", lambda name: "0.1" if name == "docstring-parser" else real(name))
    assert [r.name for r in extras.unmet("cli")] == ["jsonargparse"]


def test_a_module_of_another_distribution_will_do(monkeypatch):
    monkeypatch.setattr(extras, "_version", lambda name: None)
    assert extras.unmet("onnx") == []


def test_without_metadata_nothing_is_asked_for(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.requires", missing)
    extras.require("This", "onnx")


def test_the_command_says_in_a_sentence_what_its_parser_lacks(monkeypatch):
    from cpq_lightning.__main__ import main

    real = extras._version
    monkeypatch.setattr(extras, "_version", lambda name: "4.20.0" if name == "jsonargparse" else real(name))
    with pytest.raises(SystemExit) as raised:
        main()
    (line,) = raised.value.code.splitlines()
    assert line.startswith("The command cpq needs jsonargparse[signatures]>=")
    assert "(installed: 4.20.0): pip install 'jsonargparse[signatures]>=" in line


def test_callbacks_need_no_parser():
    code = (
        "import importlib.metadata as m, sys; sys.modules['jsonargparse'] = None; real = m.distribution\n"
        "def distribution(name):\n"
        "    if name == 'jsonargparse': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.distribution = distribution\n"
        "from cpq_lightning import CPQCallback, QuantizedModule; import cpq_lightning.callbacks, cpq_lightning.data\n"
        "assert sys.modules['jsonargparse'] is None\n"
        "from cpq_lightning.__main__ import main; main()"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    (line,) = ran.stderr.splitlines()
    assert line.startswith("The command cpq needs jsonargparse[signatures]>="), ran.stderr
    assert "(not installed): pip install" in line
