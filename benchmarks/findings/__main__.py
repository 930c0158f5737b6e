"""Train what is not done yet, and write findings.md with its plots.

python -m benchmarks.findings --data DIR             # all that is not done, at the scale of 20,000 images
python -m benchmarks.findings --data DIR --show      # what is done, and what would run
python -m benchmarks.findings --report               # only the tables and plots
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.findings.campaign import carry_out
from benchmarks.findings.methods import METHODS
from benchmarks.findings.plan import plan
from benchmarks.findings.rows import RESULTS, Row, Rows
from benchmarks.findings.runs import SCALES, Run
from benchmarks.findings.train import train_start


def main(
    data: str = "data",
    scale: str = "20k",
    only: list[str] | None = None,
    workers: int = 2,
    device: str = "cpu",
    results: Path = RESULTS,
    show: bool = False,
    report: bool = False,
) -> int:
    """Run the campaign.

    Args:
        data: Folder with Fashion-MNIST in torchvision's format, or where Debian's files are unpacked to.
        scale: How much is trained: "20k" or "60k" images.
        only: Methods to run; all by default.
        workers: Runs at a time, one thread each.
        device: Lightning's accelerator, "cpu" or "gpu".
        results: Rows of finished runs.
        show: Only list what is done, and what would run.
        report: Only write findings.md and its plots from the rows.

    Returns:
        1 where a run has failed.
    """
    console = Console(stderr=True)
    if scale not in SCALES:
        raise SystemExit(f"scale must be one of {sorted(SCALES)}, got {scale!r}.")
    unknown = set(only or ()) - METHODS.keys()
    if unknown:
        raise SystemExit(f"only has unknown methods {sorted(unknown)}; there are {list(METHODS)}.")
    rows = Rows(results)
    if report:
        from benchmarks.findings.report import write_report

        console.print(f"Written: {write_report(rows)}")
        return 0
    runs = [run for run in plan(scale) if not only or run.method in only]
    for name in dict.fromkeys(run.method for run in runs):
        if missing := METHODS[name].missing:
            console.print(f"{name} is skipped: {missing}.", markup=False)
            runs = [run for run in runs if run.method != name]
    left = [run for run in runs if run not in rows]
    console.print(f"{len(runs) - len(left)} of {len(runs)} runs are done.")
    if show:
        for run in left:
            console.print(run.title)
        return 0
    # Else the workers of a campaign that is told to stop would stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return _run(runs, rows, data, scale, workers, device, console)


def _run(runs: list[Run], rows: Rows, data: str, scale: str, workers: int, device: str, console: Console) -> int:
    failures: list[str] = []
    start = rows.path.with_name(f"findings_start_{scale}.safetensors")
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("full-precision start", total=len(runs), completed=sum(run in rows for run in runs))
        train_start(SCALES[scale], data, start, device)

        def done(run: Run, row: Row) -> None:
            progress.update(bar, advance=1, description=run.method)
            error = "" if row["weight_error"] is None else f", weight error {row['weight_error']:.4f}"
            console.print(f"{run.title}: {100 * row['accuracy']:.2f} %{error}, {row['seconds']:.0f} s")

        def failed(run: Run, error: BaseException) -> None:
            failures.append(f"{run.title}: {type(error).__name__}: {error}")
            console.print(f"failed: {failures[-1]}", style="red", markup=False)

        progress.update(bar, description="runs")
        carry_out(runs, rows, start=start, root=data, workers=workers, device=device, done=done, failed=failed)
    for failure in failures:
        console.print(f"Failed: {failure}", markup=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(auto_cli(main, as_positional=False))
