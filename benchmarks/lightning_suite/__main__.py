"""``python -m benchmarks.lightning_suite CHECKOUT``: Lightning's own tests, without and with a CPQCallback."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from benchmarks.lightning_suite.exceptions import EXCEPTIONS, Exempt
from benchmarks.lightning_suite.plugin import RECORD, WITH_CALLBACK

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "lightning_suite.md"
FOLDERS = ("loops", "callbacks", "checkpointing", "tuner", "core", "models", "trainer")
_HEAD = """# Lightning's own tests with a CPQCallback in every Trainer

Each test of `{folders}` in Lightning's repository runs as it is and then with `CPQCallback(CPQConfig(weight_bits=8,
act_bits=8), levels_file=None, table=False)` as first callback of every Trainer whose module has a layer to quantize,
within `cpq_lightning.loading()`. Of {passed} tests that pass without, {kept} pass with it, and {failed} do not: those
below, each with what it asserts. Made by `python -m benchmarks.lightning_suite CHECKOUT`.

"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both, compare, and write the table; 1 where a test fails that is no exception, or an exception passes."""
    parser = argparse.ArgumentParser(prog="benchmarks.lightning_suite", description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of Lightning's repository, of the version installed")
    parser.add_argument("--records", type=Path, help="folder of the outcomes; those that it holds are not made again")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    chosen = parser.parse_args(arguments)
    tests = chosen.checkout / "tests"
    if not (tests / "tests_pytorch").is_dir():
        parser.error(f"{tests / 'tests_pytorch'} is no folder: expected a checkout of Lightning's repository.")
    records = chosen.records or Path(tempfile.mkdtemp())
    by_variant = {}
    for name in ("without", "with"):
        record = records / f"{name}.jsonl"
        if not record.is_file():
            _run(tests, record, name == "with", chosen.workers)
        by_variant[name] = outcomes(record)
    return compare(by_variant["without"], by_variant["with"])


def _run(tests: Path, record: Path, with_callback: bool, workers: int) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    variables = {RECORD: str(record.resolve()), WITH_CALLBACK: "1" if with_callback else "", "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(ROOT), str(tests)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.lightning_suite.plugin", "-n", str(workers)]
    command += ["--timeout", "300", "-p", "no:cacheprovider", *(f"tests_pytorch/{folder}" for folder in FOLDERS)]
    subprocess.run(command, cwd=tests, env={**os.environ, **variables, "PYTHONPATH": paths}, check=False)


def outcomes(record: Path) -> dict[str, tuple[str, str]]:
    """The outcome of each test's call, and what it said."""
    rows = {}
    for line in record.read_text().splitlines():
        row = json.loads(line)
        if row["when"] == "call":
            rows[row["test"].removeprefix("tests/")] = (row["outcome"], row["said"])
    return rows


def asserted(said: str) -> str:
    """The assertion that failed, or the last line of what a test said."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in said.splitlines()]
    quoted = [line[1:].strip() for line in lines if re.match(r"^>\s", line)]
    return quoted[-1] if quoted else (lines[-1] if lines else "")


def exemption(test: str) -> Exempt | None:
    """Why a test need not pass."""
    return next((exempt for exempt in EXCEPTIONS if re.search(exempt.tests, test)), None)


def compare(without: Mapping[str, tuple[str, str]], with_it: Mapping[str, tuple[str, str]]) -> int:
    """Write the table, and say what is not as the exceptions have it."""
    passed = [test for test, (outcome, _) in without.items() if outcome == "passed"]
    failed = [test for test in passed if with_it.get(test, ("missing", ""))[0] != "passed"]
    unknown = [test for test in failed if exemption(test) is None]
    stale = [e.tests for e in EXCEPTIONS if not any(re.search(e.tests, test) for test in failed)]
    rows = ["| test | what it asserts | why that is not so here |", "|---|---|---|"]
    for test in sorted(failed):
        exempt = exemption(test)
        quoted = asserted(with_it[test][1] if test in with_it else "").replace("|", "\\|")
        name = test.removeprefix("tests_pytorch/").replace("|", "\\|")
        rows.append(f"| `{name}` | `{quoted}` | {'**unknown**' if exempt is None else exempt.reason} |")
    head = _HEAD.format(
        folders="`, `".join(FOLDERS), passed=len(passed), kept=len(passed) - len(failed), failed=len(failed)
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    RESULT.write_text(f"{head}" + "\n".join(rows) + f"\n\n{versions}.\n")
    console = Console()
    console.print(f"{len(passed)} pass without, {len(passed) - len(failed)} with; {len(unknown)} unknown failures.")
    for test in unknown:
        console.print(f"fails, and is no exception: {test}", soft_wrap=True, markup=False)
    for pattern in stale:
        console.print(f"an exception of which all pass: {pattern}", soft_wrap=True, markup=False)
    return int(bool(unknown or stale))


if __name__ == "__main__":
    raise SystemExit(main())
