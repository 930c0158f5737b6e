"""The table of an export for the terminal."""

from __future__ import annotations

from rich.table import Table

from cpq_lightning.export.export import Export
from cpq_lightning.export.verify import Verification
from cpq_lightning.report.table import LEFT_ALIGNED, shown_averages, shown_bytes


def export_table(export: Export) -> Table:
    """Format, size, average bits, verification and latency of an exported file."""
    container = f", container {export.container}" if export.container else ""
    table = Table(title=f"Exported to {export.path}", show_header=False, **LEFT_ALIGNED)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (
        ("format", f"{export.format}{container}"),
        ("size", f"{shown_bytes(export.file_bytes)} instead of {shown_bytes(export.float_bytes)} in float32"),
        (
            "average bits",
            shown_averages(export.weight_bits, export.act_bits) or "only first and last layers are quantized",
        ),
        *([("in full precision", ", ".join(export.full_precision))] if export.full_precision else []),
        *_codes(export),
        *_constants(export),
        *_verification(export.verification),
        *_speed(export),
    ):
        table.add_row(f"{name}  ", value)
    return table


def _codes(export: Export) -> list[tuple[str, str]]:
    """The integer types that hold weights, and why they may be wider than the widths."""
    if not export.code_types:
        return []
    types = ", ".join(f"{kind} ({_layers(len(layers))})" for kind, layers in sorted(export.code_types.items()))
    odd = ", ".join(export.balanced)
    note = f"; codes of a balanced grid are odd and take one bit more than the width: {odd}" if odd else ""
    return [("weights stored as", f"{types}{note}")]


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def _constants(export: Export) -> list[tuple[str, str]]:
    constants = ", ".join(f"{name}={value!r}" for name, value in export.constants.items())
    return [("constants", f"the arguments {constants}")] if constants else []


def _verification(result: Verification | None) -> list[tuple[str, str]]:
    if result is None:
        return [("verification", "switched off: the file was not compared with the trained model")]
    kind = "" if result.real else "synthetic "
    where = f" (at {result.mismatched_at})" if result.mismatched else ""
    rows = [
        ("verified in", result.runtime),
        ("weight codes", f"equal in {result.weights} of {result.weights} layers"),
        *([("left out, as unused", ", ".join(result.left_out))] if result.left_out else []),
        (
            "activation codes",
            f"at most {result.mismatched:.3%} of a quantizer's codes differ{where}, {result.activations} compared",
        ),
    ]
    if result.agreement is not None:
        rows.append(("top-1", f"agrees on {result.agreement:.1%} of {result.samples} {kind}samples"))
    rows.append(("outputs", f"differ by at most {result.largest_difference:.2g}, {result.samples} {kind}samples"))
    return rows


def _speed(export: Export) -> list[tuple[str, str]]:
    if export.latency is None:
        return []
    full, quantized, ratio = export.latency.full_precision, export.latency.quantized, export.latency.speedup
    return [
        (
            "latency",
            f"{1e3 * quantized:.2f} ms a sample, full precision {1e3 * full:.2f} ms: {ratio:.2f} times as fast",
        )
    ]
