"""The layers: imports point downwards only, and each public callback has its fragment and its row."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

import cpq_lightning
import cpq_lightning.callbacks

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cpq_lightning"


def test_imports_point_downwards():
    """The layers are in ``pyproject.toml``; import-linter looks at every import, conditional and late ones too."""
    done = subprocess.run([shutil.which("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_package_says_what_is_public():
    for init in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(init.read_text())
        assert ast.get_docstring(tree), f"{init} does not say what belongs there"
        imported = {
            alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        module = importlib.import_module(".".join(init.parent.relative_to(ROOT).parts))
        listed = set(getattr(module, "__all__", ()))
        assert listed == imported - {"TYPE_CHECKING", "Any"} or init.parent == PACKAGE, init


def test_importing_has_no_side_effect():
    code = (
        "import sys, torch, warnings; warnings.simplefilter('error', UserWarning); before = torch.get_rng_state()\n"
        "threads, dtype = torch.get_num_threads(), torch.get_default_dtype()\n"
        "import cpq_lightning, cpq_lightning.export, cpq_lightning.bitwidth.search\n"
        "sys.modules['triton'] = None; import cpq_lightning.kernels.cuda\n"
        "assert torch.get_rng_state().equal(before)\n"
        "assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())\n"
        "assert not torch.overrides._get_current_function_mode_stack()\n"
        # A machine that only runs a shipped model waits for none of these.
        "assert not {'lightning', 'torchmetrics', 'matplotlib'} & set(sys.modules)"
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


def test_private_attributes_of_lightning_are_read_in_one_place():
    names = "|".join((
        "_data_fetcher", "_combined_loader", "_data_source", "_lightning_optimizers", "_loaded_checkpoint",
        "_checkpoint_connector", "_logger_connector", "_batches_that_stepped", "_can_stop_early", "_module_mode",
        "_num_ready_batches_reached", "_state_dicts", "_on_before_batch_transfer", "_average_model",
        "_results", "_forked_name",
    ))  # fmt: skip
    for path in PACKAGE.rglob("*.py"):
        if path.name != "private.py":
            assert not re.search(rf"[.\"']({names})\b", path.read_text()), path
