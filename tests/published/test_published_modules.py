"""LightningModules that others have published train quantized with a callback added and nothing else changed."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from cpq_lightning import CPQCallback, CPQConfig, attach, levels
from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.bitwidth.model_cost import learning_quantizers, mean_width
from cpq_lightning.callbacks import BitBudget, TemperatureSchedule
from cpq_lightning.nn.quantizer import Quantizer

pytestmark = pytest.mark.published

CLASSES = 3
TARGET = 4.0
CONFIGS = {
    "fixed": CPQConfig(weight_bits=4, act_bits=4),
    "learned": CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, act_bits=4),
}


def callbacks(mode, target=TARGET):
    """What is added to the Trainer, and all that is."""
    cpq = CPQCallback(CONFIGS[mode])
    return [cpq] if mode == "fixed" else [cpq, BitBudget(target=target), TemperatureSchedule()]


def published(name):
    """A module of a package of the extra; a package that is there but does not import is an error."""
    package = name.partition(".")[0]
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[published]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(name)


# Data --------------------------------------------------------------------------------------------------------------


class Samples(Dataset):
    """Dicts of tensors, as TorchGeo's data sets have them."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["image"])

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.columns.items()}


def scenes(count, size):
    """Noise with a bright square in one of three colours: images, their classes, masks and boxes."""
    images = torch.randn(count, 3, size, size) * 0.3
    labels = torch.arange(count) % CLASSES
    masks = torch.zeros(count, size, size, dtype=torch.int64)
    boxes = torch.empty(count, 1, 4)
    side = size // 2
    for index, label in enumerate(labels.tolist()):
        top, left = torch.randint(0, size - side, (2,)).tolist()
        images[index, label, top : top + side, left : left + side] += 2
        masks[index, top : top + side, left : left + side] = label
        boxes[index, 0] = torch.tensor([left, top, left + side, top + side])
    return images, labels, masks, boxes


def loaders(dataset, batch):
    return DataLoader(dataset, batch, shuffle=True), DataLoader(dataset, batch)


def pairs(count, size, batch):
    return loaders(TensorDataset(*scenes(count, size)[:2]), batch)


def labelled(count, size, batch):
    images, labels, _, _ = scenes(count, size)
    return loaders(Samples(image=images, label=labels), batch)


def masked(count, size, batch):
    images, _, masks, _ = scenes(count, size)
    return loaders(Samples(image=images, mask=masks), batch)


def boxed(count, size, batch):
    images, labels, _, boxes = scenes(count, size)
    return loaders(Samples(image=images, bbox_xyxy=boxes, label=labels[:, None] + 1), batch)


def unlabelled(count, size, batch):
    return loaders(Samples(image=scenes(count, size)[0]), batch)


def waves():
    """Four noisy sine waves of forty points each."""
    from pandas import DataFrame

    time, series = torch.arange(40).repeat(4), torch.arange(4).repeat_interleave(40)
    value = (time / 3 + series).sin() + 0.1 * torch.randn(160, generator=torch.Generator().manual_seed(4))
    frame = DataFrame({"time": time.numpy(), "series": series.numpy().astype(str), "value": value.numpy()})
    return published("pytorch_forecasting").TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=12,
        max_prediction_length=4,
        static_categoricals=["series"],
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
    )


def windows():
    dataset = waves()
    return tuple(dataset.to_dataloader(train=train, batch_size=16, num_workers=0) for train in (True, False))


# Modules -----------------------------------------------------------------------------------------------------------


def uncertainty_resnet():
    model = published("torch_uncertainty.models.classification").resnet(3, CLASSES, arch=20, style="cifar")
    return published("torch_uncertainty.routines").ClassificationRoutine(
        model,
        num_classes=CLASSES,
        loss=nn.CrossEntropyLoss(),
        optim_recipe=published("torch_uncertainty.optim_recipes").optim_cifar10_resnet18,
    )


def vision_transformer():
    return published("torchgeo.trainers").ClassificationTask("test_vit", num_classes=CLASSES)


def unet():
    return published("torchgeo.trainers").SemanticSegmentationTask(
        "unet", "tu-mobilenetv3_small_050", num_classes=CLASSES
    )


def fcos():
    pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install -e '.[published]'")
    return published("torchgeo.trainers").ObjectDetectionTask("fcos", "resnet18", num_classes=CLASSES + 1)


def moco_v2():
    return published("torchgeo.trainers").MoCoTask(
        "test_resnet",
        version=2,
        layers=2,
        hidden_dim=64,
        output_dim=32,
        lr=0.03,
        weight_decay=1e-4,
        temperature=0.07,
        memory_bank_size=64,
        size=32,
    )


def moco_v3():
    return published("torchgeo.trainers").MoCoTask(
        "test_resnet", version=3, hidden_dim=64, output_dim=32, lr=0.01, size=32
    )


def simclr():
    return published("torchgeo.trainers").SimCLRTask(
        "test_resnet", version=1, layers=2, hidden_dim=64, output_dim=32, lr=0.3, memory_bank_size=0, size=32
    )


def byol():
    return published("torchgeo.trainers").BYOLTask("test_resnet")


def temporal_fusion_transformer():
    return published("pytorch_forecasting").TemporalFusionTransformer.from_dataset(
        waves(),
        hidden_size=16,
        attention_head_size=2,
        hidden_continuous_size=8,
        learning_rate=0.01,
        log_interval=-1,
        loss=published("pytorch_forecasting.metrics").QuantileLoss(),
    )


@dataclass(frozen=True)
class Case:
    """A published module and data for it.

    ``still`` are layers whose weights the module itself freezes, ``unused`` those whose output its loss does not see.
    """

    make: Callable[[], pl.LightningModule]
    data: Callable[..., tuple[DataLoader, DataLoader]]
    sizes: tuple[int, ...]
    epochs: int
    still: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()


CASES = {
    "classifier": Case(uncertainty_resnet, pairs, (96, 16, 16), 14),
    "transformer": Case(vision_transformer, labelled, (32, 160, 8), 8),
    "segmentation": Case(unet, masked, (32, 32, 8), 8),
    "detection": Case(
        fcos,
        boxed,
        (2, 64, 2),
        2,
        still=frozenset(f"model.backbone.body.layer1.{block}.conv{conv}" for block in (0, 1) for conv in (1, 2)),
    ),
    "forecasting": Case(temporal_fusion_transformer, windows, (), 12),
    "moco_v2": Case(moco_v2, unlabelled, (64, 32, 16), 10),
    "moco_v3": Case(moco_v3, unlabelled, (64, 32, 16), 10),
    "simclr": Case(simclr, unlabelled, (64, 32, 16), 10),
    "byol": Case(byol, unlabelled, (8, 32, 2), 2, unused=frozenset({"model.backbone.model.fc"})),
}
# Twenty million weights at widths that are learned take minutes on one core.
RUNS = [(name, mode) for name in CASES for mode in CONFIGS if (name, mode) != ("detection", "learned")]


class Watch(pl.Callback):
    """What a run shows: its losses, rates, the quantizers that gradients reach, weights that calibration changed."""

    def __init__(self, module):
        self.before = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.calibrated_away = None
        self.losses = []
        self.rates = []
        self.reached = set()

    def on_fit_start(self, trainer, pl_module):
        now = dict(pl_module.named_parameters())
        self.calibrated_away = [name for name, value in self.before.items() if not torch.equal(value, now[name])]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {name: q.log_scale.grad for name, q in quantizers(pl_module)}
        self.reached |= {name for name, grad in gradients.items() if grad is not None and grad.any()}
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def train(name, mode, folder, target=TARGET, **settings):
    case = CASES[name]
    module = case.make()
    watch = Watch(module)
    trainer = pl.Trainer(
        max_epochs=case.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*callbacks(mode, target), watch],
        **settings,
    )
    trainer.fit(module, *case.data(*case.sizes))
    return module, trainer, watch


def begin(name, folder):
    """One step of quantized training."""
    return train(name, "fixed", folder, max_steps=1, limit_train_batches=1, limit_val_batches=1)


@torch.no_grad()
def evaluate(name, module):
    """What the module makes of a batch that it has not seen, in evaluation mode."""
    case = CASES[name]
    torch.manual_seed(5)
    batch = next(iter(case.data(*case.sizes)[1]))
    output = module.eval()(batch["image"] if isinstance(batch, dict) else batch[0])
    return output.prediction if hasattr(output, "prediction") else output


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_a_published_module_trains_quantized_and_its_checkpoint_loads(name, mode, tmp_path):
    case = CASES[name]
    module, trainer, watch = train(name, mode, tmp_path)

    assert len(watch.losses) == trainer.global_step > 0
    assert torch.tensor(watch.losses).isfinite().all()
    assert all(len(set(rates)) == 1 and rates[0] > 0 for rates in watch.rates)
    assert not [n for n, q in quantizers(module) if not (q.active and q.fitted)]
    # A range that was fitted anew behind the last step begins at 0, and keeps the noise that was learned.
    noise = Quantizer("weight", CPQConfig()).noise_logit.item()
    moved = {n for n, q in quantizers(module) if q.log_scale.any() or (q.noise_logit - noise).abs().max() > 1e-6}
    idle = {n.rpartition(".")[0] for n, _ in quantizers(module) if n not in moved | watch.reached}
    assert idle == case.unused
    weights = {n: layer.weight for n, layer in quantized_layers(module)}
    assert {n for n, weight in weights.items() if torch.equal(weight, watch.before[f"{n}.weight"])} == case.still

    records = levels(module)
    assert all(r.quantizing for r in records)
    assert all(1 < r.used_levels <= 2**r.bits for r in records if r.kind == "weight" and r.numel > 1)
    assert {r.bits for r in records if r.first_or_last} == {8}
    assert sum(r.first_or_last for r in records if r.kind == "weight") >= 2
    assert {r.bits for r in records if r.kind == "activation" and not r.first_or_last} == {4}
    widths = {r.bits for r in records if r.kind == "weight" and not r.first_or_last}
    if mode == "fixed":
        assert widths == {4}
    else:
        assert not learning_quantizers(module)
        assert widths <= set(range(2, 9))
        assert len(widths) > 1
        assert abs(mean_width(module, "weight") - TARGET) <= 0.1

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = attach(case.make(), CONFIGS[mode])
    # PyTorch Forecasting keeps objects of its own among the hyperparameters.
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=name != "forecasting")
    fresh.load_state_dict(checkpoint["state_dict"])
    state, loaded = module.state_dict(), fresh.state_dict()
    assert list(state) == list(loaded)
    assert not [key for key, value in state.items() if not torch.equal(value, loaded[key])]
    torch.testing.assert_close(evaluate(name, fresh), evaluate(name, module), rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_calibration_changes_no_weight_of_a_published_module(name, tmp_path):
    _, _, watch = begin(name, tmp_path)
    assert watch.calibrated_away == []


@pytest.mark.parametrize("name", ["simclr", "moco_v2", "byol"])
def test_augmentation_within_the_step_does_not_multiply_what_layers_compute(name, tmp_path):
    module, _, _ = begin(name, tmp_path)
    first = next(layer for _, layer in quantized_layers(module))
    side = 112 if name == "byol" else 16
    assert first.weight_quantizer.macs == first.weight.numel() * side**2


@pytest.mark.parametrize("name", ["simclr", "moco_v3", "byol"])
def test_augmentation_within_the_step_is_not_reported_as_unquantized(name, tmp_path, recwarn):
    begin(name, tmp_path)
    assert not [str(w.message) for w in recwarn if "unquantized" in str(w.message)]


def test_levels_measure_no_activation_where_validation_runs_no_forward(tmp_path):
    module, _, _ = begin("simclr", tmp_path)
    records = [r for r in levels(module) if r.kind == "activation"]
    assert {(r.used_levels, r.relative_error) for r in records} == {(None, None)}


@pytest.mark.parametrize(("name", "head"), [("moco_v2", "projection_head"), ("moco_v3", "prediction_head")])
def test_the_last_layer_that_trains_is_exempt_although_a_teacher_runs_behind_it(name, head, tmp_path):
    module, _, _ = begin(name, tmp_path)
    last = list(quantized_layers(getattr(module, head)))[-1][1]
    assert last.weight_quantizer.first_or_last


@pytest.mark.parametrize("target", [3.5, TARGET])
def test_a_teacher_takes_no_bits_from_the_network_that_trains_and_leaves_it_none(target, tmp_path):
    module, _, _ = train("moco_v2", "learned", tmp_path, target)
    student = nn.ModuleList([module.backbone, module.projection_head])
    teacher = nn.ModuleList([module.backbone_momentum, module.projection_head_momentum])
    # One bit of the largest layer is a third of either's mean.
    assert abs(mean_width(student, "weight") - target) <= 0.05
    assert abs(mean_width(teacher, "weight") - target) <= 0.15
