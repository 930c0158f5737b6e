"""The figures as tables: one for the terminal, one for the README."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.train_step import variants as v
from benchmarks.train_step.measure import Figures, Setting

_SETTING = Setting()
_COMPILED = Setting(backend="inductor")
_VIT = Setting(model="vit_tiny_patch16_224")
_ABSENT = "not measured"


@dataclass(frozen=True)
class Row:
    """A line of the README's table.

    Attributes:
        label: What the figure is.
        variant: Whose it is.
        partner: What it is in relation to; empty for a count.
        kind: ``seconds``, ``kept_bytes`` or ``peak_mb`` of a relation, or the name of a count.
        target: What is aimed at, if anything.
        setting: What was trained.
    """

    label: str
    variant: str
    partner: str = v.FULL
    kind: str = "seconds"
    target: str = ""
    setting: Setting = _SETTING

    def figure(self, known: dict[str, Any]) -> dict[str, Any] | None:
        """The variant's, if it has been measured."""
        return known["figures"].get(self.setting.name, {}).get(self.variant)

    def measured(self, known: dict[str, Any]) -> str:
        """The value as the table shows it; times with their quartiles."""
        figure = self.figure(known)
        values = figure and (figure["against"].get(self.partner) if self.partner else figure)
        if not values or self.kind not in values:
            return _ABSENT
        if not self.partner:
            return f"{values[self.kind]:.0f}"
        shown = f"{values[self.kind]:.2f}"
        if self.kind == "seconds":
            low, high = values["seconds_quartiles"]
            shown += f" ({low:.2f}–{high:.2f})"
        return shown


def _memory(name: str, variant: str, kept: str = "", peak: str = "") -> list[Row]:
    return [
        Row(f"bytes kept for backward: {name} / full precision", variant, kind="kept_bytes", target=kept),
        Row(f"peak resident memory: {name} / full precision", variant, kind="peak_mb", target=peak),
    ]


_TORCHS = "torch's learnable fake-quantize"

ROWS = [
    Row("time: CPQ, `expectation` (default) / full precision", v.EXPECTATION, target="1.25"),
    Row("time: CPQ, `argmax` / full precision", v.ARGMAX, target="1.25"),
    Row(f"time: CPQ, `expectation` / {_TORCHS}", v.EXPECTATION, v.TORCH, target="0.9"),
    Row(f"time: CPQ, `argmax` / {_TORCHS}", v.ARGMAX, v.TORCH, target="1.0"),
    *_memory("CPQ, `expectation`", v.EXPECTATION, "1.05", "1.10"),
    *_memory("CPQ, `argmax`", v.ARGMAX, "1.05", "1.10"),
    Row("time: CPQ, 8 bits / 2 bits", v.WIDE, v.NARROW, target="1.05"),
    Row("time: widths of 8 to 2 bits learned / fixed widths", v.LEARNED, v.EXPECTATION, target="1.5"),
    Row("time: the same after the freeze / fixed widths", v.FROZEN, v.EXPECTATION, target="1.0"),
    *_memory("widths of 8 to 2 bits learned", v.LEARNED),
    Row("time, both compiled: CPQ, `expectation` / full precision", v.EXPECTATION, target="1.25", setting=_COMPILED),
    Row("time, both compiled: CPQ, `argmax` / full precision", v.ARGMAX, target="1.25", setting=_COMPILED),
    Row("graph breaks of CPQ compiled", v.EXPECTATION, "", "graph_breaks", "0", _COMPILED),
    Row("recompilations after the first step", v.EXPECTATION, "", "recompilations", "0", _COMPILED),
    Row("time, vit_tiny: CPQ, `expectation` / full precision", v.EXPECTATION, target="1.5", setting=_VIT),
    *(
        row
        for name, variant in [
            (_TORCHS, v.TORCH),
            ("Brevitas, W4A4", v.BREVITAS),
            ("NNCF, int8", v.NNCF),
            ("CPQ, brute force", v.BRUTE),
        ]
        for row in (Row(f"time: {name} / full precision", variant), *_memory(name, variant))
    ),
]


def markdown(known: dict[str, Any], rows: list[Row] | None = None) -> str:
    """The README's table, with the commands that made it below.

    Args:
        known: What :func:`benchmarks.train_step.results.load` gives.
        rows: The lines; all by default.
    """
    lines = ["| figure | measured | target | by |", "|---|---|---|---|"]
    runs: list[str] = []
    for row in ROWS if rows is None else rows:
        measured, by = row.measured(known), ""
        if measured != _ABSENT:
            time = row.figure(known)["run"]  # type: ignore[index]
            if time not in runs:
                runs.append(time)
            by = str(runs.index(time) + 1)
        lines.append(f"| {row.label} | {measured} | {row.target} | {by} |")
    lines.append("")
    for number, time in enumerate(runs, 1):
        lines.append(f"{number}. {_run(known['runs'][time])}")
    return "\n".join(lines) + "\n"


def _run(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    machine = run["machine"]
    kernels = "" if run["compiled_kernels"] else ", without compiled kernels"
    return (
        f"`{run['command']}`, {run['time'][:10]}, commit {run['commit']}, {machine['processor']}, "
        f"{machine['threads']} threads on {machine['cores']} cores, {versions}{kernels}"
    )


def terminal(figures: Figures, setting: Setting) -> Table:
    """What one run has measured: a line for each variant and what it is put in relation to."""
    table = Table(title=setting.name, title_justify="left")
    for header in ("variant", "against"):
        table.add_column(header)
    kinds = {"seconds": "time x", "kept_bytes": "kept x", "peak_mb": "peak x"}
    kinds = {k: h for k, h in kinds.items() if any(k in figure for figure in figures.values())}
    for header in kinds.values():
        table.add_column(header, justify="right")
    for name, figure in figures.items():
        head = f"{name}, {figure['seconds'] * 1000:.0f} ms"
        if setting.backend:
            head += (
                f", first step {figure['first_step_seconds']:.0f} s, {figure['graph_breaks']} graph breaks, "
                f"{figure['recompilations']} recompilations"
            )
        for partner, ratios in (figure["against"] or {"": {}}).items():
            table.add_row(head, partner, *(f"{ratios[k]:.2f}" if k in ratios else "" for k in kinds))
            head = ""
    return table
