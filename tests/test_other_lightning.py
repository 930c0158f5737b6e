"""Tests of callbacks and of Lightning's features, rewritten for ``pytorch_lightning``, of the version that is there.

In an environment of its own: ``pip install pytorch_lightning==2.5.2 && pytest -m other_lightning && pytest
tests/test_names.py``, whose tests are of both names as they are.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.other_lightning
ROOT = Path(__file__).parent.parent
FILES = [
    f"{folder}/{p.name}" for folder in ("callbacks", "trainer") for p in (ROOT / "tests" / folder).glob("test_*.py")
]
FILES += ["test_module.py", "test_lightning_matrix.py"]
RENAMED = {
    r"\blightning\.pytorch\b": "pytorch_lightning",
    r"\blightning\.fabric\b": "lightning_fabric",
    r"\bfrom lightning import\b": "from pytorch_lightning import",
}
# What a run of the rewritten tests begins with.
BEGIN = """
import cpq_lightning
import pytest
import pytorch_lightning
from cpq_lightning.pytorch_lightning import QuantizedModule

cpq_lightning.QuantizedModule = QuantizedModule


class _Later:
    def __init__(self, *args, **kwargs):
        pytest.skip("this version of pytorch_lightning has no averaging callback")


for name in ("WeightAveraging", "EMAWeightAveraging"):
    if not hasattr(pytorch_lightning.callbacks, name):
        setattr(pytorch_lightning.callbacks, name, _Later)
"""


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewritten")
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for path in folder.rglob("*.py"):
        text = path.read_text()
        for old, new in RENAMED.items():
            text = re.sub(old, new, text)
        path.write_text(BEGIN + text if path.name == "conftest.py" else text)
    return folder


@pytest.mark.parametrize("file", sorted(FILES))
def test_callbacks_pass_their_own_tests_under_the_other_name(file, rewritten):
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore", "--no-header"]
    places = [str(rewritten), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in places if p)}
    done = subprocess.run([*command, f"tests/{file}"], cwd=rewritten, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
