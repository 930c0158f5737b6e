"""Train what is not done yet, and write findings.md with its plots.

python -m benchmarks.findings --data DIR         # all that is not done, at the scale of 20,000 images
python -m benchmarks.findings --data DIR --show  # what would run
python -m benchmarks.findings --report           # only the tables and plots
python -m benchmarks.findings --summary          # only the README's tables
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.findings import report as tables
from benchmarks.findings.campaign import carry_out
from benchmarks.findings.data import load
from benchmarks.findings.methods import METHODS
from benchmarks.findings.plan import done, plan
from benchmarks.findings.rows import RESULTS, Row, Rows
from benchmarks.findings.runs import SCALES, SEEDS, Run
from benchmarks.findings.train import train_start


class _Description(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign.

    Returns:
        1 where a run has failed.
    """
    parser = argparse.ArgumentParser("benchmarks.findings", description=__doc__, formatter_class=_Description)
    parser.add_argument("--data", default="data", help="folder with Fashion-MNIST as torchvision has it, or gets it")
    parser.add_argument("--scale", default="20k", choices=list(SCALES), help="images to train on, and network")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), metavar="METHOD", help="methods to run")
    parser.add_argument("--widths", nargs="+", metavar="WIDTH", help="widths to run, such as W3A3 or W2A8")
    parser.add_argument("--seeds", type=int, metavar="N", help="run the first N seeds only")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows of finished runs")
    parser.add_argument("--show", action="store_true", help="only list what would run")
    parser.add_argument("--report", action="store_true", help="only write findings.md and its plots")
    parser.add_argument("--summary", action="store_true", help="only print the README's tables")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    rows = Rows(options.results)
    if options.summary:
        print(tables.summary(rows), end="")
        return 0
    if options.report:
        console.print(f"Written: {tables.write_report(rows)}")
        return 0
    runs = [run for run in plan(options.scale) if _asked(run, options)]
    for name in dict.fromkeys(run.method for run in runs):
        if missing := METHODS[name].missing:
            console.print(f"{name} is skipped: {missing}.", markup=False)
            runs = [run for run in runs if run.method != name]
    left = [run for run in runs if not done(run, rows)]
    console.print(f"{len(runs) - len(left)} of {len(runs)} runs are done.")
    if options.show:
        for run in left:
            console.print(run.title)
        return 0
    try:
        # Else every run would fail by itself.
        load(options.data, train=False)
    except FileNotFoundError as error:
        parser.error(str(error))
    code = _run(runs, rows, options, console)
    console.print(f"Written: {tables.write_report(rows)}")
    return code


def _asked(run: Run, options: argparse.Namespace) -> bool:
    only = options.only or [run.method]
    # All runs wait for the searches of their families, at whichever widths and seed these are.
    if run.rate is not None:
        return run.method in {METHODS[method].family for method in only}
    if run.method not in only:
        return False
    width, seeds = f"W{run.weight_bits:g}A{run.act_bits}", options.seeds or len(SEEDS)
    return run.seed in SEEDS[:seeds] and (not options.widths or width in options.widths)


def _run(runs: list[Run], rows: Rows, options: argparse.Namespace, console: Console) -> int:
    failures: list[str] = []

    def start(scale: str) -> Path:
        return rows.path.with_name(f"findings_start_{scale}.safetensors")

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("full-precision start", total=len(runs), completed=sum(done(run, rows) for run in runs))
        # Searches may be of another scale.
        for scale in dict.fromkeys(run.scale for run in runs if not done(run, rows)):
            train_start(SCALES[scale], options.data, start(scale), options.device)

        def finished(run: Run, row: Row) -> None:
            progress.update(bar, advance=1, description=run.method)
            error = "" if row["weight_error"] is None else f", weight error {row['weight_error']:.4f}"
            console.print(f"{run.title}: {100 * row['accuracy']:.2f} %{error}, {row['seconds']:.0f} s")

        def failed(run: Run, error: BaseException) -> None:
            failures.append(f"{run.title}: {type(error).__name__}: {error}")
            console.print(f"failed: {failures[-1]}", style="red", markup=False)

        progress.update(bar, description="runs")
        carry_out(
            runs,
            rows,
            start=lambda run: start(run.scale),
            root=options.data,
            workers=options.workers,
            device=options.device,
            finished=finished,
            failed=failed,
        )
    for failure in failures:
        console.print(f"Failed: {failure}", markup=False)
    return 1 if failures else 0


if __name__ == "__main__":
    # Else the workers of a campaign that is told to stop would stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
