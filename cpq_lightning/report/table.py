"""Tables for the terminal: the levels of the layers, the metrics of a run, and several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cpq_lightning.attach.coverage import Coverage
from cpq_lightning.report.levels import GRID_MARKS, grid_mark, mean_over_channels
from cpq_lightning.report.runs import BEFORE, FULL, QUANTIZED, Run

LEFT_ALIGNED: dict[str, Any] = {
    "title_justify": "left",
    "caption_justify": "left",
    "header_style": "bold",
    "box": SIMPLE_HEAD,
    "show_edge": False,
    "padding": 0,
}


def levels_table(manifest: Mapping[str, Any]) -> Table:
    """One row per layer from the content of ``levels.json``: weights left, activations right, totals in the caption."""
    table = Table(title="Learned levels", caption=summary(manifest), **LEFT_ALIGNED)
    table.add_column("layer", overflow="fold", min_width=16)
    oscillating = any(layer["weight"].get("oscillating") is not None for layer in manifest["layers"])
    for kind in ("weight", "input"):
        table.add_column(f"{kind}\nbits", justify="right", no_wrap=True)
        for name in ("scale", "used", "error", "clip", *(["osc"] if oscillating and kind == "weight" else [])):
            table.add_column(f"\n{name}", justify="right", no_wrap=True)
    first_or_last = False
    prefix = _shared_prefix([layer["name"] for layer in manifest["layers"]])
    for layer in manifest["layers"]:
        share = layer["weight"].get("oscillating")
        osc = ["" if share is None else _percent(share)] if oscillating else []
        cells = [*_cells(layer["weight"]), *osc, *_cells(layer["activation"])]
        star = layer["weight"]["first_or_last"]
        first_or_last = first_or_last or star
        table.add_row(f"{layer['name'].removeprefix(prefix)}{' *' if star else ''}", *cells)
    for operand in manifest.get("products", []):
        # "blocks.0.attn 0 left" is the left operand of the first product in that module.
        module, _, side = operand["name"].rpartition("product_operands.")
        name = f"{module.rstrip('.').removeprefix(prefix)} {side.replace('_', ' ')}"
        table.add_row(name, *_cells(None), *([""] if oscillating else []), *_cells(operand))
    notes = ["used: levels that occur; error: relative squared error; clip: share of clipped values", GRID_MARKS]
    if oscillating:
        notes.append("osc: share of weights that oscillated at the end of training")
    if prefix:
        notes.append(f"names of layers are relative to {prefix[:-1]}")
    if any(isinstance(layer["weight"]["scale"], list) for layer in manifest["layers"]):
        notes.append("~ mean over the channels of a layer with one scale per channel, or over its groups of inputs")
    if first_or_last:
        notes.append("* first or last layer, not part of the average")
    plain = [f"{layer['name']} ({layer['type']})" for layer in manifest.get("full_precision", ())]
    if plain:
        notes.append(f"in full precision: {', '.join(plain)}")
    table.caption = "\n".join([str(table.caption), *notes])
    return table


def _shared_prefix(names: list[str]) -> str:
    """The name of the innermost module that contains all layers, with a dot at the end; it is cut from the rows."""
    first = names[0].rpartition(".")[0].split(".") if names else []
    while first and not all(name.startswith(".".join(first) + ".") for name in names):
        first.pop()
    return ".".join(first) + "." if first and first != [""] else ""


def _cells(quantizer: Mapping[str, Any] | None) -> list[str]:
    if quantizer is None:
        return ["-", "", "", "", ""]
    if not quantizer["quantizing"]:
        return ["fp32", "", "", "", ""]
    used, error, scale = quantizer["used_levels"], quantizer["relative_error"], quantizer["scale"]
    clipped = quantizer.get("clipped")
    bits, mean_bits, mean_scale = quantizer["bits"], mean_over_channels(quantizer["bits"]), mean_over_channels(scale)
    mark = grid_mark(quantizer)
    return [
        f"~{mean_bits:.1f}{mark}" if isinstance(bits, list) else f"{bits}{mark}",
        f"~{mean_scale:#.2g}" if isinstance(scale, list) else f"{scale:#.3g}",
        "" if used is None else f"{used}",
        "" if error is None else "<0.01%" if 0 < error < 5e-5 else f"{error:.2%}",
        "" if clipped is None else _percent(clipped),
    ]


def _percent(share: float) -> str:
    return "0%" if share == 0 else "<0.1%" if share < 5e-4 else f"{share:.1%}"


def summary(manifest: Mapping[str, Any]) -> str:
    """Average bits, size and, after a forward, coverage, each on one line."""
    totals = manifest["totals"]
    averages = shown_averages(totals["weight_bits_avg"], totals["act_bits_avg"])
    size, full = totals["size_bytes"], totals["fp32_bytes"]
    prefix = f"{averages} on average\n" if averages else ""
    covered = manifest.get("coverage")
    suffix = "" if covered is None else f"\n{Coverage.from_dict(covered).sentence()}"
    sides = [layer[kind] for layer in manifest["layers"] for kind in ("weight", "activation")]
    if not any(side["quantizing"] for side in sides if side is not None):
        return f"in full precision: {shown_bytes(full)} in float32{suffix}"
    sizes = f"{shown_bytes(size)} packed instead of {shown_bytes(full)} in float32"
    return f"{prefix}{sizes}, {full / size:.1f} times smaller{suffix}"


def shown_averages(weights: float | None, activations: float | None) -> str:
    """The average bits as text; an average that is ``None`` is left out."""
    both = (("weights", weights), ("activations", activations))
    return ", ".join(f"{name} {bits:.2f} bits" for name, bits in both if bits is not None)


def shown_bytes(count: int) -> str:
    """A number of bytes with three significant digits and its unit."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def metrics_table(run: Mapping[str, Any]) -> Table:
    """One row per metric and one column per state of the network, from ``run`` in the content of ``levels.json``.

    Metrics before quantization were measured in the middle of the run: they are no results of a full-precision run.
    """
    metrics = run["metrics"]
    table = Table(title="Validation", **LEFT_ALIGNED)
    table.add_column("metric")
    columns = [state for state in (FULL, BEFORE, QUANTIZED) if state in metrics]
    for state in columns:
        at = f"\nat step {run['before_step']}" if state == BEFORE and run.get("before_step") is not None else ""
        table.add_column(f"{state}{at}", justify="right")
    if len(columns) == 2:
        table.add_column("difference", justify="right")
    for name in dict.fromkeys(name for state in columns for name in metrics[state]):
        values = [metrics[state].get(name) for state in columns]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        if len(values) == 2 and values[0] is not None and values[1] is not None:
            cells.append(f"{values[1] - values[0]:+.4f}")
        table.add_row(name, *cells)
    return table


def runs_table(runs: Sequence[Run], title: str = "Runs") -> Table:
    """One row per run: the metric at its end, size and average bits; ``fp32`` for a run without quantization."""
    table = Table(title=title, **LEFT_ALIGNED)
    table.add_column("run", overflow="fold")
    varying = [name for name in ("model", "data") if len({getattr(run, name) for run in runs}) > 1]
    for name in varying:
        table.add_column(name, overflow="fold")
    for name in (f"\n{runs[0].metric}", "\nsize", "\nin float32", "bits of\nweights", "\ninputs"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        bits = [run.weight_bits, run.act_bits]
        table.add_row(
            run.name,
            *(getattr(run, name) for name in varying),
            "-" if run.value is None else f"{run.value:.4f}",
            shown_bytes(run.size_bytes),
            shown_bytes(run.fp32_bytes),
            *("fp32" if run.state == FULL else "-" if width is None else f"{width:.2f}" for width in bits),
        )
    return table
