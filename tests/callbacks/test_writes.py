"""Weights that other code writes to during a fit are the weights that are quantized."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn

from cpq_lightning import CPQCallback, CPQConfig
from cpq_lightning.attach.layers import quantized_layers
from tests.models import Classifier, quantized_weight

HOOKS = (
    "setup",
    "configure_optimizers",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
)


def initializing(hook):
    class Initializes(Classifier):
        done = False

        def write(self):
            if not self.done:
                for layer in (self.net[0], self.net[3], self.net[6]):
                    nn.init.normal_(layer.weight, std=2.0)
            self.done = True

    def run(self, *args, **kwargs):
        self.write()
        return None if hook != "configure_optimizers" else Classifier.configure_optimizers(self)

    setattr(Initializes, hook, run)
    return Initializes()


class Errors(pl.Callback):
    """Relative errors of the weights that the first training batch multiplies by."""

    errors = None

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if self.errors is None:
            self.errors = []
            for _, layer in quantized_layers(pl_module):
                weight = layer.weight.detach()
                self.errors.append(float((quantized_weight(layer) - weight).norm() / weight.norm()))


@pytest.mark.parametrize("hook", HOOKS)
def test_weights_that_a_hook_initializes_have_ranges_of_their_own(fit, hook):
    module, errors = initializing(hook), Errors()
    fit(module, [CPQCallback(CPQConfig(weight_bits=8), table=False), errors], max_epochs=1)
    assert module.done
    assert max(errors.errors) < 0.02


@pytest.mark.parametrize("first", [False, True], ids=["behind", "before"])
def test_lightning_s_pruning_prunes_what_is_quantized(fit, first):
    module = Classifier()
    names = [(module.net[3], "weight"), (module.net[6], "weight")]
    pruning = ModelPruning(
        "l1_unstructured", parameters_to_prune=names, amount=0.5, use_lottery_ticket_hypothesis=False
    )
    callbacks = [pruning, CPQCallback(table=False)] if first else [CPQCallback(table=False), pruning]
    fit(module, callbacks, max_epochs=2)
    for layer in (module.net[3], module.net[6]):
        assert isinstance(layer.weight, nn.Parameter)
        assert float((layer.weight == 0).float().mean()) >= 0.5
        quantized = quantized_weight(layer)
        assert not quantized[layer.weight == 0].any()
        assert quantized.any()
        assert layer.weight is dict(layer.named_parameters())["weight"]


def test_a_clipped_critic_trains_quantized(fit):
    class Critic(Classifier):
        def on_train_batch_end(self, *args):
            with torch.no_grad():
                for p in self.net[3].parameters():
                    p.clamp_(-0.01, 0.01)

    module = Critic()
    fit(module, [CPQCallback(table=False)], max_epochs=3)
    assert float(module.net[3].weight.abs().max()) <= 0.01
    assert 0 < float(quantized_weight(module.net[3]).abs().max()) <= 0.012
