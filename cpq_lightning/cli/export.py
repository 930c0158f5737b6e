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
from cpq_lightning.checkpoint import CHECKPOINT_KEY, load_checkpoint
from cpq_lightning.export.export import export_model
from cpq_lightning.export.formats import Container, Format
from cpq_lightning.export.sample_file import SAMPLES_FILE, read_samples
from cpq_lightning.export.samples import Samples
from cpq_lightning.export.table import export_table
from cpq_lightning.module import QuantizedModule
from cpq_lightning.trainer.module_parts import exported_architecture, exported_name, exported_part

# What lies in a run's own folder, and neither in that of its checkpoints nor in one of many runs.
_RUN_FILES = ("config.yaml", "hparams.yaml", "levels.json")
# Folders above that of a checkpoint: a logger may keep checkpoints in project/run/checkpoints of the run's folder.
_MOST_PARENTS = 3


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
    """Write the model of a checkpoint as one file, and prove that it is that model.

    Args:
        ckpt: Checkpoint of a run, such as last.ckpt.
        format: packed (safetensors, each weight's codes at its own width), onnx, or torch (a torch.export program).
        out: Folder for the file, which is named after the model.
        module: Class of the LightningModule in the checkpoint, as mypackage.Net; by default QuantizedModule.
        module_args: Arguments of that class that the checkpoint does not have among its hyperparameters.
        container: Of onnx: int8 runs as integer kernels on ONNX Runtime, int4 is the smaller file.
        samples: File with samples of the input, to trace and verify with; by default samples.safetensors in the run's
            folder, found from the checkpoint.
        data: Config with the run's data (its config.yaml, or class_path and init_args alone), for verification on
            more samples: batches of its validation data.
        data_samples: How many samples of it.
        verify: Whether to load the file in its own runtime and compare it with the model.
    """
    try:
        if samples is not None and data is not None:
            raise ValueError(f"samples={samples} and data={data} both give samples of the input: leave one out.")
        trained = load_module(ckpt) if module is None else load_own(ckpt, module, module_args or {})
        # The training may have ended behind steps that have outgrown its ranges.
        refit_rewritten(trained)
        network, name = exported_part(trained), exported_name(trained)
        if samples is None and data is None and format == "packed" and not verify:
            # Nothing is traced and nothing compared: nothing of the input is looked at.
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
            f"ckpt={path} is no checkpoint of a QuantizedModule with a named backbone. For a module of your own give "
            "its class: --module mypackage.Net. For a QuantizedModule around a network of your own give that: --module "
            'cpq_lightning.QuantizedModule --module_args \'{"backbone": {"class_path": "mypackage.Net"}}\'.'
        )
    if settings.get("quantization") is None:
        raise ValueError(f"ckpt={path} is of a run in full precision (quantization: null): nothing in it is quantized.")
    return QuantizedModule.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()


def load_own(path: str, class_path: str, arguments: dict[str, Any]) -> LightningModule:
    """The module of a checkpoint by its class path, nothing in the file unpickled but tensors and plain values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such class, it cannot be built, or the checkpoint is not of it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"ckpt={path} is no file: expected a checkpoint, such as last.ckpt.")
    # A script that is run finds modules beside it; the installed command would not.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = locate(class_path)
    except ErrorDuringImport as error:
        raise ValueError(f"module={class_path} cannot be imported: {error}.") from None
    if not hasattr(found, "load_from_checkpoint"):
        raise ValueError(
            f"module={class_path} is {'nothing that can be found' if found is None else repr(found)}: expected the "
            "dotted path of a LightningModule's class, such as mypackage.Net."
        )
    try:
        built = {name: _instantiated(value) for name, value in arguments.items()}
        return load_checkpoint(found, path, map_location="cpu", weights_only=True, **built).eval()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"ckpt={path} cannot be read without unpickling code ({str(error).splitlines()[0]}). Use "
            "cpq_lightning.load_checkpoint(Net, path, weights_only=False), if you trust it, and export_model."
        ) from None
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"module={class_path} cannot be built as it was: {error}. Give its arguments with --module_args, as "
            "'{\"width\": 32}', or call save_hyperparameters() in its __init__."
        ) from None


def _instantiated(value: Any) -> Any:
    """An argument of a module: the object that a ``class_path`` and ``init_args`` describe, else the value itself."""
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    kind = locate(value["class_path"])
    if not isinstance(kind, type):
        raise TypeError(f"{value['class_path']!r} is no class that can be found")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "value")
    return _instantiate(parser, {"value": value})["value"]


def _instantiate(parser: ArgumentParser, settings: dict[str, Any]) -> Any:
    # Its name in jsonargparse up to 4.47, and beyond.
    instantiate: Any = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(parser.parse_object(settings))


def _choose_samples(
    network: nn.Module, ckpt: str, samples: str | None, data: str | None, count: int
) -> tuple[Samples, str]:
    """Samples, and where they are from: as given, or of the run."""
    if data is not None:
        return samples_of(network, data, count), f"data={data}"
    if samples is None:
        samples = str(find_samples(ckpt, _folder_of(ckpt)))
    return read_samples(samples), f"samples={samples}"


def _folder_of(ckpt: str) -> str | None:
    """The folder of the run that has saved a checkpoint, by its name beside what holds the checkpoints."""
    try:
        content = torch.load(ckpt, map_location="meta", weights_only=True)
        return content[CHECKPOINT_KEY]["folder"]
    except (KeyError, TypeError, pickle.UnpicklingError):
        return None


def find_samples(ckpt: str, run: str | None = None) -> Path:
    """The file of samples in the folder of the run that has saved a checkpoint.

    It is looked for in the checkpoint's folder and in those above, up to the run's: the first with a file that every
    run's folder has, and three folders at most; in each also under the name of ``run``, as of one without a logger.

    Raises:
        FileNotFoundError: there is none; with what to give instead.
    """
    folder = Path(os.path.abspath(ckpt)).parent
    seen = []
    for above in (folder, *folder.parents)[: 1 + _MOST_PARENTS]:
        # Named as the checkpoint is.
        candidate = above if Path(ckpt).is_absolute() else Path(os.path.relpath(above))
        for place in (candidate, *([] if run is None else [candidate / run])):
            if (place / SAMPLES_FILE).is_file():
                return place / SAMPLES_FILE
        seen.append(str(candidate))
        if any((candidate / name).is_file() for name in _RUN_FILES):
            break
    raise FileNotFoundError(
        f"ckpt={ckpt} comes without samples of its input, which an export is traced and verified with: there is no "
        f"{SAMPLES_FILE} in {', '.join(seen)}. A run leaves it in its folder, unless its CPQCallback has samples=0 or "
        f"writes no files. Give --samples FILE ({SAMPLES_FILE} of this run, or one of "
        "cpq_lightning.export.write_samples), or --data CONFIG (the run's config.yaml) for batches of its data module. "
        "A packed file can be written with neither, unverified: --verify false."
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
            f"{source} does not fit the model {name}, whose forward refuses a batch of it: {reason}. Each sample has "
            f"the shape {shapes}: expected samples of the data that the model was trained on."
        ) from None


def data_module(settings: Any) -> LightningDataModule:
    """The data module that settings of ``class_path`` and ``init_args`` describe."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return _instantiate(parser, {"data": settings})["data"]


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


def samples_of(network: nn.Module, config: str, count: int) -> Samples:
    """Validation inputs of the data module that a config names, as calibration hands them to a network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names no data module, or that has no validation data.
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
    found: list[Samples] = []
    for batch in loader[0] if isinstance(loader, list | tuple) else loader:
        args, kwargs = as_batch_call(network, batch)
        found.append(Samples.called_with(*args, **kwargs))
        if sum(map(len, found)) >= count:
            break
    if not found:
        raise ValueError("The data has no validation batch: a verification needs some.")
    return Samples.joined(found).first(count)
