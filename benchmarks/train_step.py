"""What a training step costs, quantized in several ways, against full precision.

``python -m benchmarks.train_step [--rounds 7] [--model resnet18] ...``. All variants take their steps in turn, so that
what else the machine does falls on all alike; times are medians, and ratios are medians over rounds of the ratio within
a round. Memory is counted twice: the bytes that autograd keeps for backward (unique storages, parameters left out), and
the peak of resident memory of a process that takes a few steps of one variant and nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cpq_lightning import CPQConfig, attach, calibrate
from cpq_lightning.kernels import describe, use_kernels

RESULT = Path(__file__).parent / "results" / "train_step.json"


def full_precision(model: nn.Module, images: Tensor) -> nn.Module:
    return model


def _cpq(**settings: Any) -> Callable[[nn.Module, Tensor], nn.Module]:
    def build(model: nn.Module, images: Tensor) -> nn.Module:
        # Every convolution but the first, on both sides.
        first = model.default_cfg["first_conv"]  # type: ignore[index]
        config = CPQConfig(first_last_bits=None, ignore=[first, "Linear"], **settings)
        return calibrate(attach(model, config), [images])

    return build


class _LearnableFakeQuantize(nn.Module):
    """torch's own kernel of LSQ (Esser et al., ICLR 2020), as its quantization-aware training calls it."""

    def __init__(self, values: Tensor, signed: bool) -> None:
        super().__init__()
        self.bounds = (-8, 7) if signed else (0, 15)
        self.scale = nn.Parameter((2 * values.detach().abs().mean() / self.bounds[1] ** 0.5).reshape(1))
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        factor = 1 / (x.numel() * self.bounds[1]) ** 0.5
        return torch._fake_quantize_learnable_per_tensor_affine(x, self.scale, self.zero, *self.bounds, factor)


class _FakeQuantizedConv(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.weight_quantizer = _LearnableFakeQuantize(conv.weight, signed=True)
        self.input_quantizer = _LearnableFakeQuantize(torch.ones(1), signed=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.conv.weight), self.conv.bias)


def torch_learnable(model: nn.Module, images: Tensor) -> nn.Module:
    """At the sites of CPQ."""
    first = model.default_cfg["first_conv"]  # type: ignore[index]
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and name != first:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _FakeQuantizedConv(module))
    return model


def brevitas(model: nn.Module, images: Tensor) -> nn.Module:
    from brevitas.nn import QuantConv2d  # type: ignore[import-not-found]
    from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloat  # type: ignore[import-not-found]

    first = model.default_cfg["first_conv"]  # type: ignore[index]
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and name != first:
            parent, _, leaf = name.rpartition(".")
            quantized = QuantConv2d(
                module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
                groups=module.groups, bias=module.bias is not None, weight_quant=Int8WeightPerTensorFloat,
                weight_bit_width=4, input_quant=Uint8ActPerTensorFloat, input_bit_width=4,
            )  # fmt: skip
            quantized.load_state_dict(module.state_dict(), strict=False)
            setattr(model.get_submodule(parent), leaf, quantized)
    return model


VARIANTS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "full precision": full_precision,
    "torch learnable fake-quantize": torch_learnable,
    "CPQ expectation": _cpq(),
    "CPQ argmax": _cpq(weight_estimator="argmax", act_estimator="argmax"),
    "CPQ expectation, 8 bits": _cpq(weight_bits=8, act_bits=8),
    "CPQ expectation, 2 bits": _cpq(weight_bits=2, act_bits=2),
    "CPQ, widths of 8 to 2 bits learned": _cpq(weight_bits=8, min_bits=2, learn_bits=True),
    "CPQ expectation, functional": _cpq(),
}
PEERS = {"Brevitas": ("brevitas", brevitas)}


def variants(with_functional: bool) -> dict[str, Callable[[nn.Module, Tensor], nn.Module]]:
    """Those that can run here; a peer that is not installed is named."""
    found = {k: v for k, v in VARIANTS.items() if with_functional or "functional" not in k}
    for name, (package, build) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            Console().print(f"{name} is skipped: {package} is not installed (pip install {package})")
        else:
            found[name] = build
    return found


class Step:
    """One training step of one variant, again and again."""

    def __init__(self, name: str, build: Callable[[nn.Module, Tensor], nn.Module], options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.kernels = "functional" not in name
        size = (options.batch, 3, options.size, options.size)
        self.images, self.labels = torch.randn(size), torch.randint(0, 100, (options.batch,))
        arguments = {"img_size": options.size} if "vit" in options.model else {}
        self.model = build(timm.create_model(options.model, num_classes=100, **arguments), self.images).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)

    def __call__(self) -> None:
        with use_kernels(self.kernels):
            loss = cross_entropy(self.model(self.images), self.labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def seconds(self) -> float:
        begun = time.perf_counter()
        self()
        return time.perf_counter() - begun

    def kept_bytes(self) -> int:
        """Bytes of all storages that a forward leaves alive, parameters, buffers and inputs left out."""
        gc.collect()
        before = {t.untyped_storage()._cdata for t in gc.get_objects() if isinstance(t, Tensor)}
        known = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        known |= {self.images.untyped_storage().data_ptr(), self.labels.untyped_storage().data_ptr()}
        kept: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with use_kernels(self.kernels), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = cross_entropy(self.model(self.images), self.labels)
            # What ctx attributes and modules hold beside it, and hooks do not see.
            for t in gc.get_objects():
                if isinstance(t, Tensor) and t.untyped_storage()._cdata not in before and t is not loss:
                    note(t)
        loss.backward()
        return sum(kept.values())


def peak_memory(name: str, options: argparse.Namespace) -> float:
    """Peak of resident memory in MB of a process that takes three steps, less what it had before there was a model."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--alone", name, *_as_arguments(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def _as_arguments(options: argparse.Namespace) -> list[str]:
    names = ("model", "batch", "size", "threads")
    return [word for name in names for word in (f"--{name}", str(getattr(options, name)))]


def alone(name: str, options: argparse.Namespace) -> None:
    """Print the peak that :func:`peak_memory` asks for."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step = Step(name, (VARIANTS | {k: b for k, (_, b) in PEERS.items()})[name], options)
    gc.collect()
    # What building and calibrating have freed goes back first: it would hide what the steps need.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print((peak - before) / 1e6)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, by variant."""
    steps = {n: Step(n, b, options) for n, b in variants(options.functional).items()}
    for step in steps.values():
        step()
        step()
    rounds: list[dict[str, float]] = []
    for _ in track(range(options.rounds), "Rounds"):
        rounds.append({name: step.seconds() for name, step in steps.items()})
    base, peer = "full precision", "torch learnable fake-quantize"
    figures = {}
    memory = {name: step.kept_bytes() for name, step in steps.items()}
    peaks = {} if options.no_peaks else {name: peak_memory(name, options) for name in track(list(steps), "Peaks")}
    for name in steps:
        figures[name] = {
            "seconds": statistics.median(r[name] for r in rounds),
            "against_full_precision": statistics.median(r[name] / r[base] for r in rounds),
            "against_torch_learnable": statistics.median(r[name] / r[peer] for r in rounds),
            "kept_bytes": memory[name],
            "kept_against_full_precision": memory[name] / memory[base],
        }
        if peaks:
            figures[name]["peak_mb"] = peaks[name]
            figures[name]["peak_against_full_precision"] = peaks[name] / peaks[base]
    return figures


def show(figures: dict[str, Any], title: str) -> None:
    """The figures as a table."""
    table = Table(title=title, title_justify="left")
    columns = ("time", "x full precision", "x torch's", "kept x", "peak x")
    table.add_column("variant")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in figures.items():
        peak = f"{row['peak_against_full_precision']:.2f}" if "peak_mb" in row else ""
        table.add_row(
            name, f"{row['seconds'] * 1000:.0f} ms", f"{row['against_full_precision']:.2f}",
            f"{row['against_torch_learnable']:.2f}", f"{row['kept_against_full_precision']:.2f}", peak,
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--functional", action="store_true", help="also time the readable computation without kernels")
    parser.add_argument("--no-peaks", action="store_true")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Of looking at every object for tensors.
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(options.threads)
    if options.alone:
        alone(options.alone, options)
        return
    figures = measure(options)
    console = Console()
    console.print(describe(), soft_wrap=True)
    show(figures, f"{options.model}, {options.size} px, batch {options.batch}, {options.threads} threads")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    RESULT.parent.mkdir(exist_ok=True)
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    known[f"{options.model}-{options.size}-{options.batch}"] = {
        "date": str(date.today()),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {options.threads} threads",
        "versions": {name: version(name) for name in ("torch", "timm")},
        "command": "python -m benchmarks.train_step " + " ".join(sys.argv[1:]),
        "figures": figures,
    }
    RESULT.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
