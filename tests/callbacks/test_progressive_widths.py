import warnings

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cpq_lightning import CPQCallback, CPQConfig, levels, load_checkpoint
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.callbacks import DistillationCallback, ProgressiveWidths
from tests.callbacks.resume import assert_resumes_exactly
from tests.models import Classifier, data
from tests.trainer.test_ddp import SameOnAllRanks

CONFIG = CPQConfig(weight_bits=2, act_bits=3, first_last_bits=None)


class Watch(pl.Callback):
    """The widths with which each batch was computed, behind ProgressiveWidths."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        bits = {(q.kind, q.bits) for _, q in quantizers(pl_module)}
        assert all(q.fitted for _, q in quantizers(pl_module))
        self.seen.append(tuple(sorted(bits)))


def test_widths_narrow_in_stages_to_those_of_the_config(fit):
    module, watch = Classifier(), Watch()
    trainer = fit(module, [CPQCallback(CONFIG, table=False), ProgressiveWidths(widths=(8, 5, 3), end=6), watch])
    assert trainer.global_step == 8
    stages = [(("activation", bits), ("weight", bits)) for bits in (8, 8, 5, 5, 3, 3)]
    assert watch.seen == [*stages, *[(("activation", 3), ("weight", 2))] * 2]
    assert {(r.kind, r.bits) for r in levels(module)} == {("weight", 2), ("activation", 3)}


def test_widths_of_layers_that_are_wide_stay(fit):
    module, watch = Classifier(), Watch()
    config = CPQConfig(weight_bits=3, act_bits=3, overrides={"net.0": {"weight_bits": 6}}, first_last_bits=None)
    fit(module, [CPQCallback(config, table=False), ProgressiveWidths(widths=(5,), end=0.5), watch])
    assert watch.seen[0] == (("activation", 5), ("weight", 5), ("weight", 6))
    assert watch.seen[-1] == (("activation", 3), ("weight", 3), ("weight", 6))


def test_each_stage_begins_with_ranges_of_its_width(fit):
    errors = []

    class Errors(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            errors.append(max(r.relative_error for r in levels(pl_module) if r.kind == "weight"))

    fit(Classifier(), [CPQCallback(CONFIG, table=False), ProgressiveWidths(widths=(8, 4), end=4), Errors()])
    assert errors[0] < 1e-3 < errors[2] < 0.03 < errors[4] < 0.3


def test_a_teacher_may_help(fit):
    callbacks = [CPQCallback(CONFIG, table=False), ProgressiveWidths(), DistillationCallback("self")]
    module = Classifier()
    fit(module, callbacks)
    assert {r.bits for r in levels(module) if r.kind == "weight"} == {2}


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_ends_the_same(fit, tmp_path, epoch):
    def callbacks():
        return [CPQCallback(CONFIG, table=False), ProgressiveWidths(widths=(8, 5), end=0.6)]

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="(?!.*[Ww]idth)")
        assert_resumes_exactly(fit, tmp_path, Classifier, callbacks, epoch)


def test_a_run_that_ends_early_is_narrowed_with_a_word(fit):
    module = Classifier()
    with pytest.warns(UserWarning, match="before the last stage of ProgressiveWidths at step 100: 6 widths"):
        fit(module, [CPQCallback(CONFIG, table=False), ProgressiveWidths(end=100)])
    assert {(r.kind, r.bits) for r in levels(module)} == {("weight", 2), ("activation", 3)}
    assert all(q.fitted for _, q in quantizers(module))


def test_the_best_checkpoint_of_a_wider_network_is_named(fit, tmp_path):
    class Falling(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("score", float(-self.trainer.global_step))

    saver = ModelCheckpoint(tmp_path, monitor="score", mode="max")
    with pytest.warns(UserWarning, match="before ProgressiveWidths had reached the last widths"):
        fit(
            Falling(), [CPQCallback(CONFIG, table=False), ProgressiveWidths(end=0.6), saver],
            max_epochs=3, enable_checkpointing=True,
        )  # fmt: skip


@pytest.mark.xdist_group("ddp")
def test_two_processes_stay_equal(fit):
    callbacks = [CPQCallback(CONFIG, table=False), ProgressiveWidths(), SameOnAllRanks()]
    fit(Classifier(), callbacks, strategy="ddp_fork", devices=2)


@pytest.mark.parametrize("settings", [{"weight_bits": 4, "min_bits": 3}, {"weight_bits": 4, "min_bits": 2}])
def test_gates_are_refused(fit, settings):
    with pytest.raises(MisconfigurationException, match="learn theirs, drop bits"):
        fit(Classifier(), [CPQCallback(CPQConfig(**settings), table=False), ProgressiveWidths()])


@pytest.mark.parametrize("widths", [(), (4, 5), (4, 4), (9,)])
def test_stages_that_do_not_narrow_are_refused(widths):
    with pytest.raises(ValueError, match="widths"):
        ProgressiveWidths(widths=widths)


def test_stages_begin_with_the_first_quantized_step(fit):
    module, watch = Classifier(), Watch()
    watch.on_train_batch_end = lambda trainer, pl_module, *_: watch.seen.append(
        tuple(sorted({(q.kind, q.bits, q.active) for _, q in quantizers(pl_module)}))
    )
    callbacks = [CPQCallback(CONFIG, table=False, quantize_from=2), ProgressiveWidths(widths=(8, 5), end=6), watch]
    fit(module, callbacks)
    wide, narrow = ((("activation", b, True), ("weight", b, True)) for b in (8, 5))
    last = (("activation", 3, True), ("weight", 2, True))
    assert all(not active for _, _, active in watch.seen[1])
    assert watch.seen[2:] == [wide, wide, narrow, narrow, last, last]


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"max_epochs": -1, "max_steps": 1}])
def test_a_run_of_one_step_has_the_last_widths(fit, settings):
    module = Classifier()
    fit(module, [CPQCallback(CONFIG, table=False), ProgressiveWidths()], **settings)
    assert {(r.kind, r.bits) for r in levels(module)} == {("weight", 2), ("activation", 3)}


STAGE = "saved at step 4 of a run with ProgressiveWidths, in its stage of 8 bits"


def test_a_checkpoint_of_a_wide_stage_says_so_to_all_who_do_not_narrow_it(fit, tmp_path):
    def callbacks(*others):
        return [CPQCallback(CONFIG, table=False), *others]

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_epochs=1, save_top_k=-1)
    trainer = fit(
        Classifier(), callbacks(ProgressiveWidths(widths=(8,), end=6), saving), max_epochs=2, enable_checkpointing=True
    )
    wide, last = tmp_path / "step=4.ckpt", tmp_path / "step=8.ckpt"
    with pytest.warns(UserWarning, match=STAGE):
        module = load_checkpoint(Classifier, wide)
    assert {q.bits for _, q in quantizers(module)} == {8}
    with pytest.warns(UserWarning, match=STAGE):
        trainer.validate(Classifier(), data(), ckpt_path=wide, verbose=False)
    with pytest.warns(UserWarning, match=STAGE):
        fit(Classifier(), callbacks(), max_epochs=2, ckpt_path=wide)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The checkpoint was saved at step")
        load_checkpoint(Classifier, last)
        module = Classifier()
        fit(module, callbacks(ProgressiveWidths(widths=(8,), end=6)), max_epochs=2, ckpt_path=wide)
    assert {(r.kind, r.bits) for r in levels(module)} == {("weight", 2), ("activation", 3)}
