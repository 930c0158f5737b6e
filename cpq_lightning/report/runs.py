"""Several runs side by side: accuracy, size and average bits of each, from their ``levels.json``."""

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
# States that a network is measured in: a run that is never quantized, one before it is, and one at its end.
FULL, BEFORE, QUANTIZED = "full precision", "before quantization", "quantized"

# How many folders deep runs are looked for: Trainer's root, a logger's name, its version.
_DEPTH = 3


@dataclass(frozen=True)
class Run:
    """What a run came to.

    Attributes:
        name: Its folder.
        model: The backbone's name, or that of the module's class.
        data: The data module, with its root.
        metric: Name of the metric, such as ``val_acc``.
        state: ``"quantized"``, or ``"full precision"`` of a run that was never quantized.
        value: The metric at its end; ``None`` without validation then.
        size_bytes: Size of the packed file of what ships.
        fp32_bytes: Size in float32.
        weight_bits: Average bits of the weights, first and last layer aside.
        act_bits: The same of activations.
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
    metrics: Mapping[str, Mapping[str, float]], model: str, data: str, before: int | None = None
) -> dict[str, Any]:
    """What ``levels.json`` holds of a run beside its levels.

    Args:
        metrics: By state: ``"full precision"`` of a run that was never quantized, ``"before quantization"``,
            ``"quantized"``.
        model: Its name.
        data: Its name.
        before: The step at which those before quantization were measured.
    """
    measured = {state: dict(values) for state, values in metrics.items()}
    return {"model": model, "data": data, "metrics": measured, "before_step": before if BEFORE in measured else None}


def read_run(folder: str | Path, metric: str | None = None, levels_file: str = "levels.json") -> Run:
    """One run from its folder.

    Args:
        folder: The run's folder.
        metric: Which metric; ``None`` is the first whose name has ``acc`` in it, or the only one.
        levels_file: Name of the file in the folder.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: the file is none of ours, or has no such metric; with those that it has.
    """
    path = Path(folder) / levels_file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected the folder of a run that has finished its fit.")
    content = read_levels(path)
    run = content.get("run") or {}
    metrics = run.get("metrics") or {}
    known = sorted({name for values in metrics.values() for name in values})
    chosen = metric or next((name for name in known if "acc" in name), known[0] if len(known) == 1 else None)
    if not known:
        raise ValueError(f"{path} has no metrics: the run had no validation, or was made before they were kept there.")
    if chosen is None or chosen not in known:
        asked = "has no metric with 'acc' in its name" if metric is None else f"has no metric {metric!r}"
        raise ValueError(f"{path} {asked}: it has {known}. Name one with --metric.")
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


def sibling_runs(folder: str | Path, metric: str | None = None, levels_file: str = "levels.json") -> list[Run]:
    """A run, and before it those beside it of the same model on the same data, oldest first.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: the file is none of ours, or has no such metric.
    """
    folder = Path(folder).resolve()
    own = read_run(folder, metric, levels_file)
    found = []
    for path in sorted(folder.parent.glob(f"*/{levels_file}"), key=lambda p: p.stat().st_mtime):
        try:
            run = read_run(path.parent, metric, levels_file)
        except (OSError, KeyError, ValueError):
            # Somebody else's file beside this run.
            continue
        if (run.model, run.data) == (own.model, own.data) and path.parent.resolve() != folder:
            found.append(run)
    return [*found, own]


def expand_runs(folders: Iterable[str | Path], levels_file: str = "levels.json") -> list[Path]:
    """Folders of runs, each once; of a folder that is none itself, the runs in it, or in its folders, at the least
    depth that has some: ``default_root_dir`` of a Trainer is that of its loggers' folders.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        inside: list[Path] = []
        for depth in range(_DEPTH + 1):
            inside = inside or sorted(folder.glob("*/" * depth + levels_file), key=_by_number)
        found += [path.parent for path in inside] or [folder]
    return list({folder.resolve(): folder for folder in found}.values())


def compare_runs(
    folders: Sequence[Path], metric: str | None = None, levels_file: str = "levels.json"
) -> tuple[list[Run], list[str]]:
    """Several runs by one metric, the first one's where none is named, under names that tell them apart.

    Returns:
        The runs, and why each of the others has been left out.

    Raises:
        FileNotFoundError: one has no such file.
        ValueError: none of them can be compared; with the reason of the first.
    """
    runs: list[Run] = []
    reasons: list[str] = []
    shared = common_folder(folders)
    for folder in folders:
        try:
            run = read_run(folder, metric, levels_file)
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
    """Write ``runs.csv``, and ``accuracy_over_size.png``: a point a run.

    Returns:
        The files that were made.

    Raises:
        ImportError: matplotlib is not installed; the table is there by then.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Run)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(run) for run in runs)
    table = Path(folder) / RUNS_FILE
    write_atomically(table, text.getvalue())
    return [table, draw_runs(runs, Path(folder) / RUNS_PICTURE)]


def common_folder(folders: Sequence[Path]) -> Path:
    """The innermost folder that has all runs in it."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
