"""The command ``cpq export``."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule
from rich.console import Console
from torch import nn

from cpq_lightning.attach.calls import as_batch_call
from cpq_lightning.attach.range_tracking import refit_rewritten
from cpq_lightning.checkpoint import CHECKPOINT_KEY, load_checkpoint, named_backbone
from cpq_lightning.export.export import export_model
from cpq_lightning.export.formats import Container, Format
from cpq_lightning.export.sample_file import SAMPLES_FILE, read_samples
from cpq_lightning.export.samples import Samples
from cpq_lightning.export.table import export_table
from cpq_lightning.module import QuantizedModule
from cpq_lightning.trainer.module_parts import exported_architecture, exported_name, exported_part

# Files in the folder of a run, but not in the folder of its checkpoints or in a folder of several runs.
_RUN_FILES = ("config.yaml", "hparams.yaml", "levels.json")
# Folders above that of a checkpoint: a logger may keep checkpoints in project/run/checkpoints of the run's folder.
_MAX_PARENTS = 3


def export(
    ckpt: str,
    format: Format = "packed",
    out: str = ".",
    module: str | None = None,
    module_args: dict[str, Any] | None = None,
    container: Container = "int8",
    samples: str | None = None,
    data: str | None = None,
    data_samples: int = 512,
    verify: bool = True,
) -> None:
    """Write the model of a checkpoint as one file, and verify the file against the model.

    Args:
        ckpt: Checkpoint of a run, such as last.ckpt.
        format: packed (safetensors, integer codes at the width of each weight), onnx, or torch (a torch.export
            program).
        out: Folder for the file, which is named after the model.
        module: Class of the LightningModule in the checkpoint, such as mypackage.Net; by default QuantizedModule.
        module_args: Arguments of that class that are not among the hyperparameters in the checkpoint.
        container: For onnx: int8 runs on the integer kernels of ONNX Runtime, int4 is the smaller file.
        samples: File with samples of the input, to trace and verify with; by default samples.safetensors in the run's
            folder, found from the checkpoint.
        data: Config with the run's data (its config.yaml, or class_path and init_args alone), for verification on
            more samples: batches of its validation data.
        data_samples: Number of samples to take from data.
        verify: Whether to load the file in the runtime of its format and compare it with the model.
    """
    try:
        if samples is not None and data is not None:
            raise ValueError(f"samples={samples} and data={data} both give samples of the input: leave one out.")
        if not Path(ckpt).is_file():
            raise FileNotFoundError(f"ckpt={ckpt} is no file: expected a checkpoint, such as last.ckpt.")
        trained = load_module(ckpt) if module is None else load_with_class(ckpt, module, module_args or {})
        # The last steps of training may have moved weights beyond their ranges.
        refit_rewritten(trained)
        network, name = exported_part(trained), exported_name(trained)
        if samples is None and data is None and format == "packed" and not verify:
            # This export traces and compares nothing, so it never uses the input.
            chosen = Samples.synthetic([[1]], 1)
        else:
            chosen, source = _choose_samples(network, ckpt, samples, data, data_samples)
            _check_fit(network, chosen, source, name)
            Console().print(f"Samples of the input: {len(chosen)}, of {source}", soft_wrap=True, highlight=False)
        written = export_model(
            network,
            out,
            format=format,
            samples=chosen,
            name=name,
            container=container,
            architecture=exported_architecture(trained),
            verify=verify,
            latency=True,
        )
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"cpq export: {error}") from None
    Console().print(export_table(written), soft_wrap=True)


def load_module(path: str) -> QuantizedModule:
    """Load the module of a checkpoint; only tensors and plain values are unpickled.

    Raises:
        ValueError: the file is no checkpoint of a QuantizedModule with a named backbone.
    """
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"ckpt={path} is no checkpoint that can be read without unpickling code ({type(error).__name__}). Expected "
            "a checkpoint that a run of QuantizedModule has saved."
        ) from None
    settings = named_backbone(content)
    if settings is None:
        raise ValueError(
            f"ckpt={path} is no checkpoint of a QuantizedModule with a named backbone. For another LightningModule "
            "give its class: --module mypackage.Net. For a QuantizedModule around an nn.Module give that network: "
            '--module cpq_lightning.QuantizedModule --module_args \'{"backbone": {"class_path": "mypackage.Net"}}\'.'
        )
    if settings.get("quantization") is None:
        raise ValueError(f"ckpt={path} is of a run in full precision (quantization: null): none of it is quantized.")
    return QuantizedModule.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()


def load_with_class(path: str, class_path: str, arguments: dict[str, Any]) -> LightningModule:
    """Load the module of a checkpoint, given its class path; only tensors and plain values are unpickled.

    Raises:
        ValueError: there is no such class, the class cannot be built, or the checkpoint is of another class.
    """
    # The installed command does not have the working directory in sys.path, as "python -m" does.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module_class: Any = locate(class_path)
    except ErrorDuringImport as error:
        raise ValueError(f"module={class_path} cannot be imported: {error}.") from None
    if not hasattr(module_class, "load_from_checkpoint"):
        problem = "cannot be found" if module_class is None else f"is {module_class!r}"
        raise ValueError(
            f"module={class_path} {problem}: expected the dotted path of a LightningModule's class, such as "
            "mypackage.Net."
        )
    try:
        objects = {name: _instantiated(value) for name, value in arguments.items()}
        return load_checkpoint(module_class, path, map_location="cpu", weights_only=True, **objects).eval()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"ckpt={path} cannot be read without unpickling code ({str(error).splitlines()[0]}). If you trust the "
            "file, use cpq_lightning.load_checkpoint(Net, path, weights_only=False) and export_model."
        ) from None
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"module={class_path} cannot be built as in training: {error}. Give its arguments with --module_args, such "
            "as '{\"width\": 32}', or call save_hyperparameters() in its __init__."
        ) from None


def _instantiated(value: Any) -> Any:
    """An argument of a module: the object that ``class_path`` and ``init_args`` describe, else the value itself."""
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    kind = locate(value["class_path"])
    if not isinstance(kind, type):
        raise TypeError(f"{value['class_path']!r} is no class that can be found")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "value")
    return _instantiate(parser, {"value": value})["value"]


def _instantiate(parser: ArgumentParser, settings: dict[str, Any]) -> Any:
    # jsonargparse names it instantiate_classes up to 4.47, instantiate later.
    instantiate: Any = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(parser.parse_object(settings))


def _choose_samples(
    network: nn.Module, ckpt: str, samples: str | None, data: str | None, count: int
) -> tuple[Samples, str]:
    """The samples, given or from the run's folder, and a description of their source."""
    if data is not None:
        return samples_of(network, data, count), f"data={data}"
    if samples is None:
        samples = str(find_samples(ckpt, _folder_of(ckpt)))
    return read_samples(samples), f"samples={samples}"


def _folder_of(ckpt: str) -> str | None:
    """The last two parts of the path of the run's folder, as the checkpoint records them; ``None`` if it does not."""
    try:
        content = torch.load(ckpt, map_location="meta", weights_only=True)
        return content[CHECKPOINT_KEY]["folder"]
    except (KeyError, TypeError, pickle.UnpicklingError):
        return None


def find_samples(ckpt: str, run: str | None = None) -> Path:
    """Find the file of samples in the folder of the run that saved a checkpoint.

    The search starts in the checkpoint's folder and goes up, by three folders at most, until a folder has a file that
    marks it as a run's. In each of these folders the relative path ``run`` is tried too, for runs without a logger.

    Raises:
        FileNotFoundError: there is no such file; the message says what to give instead.
    """
    folder = Path(os.path.abspath(ckpt)).parent
    searched = []
    for above in (folder, *folder.parents)[: 1 + _MAX_PARENTS]:
        # Absolute if the checkpoint's path is, else relative.
        candidate = above if Path(ckpt).is_absolute() else Path(os.path.relpath(above))
        for place in (candidate, *([] if run is None else [candidate / run])):
            if (place / SAMPLES_FILE).is_file():
                return place / SAMPLES_FILE
        searched.append(str(candidate))
        if any((candidate / name).is_file() for name in _RUN_FILES):
            break
    raise FileNotFoundError(
        f"ckpt={ckpt} comes without samples of its input, which an export needs for tracing and verification: there is "
        f"no {SAMPLES_FILE} in {', '.join(searched)}. A run writes this file to its folder, unless its CPQCallback has "
        f"samples=0 or writes no files. Give --samples FILE ({SAMPLES_FILE} of this run, or a file of "
        "cpq_lightning.export.write_samples), or --data CONFIG (the run's config.yaml) for batches of its data module. "
        "A packed file can also be written without samples and verification: --verify false."
    )


@torch.no_grad()
def _check_fit(network: nn.Module, samples: Samples, source: str, name: str) -> None:
    args, kwargs = samples.pair().call()
    try:
        network(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape[1:])) for t in samples.inputs)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{source} does not fit the model {name}, whose forward fails on a batch of it: {reason}. Each sample has "
            f"the shape {shapes}: expected samples of the data that the model was trained on."
        ) from None


def data_module(settings: Any) -> LightningDataModule:
    """The data module that settings of ``class_path`` and ``init_args`` describe."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return _instantiate(parser, {"data": settings})["data"]


def fill_in(model: Any, data: Any) -> None:
    """Fill in open settings of a QuantizedModule from those of its data, and the other way round, in place.

    A data module with an open ``backbone`` and ``image_size`` gets the model's. The model gets ``num_classes`` and
    ``class_names`` of a data module that has them.

    Raises:
        ValueError: the model has fewer classes than the data.
    """
    arguments = data.get("init_args") or {}
    if "backbone" in arguments and arguments["backbone"] is None and isinstance(model.get("backbone"), str):
        arguments["backbone"] = model["backbone"]
    if "image_size" in arguments and arguments["image_size"] is None:
        arguments["image_size"] = (model.get("backbone_args") or {}).get("img_size")
    data_class = locate(data["class_path"])
    if not any(hasattr(data_class, name) for name in ("num_classes", "class_names")):
        return
    source: Any = data_module(data)
    try:
        names = getattr(source, "class_names", None)
    except FileNotFoundError:
        # The names are in files that may not be downloaded yet.
        names = None
    count = getattr(source, "num_classes", None if names is None else len(names))
    if model.get("num_classes") is None:
        model["num_classes"] = count
    elif count is not None and model["num_classes"] < count:
        raise ValueError(
            f"model.num_classes is {model['num_classes']}, and the data has {count} classes: leave num_classes out."
        )
    if model.get("class_names") is None and names is not None and len(names) == model["num_classes"]:
        model["class_names"] = list(names)


def samples_of(network: nn.Module, config: str, count: int) -> Samples:
    """Validation inputs of the data module in a config file, in the form in which calibration passes them to a network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the config names no data module, or the data module has no validation data.
    """
    if count < 1:
        raise ValueError(f"data_samples must be at least 1, got {count}.")
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
    loader: Any = module.val_dataloader()
    batches: list[Samples] = []
    for batch in loader[0] if isinstance(loader, list | tuple) else loader:
        args, kwargs = as_batch_call(network, batch)
        batches.append(Samples.called_with(*args, **kwargs))
        if sum(map(len, batches)) >= count:
            break
    if not batches:
        raise ValueError("The data has no validation batch: the verification needs at least one.")
    return Samples.joined(batches).first(count)
