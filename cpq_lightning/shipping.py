"""The command ``cpq export``."""

from __future__ import annotations

from pathlib import Path
from pydoc import locate
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from rich.console import Console
from torch import Tensor

from cpq_lightning.callbacks._network import shipped_name
from cpq_lightning.callbacks._ship import known_samples
from cpq_lightning.export import Container, Format, Samples, export_model, export_table
from cpq_lightning.module import QuantizedModule

_SYNTHETIC_SAMPLES = 16


def export(
    ckpt: str,
    format: Format = "packed",
    out: str = ".",
    container: Container = "int8",
    data: str | None = None,
    samples: int = 512,
    verify: bool = True,
) -> None:
    """Write the model of a checkpoint as one file, and prove that it is that model.

    Args:
        ckpt: Checkpoint of a QuantizedModule, such as last.ckpt.
        format: packed (safetensors, each weight's codes at its own width), onnx, or torch (a torch.export program).
        out: Folder for the file, which is named after the model.
        container: Of onnx: int8 runs as integer kernels on ONNX Runtime, int4 is the smaller file.
        data: Config with the run's data (its config.yaml, or class_path and init_args alone), for verification on
            more than the samples in the checkpoint.
        samples: How many samples of it.
        verify: Whether to load the file in its own runtime and compare it with the model.
    """
    try:
        module = load_module(ckpt)
        chosen = samples_of(data, samples) if data is not None else _own_samples(module)
        written = export_model(
            module.export_module(),
            out,
            format=format,
            samples=chosen,
            name=shipped_name(module),
            container=container,
            architecture=module.export_architecture(),
            verification=verify,
            latency=True,
        )
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"cpq export: {error}") from None
    Console().print(export_table(written), soft_wrap=True)


def load_module(path: str) -> QuantizedModule:
    """The module of a checkpoint, nothing in it unpickled but tensors and plain values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of a QuantizedModule whose backbone has a name.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"ckpt={path} is no file: expected a checkpoint, such as last.ckpt.")
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"ckpt={path} is no checkpoint that can be read without unpickling code ({type(error).__name__}). Expected "
            "one that a run of QuantizedModule has saved."
        ) from None
    settings = content.get("hyper_parameters") if isinstance(content, dict) and "state_dict" in content else None
    if not isinstance(settings, dict) or not settings.get("backbone"):
        raise ValueError(
            f"ckpt={path} is no checkpoint of a QuantizedModule with a named backbone. For a module of your own, use "
            "CPQCallback(export=[...]) in its fit, or cpq_lightning.export_model(module, folder, samples=...)."
        )
    if settings.get("quantization") is None:
        raise ValueError(f"ckpt={path} is of a run in full precision (quantization: null): nothing in it is quantized.")
    return QuantizedModule.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()


def _own_samples(module: QuantizedModule) -> Samples:
    try:
        return known_samples(module)
    except ValueError:
        # An older checkpoint; timm knows what its models take.
        shape = getattr(module.model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
        channels = module.hparams["backbone_args"].get("in_chans", shape[0])
        return Samples.synthetic([[channels, *shape[1:]]], _SYNTHETIC_SAMPLES)


def data_module(settings: Any) -> LightningDataModule:
    """The data module that settings of ``class_path`` and ``init_args`` describe."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser.instantiate(parser.parse_object({"data": settings}))["data"]


def fill_in(model: Any, data: Any) -> None:
    """What the settings of a QuantizedModule and of its data leave open, from each other, in place.

    A data module with a ``backbone`` and an ``image_size`` gets the model's; the model gets ``num_classes`` and
    ``class_names`` of a data module that has them.

    Raises:
        ValueError: the model is to distinguish fewer classes than the data have.
    """
    arguments = data.get("init_args") or {}
    if "backbone" in arguments and arguments["backbone"] is None and isinstance(model.get("backbone"), str):
        arguments["backbone"] = model["backbone"]
    if "image_size" in arguments and arguments["image_size"] is None:
        arguments["image_size"] = (model.get("backbone_args") or {}).get("img_size")
    known = locate(data["class_path"])
    if not any(hasattr(known, name) for name in ("num_classes", "class_names")):
        return
    source: Any = data_module(data)
    try:
        names = getattr(source, "class_names", None)
    except FileNotFoundError:
        # They are in files that may still be downloaded.
        names = None
    count = getattr(source, "num_classes", None if names is None else len(names))
    if model.get("num_classes") is None:
        model["num_classes"] = count
    elif count is not None and model["num_classes"] < count:
        raise ValueError(f"model.num_classes is {model['num_classes']}, and the data has {count}: leave it out.")
    if model.get("class_names") is None and names is not None and len(names) == model["num_classes"]:
        model["class_names"] = list(names)


def samples_of(config: str, count: int) -> Samples:
    """Validation inputs of the data module that a config names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names no data module, or that has no validation data.
    """
    if count < 1:
        raise ValueError(f"samples must be at least 1, got {count}.")
    if not Path(config).is_file():
        raise FileNotFoundError(f"data={config} is no file: expected a YAML config, such as the run's config.yaml.")
    content = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
    chosen = content.get("data", content) if isinstance(content, dict) else {}
    if not isinstance(chosen, dict) or "class_path" not in chosen:
        raise ValueError(f"data={config} has neither 'data:' nor 'class_path:': expected the config of a run's data.")
    try:
        if isinstance(content.get("model"), dict):
            fill_in(content["model"], chosen)
        module = data_module(chosen)
    except Exception as error:
        raise ValueError(f"data={config}: {error}") from None
    module.prepare_data()
    module.setup("validate")
    return Samples((_inputs(module, count),))


def _inputs(module: LightningDataModule, count: int) -> Tensor:
    loader: Any = module.val_dataloader()
    found: list[Tensor] = []
    for batch in loader[0] if isinstance(loader, list | tuple) else loader:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(x, Tensor):
            raise ValueError(f"The data's batches begin with {type(x).__name__}: expected a tensor of inputs.")
        found.append(x)
        if sum(map(len, found)) >= count:
            break
    if not found:
        raise ValueError("The data has no validation batch: a verification needs some.")
    return torch.cat(found)[:count]
