"""Artefacts at the end of a fit, and samples of the input to verify them with."""

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
from cpq_lightning.attach.calls import as_call
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
        self._parts: list[nn.Module] = []
        self._most = 0
        # Whether they are not in the folder yet, and whether nothing has been said of exports that will fail.
        self._waiting = self._unsaid = False

    def begin(self, pl_module: LightningModule, most: int) -> None:
        """Forget those of an earlier fit."""
        self._parts, self._most = exported_candidates(pl_module), most
        self._waiting = self._unsaid = bool(most)
        for part in self._parts:
            record_samples(part, 0)

    def listen(self) -> None:
        """Let the next forward leave its samples."""
        for part in self._parts:
            record_samples(part, self._most, again=True)

    def pause(self) -> None:
        """Leave no hook behind: what Lightning calls next is its summary, with an example that is none of the data."""
        for part in self._parts:
            stop_recording_samples(part)

    def end(self) -> None:
        """Leave no hook behind, and hold no module."""
        self.pause()
        self._parts = []

    def foresee(self, trainer: Trainer, pl_module: LightningModule, formats: Sequence[Format]) -> None:
        """Say before training that exports at its end will fail, where a forward or the example has shown why."""
        if formats and self._unsaid:
            self._warn(formats, _obstacle(pl_module, self._parts) or _example_obstacle(trainer, pl_module))

    def leave(self, trainer: Trainer, folder: Path | None, formats: Sequence[Format]) -> None:
        """Write them into the run's folder, on one process, once; to be called after each batch.

        So the checkpoints of a run that is interrupted can be exported too. What cannot be written costs a warning, and
        no training; so does an export at the end that will fail for what the forward takes or returns.

        Args:
            trainer: The run's.
            folder: The run's; ``None`` where it writes nothing.
            formats: What is to be exported at its end.
        """
        if folder is None:
            return
        if formats and self._unsaid:
            self._warn(formats, _obstacle(trainer.lightning_module, self._parts))
            self._unsaid = False
        found = _recorded(self._parts) if self._waiting else None
        if found is None:
            return
        self._waiting = False
        if not trainer.is_global_zero:
            return
        path = folder / SAMPLES_FILE
        try:
            write_samples(found, path)
        except (OSError, TypeError) as error:
            rank_zero_warn(
                f"{path} could not be written ({error}): 'cpq export' of this run's checkpoints will need --samples or "
                "--data."
            )
            return
        rank_zero_info(
            f"{len(found)} inputs of the run's data written to {path}, for 'cpq export'; CPQCallback(samples=0) keeps "
            "none."
        )

    def _warn(self, formats: Sequence[Format], reason: str | None) -> None:
        if reason is not None:
            self._unsaid = False
            rank_zero_warn(f"The export at the end of this run ({', '.join(formats)}) will fail as it is: {reason}")


def _recorded(candidates: Sequence[nn.Module]) -> Samples | None:
    """Samples of a forward of what ships; or, where that is not called, of the network in it, if these fit."""
    for part in candidates:
        found = recorded_samples(part)
        if found is not None:
            return found if found.fit(candidates[0]) else None
        if export_obstacle(part) is not None:
            # It is called, with something else.
            return None
    return None


def _obstacle(pl_module: LightningModule, candidates: Sequence[nn.Module]) -> str | None:
    """What a forward has taken or returned that no export can; ``None`` too before any has."""
    if recorded_samples(candidates[0]) is not None:
        return export_obstacle(candidates[0])
    if any(export_obstacle(part) is not None and recorded_samples(part) is None for part in candidates):
        try:
            available_samples(pl_module)
        except ValueError as error:
            return str(error)
    return None


def _example_obstacle(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """What a module returns for its ``example_input_array`` that no export can hold."""
    part, example = exported_part(pl_module), getattr(pl_module, "example_input_array", None)
    if example is None or recorded_samples(part) is not None or any(is_sharded(p) for p in part.parameters()):
        return None
    modes = {module: module.training for module in part.modules()}
    try:
        args, kwargs = tree_map(
            lambda leaf: leaf.to(pl_module.device) if isinstance(leaf, torch.Tensor) else leaf, as_call(part, example)
        )
        for module in modes:
            module.training = False
        with torch.no_grad(), isolate_rng(), unaudited(), trainer.precision_plugin.forward_context():
            with torch.compiler.set_stance("force_eager"):
                output = part(*args, **kwargs)
    except Exception:
        # The export tells of it, if it is not mended by then.
        return None
    finally:
        for module, training in modes.items():
            module.training = training
    try:
        named_outputs(output)
    except TypeError as error:
        return str(error)
    return None


def available_samples(pl_module: LightningModule) -> Samples:
    """Samples that were recorded, or the module's ``example_input_array``.

    Where the whole module ships, and its example has other arguments than the recorded call, the example says which an
    export has: it may leave out labels that only training gives.

    Raises:
        ValueError: there are none.
    """
    candidates = exported_candidates(pl_module)
    part, found, reasons = candidates[0], _recorded(candidates), []
    if found is None:
        reasons = [o for p in candidates if (o := export_obstacle(p)) is not None]
    example, wanted = getattr(pl_module, "example_input_array", None), None
    if example is not None:
        try:
            wanted = replace(Samples.of(example, part), real=False)
        except (TypeError, ValueError) as error:
            reasons.append(f"example_input_array: {error}")
    if found is not None and (wanted is None or part is not pl_module):
        return found
    if wanted is not None:
        return wanted if found is None else found.for_arguments_of(wanted, part) or wanted
    raise ValueError(
        f"There are no samples of the input of {type(part).__name__}: "
        f"{' '.join(reasons) or 'its forward was never called.'} Set example_input_array in the module, or define "
        "export_module() to return the network that ships."
    )


def export_at_fit_end(
    pl_module: LightningModule, formats: Sequence[Format], folder: Path, saved: str
) -> list[dict[str, Any]]:
    """Write each format into the run's folder, verified, and show what it has come to; on one process.

    What cannot be written, or would not be the trained model, costs a warning, and no training: a test may follow.

    Returns:
        For each format its ``format``, and the ``file``, or the ``error`` and the ``command`` that tries again.
    """
    console = Console()
    outcomes: list[dict[str, Any]] = []
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
            begun = any(q.active for _, q in quantizers(pl_module))
            # No file is ever made of a checkpoint in full precision.
            command = _command(pl_module, format, saved) if begun else None
            later = f" Once that is mended, this writes it: {command}" if command else ""
            rank_zero_warn(f"The {format} file could not be written ({reason}). {what_is_saved(saved)}{later}")
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
