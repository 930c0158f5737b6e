"""The campaign: runs on several processes, each row kept as soon as it is there."""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.findings.plan import done, learned_run, rate_of, ready
from benchmarks.findings.rows import Row, Rows
from benchmarks.findings.runs import Run
from benchmarks.findings.train import train
from benchmarks.train_step.results import commit, device_name, versions


def _prepare() -> None:
    # One run a core: two threads on one run are slower than two runs.
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def carry_out(
    runs: Sequence[Run],
    rows: Rows,
    *,
    start: Callable[[Run], Path],
    root: str,
    workers: int,
    device: str,
    finished: Callable[[Run, Row], None],
    failed: Callable[[Run, BaseException], None],
) -> None:
    """Train what is not done yet, in order, as far as what it waits for is done.

    Args:
        runs: The most telling first.
        rows: Where finished runs are, and go.
        start: File of a run's full-precision start.
        root: Folder with the data.
        workers: Runs at a time.
        device: Lightning's accelerator.
        finished: Told of each run's row.
        failed: Told of each that has raised; what waits for it is left out.

    Raises:
        BrokenProcessPool: a process has died, of too little memory for example. What is done is kept.
    """
    waiting = [run for run in runs if not done(run, rows)]
    origin: dict[str, Any] = {"commit": commit(), "versions": versions(), "device": device_name(device)}
    running: dict[Future[Row], Run] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare) as pool:
        try:
            while waiting or running:
                # Another campaign may have been at it.
                rows.read()
                waiting = [run for run in waiting if not done(run, rows)]
                for run in [r for r in waiting if ready(r, rows)][: workers - len(running)]:
                    waiting.remove(run)
                    rate, source = rate_of(run, rows), learned_run(run)
                    learned = None if source is None else rows[source]
                    running[pool.submit(train, run, rate, start(run), root, learned, device)] = run  # type: ignore[arg-type]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    if error := future.exception():
                        failed(run, error)
                        continue
                    row = {**future.result(), **origin}
                    rows.append(row)
                    finished(run, row)
        except BaseException:
            # A shutdown forgets its processes.
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise
