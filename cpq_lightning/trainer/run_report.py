"""The report at the end of a fit: tables in the terminal, files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console

from cpq_lightning.attach.layers import quantizers
from cpq_lightning.report.levels import manifest, write_manifest
from cpq_lightning.report.run_files import HISTOGRAMS_FILE, report_levels
from cpq_lightning.report.runs import BEFORE, FULL, describe_run, sibling_runs
from cpq_lightning.report.table import levels_table, metrics_table, runs_table
from cpq_lightning.report.weight_histograms import write_weight_histograms
from cpq_lightning.trainer import private
from cpq_lightning.trainer.checks import last_saved, monitored_metric
from cpq_lightning.trainer.loggers import log_pictures
from cpq_lightning.trainer.module_parts import exported_architecture, exported_name, exported_part
from cpq_lightning.trainer.progress import run_step

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def validation_metrics(trainer: Trainer) -> dict[str, float]:
    """The metrics that the validation which ends now has logged."""
    names = private.metrics_of_validation(trainer)
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k in names and v.numel() == 1}


def write_run_report(
    trainer: Trainer,
    content: dict[str, Any],
    path: Path | None,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    table: bool,
) -> None:
    """Print the results of a run, and write them to its folder; on one process.

    Args:
        trainer: A trainer at the end of its fit.
        content: The result of :func:`run_manifest`.
        path: Path of ``levels.json``; ``None`` writes nothing.
        before: Weight histograms at the start of quantization.
        after: Weight histograms at the end of the fit.
        table: Whether to print tables.
    """
    if table:
        _print_tables(content)
    if path is not None:
        _write_files(trainer, content, path, before, after)
    if table and path is not None:
        _print_runs(path.parent, path.name)


def _print_tables(content: Mapping[str, Any]) -> None:
    """Print the layers' levels and, after a validation, the last metrics before quantization and the current ones."""
    console = Console()
    console.print(levels_table(content))
    if content["run"]["metrics"]:
        console.print()
        console.print(metrics_table(content["run"]))


def run_manifest(
    trainer: Trainer, pl_module: LightningModule, metrics: Mapping[str, Mapping[str, float]], before: int | None
) -> dict[str, Any]:
    """The content of ``levels.json``: the model's levels and, under ``run``, its metrics and data.

    Args:
        trainer: A trainer at the end of its fit.
        pl_module: The attached module.
        metrics: Metrics of the last validation, in full precision and quantized.
        before: Step of the last validation before quantization began.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    root = "" if data is None else str(data.hparams.get("root", ""))
    name = "" if data is None else f"{type(data).__name__} {root}".strip()
    if not all(q.active for _, q in quantizers(pl_module)):
        metrics = {FULL: metrics[BEFORE]} if BEFORE in metrics else {}
    monitor = monitored_metric(trainer, {name for values in metrics.values() for name in values})
    content = manifest(pl_module, network=exported_part(pl_module), architecture=exported_architecture(pl_module))
    return {**content, "run": describe_run(metrics, exported_name(pl_module), name, before, monitor)}


def record_exports(content: dict[str, Any], path: Path, exports: Sequence[Mapping[str, Any]]) -> None:
    """Add the exported files, and the errors of failed exports, to ``levels.json``; on one process."""
    content["run"]["exports"] = list(exports)
    try:
        write_manifest(content, path)
    except OSError as error:
        rank_zero_warn(f"{path} could not be written ({error}): it lacks the exports.")


def _print_runs(folder: Path, levels_file: str) -> None:
    """Print a table of the runs in sibling folders with the same model and data; this run is the last row."""
    try:
        runs = sibling_runs(folder, levels_file=levels_file)
    except (OSError, KeyError, ValueError):
        # Without a metric that is singled out, runs cannot be compared.
        return
    console = Console()
    console.print()
    console.print(runs_table(runs, f"Runs of {runs[-1].model}"))


def _write_files(
    trainer: Trainer, content: dict[str, Any], path: Path, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    """Write the levels and their plots, also to loggers; a failure only warns.

    BitBudget writes the trajectory.
    """
    folder, saved = path.parent, last_saved(trainer)
    try:
        write_manifest(content, path)
        write_weight_histograms(before, after, folder / HISTOGRAMS_FILE)
    except OSError as error:
        rank_zero_warn(f"{path} could not be written ({error}). {what_is_saved(saved)}")
        return
    rank_zero_info(f"Levels written to {path}")
    try:
        log_pictures(trainer, report_levels(folder, levels_file=path.name), run_step(trainer))
    except ImportError as error:
        rank_zero_info(f"Pictures were not drawn: {error}")
    except Exception as error:
        # A plot must not make the run fail.
        rank_zero_warn(
            f"Pictures of {path} were not drawn ({type(error).__name__}: {error}). {what_is_saved(saved)} "
            f"'cpq report {folder}' draws them again."
        )


def what_is_saved(saved: str) -> str:
    """A sentence that says where the trained module is saved, for warnings about files that could not be written."""
    if saved:
        return f"Nothing of the training is lost: {saved} is a checkpoint of it."
    return "The trained module is in memory, and no ModelCheckpoint has saved it: trainer.save_checkpoint(path) does."
