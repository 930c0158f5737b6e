"""How near the CUDA kernels come to what the device's memory allows: bytes a second against a copy on the device.

``python -m benchmarks.gpu_bandwidth [--rounds 50]``. All variants take their turn in each round, so that a change of
clocks falls on all alike; times are medians by CUDA events, and ratios are medians over rounds of the ratio within a
round. The cache is swept before each measurement, which also gives the host time to launch what is measured. A backward
is counted with the sum of its programs' sums. Without a CUDA device nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.train_step.results import commit
from cpq_lightning.functional.grid import level_bounds
from cpq_lightning.kernels import cuda as gpu

RESULT = Path(__file__).parent / "results" / "gpu_bandwidth.json"
TARGET = 0.8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = (1, 4, 16, 64)  # in 2**20 elements
COPY = "copy"
# The length of a row, where rows have steps of their own.
ROW = 4096


def variants(x: Tensor, grad: Tensor, rows: bool, noise: float) -> dict[str, tuple[int, Callable[[], Any]]]:
    """What is measured, and how many times it reads or writes a tensor like ``x``."""
    scale = torch.full((x.shape[0], 1) if rows else (1, 1), 0.3, device=x.device)
    sigma = scale * noise
    out = torch.empty_like(x)
    calls: dict[str, tuple[int, Callable[[], Any]]] = {COPY: (2, partial(out.copy_, x))}
    for bits in (2, 4, 8):
        # Values reach a little beyond the grid.
        bounds = level_bounds(bits)
        values = x * (0.3 * 2**bits / 4)
        calls[f"forward, {bits} bits"] = (2, partial(gpu.forward, values, scale, *bounds))
        for estimator in ("argmax", "expectation"):
            call = partial(gpu.backward, values, grad, scale, sigma, *bounds, estimator == "expectation")
            calls[f"backward, {estimator}, {bits} bits"] = (3, call)
    return calls


def milliseconds(call: Callable[[], Any], sweep: Tensor) -> float:
    """Time of one call on the device, its memory out of the cache before."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    sweep.zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(rounds: int, noise: float) -> list[dict[str, Any]]:
    """One row of figures for each size, dtype, kind of step and variant."""
    sweep = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    figures = []
    for size, (dtype, rows) in track(list(product(SIZES, product(DTYPES, (False, True)))), "Sizes"):
        x, grad = (torch.randn(size * 2**20 // ROW, ROW, device="cuda").to(DTYPES[dtype]) for _ in range(2))
        calls = variants(x, grad, rows, noise)
        for _, call in calls.values():
            call()
            call()
        times = [{name: milliseconds(call, sweep) for name, (_, call) in calls.items()} for _ in range(rounds)]
        for name, (passes, _) in calls.items():
            ratio = statistics.median(passes / t[name] / (calls[COPY][0] / t[COPY]) for t in times)
            taken = statistics.median(t[name] for t in times)
            figures.append(
                {
                    "elements": x.numel(),
                    "dtype": dtype,
                    "steps": "one for each row" if rows else "one",
                    "variant": name,
                    "milliseconds": taken,
                    "gigabytes_per_second": passes * x.numel() * x.element_size() / taken / 1e6,
                    "against_copy": ratio,
                    "meets_target": ratio >= TARGET,
                }
            )
    return figures


def show(figures: list[dict[str, Any]]) -> None:
    """The ratios as a table, a column for each size."""
    table = Table(title=f"Bytes a second against a copy, target {TARGET:.0%}", title_justify="left")
    for name in ("variant", "dtype", "steps"):
        table.add_column(name)
    for size in SIZES:
        table.add_column(f"{size} M", justify="right")
    lines: dict[tuple[str, str, str], list[str]] = {}
    for row in figures:
        shown = f"{row['gigabytes_per_second']:.0f} GB/s" if row["variant"] == COPY else f"{row['against_copy']:.0%}"
        lines.setdefault((row["variant"], row["dtype"], row["steps"]), []).append(shown)
    for key, cells in sorted(lines.items()):
        table.add_row(*key, *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--noise", type=float, default=1 / 3, help="scale of the noise, in steps")
    options = parser.parse_args()
    reason = gpu.unavailable()
    if reason is not None:
        Console().print(f"Nothing is measured: {reason}.", soft_wrap=True)
        return
    import triton

    figures = measure(options.rounds, options.noise)
    show(figures)
    result = {
        "date": str(date.today()),
        "commit": commit(),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "cuda": torch.version.cuda,
        "noise": options.noise,
        "rounds": options.rounds,
        "target": TARGET,
        "figures": figures,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
