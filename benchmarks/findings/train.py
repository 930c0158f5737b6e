"""One run, from the shared start to its row."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.findings.allocation import (
    Levels,
    hessian_traces,
    least_costly,
    narrowest,
    random_levels,
    squared_errors,
)
from benchmarks.findings.data import Images, load
from benchmarks.findings.methods import METHODS, Made, Task, inner_layers
from benchmarks.findings.network import NETWORKS, Lite0
from benchmarks.findings.rows import Row
from benchmarks.findings.runs import BATCH_SIZE, SCALES, WEIGHT_DECAY, Run, Scale
from benchmarks.quantized_layer import QuantizedLayer
from cpq_lightning import QuantizedModule, calibrate
from cpq_lightning.attach.layers import QuantizedLayer as CPQLayer
from cpq_lightning.bitwidth.cost import average_bits
from cpq_lightning.report import levels

# Cells of a histogram across one step of the grid, and how far to each side of zero it reaches, in steps.
_CELLS, _REACH = 20, 3


def optimizer(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    """AdamW, whose decay leaves all alone that is no weight of a layer."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=rate)


def _trainer(epochs: int, callbacks: list[Any], device: str, folder: str) -> Trainer:
    return Trainer(
        accelerator=device,
        devices=1,
        max_epochs=epochs,
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,
        # The order of the images is the epoch's.
        reload_dataloaders_every_n_epochs=1,
    )


def _fit(made: Made, data: Images, rate: float, epochs: int, device: str) -> tuple[QuantizedModule, Trainer]:
    steps = epochs * len(data.train_dataloader())
    module = QuantizedModule(
        made.network,
        num_classes=10,
        quantization=made.config,
        optimizer=partial(optimizer, rate=rate),  # type: ignore[arg-type]
        lr_scheduler=partial(CosineAnnealingLR, T_max=steps),  # type: ignore[arg-type]
        lr_interval="step",
    )
    # What callbacks write of a run is of no use here.
    with TemporaryDirectory() as folder, made.patched:
        trainer = _trainer(epochs, made.callbacks, device, folder)
        if made.trained:
            trainer.fit(module, datamodule=data)
        else:
            calibrate(module, data.train_dataloader())
            trainer.validate(module, datamodule=data, verbose=False)
    return module, trainer


def train_start(scale: Scale, root: str, path: Path, device: str = "cpu") -> None:
    """Train the full-precision network that all runs of a scale start from, unless it is there."""
    if path.is_file():
        return
    seed_everything(0, verbose=False)
    network = NETWORKS[scale.network]()
    if isinstance(network, Lite0):
        network.load_imagenet()
    network = network.to(memory_format=torch.channels_last)
    _fit(Made(network), Images(root, scale.images, 1000, BATCH_SIZE), scale.start_rate, scale.start_epochs, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, unfinished)
    unfinished.replace(path)


def given_levels(run: Run, source: str, learned: Row | None, network: nn.Module, root: str) -> Levels | None:
    """Widths of the layers for a method that is given them."""
    sizes = inner_layers(network)
    if learned is not None:
        return {name: round(learned["levels"][name]) for name in sizes}
    if source == "random":
        return random_levels(sizes, run.weight_bits, run.seed)
    if source in ("error", "hessian"):
        low = narrowest(run.weight_bits)
        errors = {name: squared_errors(network.get_submodule(name).get_parameter("weight"), low) for name in sizes}
        if source == "hessian":
            images, labels = load(root, True)
            count = SCALES[run.scale].images
            traces = hessian_traces(network, list(sizes), images[:count], labels[:count], run.seed)
            errors = {name: [max(traces[name], 0.0) * e for e in layer_errors] for name, layer_errors in errors.items()}
        return least_costly(errors, sizes, run.weight_bits)
    return None


def train(run: Run, rate: float, start: Path, root: str, learned: Row | None = None, device: str = "cpu") -> Row:
    """Train and measure a run.

    Args:
        run: What to train.
        rate: Its learning rate.
        start: File of the full-precision start.
        root: Folder with the data.
        learned: The row of the run whose widths this one takes.
        device: Lightning's accelerator.
    """
    began = time.perf_counter()
    seed_everything(run.seed, verbose=False)
    scale, method = SCALES[run.scale], METHODS[run.method]
    network = NETWORKS[scale.network]()
    network.load_state_dict(load_file(start))
    given = given_levels(run, method.levels, learned, network, root)
    network = network.train().to(memory_format=torch.channels_last)
    data = Images(root, scale.images, run.seed, BATCH_SIZE)
    images = load(root, True)[0][: 4 * BATCH_SIZE]
    made = method.make(Task(network, run.weight_bits, run.act_bits, images, given))
    module, trainer = _fit(made, data, rate, scale.epochs, device)
    # Of the largest scale the held-out images are trained on.
    validated = float(trainer.callback_metrics["val_acc"]) if data.holds_out else None
    tested = trainer.test(module, datamodule=data, verbose=False)[0]
    errors = weight_errors(network)
    weight_bits, average = widths(made, run)
    return {
        **run.to_dict(),
        "lr": rate,
        "accuracy": tested["test_acc"],
        "test_loss": tested["test_loss"],
        "val_accuracy": validated,
        "mean_bits": average,
        "weight_error": errors.pop("all", None),
        "layer_errors": errors,
        "levels": weight_bits,
        "act_levels": widths(made, run, "activation")[0],
        "clusters": clusters(network),
        "config": None if made.config is None else made.config.to_dict(),
        "seconds": round(time.perf_counter() - began, 1),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def widths(made: Made, run: Run, kind: str = "weight") -> tuple[dict[str, float], float]:
    """Bits of each inner layer in the end (of channels with their own their mean), and of all weights on average."""
    sizes = {name: weight.numel() for name, weight, _ in _weights(made.network)}
    records = [] if made.config is None else levels(made.network)
    bits = {record.name: record.mean_bits for record in records if record.kind == kind}
    bits_by_name = {
        name: float(bits.get(name, run.weight_bits if kind == "weight" else run.act_bits)) for name in sizes
    }
    return bits_by_name, average_bits((size, bits_by_name[name]) for name, size in sizes.items()) or run.weight_bits


def _weights(network: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight, and what evaluation makes of it, of all quantized layers but the first and the last."""
    network.eval()
    weights = []
    with torch.no_grad():
        for name, layer in network.named_modules():
            if isinstance(layer, CPQLayer):
                weights.append((name, layer.weight.detach(), layer.weight_quantizer(layer.weight).detach()))
            elif isinstance(layer, QuantizedLayer):
                weights.append((name, *layer.weights()))
            elif hasattr(layer, "quant_weight"):
                weights.append((name, layer.weight.detach(), layer.quant_weight().value))
    yield from weights[1:-1]


def weight_errors(network: nn.Module) -> dict[str, float]:
    """``||w - q(w)||^2 / ||w||^2`` of each layer, and of all together as ``"all"``; empty in full precision."""
    errors, squared, power = {}, 0.0, 0.0
    for name, weight, quantized in _weights(network):
        error, layer_power = float((weight - quantized).square().sum()), float(weight.square().sum())
        errors[name] = error / layer_power
        squared, power = squared + error, power + layer_power
    return {**errors, "all": squared / power} if errors else {}


def clusters(network: nn.Module) -> list[int]:
    """Counts of the largest layer's weights, in steps, from -3 to 3: the picture of the clusters."""
    largest = max(_weights(network), key=lambda row: row[1].numel(), default=None)
    if largest is None:
        return []
    _, weight, quantized = largest
    points = quantized.flatten().unique()
    step = float(points.diff().min()) if len(points) > 1 else 1.0
    counts = torch.histc((weight.flatten() / step).clamp(-_REACH, _REACH), 2 * _REACH * _CELLS, -_REACH, _REACH)
    return [int(count) for count in counts]
