"""The report files of a run: tables and plots that are made from ``levels.json`` and can be made again at any time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpq_lightning.attach.levels_file import read_levels
from cpq_lightning.errors import UnreadableFileError
from cpq_lightning.files import write_atomically
from cpq_lightning.report.plots import draw_levels, draw_trajectory, draw_weight_histograms

HISTOGRAMS_FILE = "weight_histograms.json"
_COLUMNS = (
    "layer", "kind", "bits", "signed", "zero_point", "levels", "used_levels", "scale", "relative_error", "clipped",
    "oscillating", "numel", "bytes", "macs", "bops", "first_or_last", "level_shares",
)  # fmt: skip

# Entries of a weight that tables and plots need.
_REQUIRED = (
    "bits", "scale", "low", "high", "numel", "bytes", "first_or_last", "quantizing", "signed", "used_levels",
    "relative_error",
)  # fmt: skip


def write_csv(manifest: Mapping[str, Any], path: Path) -> None:
    """Write one row per quantizer, the operands of products without a weight last.

    The column ``level_shares`` has numbers separated by spaces, from the lowest level to the highest.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    rows = [(layer["name"], kind, layer[kind]) for layer in manifest["layers"] for kind in ("weight", "activation")]
    rows += [(operand["name"], "operand", operand) for operand in manifest.get("products", ())]
    for name, kind, values in rows:
        if values is not None:
            row = {**values, "layer": name, "kind": kind, "levels": values["high"] - values["low"] + 1}
            writer.writerow({key: _cell(value) for key, value in row.items()})
    write_atomically(path, text.getvalue())


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(f"{v:g}" for v in value)
    return f"{value:.6g}" if isinstance(value, float) else value


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The content of a ``levels.json`` file, checked for the entries that tables and plots need.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFileError: the file is no ``levels.json`` of cpq-lightning, or an entry is missing.
    """
    content = read_levels(path)
    for layer in content.get("layers", ()):
        weight = layer.get("weight") or {}
        missing = [name for name in _REQUIRED if name not in weight]
        if missing:
            raise UnreadableFileError(
                f"{path} has no {', '.join(missing)} of the weight of layer {layer.get('name')!r}: expected an "
                "unedited file that a fit of this version has written."
            )
    return content


def write_report(folder: str | Path, *, metric: str | None = None, levels_file: str = "levels.json") -> list[Path]:
    """Do :func:`report_levels`, and make ``trajectory.png`` where the run wrote a ``trajectory.csv``.

    The plot shows ``metric``; ``None`` is the metric that the run has singled out.
    """
    written = report_levels(folder, levels_file=levels_file)
    run = read_manifest(Path(folder) / levels_file).get("run") or {}
    trajectory = draw_trajectory(Path(folder), metric or run.get("monitor"))
    return written if trajectory is None else [*written, trajectory]


def report_levels(folder: str | Path, *, levels_file: str = "levels.json") -> list[Path]:
    """Make ``levels.csv``, ``levels.png`` and ``weight_histograms.png`` from the files of a run.

    Args:
        folder: The run's folder, with ``levels.json`` and, where the run wrote it, ``weight_histograms.json``.
        levels_file: Name of the levels file in the folder.

    Returns:
        The written files.

    Raises:
        FileNotFoundError: the folder has no levels file.
        ImportError: matplotlib is not installed; the table is written before this error.
    """
    folder = Path(folder)
    source = folder / levels_file
    if not source.is_file():
        raise FileNotFoundError(f"{source} is missing: expected the folder of a run that has finished its fit.")
    manifest = read_manifest(source)
    stem = source.stem
    table = folder / f"{stem}.csv"
    write_csv(manifest, table)
    written = [table, draw_levels(manifest, folder / f"{stem}.png")]
    if (folder / HISTOGRAMS_FILE).is_file():
        histograms = json.loads((folder / HISTOGRAMS_FILE).read_text(encoding="utf-8"))
        written.append(draw_weight_histograms(histograms, manifest, folder / "weight_histograms.png"))
    return written
