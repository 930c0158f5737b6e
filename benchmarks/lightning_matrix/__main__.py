"""``python -m benchmarks.lightning_matrix [PART OF A NAME]``: run the cells, show them, and write the table."""

from __future__ import annotations

import logging
import platform
import sys
import tempfile
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.lightning_matrix.cells import CELLS

RESULT = Path(__file__).parents[1] / "results" / "lightning_matrix.md"
_HEAD = """# What of Lightning works

Each row is a run of a real Trainer on a CPU with `CPQCallback`, learned widths (`BitBudget`), `TemperatureSchedule`,
`DropBitsSchedule` and `ClusterPull`, on a small network. After each, widths are at the target and fixed, both
schedules at their ends, every quantizer has been trained, and all its state is finite; the last column says what is
checked beside that. Made by `python -m benchmarks.lightning_matrix`; the test suite runs the same cells.

"""


def main(part: str = "") -> int:
    """Run the cells whose name contains ``part``; the table is written where it is whole."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    console = Console()
    rows, failed = [], 0
    wanted = [c for c in CELLS if part.lower() in c.name.lower()]
    for cell in track(wanted, "Lightning matrix", console=console):
        begun = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                outcome, seen = "works", cell.run(Path(folder))
        except Exception as error:
            failed += 1
            outcome, seen = "**fails**", traceback.format_exception_only(error)[-1].strip().replace("\n", " ")
            console.print_exception()
        if cell.gpu:
            outcome, seen = "needs a GPU", f"{seen}: {cell.gpu}"
        if seen.startswith("refused"):
            outcome = "refused"
        seconds = time.perf_counter() - begun
        console.print(f"{cell.name}: {outcome}, {seconds:.1f} s. {seen}", soft_wrap=True)
        rows.append(f"| {cell.feature} | {cell.value} | {outcome} | {seconds:.0f} s | {seen} |")
    if not part:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
        text = "\n".join(["| feature | setting | outcome | time | what was seen |", "|---|---|---|---|---|", *rows])
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(
            f"{_HEAD}{text}\n\nPython {platform.python_version()}, {versions}; times of a shared machine.\n"
        )
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
