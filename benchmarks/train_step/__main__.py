"""``python -m benchmarks.train_step``: measure, show, and keep the figures."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.train_step import measure as m
from benchmarks.train_step import results, table
from benchmarks.train_step.variants import VARIANTS, selected
from cpq_lightning.kernels.dispatch import describe


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description="What a training step costs, quantized in several ways.",
        epilog="Peers need packages of their own: pip install -e '.[bench-brevitas]', or '.[bench-nncf]'.",
    )
    made.add_argument("--model", default="resnet18", help="a timm model (resnet18)")
    made.add_argument("--size", type=int, default=96, help="height and width of the images (96)")
    made.add_argument("--batch", type=int, default=32, help="images in a batch (32)")
    made.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    made.add_argument("--rounds", type=int, default=7, help="how often each variant takes a step, 2 or more (7)")
    made.add_argument("--only", nargs="+", metavar="NAME", choices=list(VARIANTS), help=f"of: {', '.join(VARIANTS)}")
    made.add_argument("--attention", action="store_true", help="also CPQ with products of activations quantized")
    made.add_argument("--functional", action="store_true", help="also CPQ without compiled kernels")
    made.add_argument("--brute-force", action="store_true", help="also CPQ with all grid points: minutes, and some GB")
    made.add_argument("--compile", action="store_true", help="full precision and CPQ under torch.compile")
    made.add_argument("--no-peaks", action="store_true", help="leave out peaks of resident memory")
    made.add_argument("--table", action="store_true", help="print the README's table from what is kept, and no more")
    made.add_argument("--results", type=Path, default=results.RESULT, help="where figures are kept")
    made.add_argument("--alone", choices=list(VARIANTS), help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    console = Console()
    if options.table:
        # Without rich: its wrapping is for terminals.
        print(table.markdown(results.load(options.results)), end="")
        return
    if options.rounds < 2:
        parser().error(f"--rounds must be 2 or more, got {options.rounds}: ratios are medians over rounds.")
    backend = "inductor" if options.compile else ""
    setting = m.Setting(options.model, options.size, options.batch, options.threads, backend)
    torch.set_num_threads(setting.threads)
    # Peers warn of what they import.
    warnings.simplefilter("ignore")
    if options.alone:
        print(m.peak_of_this_process(VARIANTS[options.alone], setting))
        return
    try:
        wanted, variants = selected(options, console.print)
    except ValueError as error:
        parser().error(str(error))
    # A compilation that was found in a cache takes no time.
    with torch.compiler.config.patch(force_disable_caches=True):
        figures = m.measure(wanted, variants, setting, options.rounds, not options.no_peaks)
    console.print(describe(), soft_wrap=True)
    console.print(table.terminal(figures, setting))
    results.save(figures, setting, _without_paths(arguments), options.results)


def _without_paths(arguments: list[str]) -> list[str]:
    """The arguments without a place on this machine."""
    kept = list(arguments)
    for index, word in enumerate(arguments):
        if word == "--results":
            kept[index : index + 2] = [""] * 2
        elif word.startswith("--results="):
            kept[index] = ""
    return [word for word in kept if word]


if __name__ == "__main__":
    main()
