import copy
import itertools
import random

import lightning.pytorch as pl
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy
from torchdata.stateful_dataloader import StatefulDataLoader

from cpq_lightning import CPQCallback, CPQConfig
from cpq_lightning.bitwidth.model_cost import learning_quantizers
from cpq_lightning.callbacks import BatchNormReestimation, BitBudget, DropBitsSchedule
from tests.models import Classifier, data

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
LEARNED = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, first_last_bits=None)


class Deep(Classifier):
    """Two batch norms with dropout between them, and a step that draws random numbers and notes its losses."""

    def __init__(self, *arguments, kept=0.5):
        super().__init__(*arguments)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(1 - kept),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8, momentum=0.3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 4),
        )
        self.losses = []

    def training_step(self, batch, batch_idx):
        assert self.training or not torch.is_grad_enabled()
        loss = super().training_step(batch, batch_idx)
        self.losses.append((loss.item(), random.random(), numpy.random.rand()))
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))


def statistics(state):
    state = state.state_dict() if isinstance(state, nn.Module) else state
    return {name: value.clone() for name, value in state.items() if name.endswith(STATISTICS)}


def rest(module):
    return {name: value.clone() for name, value in module.state_dict().items() if not name.endswith(STATISTICS)}


def by_hand(module, batches, prefix="net"):
    """Averages of what each batch norm sees, by a walk through the layers in evaluation mode."""
    net = copy.deepcopy(module).get_submodule(prefix).eval()
    seen = {}
    for images, _ in batches:
        x = images
        for index, layer in enumerate(net):
            if isinstance(layer, nn.BatchNorm2d):
                seen.setdefault(index, []).append((x.mean((0, 2, 3)), x.var((0, 2, 3))))
                x = nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
            else:
                x = layer(x)
    return {
        f"{prefix}.{index}.{name}": torch.stack(values).mean(0)
        for index, pairs in seen.items()
        for name, values in zip(STATISTICS, zip(*pairs, strict=True), strict=False)
    }


def assert_by_hand(state, module, count=4):
    with torch.no_grad():
        wanted = by_hand(module, itertools.islice(data(shuffle=False), count))
    assert len(wanted) == 4
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.equal(other[name]), name


class Watch(pl.Callback):
    """Notes the statistics, and how the module stands, at the end of each validation."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            assert trainer.validating
            assert not any(m.training for m in pl_module.modules())
            self.seen.append(statistics(pl_module))


def fixed(batch_size=16):
    return data(batch_size, shuffle=False), data(shuffle=False)


def quantized():
    config = CPQConfig(weight_bits=4, act_bits=4, min_bits=3)
    return [CPQCallback(config, table=False), DropBitsSchedule(first=0.5, last=0.5)]


@pytest.mark.parametrize("company", [list, quantized])
@pytest.mark.parametrize("batches", [3, 50])
def test_statistics_are_plain_averages_over_the_network_as_it_evaluates(fit, company, batches):
    module, watch = Deep(), Watch()
    fit(module, [*company(), BatchNormReestimation(batches), watch], loaders=fixed(), max_epochs=3)
    count = min(batches, 4)
    assert_by_hand(module.state_dict(), module, count)
    assert [module.net[i].num_batches_tracked.item() for i in (1, 5)] == [count, count]
    # The last validation has them, and no earlier one.
    assert_same(watch.seen[-1], statistics(module))
    assert all(seen["net.1.num_batches_tracked"] > count for seen in watch.seen[1:-1])
    assert [module.net[i].momentum for i in (1, 5)] == [0.1, 0.3]


def test_they_are_those_of_torch_s_own_update(fit):
    module = Deep(kept=1.0)
    fit(module, [BatchNormReestimation()], loaders=fixed())
    other = copy.deepcopy(module)
    torch.optim.swa_utils.update_bn(data(shuffle=False), other.net)
    for name, value in statistics(other).items():
        torch.testing.assert_close(value, statistics(module)[name], msg=name)


class Run(pl.Callback):
    """What training ends with besides the network: gradients, modes, random states, metrics."""

    def on_train_end(self, trainer, pl_module):
        self.gradients = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
        self.modes = [m.training for m in pl_module.modules()]
        self.random = (torch.get_rng_state(), random.random(), numpy.random.rand())
        self.logged = dict(trainer.logged_metrics)
        self.stage = trainer.state.stage


@pytest.mark.parametrize("company", [list, quantized])
@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 0.5}, {"max_steps": 10}, {"limit_val_batches": 0}])
def test_nothing_but_statistics_differs_from_a_run_without_it(fit, company, settings):
    outcomes = []
    for more in ([], [BatchNormReestimation(2)]):
        torch.manual_seed(7)
        random.seed(7)
        numpy.random.seed(7)
        module, run = Deep(), Run()
        trainer = fit(module, [*company(), *more, run], max_epochs=3, **settings)
        outcomes.append((module, run, trainer.optimizers[0].state_dict()["state"]))
    (plain, one, before), (module, other, after) = outcomes
    assert plain.losses == module.losses
    assert len(module.losses) == (10 if "max_steps" in settings else 12)
    assert_same(rest(plain), rest(module))
    for p, values in before.items():
        assert_same(values, after[p])
    for a, b in zip(one.gradients, other.gradients, strict=True):
        assert (a is None and b is None) or a.equal(b)
    assert one.modes == other.modes
    assert one.stage == other.stage
    assert one.random[0].equal(other.random[0])
    assert one.random[1:] == other.random[1:]
    # What is validated by other statistics may differ.
    assert one.logged.keys() == other.logged.keys()
    assert one.logged["train_loss"] == other.logged["train_loss"]
    assert not statistics(plain)["net.1.running_mean"].equal(statistics(module)["net.1.running_mean"])


ENDS = {
    "at the last validation": {"max_epochs": 2},
    "by steps that validation follows": {"max_epochs": 3, "max_steps": 6, "val_check_interval": 2},
    "by time": {"max_epochs": 50, "min_epochs": 1},
    "by steps": {"max_epochs": 3, "max_steps": 6},
    "without validation": {"max_epochs": 2, "limit_val_batches": 0},
}


class Timer(pl.Callback):
    """Stops a run as Lightning's own does."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= 6


@pytest.mark.parametrize("saving", [{}, {"every_n_train_steps": 1}, {"save_weights_only": True}])
@pytest.mark.parametrize("end", ENDS)
def test_last_validation_and_last_checkpoint_have_them_however_the_run_ends(fit, tmp_path, end, saving):
    saver, watch, module = ModelCheckpoint(tmp_path, save_last=True, **saving), Watch(), Deep()
    timer = [Timer()] if end == "by time" else []
    callbacks = [*timer, BatchNormReestimation(), watch, saver]
    fit(module, callbacks, loaders=fixed(), enable_checkpointing=True, **ENDS[end])
    assert_by_hand(module.state_dict(), module)
    if end not in ("by steps", "without validation"):
        assert_same(watch.seen[-1], statistics(module))
    for path in (saver.last_model_path, saver.best_model_path):
        saved = torch.load(path, weights_only=True)
        assert_same(saved["state_dict"], module.state_dict())


class StopEarly(EarlyStopping):
    """Stops behind the second validation."""

    def __init__(self):
        super().__init__("val_loss", patience=1, min_delta=1e9)


def test_early_stopping_renews_the_last_checkpoint_and_nothing_else_in_it(fit, tmp_path):
    states = {}
    for name, more in (("without", []), ("with", [BatchNormReestimation(3)])):
        torch.manual_seed(3)
        module, watch = Deep(), Watch()
        savers = [
            ModelCheckpoint(tmp_path / name, save_last=True, every_n_epochs=1),
            ModelCheckpoint(tmp_path / name, monitor="val_loss", mode="max", filename="chosen", save_top_k=-1),
        ]
        fit(module, [*quantized(), StopEarly(), watch, *more, *savers], loaders=fixed(), max_epochs=50,
            enable_checkpointing=True)  # fmt: skip
        assert len(watch.seen) == 2
        states[name] = [torch.load(path, weights_only=True) for path in sorted((tmp_path / name).iterdir())]
        last, chosen = torch.load(savers[0].last_model_path), torch.load(savers[1].best_model_path)
    # Behind the last validation: the metric has chosen the network that it has seen.
    assert watch.seen[-1]["net.1.num_batches_tracked"] == 8
    assert chosen["state_dict"]["net.1.num_batches_tracked"] in (4, 8)
    assert_same(last["state_dict"], module.state_dict())
    assert_by_hand(last["state_dict"], module, 3)
    assert len(states["with"]) == len(states["without"]) > 2
    for before, after in zip(states["without"], states["with"], strict=True):
        assert before["loops"] == after["loops"]
        for name, value in before["state_dict"].items():
            assert value.equal(after["state_dict"][name]) or name.endswith(STATISTICS), name
        for key, values in before["optimizer_states"][0]["state"].items():
            assert_same(values, after["optimizer_states"][0]["state"][key])


@pytest.mark.parametrize(
    ("monitor", "settings"),
    # The best one has been chosen before; the last one is of the last validation, some steps before.
    [("val_loss", {"max_epochs": 50}), (None, {"max_epochs": 2, "val_check_interval": 3})],
)
def test_a_run_whose_checkpoints_lack_them_says_so(fit, tmp_path, monitor, settings):
    saver = ModelCheckpoint(tmp_path, monitor=monitor)
    early = [StopEarly()] if monitor else []
    with pytest.warns(UserWarning, match=r"no checkpoint of this run has them .the last one is .*\.ckpt"):
        fit(Deep(), [*early, BatchNormReestimation(), saver], enable_checkpointing=True, **settings)


def test_a_checkpoint_that_cannot_be_renewed_is_named(fit, tmp_path):
    class Late(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.net[8].bias.data += 1

    saver = ModelCheckpoint(tmp_path, filename="saved")
    with pytest.warns(UserWarning, match=r"saved\.ckpt keeps the moving averages.*'net\.8\.bias'"):
        fit(Deep(), [StopEarly(), Late(), BatchNormReestimation(), saver], max_epochs=50, enable_checkpointing=True)


def test_a_run_that_is_resumed_from_its_end_sees_the_batches_that_it_would_have_seen(fit, tmp_path):
    def run(more, **settings):
        torch.manual_seed(2)
        saver = ModelCheckpoint(tmp_path / str(len(list(tmp_path.iterdir()))), save_last=True)
        module = Deep(kept=1.0)
        loaders = StatefulDataLoader(data().dataset, 8), data(shuffle=False)
        # Validation is known to be the last one in the middle of the second epoch of eight batches.
        fit(module, [*more, saver], loaders=loaders, enable_checkpointing=True, val_check_interval=2, max_epochs=3,
            **settings)  # fmt: skip
        return saver.last_model_path, module

    without, _ = run([], max_steps=12)
    path, _ = run([BatchNormReestimation()], max_steps=12)
    loops = [torch.load(p)["loops"]["fit_loop"]["state_dict"] for p in (without, path)]
    assert loops[0]["combined_loader"] == loops[1]["combined_loader"] != []
    _, wanted = run([], max_steps=16)
    _, resumed = run([], max_steps=16, ckpt_path=path)
    # Training normalizes by the batch: no statistics play a part.
    assert [loss for loss, *_ in resumed.losses] == [loss for loss, *_ in wanted.losses[12:]]


def test_widths_that_are_fixed_when_training_ends_come_first(fit):
    class Order(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            self.learning, self.seen = bool(learning_quantizers(pl_module)), statistics(pl_module)

    module, order = Deep(), Order()
    callbacks = [CPQCallback(LEARNED, table=False), BitBudget(3.5, freeze=1.0), BatchNormReestimation(), order]
    fit(module, callbacks, loaders=fixed(), max_epochs=16)
    assert order.learning
    assert order.seen["net.1.num_batches_tracked"] == 64
    assert not learning_quantizers(module)
    assert_by_hand(module.state_dict(), module)


def test_widths_that_were_fixed_before_are_those_of_the_last_validation(fit):
    module, watch = Deep(), Watch()
    callbacks = [CPQCallback(LEARNED, table=False), BitBudget(3.5), BatchNormReestimation(), watch]
    fit(module, callbacks, loaders=fixed(), max_epochs=16)
    assert_same(watch.seen[-1], statistics(module))
    assert_by_hand(module.state_dict(), module)


@pytest.mark.parametrize("stopped", [False, True])
def test_averaged_weights_get_statistics_of_their_own(fit, tmp_path, stopped):
    module, watch = Deep(), Watch()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    callbacks = [*quantized(), EMAWeightAveraging(decay=0.5), BatchNormReestimation(), watch, saver]
    trainer = fit(module, callbacks + [StopEarly()] * stopped, loaders=fixed(), max_epochs=2 + stopped,
        enable_checkpointing=True)  # fmt: skip
    assert_by_hand(module.state_dict(), module)
    trainer.save_checkpoint(tmp_path / "behind.ckpt")
    for path in (saver.last_model_path, tmp_path / "behind.ckpt"):
        assert_same(torch.load(path)["state_dict"], module.state_dict())
    # What a run goes on from has its own weights, and its own moving averages.
    current = torch.load(saver.last_model_path)["current_model_state"]
    assert not current["net.0.weight"].equal(module.net[0].weight)
    assert current["net.1.num_batches_tracked"] == 8


def test_stochastic_weight_averaging_is_followed(fit):
    module = Deep()
    # An int is an epoch; the run has one more, for its own update of batch norms.
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer = fit(module, [averaging, BatchNormReestimation()], loaders=fixed(), max_epochs=3)
    assert trainer.current_epoch == 4
    assert_by_hand(module.state_dict(), module)
    assert [module.net[i].momentum for i in (1, 5)] == [0.1, 0.3]


@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("fault", ["error", "nan"])
def test_a_step_that_fails_leaves_the_statistics_as_they_were(fit, fault, validates):
    class Needy(Deep):
        def training_step(self, batch, batch_idx):
            if not self.training and batch[0].equal(next(iter(data(shuffle=False)))[0]):
                if fault == "error":
                    self.net(batch[0])
                    raise RuntimeError("this is no training")
                batch = [batch[0] * torch.nan, batch[1]]
            return super().training_step(batch, batch_idx)

    outcomes = []
    for more in ([], [BatchNormReestimation()]):
        torch.manual_seed(5)
        module = Needy()
        if more:
            expected = "RuntimeError: this is no training" if fault == "error" else "not finite"
            with pytest.warns(UserWarning, match=rf"could not be estimated again.*{expected}") as caught:
                trainer = fit(module, more, loaders=fixed(), limit_val_batches=int(validates))
            assert len([w for w in caught if "estimated again" in str(w.message)]) == 1
            assert trainer.state.finished
        else:
            fit(module, more, loaders=fixed(), limit_val_batches=int(validates))
        outcomes.append(module)
    assert_same(outcomes[0].state_dict(), outcomes[1].state_dict())
    assert module.training
    assert [m.momentum for m in (module.net[1], module.net[5])] == [0.1, 0.3]


def test_an_interrupted_estimate_leaves_the_statistics_as_they_were(fit):
    class Interrupted(Deep):
        def training_step(self, batch, batch_idx):
            if not self.training and batch_idx == 0:
                self.net(batch[0])
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    module = Interrupted()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, [BatchNormReestimation()], loaders=fixed())
    assert module.net[1].num_batches_tracked == 8
    assert module.net[1].running_var.gt(0).all()


def test_batch_norms_that_do_not_train_keep_their_statistics(fit):
    class Partly(Deep):
        def __init__(self):
            super().__init__()
            self.teacher, self.spare = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.batchwise = nn.BatchNorm2d(3, track_running_stats=False)
            for norm in (self.teacher, self.spare):
                norm.running_mean.fill_(0.25)
                norm.num_batches_tracked.fill_(9)

        def on_train_epoch_start(self):
            self.net[1].eval().requires_grad_(False)
            self.teacher.eval()

        def training_step(self, batch, batch_idx):
            self.batchwise(self.teacher(batch[0]))
            return super().training_step(batch, batch_idx)

    module = Partly()
    before = statistics(module)
    fit(module, [BatchNormReestimation()], loaders=fixed())
    after = statistics(module)
    for name in before:
        assert before[name].equal(after[name]) == (not name.startswith("net.5")), name
    assert after["net.5.num_batches_tracked"] == 4
    assert not module.net[1].training
    assert module.spare.training


def test_a_backbone_that_a_finetuning_callback_freezes_keeps_its_statistics(fit):
    class Tuned(Classifier):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = self.net[:3], nn.Sequential(nn.BatchNorm2d(8), *self.net[3:])
            self.net = nn.Sequential(self.backbone, self.head)

        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    class Freeze(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.backbone, train_bn=False)

        def finetune_function(self, *args):
            pass

    module = Tuned()
    module.backbone[1].running_mean.fill_(0.25)
    before = statistics(module.backbone)
    fit(module, [Freeze(), BatchNormReestimation()], loaders=fixed())
    assert_same(statistics(module.backbone), before)
    module.backbone.eval()
    with torch.no_grad():
        seen = [module.backbone(images).mean((0, 2, 3)) for images, _ in data(shuffle=False)]
    torch.testing.assert_close(module.head[0].running_mean, torch.stack(seen).mean(0))


def test_other_buffers_metrics_and_attributes_are_left_alone(fit):
    from torchmetrics.classification import MulticlassAccuracy

    class Noting(Deep):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))
            self.metric = MulticlassAccuracy(4)

        def training_step(self, batch, batch_idx):
            self.count += 1
            self.metric(self.net(batch[0]), batch[1])
            self.log("metric", self.metric, on_epoch=True)
            return super().training_step(batch, batch_idx)

    class Count(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            self.updates = pl_module.metric._update_count

    module, count = Noting(), Count()
    fit(module, [BatchNormReestimation(), count])
    assert (module.count, len(module.losses), count.updates) == (8, 8, 4)
    assert "log" not in module.__dict__


@pytest.mark.parametrize("limit", [4, 0])
def test_batches_are_augmented_as_in_training(fit, limit):
    class Augmented(Deep):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.training and self.training and self.net[3].training:
                return [batch[0] + 100, batch[1]]
            return batch

    module = Augmented()
    fit(module, [BatchNormReestimation()], loaders=fixed(), limit_val_batches=limit)
    with torch.no_grad():
        wanted = by_hand(module, ((images + 100, labels) for images, labels in data(shuffle=False)))
    torch.testing.assert_close(module.net[1].running_mean, wanted["net.1.running_mean"])


def test_a_module_without_batch_norms_is_told_once(fit):
    module = Classifier()
    module.net[1] = nn.Identity()
    with pytest.warns(UserWarning, match="found no batch norm in Classifier") as caught:
        fit(module, [BatchNormReestimation()])
    assert len([w for w in caught if "BatchNormReestimation" in str(w.message)]) == 1


def test_a_validation_outside_of_a_fit_estimates_nothing(fit, recwarn):
    module = Deep()
    trainer = fit(module, [BatchNormReestimation()], max_epochs=1)
    module.net[1].running_mean.fill_(0.25)
    trainer.validate(module, data(shuffle=False), verbose=False)
    assert module.net[1].running_mean.eq(0.25).all()
    assert not [w for w in recwarn if "estimated again" in str(w.message)]


def test_a_run_without_training_estimates_nothing(fit):
    module = Deep()
    fit(module, [BatchNormReestimation()], max_epochs=0)
    assert module.net[1].num_batches_tracked == 0


@pytest.mark.parametrize("limit", [4, 0])
def test_a_callback_serves_a_second_fit(fit, limit):
    callback = BatchNormReestimation()
    for _ in range(2):
        module = Deep()
        fit(module, [callback], loaders=fixed(), limit_val_batches=limit)
        assert_by_hand(module.state_dict(), module)


@pytest.mark.parametrize(
    "behind",
    [
        lambda: CPQCallback(),
        lambda: BitBudget(3.0),
        lambda: EMAWeightAveraging(),
        lambda: StochasticWeightAveraging(0.1),
    ],
)
def test_a_callback_that_still_changes_the_network_behind_it_is_refused(fit, behind):
    with pytest.raises(MisconfigurationException, match=r"stands behind BatchNormReestimation.*put .* last"):
        fit(Deep(), [BatchNormReestimation(), behind()])


@pytest.mark.parametrize("batches", [0, -1])
def test_arguments_out_of_range_are_refused(batches):
    with pytest.raises(ValueError, match=f"batches must be at least 1, got {batches}"):
        BatchNormReestimation(batches)


class Lopsided(Deep):
    """One batch norm sees batches in the second process only, where steps outside of training fail if told to."""

    def __init__(self, fails=False):
        super().__init__()
        self.once, self.fails = nn.BatchNorm2d(3, affine=False), fails

    def training_step(self, batch, batch_idx):
        if self.trainer.global_rank == 1:
            self.once(batch[0])
            if self.fails and not self.training:
                raise RuntimeError("here only")
        return super().training_step(batch, batch_idx)


class Agreed(pl.Callback):
    """Fails the run where ranks differ in their statistics, or where these are not averages over all batches."""

    def on_train_end(self, trainer, pl_module):
        assert trainer.world_size == 2
        loader, state = trainer.train_dataloader, statistics(pl_module)
        for name, value in by_hand(pl_module, loader).items():
            one, other = trainer.strategy.all_gather(value)
            assert not one.equal(other), "both ranks have seen the same"
            torch.testing.assert_close(state[name], (one + other) / 2, rtol=1e-4, atol=1e-5, msg=name)
        seen = torch.stack([images.mean((0, 2, 3)) for images, _ in loader]).mean(0)
        torch.testing.assert_close(state["once.running_mean"], trainer.strategy.all_gather(seen)[1])
        assert [int(state[f"{name}.num_batches_tracked"]) for name in ("net.1", "net.5", "once")] == [4, 4, 2]
        for name, value in state.items():
            one, other = trainer.strategy.all_gather(value)
            assert one.equal(other), name


class Unchanged(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        # Of both epochs: each has two batches for a process.
        assert pl_module.net[1].num_batches_tracked == 4
        assert pl_module.net[1].momentum == 0.1


# Two runs that look for a free port at the same moment may find the same one.
@pytest.mark.xdist_group("ddp")
def test_two_processes_average_over_the_batches_of_both(fit):
    callbacks = [*quantized(), BatchNormReestimation(), Agreed()]
    fit(Lopsided(), callbacks, loaders=fixed(), strategy="ddp_fork", devices=2)


@pytest.mark.xdist_group("ddp")
def test_a_failure_in_one_process_is_one_in_all(fit):
    callbacks = [BatchNormReestimation(1), Unchanged()]
    fit(Lopsided(fails=True), callbacks, loaders=fixed(), strategy="ddp_fork", devices=2, limit_val_batches=0)
