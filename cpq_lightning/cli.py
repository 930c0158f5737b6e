"""The command ``cpq``: LightningCLI around QuantizedModule."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from cpq_lightning.module import QuantizedModule
from cpq_lightning.version import __version__


class CPQCLI(LightningCLI):
    """LightningCLI for :class:`~cpq_lightning.QuantizedModule` and any LightningDataModule."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ImportError, TypeError, ValueError) as error:
            # A wrong setting deserves its sentence, not a traceback through the parser.
            self.parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` default to the command line's."""
    if arguments is None:
        # LightningCLI warns of arguments that are handed over while there are some on the command line.
        sys.argv[1:] = [_shipped(a) for a in sys.argv[1:]]
    CPQCLI(
        QuantizedModule,
        LightningDataModule,
        subclass_mode_data=True,
        parser_kwargs={
            "prog": "cpq",
            "description": "Train a timm backbone with Cluster-Promoting Quantization.",
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
