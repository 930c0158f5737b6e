"""No learning rate makes one update of a run take a step or its noise further than the bound."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.optim import Lars, Lookahead
from torch.nn.functional import cross_entropy

from cpq_lightning import CPQCallback, CPQConfig, levels
from cpq_lightning.attach.attach import set_active
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.callbacks import BitBudget
from cpq_lightning.optim.update_clamp import BOUND
from tests.marks import thorough
from tests.models import Classifier, data

LEARN = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True)


class Watch(pl.Callback):
    """Measures the change of each quantizer parameter in each batch, where a batch is one optimizer step.

    It comes before CPQCallback in the list, so that it measures before that one fits outdated ranges again.
    """

    def __init__(self):
        self.moves = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = self.values(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        after = self.values(pl_module)
        self.moves.append(max(float((b - a).abs().max()) for a, b in zip(self.before, after, strict=True)))

    def values(self, pl_module):
        return [p.detach().clone() for _, q in quantizers(pl_module) for p in q.range_parameters()]


class Manual(Classifier):
    """Two optimizers, each toggled and stepped in its turn."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [self.make_optimizer(part.parameters()) for part in (self.net[:3], self.net[3:])]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
RUNS = {
    "SGD": lambda: Classifier(SGD),
    "AdamW": lambda: Classifier(partial(torch.optim.AdamW, lr=1e-3)),
    "RMSprop": lambda: Classifier(partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9)),
    "LARS": lambda: Classifier(partial(Lars, lr=0.01, momentum=0.9)),
    "LBFGS, with a companion": lambda: Classifier(partial(torch.optim.LBFGS, lr=0.05, max_iter=3)),
    "two optimizers by hand": lambda: Manual(SGD),
}
# A usual optimizer, one of somebody else's, and one that takes no quantizers; the others differ in their rule alone.
USUAL = ("AdamW", "LARS", "LBFGS, with a companion")
OTHERS = [kind for kind in RUNS if kind not in USUAL]


@pytest.mark.parametrize("kind", [*USUAL, *thorough(*OTHERS)])
@pytest.mark.parametrize(("lr_factor", "learn"), [(1e3, True), *thorough((1e6, False))])
def test_at_an_absurd_rate_steps_move_within_the_bound_and_levels_stay_usable(fit, kind, lr_factor, learn):
    module, watch = RUNS[kind](), Watch()
    cpq = CPQCallback(LEARN if learn else CPQConfig(), lr_factor=lr_factor, table=False)
    fit(module, [watch, cpq, *([BitBudget(4.0)] if learn else [])], max_epochs=8, limit_val_batches=0)
    assert 0.9 * BOUND < max(watch.moves) <= BOUND * (1 + 1e-4)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    for record in levels(module):
        if record.kind == "weight":
            assert 1 < record.used_levels <= 2**record.bits, record.name


def test_a_network_learns_at_a_rate_at_which_steps_would_run_away(fit):
    """The default of TorchGeo's SimCLR; unbounded, logarithms of steps end between -50 and 50."""
    module = Classifier(partial(Lars, lr=4.8, momentum=0.9, weight_decay=1e-4))
    trainer = fit(module, [CPQCallback(LEARN, table=False), BitBudget(4.0)], max_epochs=15)
    # A guess among four classes has log 4.
    assert trainer.callback_metrics["train_loss"] < 0.5
    assert all(q.log_scale.abs().max() < 5 for _, q in quantizers(module))


def test_lookahead_goes_back_among_values_that_were_within_the_bound(fit):
    module, watch = Classifier(lambda parameters: Lookahead(SGD(parameters), k=6)), Watch()
    fit(module, [watch, CPQCallback(lr_factor=1e5, table=False)], max_epochs=5, limit_val_batches=0)
    assert max(move for i, move in enumerate(watch.moves, 1) if i % 6) <= BOUND * (1 + 1e-4)
    assert all(r.used_levels > 1 for r in levels(module) if r.kind == "weight")


@pytest.mark.parametrize("kind", [*USUAL, *thorough(*OTHERS)])
def test_a_usual_run_is_the_same_to_the_bit(fit, kind, monkeypatch):
    ends = []
    for bound in (BOUND, float("inf")):
        monkeypatch.setattr("cpq_lightning.optim.update_clamp.UpdateClamp.__init__.__defaults__", (bound,))
        torch.manual_seed(3)
        module, watch = RUNS[kind](), Watch()
        callbacks = [CPQCallback(LEARN, table=False), BitBudget(4.0), watch]
        trainer = fit(module, callbacks, max_epochs=4, limit_val_batches=0)
        assert 0 < max(watch.moves) < BOUND
        (cpq,) = (c for c in trainer.callbacks if isinstance(c, CPQCallback))
        optimizers = [*trainer.optimizers, *(companion.optimizer for companion in cpq._companions)]
        ends.append((module.state_dict(), [o.state_dict()["state"] for o in optimizers]))
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    for one, other in zip(*(states for _, states in ends), strict=True):
        for key, state in one.items():
            same = {k: torch.as_tensor(v) for k, v in other[key].items() if not isinstance(v, list)}
            assert all(torch.equal(torch.as_tensor(state[k]), v) for k, v in same.items())


def test_ranges_that_are_fitted_anew_within_an_update_are_kept(fit):
    module = Classifier()
    fit(module, [CPQCallback(table=False)], max_epochs=1)
    with torch.no_grad():
        for _, quantizer in quantizers(module):
            for p in quantizer.range_parameters():
                p.fill_(5.0)
    set_active(module, False)
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append([value for _, q in quantizers(pl_module) for value in q.log_scale.tolist()])

    fit(module, [CPQCallback(quantize_from=4, table=False), Look()], max_epochs=2)
    assert all(set(values) == {5.0} for values in seen[:4])
    assert all(abs(value) < BOUND for values in seen[4:] for value in values)


def test_a_run_that_is_resumed_while_updates_are_cut_off_ends_the_same(fit, tmp_path):
    def run(**settings):
        torch.manual_seed(11)
        module = Classifier(SGD)
        saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, enable_version_counter=False)
        loaders = (data(shuffle=False), data(shuffle=False))
        callbacks = [CPQCallback(lr_factor=1e5, table=False), saver]
        fit(module, callbacks, loaders=loaders, enable_checkpointing=True, max_epochs=4, **settings)
        return module.state_dict()

    whole, resumed = run(), run(ckpt_path=tmp_path / "epoch=1-step=8.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_steps_that_amp_skips_move_nothing(fit):
    from lightning.pytorch.plugins import MixedPrecision

    class Overflow(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.fit_loop.total_batch_idx == 3:
                for p in pl_module.parameters():
                    p.grad.fill_(torch.inf)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module, watch = Classifier(SGD), Watch()
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    fit(module, [watch, CPQCallback(lr_factor=1e4, table=False), Overflow()], max_epochs=4, plugins=plugins)
    assert watch.moves[3] == 0
    assert 0.9 * BOUND < max(watch.moves) <= BOUND * (1 + 1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_stays_behind_a_fit(fit, fails):
    class Held(Classifier):
        def training_step(self, batch, batch_idx):
            if fails and self.global_step == 2:
                raise RuntimeError("in the middle")
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            self.held = super().configure_optimizers()
            return self.held

    module = Held()
    try:
        fit(module, [CPQCallback(table=False)], max_epochs=1)
    except RuntimeError:
        assert fails
    assert not module.held._optimizer_step_pre_hooks
    assert not module.held._optimizer_step_post_hooks
