"""Runs that were stopped or killed end, resumed, bit for bit where the uninterrupted one does."""

import signal

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torchdata.stateful_dataloader import StatefulDataLoader

from benchmarks.lightning_matrix.common import Plain, data, trainer_in
from benchmarks.lightning_matrix.worker import Kill
from benchmarks.processes import run_processes
from cpq_lightning.bitwidth.model_cost import learning_quantizers
from cpq_lightning.callbacks import BitBudget
from cpq_lightning.nn.state import read
from tests.marks import thorough

# What its tests share takes seconds to make.
pytestmark = pytest.mark.xdist_group("resume")

# Of 10 epochs of 4 steps: full precision up to step 8, widths decided from step 29, fixed from step 32.
QUANTIZE_FROM = 0.2


def stateful():
    return StatefulDataLoader(data().dataset, 16)


def run(folder, loader, *more, ckpt_path=None, **settings):
    torch.manual_seed(0)
    module = Plain(make_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40))
    settings = {"max_epochs": 10, "enable_checkpointing": bool(more)} | settings
    trainer = trainer_in(folder, *more, quantize_from=QUANTIZE_FROM, **settings)
    trainer.fit(module, loader, data(), ckpt_path=ckpt_path)
    return trainer, module


def outcome(trainer, module):
    """All that a run ends with: weights, gates, what schedules and budget have set, and the optimizers."""
    optimizers = [trainer.optimizers[0], *(companion.optimizer for companion in trainer.callbacks[0]._companions)]
    budget = next(c for c in trainer.callbacks if isinstance(c, BitBudget))
    search = budget.state_dict()["search"]
    return module.state_dict(), search, budget.changes, [optimizer.state_dict() for optimizer in optimizers]


def assert_equal(one, other, path=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{path}/{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, with a checkpoint of each epoch and of each third step."""
    folder = tmp_path_factory.mktemp("whole")
    savers = [
        ModelCheckpoint(folder / "epochs", save_top_k=-1, every_n_epochs=1, filename="{epoch}-{step}"),
        ModelCheckpoint(folder / "steps", save_top_k=-1, every_n_train_steps=3, filename="{epoch}-{step}"),
    ]
    return folder, outcome(*run(folder, stateful(), *savers))


class RestoresLate(SingleDeviceStrategy):
    """As DeepSpeed's: it restores a checkpoint only behind ``on_fit_start``."""

    restore_checkpoint_after_setup = True


def test_under_a_strategy_that_restores_late(whole, tmp_path):
    folder, wanted = whole
    [checkpoint] = (folder / "epochs").glob("epoch=6-*.ckpt")
    strategy = RestoresLate("cpu")
    assert_equal(outcome(*run(tmp_path, stateful(), ckpt_path=checkpoint, strategy=strategy)), wanted)


# Full precision; its last epoch; widths learned while both schedules move; decided; fixed.
@pytest.mark.parametrize("epoch", [0, 1, 6, 8, *thorough(4, 7)])
def test_from_the_end_of_an_epoch(whole, tmp_path, epoch):
    folder, wanted = whole
    path = next((folder / "epochs").glob(f"epoch={epoch}-*.ckpt"))
    assert_equal(outcome(*run(tmp_path, data(), ckpt_path=path)), wanted)


@pytest.mark.parametrize("step", [3, 15, 30, *thorough(9, 21, 33)])
def test_from_the_middle_of_an_epoch_with_a_loader_that_knows_where_it_was(whole, tmp_path, step):
    folder, wanted = whole
    path = next((folder / "steps").glob(f"*-step={step}.ckpt"))
    assert_equal(outcome(*run(tmp_path, stateful(), ckpt_path=path)), wanted)


def test_from_the_middle_of_an_epoch_with_a_plain_loader_it_says_what_differs(whole, tmp_path):
    _, wanted = whole
    run(tmp_path, data(), ModelCheckpoint(tmp_path, every_n_train_steps=15, filename="{step}"), max_steps=16)
    path = tmp_path / "step=15.ckpt"
    with pytest.warns(UserWarning, match=r"middle of epoch 3.*sees other batches.*StatefulDataLoader"):
        trainer, module = run(tmp_path, data(), ckpt_path=path)
    assert trainer.global_step == 40
    assert not learning_quantizers(module)
    schedules = ("temperature", "keep_prob", "gates.noise_step")
    state, same = module.state_dict(), wanted[0]
    assert all(torch.equal(state[name], same[name]) for name in same if name.endswith(schedules))
    states = [(read(state[name])[0], read(same[name])[0]) for name in same if name.endswith("_quantizer.state")]
    assert all((a.active, a.fitted, a.settled) == (b.active, b.fitted, b.settled) for a, b in states)


@pytest.mark.parametrize(("loader", "path"), [(stateful, "steps/*-step=15.ckpt"), (stateful, "epochs/epoch=4-*.ckpt")])
def test_no_warning_where_the_run_goes_on_exactly(whole, tmp_path, loader, path, recwarn):
    run(tmp_path, loader(), ckpt_path=next(whole[0].glob(path)), max_epochs=6)
    assert not [w for w in recwarn if "sees other batches" in str(w.message)]


def killed(folder, step):
    run(folder, stateful(), Kill(step), saver(folder))


def saver(folder):
    return ModelCheckpoint(folder, save_top_k=1, every_n_train_steps=3, filename="last", enable_version_counter=False)


# From no checkpoint at the last batch of an epoch: Lightning and torchdata lose an epoch there, without any callback.
@pytest.mark.parametrize("step", [23, *thorough(7, 35)])
def test_killed_in_the_middle_of_a_step_and_resumed_from_its_last_checkpoint(whole, tmp_path, step):
    (done,) = run_processes(killed, tmp_path, step)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    path = tmp_path / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == step // 3 * 3
    assert_equal(outcome(*run(tmp_path / "again", stateful(), ckpt_path=path)), whole[1])


def whole_and_resumed(folder, make, epoch):
    """The states that a run ends with, and one that goes on from the checkpoint of an epoch of it."""
    states = []
    saver = ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    for path in (None, folder / f"epoch={epoch}.ckpt"):
        torch.manual_seed(0)
        module = make()
        trainer = trainer_in(folder, *([] if path else [saver]), enable_checkpointing=path is None)
        trainer.fit(module, data(), data(), ckpt_path=path)
        states.append(module.state_dict())
    return states


def test_from_a_checkpoint_while_a_layer_is_never_called(tmp_path):
    """What has no range yet because nothing calls it must not have all others fitted afresh."""

    class Spare(Plain):
        def __init__(self):
            super().__init__()
            self.spare = torch.nn.Linear(4, 4)

    assert_equal(*whole_and_resumed(tmp_path, Spare, epoch=4))


def test_a_resumed_run_counts_costs_as_the_whole_one_where_inputs_have_several_sizes(tmp_path):
    class Sizes(Plain):
        def __init__(self):
            super().__init__()
            self.net[7] = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())

        def training_step(self, batch, batch_idx):
            size = 8 + 2 * (self.global_step % 3)
            images = torch.nn.functional.interpolate(batch[0], size=size)
            return super().training_step((images, batch[1]), batch_idx)

    assert_equal(*whole_and_resumed(tmp_path, Sizes, epoch=3))
