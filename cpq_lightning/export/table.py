"""What the terminal shows of an export."""

from __future__ import annotations

from rich.table import Table

from cpq_lightning.export.export import Export
from cpq_lightning.export.verify import Verification
from cpq_lightning.report.table import LEFT_ALIGNED, shown_averages, shown_bytes


def export_table(export: Export) -> Table:
    """What was written, how large it is, whether it is the model that was trained, and how fast."""
    container = f", container {export.container}" if export.container else ""
    table = Table(title=f"Exported to {export.path}", show_header=False, **LEFT_ALIGNED)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (
        ("format", f"{export.format}{container}"),
        ("size", f"{shown_bytes(export.file_bytes)} instead of {shown_bytes(export.float_bytes)} in float32"),
        ("average bits", shown_averages(export.weight_bits, export.act_bits) or "nothing but first and last layers"),
        *([("in full precision", ", ".join(export.full_precision))] if export.full_precision else []),
        *_constants(export),
        *_proof(export.verification),
        *_speed(export),
    ):
        table.add_row(f"{name}  ", value)
    return table


def _constants(export: Export) -> list[tuple[str, str]]:
    told = ", ".join(f"{name}={value!r}" for name, value in export.constants.items())
    return [("constants", f"the arguments {told}")] if told else []


def _proof(proof: Verification | None) -> list[tuple[str, str]]:
    if proof is None:
        return [("verification", "switched off: nothing says that this file is the trained model")]
    kind = "" if proof.real else "synthetic "
    at = f" (at {proof.moved_at})" if proof.moved else ""
    rows = [
        ("verified in", proof.runtime),
        ("weight codes", f"equal in {proof.weights} of {proof.weights} layers"),
        ("activation codes", f"{proof.moved:.3%} of one quantizer's differ at most{at}, {proof.activations} compared"),
    ]
    if proof.agreement is not None:
        rows.append(("top-1", f"agrees on {proof.agreement:.1%} of {proof.samples} {kind}samples"))
    rows.append(("outputs", f"{proof.largest_difference:.2g} apart at most, {proof.samples} {kind}samples"))
    return rows


def _speed(export: Export) -> list[tuple[str, str]]:
    if export.latency is None:
        return []
    full, ours, ratio = export.latency.full_precision, export.latency.quantized, export.latency.speedup
    return [("latency", f"{1e3 * ours:.2f} ms a sample, full precision {1e3 * full:.2f} ms: {ratio:.2f} times as fast")]
