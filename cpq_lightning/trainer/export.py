"""Exports at the end of a fit, and input samples that verify them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from torch import nn
from torch.utils._pytree import tree_map

from cpq_lightning.attach.audit import unaudited
from cpq_lightning.attach.calls import as_call, in_evaluation
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.export.calls import named_outputs
from cpq_lightning.export.export import export_model
from cpq_lightning.export.formats import Format, check_formats
from cpq_lightning.export.sample_file import SAMPLES_FILE, write_samples
from cpq_lightning.export.samples import (
    Samples,
    export_obstacle,
    record_samples,
    recorded_samples,
    stop_recording_samples,
)
from cpq_lightning.export.table import export_table
from cpq_lightning.export.verify import MismatchError
from cpq_lightning.nn.sharding import is_sharded
from cpq_lightning.trainer.module_parts import exported_architecture, exported_candidates, exported_name, exported_part
from cpq_lightning.trainer.run_report import what_is_saved

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def check_settings(formats: Sequence[str], samples: int) -> None:
    """Refuse exports that cannot be made, before training rather than after it.

    Raises:
        ValueError: a format is unknown, or there are no samples for verification.
        ImportError: a format needs packages that are not installed.
    """
    if samples < 0 or (formats and not samples):
        raise ValueError(f"samples must be at least {1 if formats else 0}, got {samples}.")
    check_formats(formats)


class RunSamples:
    """Input samples of a run: recorded in its first forward, and written to its folder for ``cpq export``."""

    def __init__(self) -> None:
        self._parts: list[nn.Module] = []
        self._max_samples = 0
        # Whether the samples are not written yet, and whether exports that will fail have not been reported yet.
        self._unwritten = self._unreported = False

    def begin(self, pl_module: LightningModule, max_samples: int) -> None:
        """Start a fit, without the samples of an earlier fit.

        Args:
            pl_module: The module.
            most: Maximal number of samples; 0 records none.
        """
        self._parts, self._max_samples = exported_candidates(pl_module), max_samples
        self._unwritten = self._unreported = bool(max_samples)
        for part in self._parts:
            record_samples(part, 0)

    def listen(self) -> None:
        """Record samples in the next forward."""
        for part in self._parts:
            record_samples(part, self._max_samples, again=True)

    def pause(self) -> None:
        """Remove the hooks, because Lightning's model summary runs a forward on an example that is not data."""
        for part in self._parts:
            stop_recording_samples(part)

    def end(self) -> None:
        """Remove the hooks and the references to modules."""
        self.pause()
        self._parts = []

    def foresee(self, trainer: Trainer, pl_module: LightningModule, formats: Sequence[Format]) -> None:
        """Warn before training if the exports at its end will fail, as far as a forward or the example shows it."""
        if formats and self._unreported:
            self._warn(formats, _obstacle(pl_module, self._parts) or _example_obstacle(trainer, pl_module))

    def leave(self, trainer: Trainer, folder: Path | None, formats: Sequence[Format]) -> None:
        """Write the samples to the run's folder, once and on one process; call this after each batch.

        With the samples, checkpoints of an interrupted run can be exported too. A failure to write only warns. If an
        export at the end will fail because of the forward's inputs or outputs, this method warns too.

        Args:
            trainer: The run's Trainer.
            folder: The run's folder; ``None`` if the run writes no files.
            formats: Formats that are exported at the end of the run.
        """
        if folder is None:
            return
        if formats and self._unreported:
            self._warn(formats, _obstacle(trainer.lightning_module, self._parts))
            self._unreported = False
        samples = _recorded(self._parts) if self._unwritten else None
        if samples is None:
            return
        self._unwritten = False
        if not trainer.is_global_zero:
            return
        path = folder / SAMPLES_FILE
        try:
            write_samples(samples, path)
        except (OSError, TypeError) as error:
            rank_zero_warn(
                f"{path} could not be written ({error}): 'cpq export' of this run's checkpoints will need --samples or "
                "--data."
            )
            return
        rank_zero_info(
            f"{len(samples)} inputs of the run's data written to {path}, for 'cpq export'; CPQCallback(samples=0) "
            "keeps none."
        )

    def _warn(self, formats: Sequence[Format], reason: str | None) -> None:
        if reason is not None:
            self._unreported = False
            rank_zero_warn(f"The export at the end of this run ({', '.join(formats)}) will fail: {reason}")


def _recorded(candidates: Sequence[nn.Module]) -> Samples | None:
    """Samples of the exported part; if that is never called, those of the network in it, provided they fit."""
    for part in candidates:
        samples = recorded_samples(part)
        if samples is not None:
            return samples if samples.fit(candidates[0]) else None
        if export_obstacle(part) is not None:
            # This part was called, with arguments that cannot be recorded.
            return None
    return None


def _obstacle(pl_module: LightningModule, candidates: Sequence[nn.Module]) -> str | None:
    """Why the arguments or outputs of a forward prevent an export; ``None`` if they do not, or before any forward."""
    if recorded_samples(candidates[0]) is not None:
        return export_obstacle(candidates[0])
    if any(export_obstacle(part) is not None and recorded_samples(part) is None for part in candidates):
        try:
            available_samples(pl_module)
        except ValueError as error:
            return str(error)
    return None


def _example_obstacle(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Call the module on its ``example_input_array``. If an export cannot hold the types of its outputs, return why.

    Otherwise return ``None``, also if there is no ``example_input_array``.
    """
    part, example = exported_part(pl_module), getattr(pl_module, "example_input_array", None)
    if example is None or recorded_samples(part) is not None or any(is_sharded(p) for p in part.parameters()):
        return None
    try:
        args, kwargs = tree_map(
            lambda leaf: leaf.to(pl_module.device) if isinstance(leaf, torch.Tensor) else leaf, as_call(part, example)
        )
        with torch.no_grad(), isolate_rng(), unaudited(), trainer.precision_plugin.forward_context():
            with in_evaluation(part), torch.compiler.set_stance("force_eager"):
                output = part(*args, **kwargs)
    except Exception:
        # The export reports this error, unless it is fixed by then.
        return None
    try:
        named_outputs(output)
    except TypeError as error:
        return str(error)
    return None


def available_samples(pl_module: LightningModule) -> Samples:
    """The recorded samples, or the module's ``example_input_array``.

    If the exported part is the module itself, and its example has other arguments than the recorded call, the export
    has the arguments of the example: the example may omit labels that only training passes.

    Raises:
        ValueError: there are no samples.
    """
    candidates = exported_candidates(pl_module)
    part, samples, reasons = candidates[0], _recorded(candidates), []
    if samples is None:
        reasons = [o for p in candidates if (o := export_obstacle(p)) is not None]
    example, example_samples = getattr(pl_module, "example_input_array", None), None
    if example is not None:
        try:
            example_samples = replace(Samples.of(example, part), real=False)
        except (TypeError, ValueError) as error:
            reasons.append(f"example_input_array: {error}")
    if samples is not None and (example_samples is None or part is not pl_module):
        return samples
    if example_samples is not None:
        return (
            example_samples if samples is None else samples.for_arguments_of(example_samples, part) or example_samples
        )
    raise ValueError(
        f"There are no samples of the input of {type(part).__name__}: "
        f"{' '.join(reasons) or 'its forward was never called.'} Set example_input_array in the module, or define "
        "export_module() to return the network to export."
    )


def export_at_fit_end(
    pl_module: LightningModule, formats: Sequence[Format], folder: Path, saved: str
) -> list[dict[str, Any]]:
    """Export the model in each format to the run's folder, verify the files, and print the results; on one process.

    An export that fails, or whose outputs differ from the model's, only warns, so that a test may follow the fit.

    Returns:
        For each format: its ``format``, and the ``file``, or the ``error`` and the ``command`` that retries the export.
    """
    console = Console()
    results: list[dict[str, Any]] = []
    for format in formats:
        try:
            export = export_model(
                exported_part(pl_module),
                folder,
                format=format,
                samples=available_samples(pl_module),
                name=exported_name(pl_module),
                architecture=exported_architecture(pl_module),
            )
        except Exception as error:
            reason = str(error) if isinstance(error, MismatchError) else f"{type(error).__name__}: {error}"
            is_quantized = any(q.active for _, q in quantizers(pl_module))
            # A checkpoint in full precision cannot be exported.
            command = _command(pl_module, format, saved) if is_quantized else None
            hint = f" Once that is fixed, this command writes it: {command}" if command else ""
            rank_zero_warn(f"The {format} file could not be written ({reason}). {what_is_saved(saved)}{hint}")
            results.append({"format": format, "error": reason, "command": command})
            continue
        results.append({"format": format, "file": export.path.name})
        console.print()
        console.print(export_table(export))
    return results


def _command(pl_module: LightningModule, format: Format, saved: str) -> str | None:
    """The command that exports a run's checkpoint; ``None`` if there is no checkpoint."""
    if not saved:
        return None
    module_type = type(pl_module)
    knows_architecture = hasattr(pl_module, "export_architecture")
    module = "" if knows_architecture else f" --module {module_type.__module__}.{module_type.__qualname__}"
    return f"cpq export --ckpt {shlex.quote(saved)} --format {format}{module}"
