"""How many small mistakes the test suite notices: ``python -m benchmarks.mutation record`` and ``... run --seed N``.

``record`` runs the suite once with coverage and keeps, for each line of the package, the tests that execute it. ``run``
draws mutations by a seed (a sign, a comparison, an off-by-one, a flipped truth value, a dropped statement), puts each
into a copy of the checkout, and runs the tests that execute its line, the quickest first, until one fails or
``--limit`` seconds of recorded time are used up. A run that was interrupted goes on where it was. Needs the extra
``bench-mutation``.

To see what tests that are left out of the suite would find, record them with ``--marks thorough`` in another folder,
and try there the mutations that survived the suite: ``run --survivors ROWS``, the rows of the first run.

A line that runs while the package is imported is in no test's coverage. A mutation of it is tried with all tests that
execute some other line of the file.
A line that only processes started by tests execute counts as executed by no test.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PACKAGE = "cpq_lightning"
# Names of variables of the environment that the plugin below reads.
CHOSEN, DURATIONS = "MUTATION_TESTS", "MUTATION_DURATIONS"

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_SIGNS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
}  # fmt: skip


class Mutation(NamedTuple):
    """One replacement in one file: characters ``start`` to ``end`` of its text become ``after``."""

    path: str
    line: int
    kind: str
    start: int
    end: int
    before: str
    after: str


def mutations(path: str, text: str) -> Iterator[Mutation]:
    """All mutations of a module's text, in the order of its lines."""
    starts = [0]
    for row in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))
    rows = text.splitlines()

    def position(line: int, column: int) -> int:
        # ast counts columns in bytes.
        return starts[line - 1] + len(rows[line - 1].encode()[:column].decode())

    def change(node: Any, kind: str, after: str) -> Mutation:
        start, end = position(node.lineno, node.col_offset), position(node.end_lineno, node.end_col_offset)
        return Mutation(path, node.lineno, kind, start, end, text[start:end], after)

    for node in _outside_of_annotations(ast.parse(text)):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
            other = ast.Compare(node.left, [_COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
            yield change(node, "comparison", f"({ast.unparse(other)})")
        elif isinstance(node, ast.BinOp) and type(node.op) in _SIGNS and not _is_text(node):
            other = ast.BinOp(node.left, _SIGNS[type(node.op)](), node.right)
            yield change(node, "sign", f"({ast.unparse(other)})")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            kind = "sign" if isinstance(node.op, ast.USub) else "truth"
            yield change(node, kind, f"({ast.unparse(node.operand)})")
        elif isinstance(node, ast.BoolOp):
            other = ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
            yield change(node, "truth", f"({ast.unparse(other)})")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield change(node, "truth", str(not node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            yield change(node, "off by one", str(node.value + 1))
        elif isinstance(node, ast.AugAssign | ast.Raise) or _is_call(node) or _writes_attribute(node):
            yield change(node, "dropped statement", "pass")


def _outside_of_annotations(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but types, decorators, and what only a type checker reads."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, ast.If) and ast.unparse(inner.test) == "TYPE_CHECKING":
                continue
            if isinstance(inner, ast.JoinedStr):
                continue
            if isinstance(inner, ast.AST):
                yield inner
                yield from _outside_of_annotations(inner)


def _is_text(node: ast.BinOp) -> bool:
    return any(
        isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def _is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _writes_attribute(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and all(isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets)


def draw(root: Path, seed: int, count: int) -> list[Mutation]:
    """``count`` mutations: lines by chance, then one of what each line allows."""
    by_line: dict[tuple[str, int], list[Mutation]] = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        for mutation in mutations(name, path.read_text()):
            by_line.setdefault((name, mutation.line), []).append(mutation)
    chance = random.Random(seed)
    return [chance.choice(by_line[line]) for line in chance.sample(sorted(by_line), count)]


# What follows runs within pytest, loaded by ``-p benchmarks.mutation``.


def pytest_collection_modifyitems(items: list[Any], config: Any) -> None:
    """Keep the chosen tests alone, the quickest first."""
    if CHOSEN not in os.environ:
        return
    order = {name: place for place, name in enumerate(json.loads(Path(os.environ[CHOSEN]).read_text()))}
    chosen = [item for item in items if item.nodeid in order]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in order])
    items[:] = sorted(chosen, key=lambda item: order[item.nodeid])


def record(root: Path, folder: Path, workers: int, marks: str | None = None) -> None:
    """Run the suite once, or the tests of ``marks``, with coverage by test; keep which tests execute which lines."""
    from coverage import CoverageData

    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "coveragerc"
    config.write_text(f"[run]\nsource = {PACKAGE}\ndata_file = {folder / 'coverage'}\nrelative_files = true\n")
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "-p", "no:cacheprovider"]
    command += [f"--cov={PACKAGE}", f"--cov-config={config}", "--cov-context=test", "--cov-report="]
    command += [f"--junitxml={report}", "-o", "junit_family=xunit1", *(["-m", marks] if marks else [])]
    subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False)
    seconds: dict[str, float] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('file')}::{case.get('name')}"
        seconds[name] = seconds.get(name, 0.0) + float(case.get("time", 0))
    data = CoverageData(str(folder / "coverage"))
    data.read()
    lines: dict[str, dict[int, list[str]]] = {}
    for file in sorted(data.measured_files()):
        path = Path(file)
        name = path.relative_to(root).as_posix() if path.is_absolute() else path.as_posix()
        lines[name] = {
            line: sorted(c for c in contexts if c) for line, contexts in data.contexts_by_lineno(file).items()
        }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    (folder / "lines.json").write_text(json.dumps({"commit": commit, "seconds": seconds, "lines": lines}))


def tests_of(mutation: Mutation, recorded: dict[str, Any]) -> list[str]:
    """The tests that execute a mutation's line, the quickest first."""
    lines = recorded["lines"].get(mutation.path, {})
    contexts = lines.get(str(mutation.line))
    if contexts is not None and not contexts:
        # It runs while the package is imported.
        contexts = sorted({context for tests in lines.values() for context in tests})
    tests = set()
    for context in contexts or ():
        name, _, phase = context.rpartition("|")
        tests.add(name)
        if phase == "setup":
            # A fixture that several tests of a file share is set up by the first one.
            file = name.split("::")[0]
            tests.update(test for test in recorded["seconds"] if test.startswith(f"{file}::"))
    seconds = recorded["seconds"]
    return sorted(tests, key=lambda test: (seconds.get(test, 1e9), test))


def within(tests: Sequence[str], seconds: dict[str, float], limit: float) -> list[str]:
    """The first of these tests that together take no more than ``limit`` seconds; at least one."""
    total = itertools.accumulate(seconds.get(test, 1.0) for test in tests)
    return [test for place, (test, used) in enumerate(zip(tests, total, strict=True)) if not place or used <= limit]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run(
    root: Path, folder: Path, seed: int, count: int, workers: int, limit: float, survivors: Path | None = None
) -> list[dict[str, Any]]:
    """Try each mutation that is not tried yet, ``workers`` at a time; a row for each.

    With ``survivors``, the rows of another run of the same seed, only those that it did not kill are tried.
    """
    recorded = json.loads((folder / "lines.json").read_text())
    results = folder / f"seed{seed}.jsonl"
    rows = read_rows(results)
    known = {row["place"] for row in rows}
    if survivors is not None:
        known |= {row["place"] for row in read_rows(survivors) if row["outcome"].startswith("killed")}
    drawn = [(place, mutation) for place, mutation in enumerate(draw(root, seed, count)) if place not in known]
    every = len(rows) + len(drawn)

    def attempt(place: int, mutation: Mutation) -> dict[str, Any]:
        tests = tests_of(mutation, recorded)
        chosen = within(tests, recorded["seconds"], limit)
        began = time.monotonic()
        outcome = _try(root, mutation, chosen, recorded["seconds"]) if tests else "not executed"
        return {
            "place": place, "outcome": outcome, "path": mutation.path, "line": mutation.line, "kind": mutation.kind,
            "before": mutation.before, "after": mutation.after, "tests": len(tests), "tried": len(chosen),
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip

    with ThreadPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(attempt, *each) for each in drawn]):
            row = done.result()
            rows.append(row)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{len(rows)}/{every} {row['outcome']}: {row['path']}:{row['line']} {row['kind']}", flush=True)
    return rows


def _try(root: Path, mutation: Mutation, tests: Sequence[str], seconds: dict[str, float]) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "checkout"
        copy.mkdir()
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=root, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x"], cwd=copy, input=archive, check=True)
        path = copy / mutation.path
        text = path.read_text()
        path.write_text(text[: mutation.start] + mutation.after + text[mutation.end :])
        chosen = Path(temporary) / "tests.json"
        chosen.write_text(json.dumps(list(tests)))
        files = sorted({test.split("::")[0] for test in tests})
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "benchmarks.mutation"]
        # Chosen tests run whatever marks they have.
        command += ["-p", "no:cacheprovider", "-m", "", *files]
        environment = {**os.environ, "PYTHONPATH": str(copy), CHOSEN: str(chosen)}
        limit = 180 + 4 * sum(seconds.get(test, 1.0) for test in tests)
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            return "killed by time"
    # 1: tests failed; 2 to 4: pytest could not even collect them.
    return "survived" if done.returncode == 0 else "killed"


def summary(rows: Sequence[dict[str, Any]]) -> Table:
    """How many were killed, by kind."""
    table = Table("mutation", "drawn", "killed", "survived", "executed by no test", box=None)
    for kind in [*sorted({row["kind"] for row in rows}), "all"]:
        of_kind = [row["outcome"] for row in rows if kind in ("all", row["kind"])]
        killed = sum(outcome.startswith("killed") for outcome in of_kind)
        counts = (len(of_kind), killed, of_kind.count("survived"), of_kind.count("not executed"))
        table.add_row(kind, *map(str, counts))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Record which tests execute which lines, or try mutations."""
    parser = argparse.ArgumentParser(prog="benchmarks.mutation", description=__doc__)
    parser.add_argument("what", choices=["record", "run"])
    parser.add_argument("--folder", type=Path, required=True, help="where records and rows are kept")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose HEAD is tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60, help="mutations")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--marks", help="record the tests of these marks, as pytest -m takes them, not the suite")
    parser.add_argument("--survivors", type=Path, help="rows of a run: try only the mutations that it did not kill")
    parser.add_argument("--limit", type=float, default=300, help="recorded seconds of tests for each mutation")
    chosen = parser.parse_args(arguments)
    root, folder = chosen.root.resolve(), chosen.folder.resolve()
    if chosen.what == "record":
        record(root, folder, chosen.workers, chosen.marks)
    else:
        rows = run(root, folder, chosen.seed, chosen.count, chosen.workers, chosen.limit, chosen.survivors)
        Console().print(summary(rows))


if __name__ == "__main__":
    main()
