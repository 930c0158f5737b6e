"""What a fit leaves behind: tables in the terminal, files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console

from cpq_lightning.export import (
    CLUSTERS_FILE,
    levels_table,
    metrics_table,
    report_levels,
    write_clusters,
    write_manifest,
)

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def validation_metrics(trainer: Trainer) -> dict[str, float]:
    """What the last validation has logged."""
    values = {k: float(v) for k, v in trainer.callback_metrics.items() if v.numel() == 1}
    return {k: v for k, v in values.items() if "val" in k} or values


def print_tables(content: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Print the layers' levels and, where a validation has run, its metrics in full precision and quantized."""
    console = Console()
    console.print(levels_table(content))
    if metrics:
        console.print()
        console.print(metrics_table(metrics))


def write_files(
    content: dict[str, Any],
    folder: Path,
    levels_file: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    saved: str,
) -> list[Path]:
    """Write the levels and what shows them; what cannot be written costs a warning, and no training.

    The trajectory is the budget's that has recorded it.

    Returns:
        The files that were made of the levels.
    """
    path = folder / levels_file
    try:
        write_manifest(content, path)
        write_clusters(before, after, folder / CLUSTERS_FILE)
    except OSError as error:
        rank_zero_warn(f"{path} could not be written ({error}). {nothing_is_lost(saved)}")
        return []
    rank_zero_info(f"Levels written to {path}")
    try:
        return report_levels(folder, levels_file)
    except ImportError as error:
        rank_zero_info(f"Pictures were not drawn: {error}")
    except Exception as error:
        # A picture is not worth a failing run.
        rank_zero_warn(
            f"Pictures of {path} were not drawn ({type(error).__name__}: {error}). {nothing_is_lost(saved)} "
            f"'cpq report {folder}' makes them again."
        )
    return []


def nothing_is_lost(saved: str) -> str:
    """What is left of a training whose files could not be written."""
    if saved:
        return f"Nothing of the training is lost: {saved} is a checkpoint of it."
    return "The trained module is in memory, and no ModelCheckpoint has saved it: trainer.save_checkpoint(path) does."
