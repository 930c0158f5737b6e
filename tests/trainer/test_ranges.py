"""When a run fits ranges again."""

import pytest
import torch

from cpq_lightning import CPQCallback, CPQConfig
from cpq_lightning.attach.layers import quantized_layers
from tests.models import Classifier

HOOKS = ["on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_train_end"]


def pruning(hook):
    """A module that masks its first weight in one of its own hooks."""

    class Pruning(Classifier):
        def mask(self):
            weight = self.net[0].weight
            with torch.no_grad():
                weight[:, : weight.shape[1] // 2] = 0

    setattr(Pruning, hook, lambda self, *args, **kwargs: self.mask())
    return Pruning()


@pytest.mark.filterwarnings("ignore:The weights of 1 layers have zeros")
@pytest.mark.parametrize("hook", HOOKS)
def test_a_weight_of_one_bit_that_a_hook_of_the_module_prunes_keeps_its_zeros(fit, hook):
    module, seen = pruning(hook), []

    class Watch(CPQCallback):
        def on_fit_end(self, trainer, pl_module):
            super().on_fit_end(trainer, pl_module)
            seen.append(self)

    fit(module, [Watch(CPQConfig(weight_bits=1, first_last_bits=None), table=False)], max_epochs=2)
    assert seen
    module.mask()
    layer = dict(quantized_layers(module))["net.0"]
    assert layer.weight_quantizer.zero_point == 1
    quantized = layer.weight_quantizer(layer.weight)
    assert quantized[layer.weight == 0].eq(0).all()
    others = [each for name, each in quantized_layers(module) if name != "net.0"]
    assert all(each.weight_quantizer.zero_point == 0.5 for each in others)


def test_a_validation_has_the_zeros_of_a_weight_that_was_pruned_between_two_checks(fit):
    class Pruning(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            # Step 17 is due, 18 is not.
            if self.global_step == 19:
                with torch.no_grad():
                    self.net[0].weight[0] = 0

        def on_validation_epoch_start(self):
            if self.global_step == 19:
                weight = self.net[0].weight
                self.evaluated = self.net[0].weight_quantizer(weight)[0].detach()

    module = Pruning()
    with pytest.warns(UserWarning, match=r"1 layers have zeros, as after pruning.*: net\.0\."):
        fit(
            module,
            [CPQCallback(CPQConfig(weight_bits=1, first_last_bits=None), table=False)],
            max_epochs=-1,
            max_steps=20,
            val_check_interval=19,
            check_val_every_n_epoch=None,
        )
    assert module.evaluated.eq(0).all()
