"""Cells on several processes."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from benchmarks.lightning_matrix.common import Plain, cell, data, trainer_in
from benchmarks.lightning_matrix.worker import JOBS
from benchmarks.processes import run_processes
from cpq_lightning import CPQCallback, levels


def run_job(job: str, folder: Path, processes: int = 2, **environment: str) -> None:
    """Run a job of the worker on several processes, as torchrun would start them.

    Raises:
        AssertionError: one of them failed, with the end of what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": job,
    }  # fmt: skip
    ranks = [{**shared, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    for rank, done in enumerate(run_processes(JOBS[job], folder, environments=ranks)):
        assert done.returncode == 0, f"{job}, process {rank}, ended with {done.returncode}:\n{done.stderr[-4000:]}"


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
    run_job("resumed", folder, CPQ_EPOCHS=json.dumps([0, 2, 4]))
    for epoch in (0, 2, 4):
        assert differing(_state(folder), _state(folder / f"from-{epoch}")) == []
    return "parameters, buffers and levels equal on both; each resumed run ends bit for bit like the whole one"


@cell("processes", "DDP, 2 processes at half the batch against 1 at the whole", thorough=True)
def follow(folder: Path) -> str:
    one, two = folder / "one", folder / "two"
    for processes, path in enumerate((one, two), 1):
        path.mkdir()
        run_job("follow", path, processes)
    assert differing(*(torch.load(path / "ranges.pt", weights_only=True) for path in (one, two))) == []
    states = [_state(path) for path in (one, two)]
    apart = max(
        float((value - states[1][name]).abs().max() / value.abs().max().clamp(min=1e-12))
        for name, value in states[0].items()
        if value.is_floating_point()
    )
    assert apart < 1e-3
    return f"starting ranges equal to the bit; after 32 steps all state within {apart:.0e}, relative"


def _pickled(folder: Path, start_method: Any) -> str:
    trainer = trainer_in(folder, strategy=DDPStrategy(start_method=start_method), devices=2)
    trainer.fit(Plain(), data(batch_size=8), data())
    assert trainer.state.finished
    content = json.loads((folder / "cpq_runs" / "version_0" / "levels.json").read_text())
    assert abs(content["totals"]["weight_bits_avg"] - 4) <= 0.2
    return f"weights of {content['totals']['weight_bits_avg']:.2f} bits"


@cell("processes", "DDP, spawned", thorough=True)
def spawned(folder: Path) -> str:
    return _pickled(folder, "spawn")


@cell("processes", "DDP, from a fork server")
def forked(folder: Path) -> str:
    return _pickled(folder, "forkserver")


@cell("processes", "FSDP2 by ModelParallelStrategy, 2 processes, clipped by norm, and resumed")
def fsdp2(folder: Path) -> str:
    run_job("fsdp2", folder)
    run_job("resumed", folder, CPQ_EPOCHS=json.dumps([0, 3]), CPQ_SHARDED="1")
    for epoch in (0, 3):
        assert differing(_state(folder), _state(folder / f"from-{epoch}")) == []
    module = Plain()
    path = next(folder.glob("epoch=5-*.ckpt"))
    trainer_in(folder).validate(module, data(), ckpt_path=path, verbose=False)
    content = json.loads((folder / "cpq_runs" / "version_0" / "levels.json").read_text())
    wanted = [(layer["name"], layer["weight"]["bits"]) for layer in content["layers"]]
    assert [(r.name, r.bits) for r in levels(module) if r.kind == "weight"] == wanted
    return "quantizers whole and equal on both; resumed bit for bit; its checkpoint evaluates in one process"


@cell("processes", "FSDP1")
def fsdp1(folder: Path) -> str:
    trainer, callback = trainer_in(folder), CPQCallback()
    trainer.callbacks = [callback]  # type: ignore[attr-defined]
    # Lightning refuses to construct this strategy without a GPU, so another strategy's object gets its class.
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(MisconfigurationException, match="ModelParallelStrategy"):
        callback.setup(trainer, Plain(), "fit")
    return "refused, naming ModelParallelStrategy"
