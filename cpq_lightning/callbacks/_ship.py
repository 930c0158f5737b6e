"""Artefacts at the end of a fit, and samples of the input to verify them with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import nn

from cpq_lightning.attach import renew_rewritten
from cpq_lightning.callbacks._finish import nothing_is_lost
from cpq_lightning.callbacks._network import shipped_architecture, shipped_candidates, shipped_name, shipped_part
from cpq_lightning.export import (
    SAMPLES_FILE,
    Format,
    MismatchError,
    Samples,
    check_formats,
    export_model,
    export_table,
    record_samples,
    recorded_samples,
    stop_recording_samples,
    write_samples,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def check_settings(formats: Sequence[str], samples: int) -> None:
    """Refuse exports that cannot be made, before a training rather than behind it.

    Raises:
        ValueError: an unknown format, or no samples to verify with.
        ImportError: a format needs packages that are not installed.
    """
    if samples < 0 or (formats and not samples):
        raise ValueError(f"samples must be at least {1 if formats else 0}, got {samples}.")
    check_formats(formats)


class RunSamples:
    """Samples of a run's input: recorded in its first forward, and left in its folder, where ``cpq export`` looks."""

    def __init__(self) -> None:
        # Parts whose samples are not in the folder yet.
        self._waiting: list[nn.Module] = []

    def begin(self, pl_module: LightningModule, most: int) -> None:
        """Let the first forward of a fit leave its samples."""
        parts = shipped_candidates(pl_module)
        for part in parts:
            record_samples(part, most)
        self._waiting = parts if most else []

    def leave(self, trainer: Trainer, folder: Path | None) -> None:
        """Write them into the run's folder, on one process, once; to be called after each batch.

        So the checkpoints of a run that is interrupted can be exported too. What cannot be written costs a warning, and
        no training.

        Args:
            trainer: The run's.
            folder: The run's; ``None`` where it writes nothing.
        """
        found = next((s for p in self._waiting if (s := recorded_samples(p)) is not None), None)
        if found is None or folder is None:
            return
        self._waiting = []
        if not trainer.is_global_zero:
            return
        path = folder / SAMPLES_FILE
        try:
            write_samples(found, path)
        except OSError as error:
            rank_zero_warn(
                f"{path} could not be written ({error}): 'cpq export' of this run's checkpoints will need --samples or "
                "--data."
            )
            return
        rank_zero_info(
            f"{len(found)} inputs of the run's data written to {path}, for 'cpq export'; CPQCallback(samples=0) keeps "
            "none."
        )

    def end(self, pl_module: LightningModule) -> None:
        """Leave no hook behind."""
        for part in shipped_candidates(pl_module):
            stop_recording_samples(part)


def known_samples(pl_module: LightningModule) -> Samples:
    """Samples that were recorded, or the module's ``example_input_array``.

    Raises:
        ValueError: there are none.
    """
    part = shipped_part(pl_module)
    found = next((s for p in shipped_candidates(pl_module) if (s := recorded_samples(p)) is not None), None)
    if found is not None:
        return found
    example = getattr(pl_module, "example_input_array", None)
    inputs = (example,) if isinstance(example, torch.Tensor) else example
    if isinstance(inputs, tuple) and all(isinstance(e, torch.Tensor) for e in inputs):
        return Samples(inputs, real=False)
    raise ValueError(
        f"There are no samples of the input of {type(part).__name__}: its forward was never called with tensors alone. "
        "Set example_input_array in the module, or define export_module() to return the network that ships."
    )


def ship(pl_module: LightningModule, formats: Sequence[Format], folder: Path, saved: str) -> list[dict[str, Any]]:
    """Write each format into the run's folder, verified, and show what it has come to; on one process.

    What cannot be written, or would not be the trained model, costs a warning, and no training: a test may follow.

    Returns:
        For each format its ``format``, and the ``file``, or the ``error`` and the ``command`` that tries again.
    """
    if formats:
        # The last steps may have outgrown what the run's tracker has looked at before.
        renew_rewritten(pl_module)
    console = Console()
    outcomes: list[dict[str, Any]] = []
    for format in formats:
        try:
            export = export_model(
                shipped_part(pl_module),
                folder,
                format=format,
                samples=known_samples(pl_module),
                name=shipped_name(pl_module),
                architecture=shipped_architecture(pl_module),
            )
        except Exception as error:
            reason = str(error) if isinstance(error, MismatchError) else f"{type(error).__name__}: {error}"
            command = _command(pl_module, format, saved)
            later = f" Once that is mended, this writes it: {command}" if command else ""
            rank_zero_warn(f"The {format} file could not be written ({reason}). {nothing_is_lost(saved)}{later}")
            outcomes.append({"format": format, "error": reason, "command": command})
            continue
        outcomes.append({"format": format, "file": export.path.name})
        console.print()
        console.print(export_table(export))
    return outcomes


def _command(pl_module: LightningModule, format: Format, saved: str) -> str | None:
    """What exports a run's checkpoint; ``None`` where there is none."""
    if not saved:
        return None
    own = type(pl_module)
    known = hasattr(pl_module, "export_architecture")
    module = "" if known else f" --module {own.__module__}.{own.__qualname__}"
    return f"cpq export --ckpt {shlex.quote(saved)} --format {format}{module}"
