"""Time, bytes kept for backward and peak of resident memory of training steps.

All variants take their steps in turn, so that what else the machine does falls on all alike: times are medians, and
ratios are medians over rounds of the ratio within a round. Memory is counted twice: the bytes that autograd keeps for
backward (unique storages, parameters left out), and the peak of resident memory of a process that takes a few steps of
one variant and nothing else.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import track
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

from benchmarks.train_step.learning import Learning
from benchmarks.train_step.variants import Variant
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.kernels.cpu_build import use_kernels

ROOT = Path(__file__).parents[2]
_CLASSES = 100
Figures = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """What is trained, and on what.

    Attributes:
        model: Name of a timm model.
        size: Height and width of the images.
        batch: Images in a batch.
        threads: Threads of torch.
        backend: Of ``torch.compile``; empty where nothing is compiled.
    """

    model: str = "resnet18"
    size: int = 96
    batch: int = 32
    threads: int = 2
    backend: str = ""

    @property
    def name(self) -> str:
        """The key of its figures."""
        compiled = ", torch.compile" if self.backend else ""
        return f"{self.model}, {self.size} px, batch {self.batch}, {self.threads} threads{compiled}"

    def arguments(self) -> list[str]:
        """The command's, for a process of its own."""
        return [w for n in ("model", "size", "batch", "threads") for w in (f"--{n}", str(getattr(self, n)))]


class Step:
    """One training step of one variant, again and again."""

    def __init__(self, variant: Variant, setting: Setting) -> None:
        torch.manual_seed(0)
        self.kernels = variant.kernels
        self.images = torch.randn(setting.batch, 3, setting.size, setting.size)
        self.labels = torch.randint(0, _CLASSES, (setting.batch,))
        arguments: dict[str, Any] = {"img_size": setting.size} if "vit" in setting.model else {}
        network = timm.create_model(setting.model, num_classes=_CLASSES, **arguments)
        with use_kernels(self.kernels):
            self.model = variant.build(network, self.images).train()
        self.learning = Learning(self.model) if variant.learns else None
        # As in a fit with BitBudget: the gates are in no optimizer.
        self.beside = [q.gates.logit for _, q in quantizers(self.model) if q.gates.logit is not None]
        gates = {id(p) for p in self.beside}
        self.optimizer = torch.optim.SGD((p for p in self.model.parameters() if id(p) not in gates), 1e-4, momentum=0.9)
        self.forward: Callable[[Tensor], Tensor] = self.model
        # What torch.compile did in each step: seconds, frames compiled, graph breaks.
        self.compilations: list[tuple[float, int, int]] = []
        if setting.backend:
            self.forward = torch.compile(self.model, backend=setting.backend)

    def __call__(self) -> None:
        with use_kernels(self.kernels):
            if self.learning is not None:
                self.learning.enter()
            loss = cross_entropy(self.forward(self.images), self.labels)
            self.optimizer.zero_grad()
            for parameter in self.beside:
                parameter.grad = None
            loss.backward()
            self.optimizer.step()
            if self.learning is not None:
                self.learning.leave()

    def seconds(self) -> float:
        """Take a step and time it."""
        before = _compilations()
        begun = time.perf_counter()
        self()
        seconds = time.perf_counter() - begun
        frames, breaks = (now - then for now, then in zip(_compilations(), before, strict=True))
        self.compilations.append((seconds, frames, breaks))
        return seconds

    def kept_bytes(self) -> int:
        """Bytes of all storages that a forward leaves alive, parameters, buffers and inputs left out."""
        gc.collect()
        before = {t.untyped_storage()._cdata for t in _tensors()}
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
            for t in _tensors():
                if t.untyped_storage()._cdata not in before and t is not loss:
                    note(t)
        loss.backward()
        return sum(kept.values())


def _tensors() -> list[Tensor]:
    # Without subclasses: those of tracing have no storage, and no network here keeps any for backward.
    return [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]


def _compilations() -> tuple[int, int]:
    """Frames that torch.compile has made a graph of in this process, and graph breaks."""
    return counters["frames"]["ok"], sum(counters["graph_break"].values())


def peak_memory(name: str, setting: Setting) -> float:
    """Peak of resident memory in MB of a process that takes a few steps, less what it had before there was a model.

    Raises:
        RuntimeError: the process failed; with what it said.
    """
    command = [sys.executable, "-m", "benchmarks.train_step", "--alone", name, *setting.arguments()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(
            f"The peak of {name} was to be measured in a process of its own, which failed:\n{done.stderr}"
        )
    return float(done.stdout.strip().splitlines()[-1])


def peak_of_this_process(variant: Variant, setting: Setting) -> float:
    """What :func:`peak_memory` asks a process for."""
    # What is imported and started once, in a step of a network that is too small to count.
    Step(variant, replace(setting, model="test_resnet", size=32, batch=2))()
    _give_back()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step = Step(variant, setting)
    # What building and calibrating have freed would hide what the steps need.
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2 if variant.rounds else 3):
        step()
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return (peak - before) / 1e6


def _give_back() -> None:
    """Free memory goes back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(
    wanted: Iterable[str], variants: dict[str, Variant], setting: Setting, rounds: int, peaks: bool = True
) -> Figures:
    """The figures of the wanted variants.

    Args:
        wanted: Whose figures are given.
        variants: Those, and all that they are measured against.
        setting: What is trained.
        rounds: How often each takes a step, if its variant sets no limit; at least 2.
        peaks: Whether to measure the peak of resident memory, in a process for each.
    """
    steps = {name: Step(variant, setting) for name, variant in variants.items()}
    for name, step in steps.items():
        for _ in range(1 if variants[name].rounds else 2):
            step.seconds()
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for index in track(range(rounds), "Rounds"):
        for name, step in steps.items():
            if index < (variants[name].rounds or rounds):
                taken[name].append(step.seconds())
    memory: dict[str, dict[str, float]] = {name: {} for name in variants}
    if not setting.backend:
        for name, step in steps.items():
            memory[name]["kept_bytes"] = step.kept_bytes()
    if peaks and not setting.backend:
        # Each process needs as much again.
        _give_back()
        for name in track(list(steps), "Peaks"):
            memory[name]["peak_mb"] = peak_memory(name, setting)
    return {name: _figure(name, variants, taken, memory, steps[name]) for name in wanted}


def _figure(
    name: str,
    variants: dict[str, Variant],
    taken: dict[str, list[float]],
    memory: dict[str, dict[str, float]],
    step: Step,
) -> dict[str, Any]:
    figure: dict[str, Any] = {
        "seconds": statistics.median(taken[name]),
        "rounds": len(taken[name]),
        **memory[name],
        "against": {},
    }
    if step.forward is not step.model:
        first, *later = step.compilations
        figure |= {
            "first_step_seconds": first[0],
            "graph_breaks": sum(breaks for _, _, breaks in step.compilations),
            "recompilations": sum(frames for _, frames, _ in later),
        }
    for partner in variants[name].against:
        if partner not in taken:
            continue
        # Rounds that both took part in, the first ones.
        ratios = [seconds / other for seconds, other in zip(taken[name], taken[partner], strict=False)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        figure["against"][partner] = {
            "seconds": median,
            "seconds_quartiles": [low, high],
            **{kind: value / memory[partner][kind] for kind, value in memory[name].items()},
        }
    return figure
