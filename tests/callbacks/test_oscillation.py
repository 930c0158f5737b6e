import itertools
import json

import pytest
import torch

from cpq_lightning import CPQCallback, CPQConfig, levels
from cpq_lightning.attach.layers import quantized_layers
from cpq_lightning.callbacks import BitBudget, OscillationFreezing, OscillationMonitor
from tests.callbacks.resume import assert_resumes_exactly
from tests.models import Classifier
from tests.trainer.test_ddp import SameOnAllRanks

CONFIG = CPQConfig(weight_bits=3, first_last_bits=None)


def wild(parameters):
    """Steps so large that weights jump between levels."""
    return torch.optim.SGD(parameters, lr=2.0)


def freezing(**settings):
    return OscillationFreezing(**{"first": 0.02, "last": 0.02, "momentum": 0.1, **settings})


def shares(module):
    return [r.oscillating for r in levels(module) if r.kind == "weight"]


def test_the_share_of_each_layer_is_in_levels_json_table_and_log(fit, tmp_path, capsys):
    module = Classifier(wild)
    callbacks = [CPQCallback(CONFIG), OscillationMonitor(momentum=0.1)]
    trainer = fit(module, callbacks, max_epochs=4, default_root_dir=tmp_path, log_every_n_steps=1)
    [written] = tmp_path.rglob("levels.json")
    written = [layer["weight"]["oscillating"] for layer in json.loads(written.read_text())["layers"]]
    assert written == shares(module)
    assert max(written) > 0
    sizes = [layer.weight.numel() for _, layer in quantized_layers(module)]
    total = sum(size * share for size, share in zip(sizes, written, strict=True)) / sum(sizes)
    assert trainer.callback_metrics["cpq/oscillating"].item() == pytest.approx(total)
    assert " osc" in capsys.readouterr().out


def test_frozen_weights_no_longer_change_their_level(fit):
    class Watch(OscillationFreezing):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            for name, (quantizer, oscillation) in self._weights.items():
                frozen = oscillation.state_dict()["tensors"]["frozen_code"] >= 0
                layer = pl_module.get_submodule(name)
                self.path.setdefault(name, []).append((frozen, quantizer.levels(layer.weight.detach())))

    module, watch = Classifier(wild), Watch(first=0.02, last=0.02, momentum=0.1)
    watch.path = {}
    trainer = fit(module, [CPQCallback(CONFIG, table=False), watch], max_epochs=6, log_every_n_steps=1)
    assert trainer.callback_metrics["cpq/frozen"] > 0
    changes = 0
    for path in watch.path.values():
        for (frozen, before), (still, after) in itertools.pairwise(path):
            # A new range of the layer sets all free.
            kept = frozen & still
            assert torch.equal(before[kept], after[kept])
            changes += int((before != after).sum())
    assert changes > 0


def test_a_resumed_run_ends_the_same(fit, tmp_path):
    def callbacks():
        return [CPQCallback(CONFIG, table=False), freezing()]

    last = assert_resumes_exactly(fit, tmp_path, lambda: Classifier(wild), callbacks)
    assert any(o.frozen_share() for _, o in last[1]._weights.values())


@pytest.mark.xdist_group("ddp")
def test_two_processes_stay_equal(fit):
    fit(
        Classifier(wild),
        [CPQCallback(CONFIG, table=False), freezing(), SameOnAllRanks()],
        strategy="ddp_fork",
        devices=2,
    )


def test_widths_that_are_learned_are_followed_behind_the_freeze(fit):
    module, callback = Classifier(wild), freezing()
    config = CPQConfig(weight_bits=4, min_bits=2, learn_bits=True)
    with pytest.warns(UserWarning, match="only"):
        fit(module, [CPQCallback(config, table=False), BitBudget(3.0, freeze=0.5), callback], max_epochs=4)
    assert all(share is not None for share in shares(module))


def test_accumulated_batches_count_once_a_step(fit):
    seen = []

    class Watch(OscillationMonitor):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            [(_, oscillation), *_] = self._weights.values()
            seen.append(oscillation.share() is not None)

    fit(Classifier(wild), [CPQCallback(CONFIG, table=False), Watch()], max_epochs=1, accumulate_grad_batches=4)
    assert seen == [False, False, False, True]


def test_weights_that_are_computed_are_left_alone_with_a_word(fit):
    module = Classifier()
    torch.nn.utils.parametrizations.weight_norm(module.net[0])
    with pytest.warns(UserWarning, match="OscillationFreezing leaves 1 layers alone"):
        fit(module, [CPQCallback(CONFIG, table=False), freezing()], max_epochs=1)
    assert shares(module)[0] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"first": 0.0}, "first must be"), ({"momentum": 1.0}, "momentum must be"), ({"start": 0.9, "end": 0.1}, "start")],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OscillationFreezing(**settings)


def test_a_callback_that_was_resumed_starts_anew_in_the_next_fit(fit, tmp_path):
    """Its shares are those of the run, not of the run that it was in before."""

    def run(monitor, **settings):
        torch.manual_seed(0)
        module = Classifier(wild)
        trainer = fit(module, [CPQCallback(CONFIG, table=False), monitor], max_epochs=3, **settings)
        return trainer, shares(module)

    trainer, alone = run(OscillationMonitor(momentum=0.1))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    monitor = OscillationMonitor(momentum=0.1)
    run(monitor, ckpt_path=tmp_path / "run.ckpt")
    assert run(monitor)[1] == alone
    assert max(alone) > 0
