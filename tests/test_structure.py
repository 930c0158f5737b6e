"""The house: imports point downwards only, and each public callback has its fragment and its row."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import cpq_lightning
import cpq_lightning.callbacks

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cpq_lightning"
# A module may import from its own floor's folder and from floors below it.
FLOORS = [
    ["functional", "version", "extras"],
    ["kernels"],
    ["config"],
    ["nn"],
    ["attach", "optim", "backbones"],
    ["checkpoint"],
    ["export"],
    ["callbacks"],
    ["module", "data"],
    ["shipping", "pytorch_lightning"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
WITHOUT_LIGHTNING = {name for names in FLOORS[:7] for name in names}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", [p for p in SOURCES if p != PACKAGE / "__init__.py"], ids=lambda p: p.name)
def test_imports_point_downwards(path):
    here = place(path)
    assert here in FLOOR, f"{here} stands on no floor"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "cpq_lightning" and parts[1] != here:
            assert FLOOR[parts[1]] < FLOOR[here], f"{path.relative_to(ROOT)} imports {name}"
        if here in WITHOUT_LIGHTNING:
            assert parts[0] not in ("lightning", "pytorch_lightning"), f"{path.relative_to(ROOT)} imports {name}"
        if here == "functional":
            assert parts[0] in (*sys.stdlib_module_names, "torch", "cpq_lightning"), f"{path} imports {name}"


def test_callbacks_import_no_other_callback():
    files = {p.stem for p in (PACKAGE / "callbacks").glob("[!_]*.py")}
    for stem in files:
        for name in imports(PACKAGE / "callbacks" / f"{stem}.py"):
            parts = name.split(".")
            assert parts[:2] != ["cpq_lightning", "callbacks"] or parts[2].startswith("_"), f"{stem} imports {name}"


def test_importing_has_no_side_effect():
    code = (
        "import torch, warnings; warnings.simplefilter('error', UserWarning); before = torch.get_rng_state()\n"
        "threads, dtype = torch.get_num_threads(), torch.get_default_dtype()\n"
        "import cpq_lightning\n"
        "assert torch.get_rng_state().equal(before)\n"
        "assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())\n"
        "assert not torch.overrides._get_current_function_mode_stack()\n"
        # A machine that only runs a shipped model waits for none of these.
        "import sys; assert not {'lightning', 'torchmetrics', 'matplotlib'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


def test_star_import_hides_no_package_of_others():
    names = {}
    exec("from cpq_lightning import *", names)
    assert "nn" not in names
    assert set(cpq_lightning.__all__) <= set(names)


def public_callbacks():
    return {n for n in dir(cpq_lightning.callbacks) if isinstance(getattr(cpq_lightning.callbacks, n), type)}


def test_callback_fragment_and_readme_row_stand_together():
    fragments = {}
    for path in (ROOT / "callbacks").glob("*.yaml"):
        (entry,) = yaml.safe_load(path.read_text())["trainer"].values()
        fragments[entry["class_path"].rsplit(".", 1)[-1]] = path.name
    assert set(fragments) == public_callbacks()
    rows = [line for line in (ROOT / "callbacks" / "README.md").read_text().splitlines() if line.startswith("| [")]
    assert len(rows) == len(fragments)
    for name, file in fragments.items():
        assert any(file in row and name in row for row in rows), name


def test_each_recipe_has_its_row():
    text = (ROOT / "recipes" / "README.md").read_text()
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"recipes/{path.name}" in text
