import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cpq_lightning import CPQCallback, CPQConfig, levels
from cpq_lightning.callbacks import BitBudget, ClusterPull
from tests.callbacks.resume import assert_resumes_exactly
from tests.models import Classifier, quantized_weight
from tests.trainer.test_ddp import SameOnAllRanks

CONFIG = CPQConfig(weight_bits=2, first_last_bits=None)


def error(module):
    """The largest relative weight error of a layer."""
    return max(r.relative_error for r in levels(module) if r.kind == "weight")


def test_weights_gather_at_the_grid(fit):
    left, gathered = Classifier(), Classifier()
    fit(left, [CPQCallback(CONFIG, table=False)])
    fit(gathered, [CPQCallback(CONFIG, table=False), ClusterPull(start=0.5, strength=0.9)])
    assert error(left) > 0.05
    assert error(gathered) < 0.1 * error(left)


def test_it_begins_where_it_is_told_and_grows(fit):
    module = Classifier()
    pull = ClusterPull(start=2, end=6, strength=0.8)
    trainer = fit(module, [CPQCallback(CONFIG, table=False), pull])
    seen = [round(pull.value(step), 6) for step in range(8)]
    assert trainer.global_step == 8
    # Behind the update of step 5, the sixth, it is whole.
    assert seen == [0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8]


def test_widths_that_are_learned_are_pulled_behind_the_freeze(fit):
    module = Classifier()
    config = CPQConfig(weight_bits=4, min_bits=2, learn_bits=True)
    with pytest.warns(UserWarning, match="only"):
        fit(
            module,
            [CPQCallback(config, table=False), BitBudget(3.0, freeze=0.5), ClusterPull(start=0.0, strength=1.0)],
            max_epochs=4,
        )
    # At full strength each update starts from the grid.
    assert error(module) < 0.02


def test_a_resumed_run_ends_the_same(fit, tmp_path):
    def callbacks():
        return [CPQCallback(CONFIG, table=False), ClusterPull(start=0.25, strength=0.5)]

    assert_resumes_exactly(fit, tmp_path, Classifier, callbacks)


@pytest.mark.xdist_group("ddp")
def test_two_processes_stay_equal(fit):
    pull = ClusterPull(start=0.0, strength=0.5)
    fit(Classifier(), [CPQCallback(CONFIG, table=False), pull, SameOnAllRanks()], strategy="ddp_fork", devices=2)


def test_accumulated_batches_pull_once_a_step(fit):
    module = Classifier(lambda p: torch.optim.SGD(p, lr=0.0))
    callbacks = [CPQCallback(CONFIG, table=False), ClusterPull(start=0, end=0, strength=0.5)]
    before = module.net[0].weight.detach().clone()
    fit(module, callbacks, max_epochs=1, accumulate_grad_batches=4)
    after, points = module.net[0].weight, quantized_weight(module.net[0])
    # One step of four batches: half of the way.
    torch.testing.assert_close(after, (before + points) / 2)


def test_hooks_are_gone_behind_the_fit(fit):
    pull = ClusterPull()
    trainer = fit(Classifier(), [CPQCallback(CONFIG, table=False), pull])
    assert pull._pulls == []
    (optimizer,) = trainer.optimizers
    assert not any("GridPull" in repr(hook) for hook in optimizer._optimizer_step_post_hooks.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.0}, "strength must be"),
        ({"strength": 1.5}, "strength must be"),
        ({"strength": True}, "strength must be"),
        ({"start": 0.9, "end": 0.2}, "start must not be after"),
        ({"end": 1.5}, "fraction of the run"),
        ({"shape": "steep"}, "shape must be"),
        ({"shape": "exponential"}, "needs values over 0"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClusterPull(**settings)


def test_a_model_without_quantizers_is_refused(fit):
    with pytest.raises(MisconfigurationException, match="add CPQCallback"):
        fit(Classifier(), [ClusterPull()])
