"""Journeys through packages that others have published: trained, saved and loaded by their own means.

``python -m tests.published.packages NAME FOLDER`` loads what a journey has saved, in a process of its own, and writes
what it predicts.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

import cpq_lightning
from cpq_lightning import CPQCallback, CPQConfig


class Journey(NamedTuple):
    """What is done with one package.

    Attributes:
        package: What has to be installed.
        train: Given callbacks and a seed, the trained model.
        save: Writes a model, by the package's own means.
        load: Reads it again, by the package's own means.
        predict: What a model answers, as one tensor.
        error: How far it is off on what it has to do; lower is better.
    """

    package: str
    train: Callable[[list[Any], int], Any]
    save: Callable[[Any, Path], None]
    load: Callable[[Path], Any]
    predict: Callable[[Any], torch.Tensor]
    error: Callable[[Any], float]


def callbacks() -> list[Any]:
    return [CPQCallback(CPQConfig(weight_bits=8, act_bits=8), table=False, levels_file=None)]


QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


# darts -------------------------------------------------------------------------------------------------------------


def _series() -> Any:
    from darts import TimeSeries

    t = np.arange(400)
    noise = 0.02 * np.random.RandomState(0).randn(400)
    return TimeSeries.from_values((np.sin(t / 8) + 0.3 * np.sin(t / 3) + noise).astype("float32"))


def _forecaster(name: str) -> Journey:
    def made(held: list[Any], seed: int) -> Any:
        import darts.models

        arguments = {**QUIET, "callbacks": held, "logger": False}
        make = getattr(darts.models, name)
        return make(24, 12, n_epochs=12, random_state=seed, pl_trainer_kwargs=arguments)

    def train(held: list[Any], seed: int) -> Any:
        return made(held, seed).fit(_series()[:360])

    def load(path: Path) -> Any:
        return type(made([], 0)).load(str(path))

    def predict(model: Any) -> torch.Tensor:
        return torch.from_numpy(model.predict(12, series=_series()[:360]).values())

    def error(model: Any) -> float:
        return float((predict(model) - torch.from_numpy(_series()[360:372].values())).square().mean())

    return Journey("darts", train, lambda model, path: model.save(str(path)), load, predict, error)


# chemprop ----------------------------------------------------------------------------------------------------------


def _molecules() -> tuple[list[str], np.ndarray]:
    ends = ("O", "N", "C(=O)O", "c1ccccc1", "Cl", "F", "OC", "C#N")
    smiles = ["C" * length + end for length in range(1, 13) for end in ends]
    return smiles, np.array([[len(s) + 3.0 * s.count("O") - 2 * s.count("N")] for s in smiles])


def _dataset() -> Any:
    from chemprop import data

    return data.MoleculeDataset([data.MoleculeDatapoint.from_smi(s, y) for s, y in zip(*_molecules(), strict=True)])


def _train_mpnn(held: list[Any], seed: int) -> Any:
    import lightning.pytorch as pl
    from chemprop import data, models, nn

    pl.seed_everything(seed)
    molecules = _dataset()
    scale = nn.UnscaleTransform.from_standard_scaler(molecules.normalize_targets())
    head = nn.RegressionFFN(input_dim=64, output_transform=scale)
    model = models.MPNN(nn.BondMessagePassing(d_h=64, depth=2), nn.MeanAggregation(), head, batch_norm=True)
    trainer = pl.Trainer(max_epochs=30, logger=False, enable_checkpointing=False, callbacks=held, **QUIET)
    trainer.fit(model, data.build_dataloader(molecules, batch_size=32, shuffle=True))
    return model


def _predict_mpnn(model: Any) -> torch.Tensor:
    import lightning.pytorch as pl
    from chemprop import data

    trainer = pl.Trainer(logger=False, **QUIET)
    return torch.cat(trainer.predict(model, data.build_dataloader(_dataset(), shuffle=False, batch_size=32)))


def _save_mpnn(model: Any, path: Path) -> None:
    from chemprop.models import save_model

    save_model(path, model)


def _load_mpnn(path: Path) -> Any:
    from chemprop.models import load_model

    return load_model(path)


def _error_mpnn(model: Any) -> float:
    return float((_predict_mpnn(model).numpy() - _molecules()[1]).__pow__(2).mean())


# anomalib ----------------------------------------------------------------------------------------------------------


def _images() -> torch.Tensor:
    """Noise around grey, the last eight with a bright square."""
    images = 0.4 + 0.2 * torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[32:, :, 20:40, 20:40] = 1.0
    return images


def _folder(path: Path) -> Any:
    from anomalib.data import Folder
    from torchvision.utils import save_image

    for index, image in enumerate(_images()):
        target = path / ("good" if index < 32 else "bad") / f"{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_image(image, target)
    return Folder(
        name="squares", root=path, normal_dir="good", abnormal_dir="bad", train_batch_size=8, eval_batch_size=8,
        num_workers=0, seed=3, val_split_mode="same_as_test",
    )  # fmt: skip


def _detector(name: str, epochs: int, **arguments: Any) -> Journey:
    def made() -> Any:
        import anomalib.models

        return getattr(anomalib.models, name)(**arguments)

    def train(held: list[Any], seed: int) -> Any:
        from anomalib.engine import Engine

        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            model, data = made(), _folder(Path(folder) / "images")
            engine = Engine(accelerator="cpu", max_epochs=epochs, callbacks=held, default_root_dir=folder, logger=False)
            engine.fit(model=model, datamodule=data)
            engine.trainer.save_checkpoint(Path(folder) / "last.ckpt")
            model.saved = (Path(folder) / "last.ckpt").read_bytes()
        return model

    def save(model: Any, path: Path) -> None:
        path.write_bytes(model.saved)

    def load(path: Path) -> Any:
        return type(made()).load_from_checkpoint(path)

    @torch.no_grad()
    def predict(model: Any) -> torch.Tensor:
        answer = model.eval()(interpolate(_images()[::8], size=256))
        return torch.cat([part.flatten() for part in (answer.pred_score, answer.anomaly_map) if part is not None])

    @torch.no_grad()
    def error(model: Any) -> float:
        images = interpolate(_images()[24:], size=256)
        if name == "Ganomaly":
            # How far the generator is from giving back what is normal.
            real, fake, *_ = model.train().model(images[:8])
            model.eval()
            return float((real - fake).abs().mean())
        scores = model.eval()(images).pred_score.flatten()
        return float((scores[:8].max() >= scores[8:].min()).float())

    return Journey("anomalib", train, save, load, predict, error)


JOURNEYS = {
    "TCN": _forecaster("TCNModel"),
    "TSMixer": _forecaster("TSMixerModel"),
    "MPNN": Journey("chemprop", _train_mpnn, _save_mpnn, _load_mpnn, _predict_mpnn, _error_mpnn),
    "Padim": _detector("Padim", 1, backbone="resnet18", pre_trained=False, layers=["layer1", "layer2"]),
    "Ganomaly": _detector("Ganomaly", 6, batch_size=8, n_features=8, latent_vec_size=16, lr=0.002),
}


def main(name: str, folder: str) -> None:
    journey = JOURNEYS[name]
    with cpq_lightning.loading():
        model = journey.load(Path(folder) / "model")
    torch.save(journey.predict(model), Path(folder) / "predicted.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
