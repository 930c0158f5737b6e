"""Latency of ONNX files on ONNX Runtime's CPU: a W4A4 network in both containers against full precision.

``python -m benchmarks.onnx_latency [--model resnet18] [--size 224] [--rounds 60]``. The network has random weights, its
batch norms random gains and the statistics of random images: the time does not depend on what it has learned. All files
take their turn in each round; times are medians, ratios medians over rounds of the ratio within a round. For comparison
ONNX Runtime's own static quantizer (8 bits, per channel, after its pre-processing) makes a file of the same network.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.train_step.results import commit
from cpq_lightning import CPQConfig, attach, calibrate
from cpq_lightning.export.onnx.runtime import seconds, session
from cpq_lightning.export.onnx.write import full_precision, write_onnx
from cpq_lightning.export.samples import Samples

RESULT = Path(__file__).parent / "results" / "onnx_latency.json"
FULL, TARGET = "full precision", 2.0


def network(name: str) -> nn.Module:
    """A timm network with batch norms that are not all alike."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=1000)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 0.6)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def make_files(name: str, images: torch.Tensor, folder: Path) -> dict[str, bytes]:
    """The files that are compared."""
    model, samples = network(name), Samples.of(images)
    files = {FULL: full_precision(model, samples)}
    source = folder / "full.onnx"
    source.write_bytes(files[FULL])
    quant_pre_process(str(source), str(folder / "prepared.onnx"))
    quantization.quantize_static(
        str(folder / "prepared.onnx"),
        str(folder / "static.onnx"),
        _Reader(images.numpy()),
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    files["ONNX Runtime's static quantizer, 8 bits"] = (folder / "static.onnx").read_bytes()
    calibrate(attach(model, CPQConfig(weight_bits=4, act_bits=4)), [images])
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(images)
    for container, biases in (("int8", True), ("int8", False), ("int4", True)):
        form = "" if biases else ", exact form"
        path = write_onnx(model.eval(), folder / "own.onnx", samples, container=container, round_biases=biases)
        files[f"W4A4, {container}{form}"] = path.read_bytes()
    return files


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self._left = iter([{"input": images[i : i + 1]} for i in range(len(images))])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def measure(files: dict[str, bytes], image: np.ndarray, rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each file in each round."""
    sessions = {name: session(content, threads) for name, content in files.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(rounds):
        for name, one in sessions.items():
            times[name].append(seconds(one, {"input": image}))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = torch.randn(4, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(options.model, images, Path(folder))
    times = measure(files, images[:1].numpy(), options.rounds, options.threads)
    full = np.array(times[FULL])
    rows = {
        name: {
            "milliseconds": 1e3 * float(np.median(taken)),
            "speedup": [float(q) for q in np.quantile(full / np.array(taken), [0.25, 0.5, 0.75])],
            "bytes": len(files[name]),
        }
        for name, taken in times.items()
    }
    table = Table(title=f"{options.model}, {options.size} px, one image, {options.threads} threads")
    for column in ("file", "ms", "times as fast (quartiles)", "MB"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for name, row in rows.items():
        low, middle, high = row["speedup"]
        cells = (f"{row['milliseconds']:.2f}", f"{middle:.2f} ({low:.2f}-{high:.2f})", f"{row['bytes'] / 1e6:.2f}")
        table.add_row(name, *cells)
    Console().print(table)
    setting = {
        "model": options.model, "size": options.size, "rounds": options.rounds, "threads": options.threads,
        "machine": platform.processor() or platform.machine(), "onnxruntime": onnxruntime.__version__,
        "date": str(date.today()), "commit": commit(), "target_int8": TARGET,
    }  # fmt: skip
    options.results.write_text(json.dumps({"setting": setting, "files": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
