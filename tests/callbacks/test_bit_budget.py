"""BitBudget: widths that training decides, under a budget."""

import csv
import itertools
import json
import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from cpq_lightning import CPQCallback, CPQConfig, levels
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.bitwidth.model_cost import learning_quantizers, mean_width, model_costs
from cpq_lightning.callbacks import BitBudget
from cpq_lightning.export.sample_file import SAMPLES_FILE
from tests.marks import thorough
from tests.models import IMAGES, LABELS, Classifier, data, with_own_forward

LEARN = {"weight_bits": 8, "min_bits": 2, "learn_bits": True, "act_bits": 4}


class Deep(Classifier):
    """Six learned layers of unequal sizes, and the two ends."""

    def __init__(self, **settings):
        super().__init__(**settings)
        widths = [6, 8, 12, 6, 16, 10, 8]
        layers = [nn.Conv2d(3, widths[0], 3, stride=2, padding=1), nn.ReLU()]
        for a, b in itertools.pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


def callbacks(target=3.0, config=None, quantize_from=0, **settings):
    cpq = CPQCallback(CPQConfig(**(LEARN | (config or {}))), table=False, levels_file=None, quantize_from=quantize_from)
    return [cpq, BitBudget(target, **settings)]


def learn(fit, module, callbacks, **settings):
    """A fit of 32 steps without validation, whose first half decides the widths."""
    return fit(module, callbacks, **({"max_epochs": 8, "limit_val_batches": 0} | settings))


def just_below(value, target, by=0.05):
    """Whether a cost is at most its target, and not far below it."""
    return target - by <= value <= target * (1 + 1e-9)


class Watch(pl.Callback):
    """Expected and decided bits before each batch, and whether widths were still learned."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        costs = model_costs(pl_module)
        learning = bool(learning_quantizers(pl_module))
        self.seen.append((learning, costs["expected_weight_bits"], costs["weight_bits"]))


@pytest.mark.parametrize("target", [3.4, *thorough(2.4, 4.5)])
def test_the_run_ends_at_the_target_and_the_freeze_changes_nothing(fit, target):
    module, watch = Deep(), Watch()
    learn(fit, module, [*callbacks(target), watch])
    assert just_below(mean_width(module, "weight"), target)
    frozen = [learning for learning, *_ in watch.seen].index(False)
    assert frozen == 16
    _, expected, decided = watch.seen[frozen - 1]
    assert abs(expected - decided) < 0.1
    assert decided == watch.seen[frozen][2] == watch.seen[-1][2]
    assert len({q.bits for _, q in quantizers(module) if q.kind == "weight"}) > 2


@pytest.mark.parametrize("begin", [0.5, *thorough(16)])
def test_widths_are_fixed_halfway_from_the_first_quantized_step(fit, begin):
    module, watch = Deep(), Watch()
    learn(fit, module, [*callbacks(4.0, quantize_from=begin), watch])
    assert [learning for learning, *_ in watch.seen].index(False, 16) == 24


class Small(Deep):
    """The same for digits of 8 x 8 pixels."""

    def __init__(self):
        super().__init__(make_optimizer=partial(torch.optim.AdamW, lr=3e-3))
        self.net[0] = nn.Conv2d(1, 6, 3, padding=1)
        self.net[-1] = nn.Linear(8, 10)


class AroundTheFreeze(pl.Callback):
    """Validation accuracy in the moment before widths are fixed, or after: by its place in the list of callbacks."""

    def __init__(self, freeze):
        self.freeze, self.accuracy = freeze, 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.freeze:
            pl_module.eval()
            images, labels = next(iter(trainer.datamodule.val_dataloader()))
            with torch.no_grad():
                self.accuracy = (pl_module.net(images).argmax(1) == labels).float().mean().item()
            pl_module.train()


@pytest.mark.thorough
def test_the_freeze_costs_less_than_a_point_of_accuracy(tmp_path):
    from cpq_lightning.data import DigitsDataModule

    module, before, after = Small(), AroundTheFreeze(300), AroundTheFreeze(300)
    trainer = pl.Trainer(
        max_steps=310, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[before, *callbacks(3.0, freeze=300), after], default_root_dir=tmp_path,
        limit_val_batches=0,
    )  # fmt: skip
    data = DigitsDataModule(batch_size=64, image_size=8)
    trainer.fit(module, datamodule=DigitsVal(data))
    assert not learning_quantizers(module)
    # Far over chance, so that there is accuracy to lose.
    assert before.accuracy > 0.8
    assert after.accuracy >= before.accuracy - 0.01


class DigitsVal(pl.LightningDataModule):
    """Digits with all validation images in one batch."""

    def __init__(self, digits):
        super().__init__()
        self.digits = digits

    def setup(self, stage):
        self.digits.setup(stage)

    def train_dataloader(self):
        return self.digits.train_dataloader()

    def val_dataloader(self):
        return DataLoader(self.digits.val_data, 360)


def test_bit_operations_end_below_their_target_by_little(fit):
    widest = Deep()
    fit(widest, [CPQCallback(CPQConfig(weight_bits=8, act_bits=4), table=False, levels_file=None)], max_epochs=1)
    target = round(0.55 * model_costs(widest)["bops"])
    module = Deep()
    learn(fit, module, callbacks(target, unit="bops"))
    assert just_below(model_costs(module)["bops"], target, 0.02 * target)


@pytest.mark.parametrize("gates", ["tensor", *thorough("channel")])
def test_bytes_are_those_of_the_file_that_is_written_and_no_more_than_the_target(fit, gates, tmp_path):
    module, target = Deep(), 6_500
    cpq, budget = callbacks(target, {"gate_sharing": gates}, unit="bytes")
    cpq.export, cpq.levels_file = ("packed",), "levels.json"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could not be written.*")
        fit(module, [cpq, budget], max_epochs=8)
    assert not learning_quantizers(module)
    (path,) = (path for path in tmp_path.rglob("*.safetensors") if path.name != SAMPLES_FILE)
    size = path.stat().st_size
    assert just_below(size, target, 0.015 * target)
    (levels_file,) = tmp_path.rglob("levels.json")
    assert json.loads(levels_file.read_text())["totals"]["size_bytes"] == size


def test_activations_learn_their_bits_too(fit):
    module = Deep()
    config = {"act_bits": 8, "learn_act_bits": True}
    learn(fit, module, callbacks(3.5, config, act_target=4.0))
    assert just_below(mean_width(module, "weight"), 3.5)
    assert just_below(mean_width(module, "activation"), 4.0)
    # Bit operations count both together.
    module = Deep()
    learn(fit, module, callbacks(3e6, config, unit="bops"))
    assert just_below(model_costs(module)["bops"], 3e6, 6e4)
    assert mean_width(module, "activation") < 7


def test_channels_learn_widths_of_their_own(fit):
    module = Deep()
    learn(fit, module, callbacks(3.0, {"gate_sharing": "channel", "per_channel": True}))
    assert just_below(mean_width(module, "weight"), 3.0)
    records = [r for r in levels(module) if r.kind == "weight" and not r.first_or_last]
    assert any(isinstance(r.bits, list) and len(set(r.bits)) > 1 for r in records)
    copy = Deep()
    fit(copy, callbacks(3.0, {"gate_sharing": "channel", "per_channel": True}), max_epochs=1)
    copy.load_state_dict(module.state_dict())
    assert torch.equal(copy.net.eval()(IMAGES), module.net.eval()(IMAGES))


class Student(pl.LightningModule):
    """Learns what a teacher does; one of the teacher's layers has 6-bit weights, the others have 2-bit weights."""

    def __init__(self, wide, layers=5, size=24):
        super().__init__()
        linears = [nn.Linear(size, size, bias=False) for _ in range(layers)]
        for index, linear in enumerate(linears):
            half = 2 ** (6 if index == wide else 2) // 2
            codes = torch.randint(-half, half, (size, size)).float()
            linear.weight.data = codes / (codes.square().mean() * size).sqrt()
        parts = [part for linear in linears for part in (linear, nn.ReLU())][:-1]
        self.net = nn.Sequential(*parts)
        with torch.no_grad():
            inputs = torch.randn(2048, size)
            outputs = self.net(inputs)
            # What nothing explains: without it no gradient tells anything of a network that starts as its teacher.
            self.pairs = TensorDataset(inputs, outputs + 0.1 * outputs.std() * torch.randn_like(outputs))

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def train_dataloader(self):
        return DataLoader(self.pairs, 64, shuffle=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("wide", [2, *thorough(0, 3)])
@pytest.mark.parametrize("estimator", ["curvature", *thorough("concrete")])
def test_one_layer_that_needs_six_bits_gets_them_and_the_others_two(tmp_path, wide, estimator):
    torch.manual_seed(wide)
    module = Student(wide)
    config = {"act_bits": None, "first_last_bits": None, "gate_estimator": estimator}
    trainer = pl.Trainer(
        max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks((6 + 4 * 2) / 5, config, freeze=0.8),
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module)
    # The last of the bits is worth a thousandth of the first: no more than where training has left the other weights.
    off = [abs(r.bits - (6 if index == wide else 2)) for index, r in enumerate(levels(module))]
    assert sum(off) <= (2 if estimator == "curvature" else 0)
    assert max(off) <= 1


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.AdamW, lr=1e-3)])
def test_the_rate_of_the_widths_is_their_own_whatever_trains_the_weights(fit, make):
    module = Deep(make_optimizer=make)
    learn(fit, module, callbacks(3.0))
    assert just_below(mean_width(module, "weight"), 3.0)
    held = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert not any(id(q.gates.logit) in held for _, q in quantizers(module) if q.gates.logit is not None)


def test_clipping_sees_the_same_weight_gradients_with_and_without_the_penalty(fit):
    class Norms(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            self.seen.append(torch.stack([g.norm() for g in grads if g is not None]).norm().item())

    seen = []
    for target in (3.0, 6.9):
        torch.manual_seed(0)
        module, norms = Deep(), Norms()
        loaders = (data(shuffle=False), data(shuffle=False))
        fit(module, [*callbacks(target), norms], max_steps=1, loaders=loaders, gradient_clip_val=0.1)
        seen.append(norms.seen)
        assert any(q.gates.logit is not None for _, q in quantizers(module))
    assert seen[0] == seen[1]


@pytest.mark.thorough
def test_a_resumed_run_decides_and_ends_as_the_uninterrupted_one(fit, tmp_path):
    states, changes = [], []
    for stop in (None, 2, 6):
        torch.manual_seed(0)
        loaders = (data(shuffle=False), data(shuffle=False))
        module, both = Deep(), callbacks(3.0)
        saver = ModelCheckpoint(tmp_path / str(stop), every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        settings = {"loaders": loaders, "max_epochs": 8, "enable_checkpointing": True}
        fit(module, [*both, saver], **settings)
        if stop is not None:
            module, both = Deep(), callbacks(3.0)
            path = next((tmp_path / str(stop)).glob(f"epoch={stop}*.ckpt"))
            fit(module, both, ckpt_path=path, loaders=loaders, max_epochs=8)
        states.append(module.state_dict())
        changes.append(both[1].changes)
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())
    assert changes[0] == changes[1] == changes[2]


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_accumulation_and_bfloat16_arrive_too(fit, settings):
    module = Deep()
    learn(fit, module, callbacks(3.0), **settings)
    assert just_below(mean_width(module, "weight"), 3.0)
    assert all(p.isfinite().all() for p in module.parameters())


class Manual(Deep):
    """Manual optimization with an optimizer for each half."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.net(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        parameters = list(self.net.parameters())
        half = len(parameters) // 2
        return [torch.optim.SGD(parameters[:half], lr=0.05), torch.optim.AdamW(parameters[half:], lr=1e-3)]


def test_manual_optimization_with_two_optimizers_arrives_too(fit):
    module = Manual()
    learn(fit, module, callbacks(3.0))
    assert just_below(mean_width(module, "weight"), 3.0)


def test_a_full_precision_start_comes_first(fit):
    module, watch = Deep(), Watch()
    learn(fit, module, [*callbacks(3.0, quantize_from=0.25), watch])
    assert just_below(mean_width(module, "weight"), 3.0)


def test_a_run_that_ends_early_fixes_its_widths(fit):
    module = Deep()
    with pytest.warns(UserWarning, match="before the freeze"):
        fit(module, callbacks(3.0, freeze=10_000), max_epochs=3)
    assert not learning_quantizers(module)
    assert just_below(mean_width(module, "weight"), 3.0)


@pytest.mark.parametrize(
    ("target", "settings", "words"),
    [
        (1.5, {}, r"1\.5 average bits of the weights is out of reach.* allow 2 to 8"),
        (9.0, {}, r"allow 2 to 8"),
        (10, {"unit": "bytes"}, r"10 bytes of the packed file is out of reach"),
        (3.0, {"freeze": 0}, "later freeze"),
        (3.0, {"quantize_from": 10_000}, "earlier quantize_from"),
        (3.0, {"config": {"learn_bits": False}}, "nothing to learn"),
        (9999, {"unit": "bytes", "config": {"act_bits": 8, "learn_act_bits": True}}, "act_target"),
    ],
)
def test_what_cannot_be_is_refused_before_training(fit, target, settings, words):
    module = Deep()
    before = {name: p.clone() for name, p in module.named_parameters()}
    with pytest.raises(MisconfigurationException, match=words):
        fit(module, callbacks(target, **settings))
    assert all(torch.equal(p, dict(module.named_parameters())[name]) for name, p in before.items())


def test_widths_that_nobody_trains_are_refused(fit):
    with pytest.raises(MisconfigurationException, match="add a BitBudget"):
        fit(Deep(), callbacks()[:1])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"target": 0}, ValueError),
        ({"target": True}, ValueError),
        ({"target": 3.0, "unit": "kB"}, ValueError),
        ({"target": 3.0, "unit": "bops", "act_target": 3.0}, ValueError),
        ({"target": 3.0, "act_target": -1}, ValueError),
        ({"target": 3.0, "freeze": 1.5}, ValueError),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, error):
    with pytest.raises(error):
        BitBudget(**arguments)


@pytest.mark.pictures
def test_what_is_logged_and_left_behind(fit, cpq, tmp_path):
    module = Deep()
    own, budget = callbacks(3.0)
    own.levels_file = "levels.json"
    logger = CSVLogger(tmp_path)
    fit(module, [own, budget], max_epochs=6, logger=logger, log_every_n_steps=1)
    folder = tmp_path / "lightning_logs" / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["cpq/weight_bits"]]
    assert {"cpq/expected_weight_bits", "cpq/size_bytes", "cpq/penalty", "cpq/target", "cpq/bops"} <= set(rows[0])
    assert float(rows[0]["cpq/weight_bits"]) == 8
    assert just_below(float(rows[-1]["cpq/weight_bits"]), 3.0)
    for name in (
        "levels.csv",
        "levels.png",
        "weight_histograms.png",
        "trajectory.png",
        "trajectory.csv",
        "weight_histograms.json",
    ):
        assert (folder / name).stat().st_size > 500, name
    made_again = [folder / "levels.csv", folder / "levels.png"]
    for path in made_again:
        path.unlink()
    assert cpq("report", folder).returncode == 0
    assert all(path.stat().st_size > 500 for path in made_again)
    content = json.loads((folder / "levels.json").read_text())
    assert content["totals"]["weight_bits_avg"] == mean_width(module, "weight")
    weight = content["layers"][3]["weight"]
    assert sum(weight["level_shares"]) == pytest.approx(1, abs=1e-4)
    assert weight["bytes"] == -(-weight["numel"] * weight["bits"] // 8)
    assert weight["bops"] == weight["macs"] * weight["bits"] * 4
    # The levels serve another run, fixed from its start.
    again = Deep()
    settings = CPQConfig(act_bits=4, levels_from=str(folder / "levels.json"))
    fit(again, [CPQCallback(settings, table=False, levels_file=None)], max_epochs=1)
    assert [(r.name, r.bits) for r in levels(again)] == [(r.name, r.bits) for r in levels(module)]
    assert mean_width(again, "weight") == mean_width(module, "weight")


def test_a_logger_that_takes_tables_and_pictures_gets_each_layer_s_bits(fit, tmp_path):
    class Tables(CSVLogger):
        tables, pictures = [], []

        def log_table(self, key, columns, data, step):
            self.tables.append((key, columns, data))

        def log_image(self, key, images, step):
            self.pictures.append((key, images, step))

    cpq, budget = callbacks(3.0)
    cpq.levels_file = "levels.json"
    fit(Deep(), [cpq, budget], max_epochs=3, logger=Tables(tmp_path))
    key, columns, rows = Tables.tables[-1]
    assert (key, columns[:2]) == ("cpq/bits", ["quantizer", "bits"])
    assert len(rows) == 16
    assert [(key, step) for key, _, step in Tables.pictures] == [
        ("cpq/levels_picture", 12),
        ("cpq/weight_histograms_picture", 12),
    ]
    assert all(images[0].endswith(".png") for _, images, _ in Tables.pictures)


@pytest.mark.pictures
def test_tensorboard_gets_pictures_as_pixels(fit, tmp_path):
    class Experiment:
        pictures = {}  # noqa: RUF012

        def add_image(self, key, pixels, step, dataformats):
            self.pictures[key] = (pixels.shape, dataformats)

    class Board(CSVLogger):
        experiment = Experiment()

        def log_metrics(self, metrics, step=None):
            pass

        def save(self):
            pass

    cpq, budget = callbacks(3.0)
    cpq.levels_file = "levels.json"
    fit(Deep(), [cpq, budget], max_epochs=3, logger=Board(tmp_path))
    assert set(Experiment.pictures) == {"cpq/levels_picture", "cpq/weight_histograms_picture"}
    assert all(shape[2] == 3 and formats == "HWC" for shape, formats in Experiment.pictures.values())


def test_labels_are_learned_all_the_same(fit):
    """The decided network is as good as the one before the freeze."""
    module = Deep()
    learn(fit, module, callbacks(3.0), max_epochs=24)
    accuracy = (module.net.eval()(IMAGES).argmax(1) == LABELS).float().mean()
    assert accuracy > 0.6


class Recurrent(Classifier):
    """A recurrent layer, which is not quantized, between two linear ones: a first and a last layer, and no other."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(2), nn.Linear(64, 8), Last(with_own_forward(nn.LSTM)(8, 8, batch_first=True)), nn.Linear(8, 4)
        )


class Last(nn.Module):
    def __init__(self, recurrent):
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x):
        return self.recurrent(x)[0][:, -1]


@pytest.mark.parametrize(
    "config", [{}, {"act_bits": 8, "learn_act_bits": True}, {"act_bits": None}], ids=["weights", "both", "no inputs"]
)
def test_where_all_layers_are_first_or_last_ones_a_budget_is_refused_by_the_name_of_the_setting(fit, config):
    module = Recurrent()
    words = r"no weight to learn .*net\.1\.weight_quantizer, net\.3\.weight_quantizer.* first_last_bits=8.*=None"
    with pytest.raises(MisconfigurationException, match=words):
        fit(module, callbacks(4.0, config))
    learn(fit, module := Recurrent(), callbacks(4.0, {"first_last_bits": None} | config))
    assert mean_width(module, "weight") <= 4.0
