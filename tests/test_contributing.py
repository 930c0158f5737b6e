"""What contributors read: the examples run, pictures and lists show the package as it is, and links lead somewhere."""

import ast
import doctest
import inspect
import json
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pydoc import locate
from types import ModuleType
from typing import get_args

import pytest
import yaml
from PIL import Image

import cpq_lightning.callbacks
from cpq_lightning.export import formats
from cpq_lightning.functional import categorical, schedule
from tests.test_structure import PACKAGE, ROOT, public_callbacks

LAYERS = runpy.run_path(str(ROOT / "docs" / "layers.py"))
TABLES = {"Estimator": "ESTIMATORS", "Shape": "SHAPES", "Format": "FORMATS"}

# Examples -------------------------------------------------------------------------------------------------------------

SECTIONS = (ROOT / "docs" / "extending.md").read_text().split("\n## ")[1:]
PART = re.compile(r"^\d+\. (?:`(?P<path>[^`]+)`)?|^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(section):
    """Path, language and content of each block: a path is the first word of a step."""
    path = None
    for part in PART.finditer(section):
        if part["language"]:
            yield path, part["language"], part["body"]
        else:
            path = part["path"]


def applied(section):
    """The files of a section, as its blocks leave them."""
    files = {}
    for path, language, body in blocks(section):
        if path is None:
            continue
        before = files.get(path) or ((ROOT / path).read_text() if (ROOT / path).exists() else "")
        if language == "diff":
            lines = body.splitlines(keepends=True)
            old, new = ("".join(line[1:] or "\n" for line in lines if line[0] != other) for other in "+-")
            assert before.count(old) == 1, f"{path} has {before.count(old)} places like\n{old}"
            files[path] = before.replace(old, new)
        else:
            files[path] = f"{before}\n\n{body}" if before else body
    return files


def check_table(module):
    for kind, table in TABLES.items():
        if table in vars(module):
            assert get_args(vars(module)[kind]) == tuple(vars(module)[table])


@pytest.fixture
def take_over(monkeypatch):
    """Run a file of the package, new or edited, and let the package have what is new in it."""

    def run(path, text):
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        made = ModuleType(name)
        exec(compile(text, path, "exec"), vars(made))
        check_table(made)
        if not (ROOT / path).exists():
            assert doctest.testmod(made).failed == 0
            monkeypatch.setitem(sys.modules, name, made)
            return
        real = sys.modules[name]
        for key, value in vars(made).items():
            if not hasattr(real, key):
                monkeypatch.setattr(real, key, value, raising=False)
            elif key in TABLES.values():
                for entry in value.keys() - vars(real)[key].keys():
                    monkeypatch.setitem(vars(real)[key], entry, value[entry])

    return run


@pytest.mark.parametrize("section", SECTIONS, ids=[section.split("\n")[0] for section in SECTIONS])
def test_an_example_of_an_extension_works(section, take_over, request, tmp_path):
    files = {path: text for path, text in applied(section).items() if path.endswith(".py")}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    ours = 'lint.isort.known-first-party = ["cpq_lightning", "tests"]'
    for check in (["check"], ["format", "--check"]):
        command = ["ruff", *check, "--no-cache", "--config", ROOT / "pyproject.toml", "--config", ours, tmp_path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    for path, text in files.items():
        if path.startswith("cpq_lightning"):
            take_over(path, text)

    tests = re.findall(r"^def (test_\w+)", section, re.MULTILINE)
    (test_file,) = (path for path in files if path.startswith("tests"))
    namespace = {"__name__": "example"}
    exec(compile(files[test_file], test_file, "exec"), namespace)
    for test in tests:
        namespace[test](**{n: request.getfixturevalue(n) for n in inspect.signature(namespace[test]).parameters})
    assert tests

    (fragment,) = (yaml.safe_load(body) for _, language, body in blocks(section) if language == "yaml")
    (entry,) = fragment["trainer"].values()
    locate(entry["class_path"])(**entry["init_args"])


@pytest.mark.parametrize("module", [categorical, schedule, formats])
def test_a_type_lists_the_names_of_its_table(module):
    check_table(module)


# Layers ---------------------------------------------------------------------------------------------------------------


def test_the_picture_shows_the_layers_of_the_contract():
    drawn = json.loads(Image.open(LAYERS["PICTURE"]).text[LAYERS["KEY"]])
    assert drawn == LAYERS["read"](), "python docs/layers.py draws it again"


def test_a_folder_says_what_belongs_there_and_what_it_may_import():
    may = {}
    rows = LAYERS["read"]()
    for place, row in enumerate(rows[:-1]):
        for layer in row:
            name, beside = layer["name"], row if layer["joined"] else ()
            names = [other["name"] for other in (*beside, *rows[place + 1]) if other is not layer]
            may[name] = f"May import {', '.join(names)}{' and below' if rows[place + 2 :] else ''}"
    for init in PACKAGE.glob("*/**/__init__.py"):
        first = ast.get_docstring(ast.parse(init.read_text())).split("\n")[0]
        parent, *inner = init.parent.relative_to(PACKAGE).parts
        assert (f"May import what {parent} may" if inner else may[parent]) in first, init


# Other documents ------------------------------------------------------------------------------------------------------

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("callbacks/*.md"), *ROOT.glob("recipes/*.md")]


def prose(path):
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path):
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "llms.txt"], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "README.md"])
def test_files_that_are_named_exist(name):
    folders = [PACKAGE, *(ROOT / folder for folder in ("tests", "docs", "benchmarks", "recipes", "callbacks"))]
    paths = "\n".join(str(path) for folder in folders for path in (folder, *folder.rglob("*"), *ROOT.glob("*")))
    for file in re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|md|toml)|(?:[\w.]+/)+)`", prose(ROOT / name)):
        found = re.search(rf"/{re.escape(file.rstrip('/'))}$", paths, re.MULTILINE)
        assert found or file in ("train/", "val/"), file


def test_the_changelog_keeps_its_form():
    """That of https://keepachangelog.com: versions, the unreleased first, with sections by kind of change."""
    first, *versions = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", version) for version in versions)
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for part in (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1:]:
        found = re.findall(r"^### (.*)$", part, re.MULTILINE)
        assert found == sorted(set(found), key=kinds.index)


def test_llms_txt_keeps_its_form_and_names_what_exists():
    """That of https://llmstxt.org: a title, a quoted summary, text, and behind it sections that are lists of links."""
    head, *sections = (ROOT / "llms.txt").read_text().split("\n## ")
    assert re.match(r"# cpq-lightning\n\n(> .*\n)+\n", head)
    for section in sections:
        _, _, *lines = section.strip().splitlines()
        assert all(re.match(r"- \[.+\]\(.+\): ", line) for line in lines)
    lists = dict(re.findall(r"^- `(cpq_lightning[\w.]*)`: ((?:.|\n  )*)", head, re.MULTILINE))
    for module, listed in lists.items():
        assert all(hasattr(import_module(module), name) for name in re.findall(r"`(\w+)`", listed)), module
    assert set(re.findall(r"`(\w+)`", lists["cpq_lightning.callbacks"])) == public_callbacks()
    assert set(re.findall(r"`(\w+)`", lists["cpq_lightning"])) == set(cpq_lightning.__all__) - {"__version__"}


def test_the_hooks_are_the_fast_checks_of_ci():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["entry"].removesuffix(" --fix") for hook in repository["hooks"]}
    lines = re.findall(r"^(?:ruff|pyright).*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    checks = {line.removesuffix(" .").removesuffix(" --check") for line in lines}
    # Within the tests: tests/test_structure.py.
    assert hooks == checks | {"lint-imports"}
