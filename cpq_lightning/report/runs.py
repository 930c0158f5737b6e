"""Comparison of several runs: accuracy, size and average bits of each run, read from its ``levels.json``."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cpq_lightning.attach.levels_file import read_levels
from cpq_lightning.files import write_atomically
from cpq_lightning.report.plots import draw_runs

RUNS_FILE, RUNS_PICTURE = "runs.csv", "accuracy_over_size.png"
# States of a network at a validation: of a run without quantization, before quantization begins, and quantized.
FULL, BEFORE, QUANTIZED = "full precision", "before quantization", "quantized"

# Number of folder levels in which runs are searched: default_root_dir of a Trainer, a logger's name, its version.
_MAX_DEPTH = 3


@dataclass(frozen=True)
class Run:
    """The result of a run.

    Attributes:
        name: Name of the run's folder.
        model: Name of the backbone, or of the module's class.
        data: The data module, with its root.
        metric: Name of the metric, such as ``val_acc``.
        state: ``"quantized"``, or ``"full precision"`` for a run without quantization.
        value: The metric at the end of the run; ``None`` without a validation at the end.
        size_bytes: Size of the exported network as a packed file; in float32 for a run without quantization.
        fp32_bytes: Size of the network in float32.
        weight_bits: Average bits of the weights, without first and last layers.
        act_bits: Average bits of the activations, without those of first and last layers.
    """

    name: str
    model: str
    data: str
    metric: str
    state: str
    value: float | None
    size_bytes: int
    fp32_bytes: int
    weight_bits: float | None
    act_bits: float | None


def describe_run(
    metrics: Mapping[str, Mapping[str, float]],
    model: str,
    data: str,
    before: int | None = None,
    monitor: str | None = None,
) -> dict[str, Any]:
    """The entry ``run`` of ``levels.json``.

    Args:
        metrics: Metrics by state: ``"full precision"`` for a run without quantization, ``"before quantization"``, and
            ``"quantized"``.
        model: Name of the model.
        data: Name of the data.
        before: The training step of the metrics before quantization.
        monitor: The metric by which reports compare runs; ``None`` if none is singled out.
    """
    measured = {state: dict(values) for state, values in metrics.items()}
    step = before if BEFORE in measured else None
    return {"model": model, "data": data, "metrics": measured, "before_step": step, "monitor": monitor}


def read_run(folder: str | Path, *, metric: str | None = None, levels_file: str = "levels.json") -> Run:
    """Read the result of a run from its folder.

    Args:
        folder: The run's folder.
        metric: Name of the metric; ``None`` is the one that the run has singled out (``CPQCallback(monitor=...)``), or
            its only one.
        levels_file: Name of the levels file in the folder.

    Raises:
        FileNotFoundError: the folder has no levels file.
        ValueError: the file is no ``levels.json`` of cpq-lightning, or has no such metric; the message lists the
            metrics of the file.
    """
    path = Path(folder) / levels_file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected the folder of a run that has finished its fit.")
    content = read_levels(path)
    run = content.get("run") or {}
    metrics = run.get("metrics") or {}
    known = sorted({name for values in metrics.values() for name in values})
    # Files of older versions have no "monitor".
    chosen = metric or run.get("monitor") or (known[0] if len(known) == 1 else None)
    if not known:
        raise ValueError(
            f"{path} has no metrics: the run had no validation, or an older version, which did not store them, wrote "
            "the file."
        )
    if chosen is None:
        raise ValueError(
            f"{path} singles out none of its metrics {known}: name one with --metric, and in later runs with "
            "CPQCallback(monitor=...)."
        )
    if chosen not in known:
        raise ValueError(f"{path} has no metric {chosen!r}: it has {known}. Name one with --metric.")
    totals = content["totals"]
    plain = FULL in metrics and QUANTIZED not in metrics
    state = FULL if plain else QUANTIZED
    return Run(
        name=Path(folder).resolve().name,
        model=run.get("model", ""),
        data=run.get("data", ""),
        metric=chosen,
        state=state,
        value=metrics.get(state, {}).get(chosen),
        size_bytes=totals["fp32_bytes" if plain else "size_bytes"],
        fp32_bytes=totals["fp32_bytes"],
        weight_bits=None if plain else totals["weight_bits_avg"],
        act_bits=None if plain else totals["act_bits_avg"],
    )


def sibling_runs(folder: str | Path, *, metric: str | None = None, levels_file: str = "levels.json") -> list[Run]:
    """The runs of the same model on the same data in the sibling folders of a run, oldest first, and the run as the
    last one.

    Raises:
        FileNotFoundError: the folder has no levels file.
        ValueError: the file is no ``levels.json`` of cpq-lightning, or has no such metric.
    """
    folder = Path(folder).resolve()
    this_run = read_run(folder, metric=metric, levels_file=levels_file)
    siblings = []
    for path in sorted(folder.parent.glob(f"*/{levels_file}"), key=lambda p: p.stat().st_mtime):
        try:
            run = read_run(path.parent, metric=this_run.metric, levels_file=levels_file)
        except (OSError, KeyError, ValueError):
            # A sibling folder may have an unrelated file of this name.
            continue
        if (run.model, run.data) == (this_run.model, this_run.data) and path.parent.resolve() != folder:
            siblings.append(run)
    return [*siblings, this_run]


def expand_runs(folders: Iterable[str | Path], *, levels_file: str = "levels.json") -> list[Path]:
    """Replace folders that contain runs by the folders of these runs; each run occurs once.

    A folder without a levels file is searched up to 3 levels deep, and the runs at the first level that has any are
    taken. So ``default_root_dir`` of a Trainer stands for the runs of its loggers. A folder without runs stays in the
    list.
    """
    expanded: list[Path] = []
    for folder in map(Path, folders):
        inside: list[Path] = []
        for depth in range(_MAX_DEPTH + 1):
            inside = inside or sorted(folder.glob("*/" * depth + levels_file), key=_by_number)
        expanded += [path.parent for path in inside] or [folder]
    return list({folder.resolve(): folder for folder in expanded}.values())


def compare_runs(
    folders: Sequence[Path], *, metric: str | None = None, levels_file: str = "levels.json"
) -> tuple[list[Run], list[str]]:
    """Read several runs with one metric; by default that of the first readable run. Names of runs are unique.

    Returns:
        The runs, and for each run that was left out the reason.

    Raises:
        FileNotFoundError: a folder has no levels file.
        ValueError: no run can be compared; the message is the reason for the first one.
    """
    runs: list[Run] = []
    reasons: list[str] = []
    shared = common_folder(folders)
    for folder in folders:
        try:
            run = read_run(folder, metric=metric, levels_file=levels_file)
        except ValueError as error:
            reasons.append(str(error))
            continue
        metric = run.metric
        runs.append(replace(run, name=folder.resolve().relative_to(shared).as_posix()))
    if not runs:
        raise ValueError(reasons[0])
    return runs, reasons


def _by_number(path: Path) -> tuple[str, int]:
    head, _, number = path.parent.name.rpartition("_")
    return (head, int(number)) if number.isdigit() else (path.parent.name, 0)


def write_runs(runs: Sequence[Run], folder: str | Path) -> list[Path]:
    """Write ``runs.csv`` with one row per run, and ``accuracy_over_size.png`` with one point per run.

    Returns:
        The written files.

    Raises:
        ImportError: matplotlib is not installed; the table is written before this error.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Run)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(run) for run in runs)
    table = Path(folder) / RUNS_FILE
    write_atomically(table, text.getvalue())
    return [table, draw_runs(runs, Path(folder) / RUNS_PICTURE)]


def common_folder(folders: Sequence[Path]) -> Path:
    """The innermost folder that contains all folders of runs."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
