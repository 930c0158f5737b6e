"""One run on several processes: the jobs of the cells that need them, each called in every process."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset

from benchmarks.lightning_matrix.common import Plain, check, data, trainer_in
from cpq_lightning import CPQCallback, CPQConfig, levels
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.nn.sharding import full_tensor

# Batch norm's running statistics are each process's own until the next forward hands the first one's on.
_PER_RANK = ("running_mean", "running_var", "num_batches_tracked")


class Same(pl.Callback):
    """Fails the run where processes differ, after ranges are set and at the end, and writes what the first one has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.compare(trainer, pl_module)
        if trainer.is_global_zero:
            torch.save({n: q.start_scale.clone() for n, q in quantizers(pl_module)}, self.folder / "ranges.pt")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.compare(trainer, pl_module)
        records = [[r.name, r.kind, r.bits, r.scale] for r in levels(pl_module)]
        everybody = [None] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(everybody, records)
            assert all(other == records for other in everybody)
        state = {name: full_tensor(value) for name, value in pl_module.state_dict().items()}
        if trainer.is_global_zero:
            torch.save(state, self.folder / "state.pt")

    def compare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, value in pl_module.state_dict().items():
            sharded = isinstance(value, torch.distributed.tensor.DTensor)
            if sharded or name.endswith(_PER_RANK) or trainer.world_size == 1:
                continue
            gathered: Any = trainer.strategy.all_gather(value.clone())
            assert all(torch.equal(gathered[0], other) for other in gathered[1:]), name


class Sharded(Plain):
    """FSDP2 as Lightning's documentation has it: the hook shards what the constructor has built."""

    def configure_model(self) -> None:
        for layer in self.net:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]


class Unnormed(Plain):
    """Without batch norm, whose statistics depend on how a batch is split."""

    def __init__(self) -> None:
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=0.02))
        self.net[1] = nn.Identity()
        self.devices = 1

    def train_dataloader(self) -> DataLoader[Any]:
        # Lightning's own sampler would shuffle: each batch of one process is split over the two here.
        part = Subset(data().dataset, range(self.trainer.global_rank, 64, self.devices))
        return DataLoader(part, 16 // self.devices)


class Kill(pl.Callback):
    """Ends the process in the middle of a step, as the kernel does when memory is out."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def saver(folder: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}-{step}", **settings)


def run(folder: Path, strategy: Any, module: pl.LightningModule, **settings: Any) -> pl.Trainer:
    """A run on two processes, its learned widths and all."""
    torch.manual_seed(0)
    added = [Same(folder), saver(folder, every_n_epochs=1)]
    path = settings.pop("ckpt_path", None)
    trainer = trainer_in(
        folder, *added, quantize_from=0.2, strategy=strategy, devices=2, enable_checkpointing=True, **settings
    )
    trainer.fit(module, data(batch_size=8), data(), ckpt_path=path)
    check(trainer, module)
    return trainer


def ddp(folder: Path) -> None:
    run(folder, "ddp", Plain())


def resumed(folder: Path) -> None:
    """From each of the checkpoints that another job has left; into a folder of its own."""
    for epoch in json.loads(os.environ["CPQ_EPOCHS"]):
        into = folder / f"from-{epoch}"
        into.mkdir(exist_ok=True)
        path = next(folder.glob(f"epoch={epoch}-*.ckpt"))
        if "CPQ_SHARDED" in os.environ:
            run(into, _sharding(), Sharded(), gradient_clip_val=1.0, ckpt_path=path)
        else:
            run(into, "ddp", Plain(), ckpt_path=path)


def _sharding() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)


def fsdp2(folder: Path) -> None:
    run(folder, _sharding(), Sharded(), gradient_clip_val=1.0)


def follow(folder: Path) -> None:
    """Fixed widths, no noise: what is learned does not depend on how a batch is split."""
    torch.manual_seed(0)
    devices = int(os.environ["WORLD_SIZE"])
    module = Unnormed()
    trainer = pl.Trainer(
        max_epochs=8, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        precision="64-true", callbacks=[CPQCallback(CPQConfig(), table=False), Same(folder)],
        use_distributed_sampler=False,
    )  # fmt: skip
    module.devices = devices
    trainer.fit(module, val_dataloaders=data())


JOBS = {"ddp": ddp, "resumed": resumed, "fsdp2": fsdp2, "follow": follow}
