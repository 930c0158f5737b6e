"""The command ``cpq``: LightningCLI around QuantizedModule."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
from jsonargparse import auto_cli
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from rich.console import Console

from cpq_lightning.export import levels_table, read_manifest, write_report
from cpq_lightning.kernels import describe
from cpq_lightning.module import QuantizedModule
from cpq_lightning.shipping import export
from cpq_lightning.version import __version__


class CPQCLI(LightningCLI):
    """LightningCLI for :class:`~cpq_lightning.QuantizedModule` and any LightningDataModule."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ImportError, TypeError, ValueError) as error:
            # A wrong setting deserves its sentence, not a traceback through the parser.
            self.parser.error(str(error))


def report(run_dir: str, levels_file: str = "levels.json") -> None:
    """Show a run's table again, and make its CSV and pictures again from its files.

    Args:
        run_dir: The run's folder, with its levels.json.
        levels_file: Name of that file.
    """
    path = Path(run_dir) / levels_file
    try:
        Console().print(levels_table(read_manifest(path)))
        made = write_report(run_dir, levels_file)
    except (OSError, ValueError, ImportError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = f"{path} is missing: expected the folder of a run that has finished its fit." if missing else error
        raise SystemExit(f"cpq report: {reason}") from None
    Console().print("\n".join(["", *(f"made {file}" for file in made)]), soft_wrap=True)


def doctor() -> None:
    """Show what runs here: versions, devices, and which computation quantizers use."""
    lines = [f"{name} {version(name)}" for name in ("cpq-lightning", "torch", "lightning", "timm")]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines += [f"{torch.get_num_threads()} CPU threads", ", ".join(gpus) or "no GPU", describe()]
    if gpus:
        lines.append("GPU: functional, in PyTorch operations (kernels are not there yet)")
    Console().print("\n".join(lines), soft_wrap=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` default to the command line's."""
    if arguments is None:
        # LightningCLI warns of arguments that are handed over while there are some on the command line.
        sys.argv[1:] = [_shipped(a) for a in sys.argv[1:]]
    given = sys.argv[1:] if arguments is None else list(arguments)
    for name, command in (("export", export), ("report", report), ("doctor", doctor)):
        if given[:1] == [name]:
            auto_cli(command, args=given[1:], as_positional=name != "export", prog=f"cpq {name}")
            return
    CPQCLI(
        QuantizedModule,
        LightningDataModule,
        subclass_mode_data=True,
        parser_kwargs={
            "prog": "cpq",
            "description": "Train a timm backbone with Cluster-Promoting Quantization. Besides the subcommands below, "
            "'cpq export --ckpt CKPT' writes the trained model as one file and proves that it is that model, "
            "'cpq report RUN_DIR' shows a run's levels and makes its pictures again, and 'cpq doctor' tells what runs "
            "here.",
            "version": __version__,
        },
        args=None if arguments is None else [_shipped(a) for a in arguments],
    )


def _shipped(argument: str) -> str:
    """``recipes/NAME.yaml`` and ``callbacks/NAME.yaml`` from the installed package or its checkout, if not at hand."""
    option, equals, path = argument.rpartition("=")
    if Path(path).parts[:1] not in (("recipes",), ("callbacks",)) or Path(path).exists():
        return argument
    package = Path(str(files("cpq_lightning")))
    places = [package / "shipped" / path, package.parent / path]
    return next((f"{option}{equals}{place}" for place in places if place.exists()), argument)


if __name__ == "__main__":
    main()
