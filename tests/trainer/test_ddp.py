import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cpq_lightning import CPQCallback, CPQConfig
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.bitwidth.model_cost import mean_width
from cpq_lightning.callbacks import BitBudget, DropBitsSchedule, TemperatureSchedule
from tests.models import LABELS, Classifier, data

# Two runs that look for a free port at the same moment may find the same one.
pytestmark = pytest.mark.xdist_group("ddp")
# Batch norm's running statistics are each rank's own until they are broadcast in the next forward.
OWN = ("running_mean", "running_var", "num_batches_tracked")


class SameOnAllRanks(pl.Callback):
    """Fails the run when ranks differ, at its end and right after the ranges are set."""

    def on_train_start(self, trainer, pl_module):
        self.check(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        self.check(trainer, pl_module)
        assert all(q.fitted and q.active for _, q in quantizers(pl_module))

    def check(self, trainer, pl_module):
        assert trainer.world_size == 2
        for name, value in pl_module.state_dict().items():
            if not name.endswith(OWN):
                gathered = trainer.strategy.all_gather(value.clone())
                assert gathered[0].equal(gathered[1]), name


@pytest.mark.parametrize("quantize_from", [0, 0.5])
def test_two_processes_stay_equal(fit, quantize_from):
    module = Classifier()
    config = CPQConfig(min_bits=3)
    fit(
        module,
        [
            CPQCallback(config, quantize_from=quantize_from, table=False),
            TemperatureSchedule(),
            DropBitsSchedule(),
            SameOnAllRanks(),
        ],
        strategy="ddp_fork",
        devices=2,
        max_epochs=2,
    )
    # Of processes that were spawned the one that waits gets the network that they have trained.
    assert all(q.fitted and q.active for _, q in quantizers(module))
    assert len(dict(quantizers(module))) == 6


class StartingSteps(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        if trainer.is_global_zero:
            steps = {name: q.start_scale for name, q in quantizers(pl_module)}
            torch.save(steps, f"{trainer.default_root_dir}/steps-{trainer.world_size}.pt")


def test_starting_ranges_are_those_of_one_process_on_the_union(fit, tmp_path):
    for devices in (1, 2):
        torch.manual_seed(4)
        module = Classifier()
        # Without batch norm's dependence on the batch, two half batches show what the whole one does.
        module.net[1].eval()
        loaders = (data(batch_size=32 // devices, shuffle=False), data(shuffle=False))
        fit(
            module,
            [CPQCallback(table=False, calibration_batches=2), StartingSteps()],
            strategy="ddp_fork" if devices == 2 else "auto",
            devices=devices,
            loaders=loaders,
            max_epochs=1,
        )
    one, two = (torch.load(tmp_path / f"steps-{n}.pt", weights_only=True) for n in (1, 2))
    for name, step in one.items():
        assert step.equal(two[name]), name


class DecidedAtTheEnd(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        assert not any(q.has_gates for _, q in quantizers(pl_module))
        # Three layers of 216, 576 and 2048 weights permit no more.
        assert abs(mean_width(pl_module, "weight") - 3.5) < 0.1


def test_two_processes_decide_the_same_widths(fit):
    module = Classifier()
    config = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, first_last_bits=None)
    callbacks = [CPQCallback(config, table=False), BitBudget(3.5), DecidedAtTheEnd(), SameOnAllRanks()]
    fit(module, callbacks, strategy="ddp_fork", devices=2, max_epochs=12)


class Halted(Classifier):
    """One of its learning layers is in evaluation mode while it trains."""

    def on_train_batch_start(self, batch, batch_idx):
        self.net[3].eval()


def test_two_processes_learn_widths_with_a_layer_in_evaluation_mode(fit):
    config = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, first_last_bits=None)
    callbacks = [CPQCallback(config, table=False), BitBudget(3.5), DecidedAtTheEnd(), SameOnAllRanks()]
    fit(Halted(), callbacks, strategy="ddp_fork", devices=2, max_epochs=8)


class Sizes(Classifier):
    """Each process sees images of its own size."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*self.net[:-2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def train_dataloader(self):
        size = 8 + 4 * self.trainer.global_rank
        images = torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(images, LABELS[:32]), 8)

    def validation_step(self, batch, batch_idx):
        pass


class SameCosts(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        noted = [(q.macs, q.numel, q.execution_index) for _, q in quantizers(pl_module)]
        everybody = [None, None]
        torch.distributed.all_gather_object(everybody, noted)
        assert everybody[0] == everybody[1]
        assert all(any(counts) for counts in noted)


def test_processes_with_inputs_of_several_sizes_count_the_same_costs(fit):
    config = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, act_bits=4, first_last_bits=None)
    # 576 products a position of the layer in the middle; what two processes disagree on would be refused on one only.
    budget = BitBudget(500_000, unit="bops")
    trainer_settings = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 8, "use_distributed_sampler": False}
    fit(Sizes(), [CPQCallback(config, table=False), budget, SameCosts(), SameOnAllRanks()], loaders=(None, None),
        **trainer_settings)  # fmt: skip
