"""Cells on several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy

from benchmarks.lightning_matrix.common import Plain, cell, data, trainer_in
from cpq_lightning import CPQCallback, levels

_ROOT = Path(__file__).parents[2]


def run_job(job: str, folder: Path, **environment: str) -> None:
    """Run a job of the worker in a program of its own.

    Raises:
        AssertionError: it failed, with the end of what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.lightning_matrix.worker", job, str(folder)],
        cwd=_ROOT, env=settings | environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{job} ended with {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def _state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "state.pt", weights_only=True)


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the entries of two states that are not equal to the bit."""
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@cell("processes", "DDP, 2 processes (gloo), and resumed from three of its checkpoints")
def ddp(folder: Path) -> str:
    run_job("ddp", folder)
    # Before quantize_from; while widths are learned and both schedules move; after the freeze.
    run_job("resumed", folder, CPQ_EPOCHS=json.dumps([0, 4, 8]))
    for epoch in (0, 4, 8):
        assert differing(_state(folder), _state(folder / f"from-{epoch}")) == []
    return "parameters, buffers and levels equal on both; each resumed run ends bit for bit like the whole one"


@cell("processes", "DDP, 2 processes at half the batch against 1 at the whole", thorough=True)
def follow(folder: Path) -> str:
    one, two = folder / "one", folder / "two"
    for path in (one, two):
        path.mkdir()
        run_job(path.name, path)
    assert differing(*(torch.load(path / "ranges.pt", weights_only=True) for path in (one, two))) == []
    states = [_state(path) for path in (one, two)]
    apart = max(
        float((value - states[1][name]).abs().max() / value.abs().max().clamp(min=1e-12))
        for name, value in states[0].items()
        if value.is_floating_point()
    )
    assert apart < 1e-3
    return f"starting ranges equal to the bit; after 32 steps all state within {apart:.0e}, relative"


@cell("processes", "DDP, spawned")
def spawned(folder: Path) -> str:
    trainer = trainer_in(folder, strategy="ddp_spawn", devices=2)
    trainer.fit(Plain(), data(batch_size=8), data())
    assert trainer.state.finished
    content = json.loads((folder / "cpq_runs" / "version_0" / "levels.json").read_text())
    assert abs(content["totals"]["weight_bits_avg"] - 4) <= 0.2
    return f"weights of {content['totals']['weight_bits_avg']:.2f} bits"


@cell("processes", "FSDP2 by ModelParallelStrategy, 2 processes, clipped by norm, and resumed")
def fsdp2(folder: Path) -> str:
    run_job("fsdp2", folder)
    run_job("resumed", folder, CPQ_EPOCHS=json.dumps([0, 5]), CPQ_SHARDED="1")
    for epoch in (0, 5):
        assert differing(_state(folder), _state(folder / f"from-{epoch}")) == []
    module = Plain()
    path = next(folder.glob("epoch=9-*.ckpt"))
    trainer_in(folder).validate(module, data(), ckpt_path=path, verbose=False)
    content = json.loads((folder / "cpq_runs" / "version_0" / "levels.json").read_text())
    wanted = [(layer["name"], layer["weight"]["bits"]) for layer in content["layers"]]
    assert [(r.name, r.bits) for r in levels(module) if r.kind == "weight"] == wanted
    return "quantizers whole and equal on both; resumed bit for bit; its checkpoint evaluates in one process"


@cell("processes", "FSDP1")
def fsdp1(folder: Path) -> str:
    trainer, callback = trainer_in(folder), CPQCallback()
    trainer.callbacks = [callback]  # type: ignore[attr-defined]
    # Lightning makes the strategy on GPUs only; the question is asked of a Trainer that has it.
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(MisconfigurationException, match="ModelParallelStrategy"):
        callback.setup(trainer, Plain(), "fit")
    return "refused, naming ModelParallelStrategy"
