"""The command ``cpq``: LightningCLI for QuantizedModule, and commands for its runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from rich.console import Console

from cpq_lightning.attach.attach import attach
from cpq_lightning.backbones.create import create_backbone
from cpq_lightning.callbacks.cpq import CPQCallback
from cpq_lightning.cli.export import export, fill_in
from cpq_lightning.config import CPQConfig
from cpq_lightning.data import DataError
from cpq_lightning.kernels.dispatch import describe
from cpq_lightning.module import QuantizedModule
from cpq_lightning.report.kernels import kernels_table
from cpq_lightning.report.run_files import read_manifest, write_report
from cpq_lightning.report.runs import common_folder, compare_runs, expand_runs, write_runs
from cpq_lightning.report.table import levels_table, runs_table
from cpq_lightning.version import __version__

# Files and folders that every run writes to its folder, whatever its logger.
_RUN_FILES = ("config.yaml", "levels.json", "checkpoints")


class _Parser(LightningArgumentParser):
    """Adds the commands without a Trainer to the help and to the shell's completion."""

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        action = super().add_subcommands(*args, **kwargs)
        for name, command in _COMMANDS.items():
            action.add_subcommand(name, _parser_of(name), help=(command.__doc__ or "").split("\n")[0])
        return action


class CPQCLI(LightningCLI):
    """LightningCLI for :class:`~cpq_lightning.QuantizedModule` and any LightningDataModule.

    The model takes ``num_classes`` and ``class_names`` from the data, if they are not set and the data module has them.
    A data module with an open ``backbone`` gets the model's.
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        # Lightning before 2.6 has no argument for the parser's class.
        parser.__class__ = _Parser
        return parser

    def instantiate_classes(self) -> None:
        as_given = self.config.clone()
        settings = self.config[str(self.subcommand)]
        try:
            if settings.get("data") is not None:
                fill_in(settings["model"], settings["data"])
            super().instantiate_classes()
        except (ImportError, OSError, TypeError, ValueError) as error:
            # A wrong setting is reported as one sentence, not as a traceback through the parser.
            self.parser.error(str(error))
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfigCallback):
                # The config is saved as given, so that the filled-in settings stay open for other data.
                callback.config = as_given[str(self.subcommand)]

    def fit(self, model: Any, **settings: Any) -> None:
        self._refuse_to_overwrite()
        self._run("fit", model, settings)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, CPQCallback) and callback.failed_exports:
                formats = " and ".join(callback.failed_exports)
                raise SystemExit(f"cpq fit: the run is complete except for its {formats} file; see the warning above.")

    def validate(self, model: Any, **settings: Any) -> None:
        self._run("validate", model, settings)

    def test(self, model: Any, **settings: Any) -> None:
        self._run("test", model, settings)

    def predict(self, model: Any, **settings: Any) -> None:
        self._run("predict", model, settings)

    def _run(self, name: str, model: Any, settings: dict[str, Any]) -> None:
        try:
            getattr(self.trainer, name)(model, **settings)
        except (DataError, MisconfigurationException) as error:
            self.parser.error(str(error))

    def _refuse_to_overwrite(self) -> None:
        trainer = self.trainer
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if getattr(trainer, "fast_dev_run", False) or not trainer.is_global_zero:
            return
        existing = [name for name in _RUN_FILES if (folder / name).exists()]
        if existing:
            self.parser.error(
                f"{folder} is the folder of a run already, with {', '.join(existing)}: nothing was overwritten. Leave "
                "out the logger's version, so that it counts up, or give another --trainer.default_root_dir or logger."
            )


def report(
    runs: list[str], *, metric: str | None = None, levels_file: str = "levels.json", out: str | None = None
) -> None:
    """Show one run again or compare several, and make their tables and pictures again.

    One run gives its levels, as a table, CSV and pictures. Several runs give the accuracy, size and average bits of
    each, as a table, runs.csv and accuracy_over_size.png.

    Args:
        runs: Folders of runs, each with its levels.json; a folder of runs, such as a Trainer's default_root_dir, stands
            for all runs in it.
        metric: Metric by which to compare runs, and to plot over a run; by default the one that the run has singled
            out (CPQCallback's monitor), or its only one.
        levels_file: Name of the file with the levels, in place of levels.json.
        out: Folder for the files of a comparison; by default the folder that contains all runs.
    """
    folders = expand_runs(runs, levels_file=levels_file)
    try:
        if len(folders) > 1:
            compared, left_out = compare_runs(folders, metric=metric, levels_file=levels_file)
            Console().print(runs_table(compared))
            for reason in left_out:
                Console().print(f"left out: {reason}", soft_wrap=True)
            made = write_runs(compared, out or common_folder(folders))
        else:
            Console().print(levels_table(read_manifest(folders[0] / levels_file)))
            made = write_report(folders[0], metric=metric, levels_file=levels_file)
    except FileNotFoundError:
        missing = next(f for f in folders if not (f / levels_file).is_file()) / levels_file
        raise SystemExit(
            f"cpq report: {missing} is missing: expected the folder of a run that has finished its fit, or a folder of "
            "such folders."
        ) from None
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"cpq report: {error}") from None
    Console().print("\n".join(["", *(f"made {file}" for file in made)]), soft_wrap=True)


def doctor(
    model: str | None = None,
    quantization: CPQConfig = CPQConfig(),  # noqa: B008 - frozen
    device: str = "cpu",
) -> None:
    """Show versions, devices, and which kernels the quantizers use on this machine.

    With a model, a table gives the bits and the kernel of each of its layers in training, why no faster kernel
    quantizes it, and the layers that stay in full precision.

    Args:
        model: Name of a timm model, or of another backbone of QuantizedModule.
        quantization: What to quantize, and how; the settings, or a file of them.
        device: Type of the device that the model trains on, such as cpu or cuda.
    """
    lines = [f"{name} {version(name)}" for name in ("cpq-lightning", "torch", "lightning", "timm")]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines += [f"{torch.get_num_threads()} CPU threads", ", ".join(gpus) or "no GPU", describe()]
    Console().print("\n".join(lines), soft_wrap=True, highlight=False)
    if model is None:
        if (quantization, device) != (CPQConfig().to_dict(), "cpu"):
            raise SystemExit("cpq doctor: --quantization and --device say how a model is trained: give a --model too.")
        return
    try:
        # On the meta device the network has no weights: nothing is computed.
        with torch.device("meta"):
            network = attach(create_backbone(model), quantization)
    except (ConnectionError, TypeError, ValueError) as error:
        raise SystemExit(f"cpq doctor: {error}") from None
    Console().print(kernels_table(network, device))


_COMMANDS: dict[str, Callable[..., None]] = {"export": export, "report": report, "doctor": doctor}


def _parser_of(name: str) -> ArgumentParser:
    command = _COMMANDS[name]
    parser = ArgumentParser(prog=f"cpq {name}", description=(command.__doc__ or "").split("\n")[0])
    if command is report:
        parser.add_argument("runs", nargs="+", help="Folders of runs, or folders that contain runs.")
    parser.add_function_arguments(command, skip={"runs"} if command is report else None)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command ``cpq``; ``arguments`` defaults to the command line."""
    if "add_print_completion_argument" in signature(set_parsing_settings).parameters:
        # New in jsonargparse 4.47, which only the extra 'completion' needs.
        set_parsing_settings(add_print_completion_argument=True)
    if arguments is None:
        # LightningCLI warns if it gets arguments while the command line has some.
        sys.argv[1:] = [_shipped(a) for a in sys.argv[1:]]
    words = sys.argv[1:] if arguments is None else list(arguments)
    completing = any(argument.startswith("--print_completion") for argument in words)
    if completing:
        _flatten_types()
    if words and words[0] in _COMMANDS:
        # These commands need no Trainer, whose parser takes seconds.
        _COMMANDS[words[0]](**_parser_of(words[0]).parse_args(words[1:]).as_dict())
        return
    CPQCLI(
        QuantizedModule,
        LightningDataModule,
        subclass_mode_data=True,
        # Optimizers have settings that are objects too (a learning rate may be a tensor), see _flatten_types.
        auto_configure_optimizers=not completing,
        parser_kwargs={
            "prog": "cpq",
            "description": "Train a timm backbone with Cluster-Promoting Quantization, and export it.",
            "version": __version__,
        },
        args=None if arguments is None else [_shipped(a) for a in arguments],
    )


def _flatten_types() -> None:
    """Treat settings that are objects as strings, in a process that only prints the shell's completion.

    A backbone may be any module and a list of callbacks may hold any callback, and their settings may be objects again.
    A full completion would be endless (backbones) or a hundred megabytes long (the Trainer's).
    """
    wrapped: Any = Trainer.__init__
    for function, names in (
        (wrapped, ("callbacks", "logger", "plugins", "profiler", "strategy")),
        (wrapped.__wrapped__, ("callbacks", "logger", "plugins", "profiler", "strategy")),
        (QuantizedModule.__init__, ("backbone",)),
    ):
        function.__annotations__.update(dict.fromkeys(names, str))


def _shipped(argument: str) -> str:
    """Replace ``recipes/NAME.yaml`` and ``callbacks/NAME.yaml`` by those of the package, unless such a file exists."""
    option, equals, path = argument.rpartition("=")
    if Path(path).parts[:1] not in (("recipes",), ("callbacks",)) or Path(path).exists():
        return argument
    package = Path(str(files("cpq_lightning")))
    # The first is in an installed package, the second in a checkout.
    candidates = [package / "shipped" / path, package.parent / path]
    return next((f"{option}{equals}{file}" for file in candidates if file.exists()), argument)
