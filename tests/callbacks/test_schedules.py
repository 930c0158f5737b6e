import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cpq_lightning import CPQCallback, CPQConfig
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.callbacks import DropBitsSchedule, TemperatureSchedule
from tests.models import Classifier


class Record(pl.Callback):
    def __init__(self, buffer):
        self.buffer, self.values = buffer, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.values.append([self.value(q) for _, q in quantizers(pl_module)])

    def value(self, quantizer):
        # A quantizer without gates has nothing of theirs.
        buffers = dict(quantizer.named_buffers())
        buffer = buffers.get(self.buffer, buffers.get(f"gates.{self.buffer}"))
        return None if buffer is None else round(buffer.item(), 6)


def test_temperature_reaches_every_quantizer_at_each_step(fit):
    record = Record("temperature")
    schedule = TemperatureSchedule(start=2, end=0.75, first=1.0, last=0.6)
    fit(Classifier(), [CPQCallback(table=False), schedule, record], max_epochs=2)
    expected = [1.0, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.6]
    assert [set(values) for values in record.values] == [{value} for value in expected]


def test_keep_probability_reaches_the_quantizers_with_gates_only(fit):
    module, record = Classifier(), Record("keep_prob")
    config = CPQConfig(min_bits=2)
    fit(module, [CPQCallback(config, table=False), DropBitsSchedule(end=0.5, first=0.5), record], max_epochs=2)
    gated = [q.has_gates for _, q in quantizers(module)]
    assert gated == [False, False, True, False, False, False]
    assert [values[2] for values in record.values] == [0.5, 0.625, 0.75, 0.875, 1.0, 1.0, 1.0, 1.0]
    assert {value for values in record.values for value, has in zip(values, gated, strict=True) if not has} == {
        1.0,
        None,
    }


def test_schedules_follow_optimizer_steps_under_accumulation(fit):
    record = Record("temperature")
    fit(
        Classifier(),
        [CPQCallback(table=False), TemperatureSchedule(end=4, last=0.5), record],
        max_epochs=2,
        accumulate_grad_batches=2,
    )
    assert [values[0] for values in record.values] == [1.0, 1.0, 0.875, 0.875, 0.75, 0.75, 0.625, 0.625]


class ConcreteStatistics(pl.Callback):
    """The masks that a layer was quantized with in each batch."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        gates = next(q.gates for _, q in quantizers(pl_module) if q.has_gates)
        draw = gates.masks
        gates.masks = lambda *args, **kwargs: self.seen.append(draw(*args, **kwargs)) or self.seen[-1]


def test_batches_that_are_accumulated_draw_the_same_gates(fit):
    """As the batch that they are the parts of."""
    drawn, config = ConcreteStatistics(), CPQConfig(weight_bits=6, min_bits=2, keep_prob=0.5, gate_sharing="channel")
    fit(
        Classifier(),
        [CPQCallback(config, table=False), drawn],
        max_epochs=1,
        accumulate_grad_batches=2,
        limit_val_batches=0,
    )
    first, again, other, *_ = drawn.seen
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_gate_to_drive_is_said(fit):
    with pytest.warns(UserWarning, match=r"found no gate to drive.*min_bits=3"):
        fit(Classifier(), [CPQCallback(table=False), DropBitsSchedule()], max_epochs=1)


@pytest.mark.parametrize("schedule", [TemperatureSchedule, DropBitsSchedule])
def test_a_model_without_quantizers_is_refused(fit, schedule):
    with pytest.raises(MisconfigurationException, match="add CPQCallback"):
        fit(Classifier(), [schedule()])


@pytest.mark.parametrize("schedule", [TemperatureSchedule, DropBitsSchedule])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.8, "end": 0.2}, "start must not be after"),
        ({"first": 0.0}, "first must be"),
        ({"last": 1.5}, "last must be"),
        ({"end": 2.0}, "fraction of the run"),
        ({"shape": "steep"}, "shape must be"),
    ],
)
def test_arguments_out_of_range_are_refused(schedule, settings, message):
    with pytest.raises(ValueError, match=message):
        schedule(**settings)


def test_a_start_after_the_end_in_steps_is_refused(fit):
    with pytest.raises(MisconfigurationException, match=r"start=100 is step 100, after end=0\.5, step 4"):
        fit(Classifier(), [CPQCallback(), TemperatureSchedule(start=100, end=0.5)])
