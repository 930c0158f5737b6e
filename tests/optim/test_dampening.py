import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate
from cpq_lightning.attach.attach import set_active
from cpq_lightning.attach.layers import quantized_layers, quantizers
from cpq_lightning.nn.sharding import whole
from cpq_lightning.optim.dampening import Dampening
from tests.models import IMAGES, LABELS, convnet, quantized_weight

THREE = CPQConfig(weight_bits=3)


def pulled(strength, config=THREE, lr=0.0, prepare=lambda model: None, steps=1):
    """A model before and after steps of SGD with a pull; its layers' weights and grid points before."""
    model = calibrate(attach(convnet(), config, example_inputs=IMAGES[:4]), [IMAGES])
    prepare(model)
    layers = [layer for _, layer in quantized_layers(model)]
    before = [(layer.weight.detach().clone(), quantized_weight(layer)) for layer in layers]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    owners = {id(layer.weight): [(whole, layer.weight_quantizer)] for layer in layers}
    pull = Dampening(optimizer, owners, lambda: strength)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    return layers, before, pull


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_move_by_their_part_of_the_way(per_channel):
    layers, before, _ = pulled(0.25, CPQConfig(weight_bits=3, per_channel=per_channel))
    for layer, (weight, points) in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.weight, weight + 0.25 * (points - weight))
        # And stay on the same level.
        torch.testing.assert_close(quantized_weight(layer), points)


def test_a_strength_of_one_puts_weights_on_the_grid():
    layers, before, _ = pulled(1.0)
    for layer, (_, points) in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.weight, points)


def test_nothing_is_pulled_without_strength_or_behind_the_end():
    layers, before, _ = pulled(0.0)
    assert all(layer.weight.equal(w) for layer, (w, _) in zip(layers, before, strict=True))
    layers, before, pull = pulled(0.5, steps=0)
    pull.remove()
    assert all(layer.weight.equal(w) for layer, (w, _) in zip(layers, before, strict=True))


@pytest.mark.parametrize(
    ("config", "prepare"),
    [
        (CPQConfig(), lambda model: set_active(model, False)),
        (CPQConfig(weight_bits=4, min_bits=2, learn_bits=True, first_last_bits=None), lambda model: None),
        (CPQConfig(), lambda model: model.requires_grad_(False)[0].bias.requires_grad_(True)),
    ],
    ids=["inactive", "learning", "frozen"],
)
def test_what_is_in_no_place_yet_is_left_alone(config, prepare):
    layers, before, _ = pulled(0.5, config, prepare=prepare)
    assert all(layer.weight.equal(w) for layer, (w, _) in zip(layers, before, strict=True))


def test_widths_that_are_fixed_are_pulled_to_their_own_grid():
    def fix(model):
        for _, quantizer in quantizers(model):
            if quantizer.learns_bits:
                quantizer.fix_widths([2])

    config = CPQConfig(weight_bits=4, min_bits=2, learn_bits=True, first_last_bits=None)
    layers, before, _ = pulled(1.0, config, prepare=fix)
    for layer, (_, points) in zip(layers, before, strict=True):
        assert all(len(channel.unique()) <= 4 for channel in points)
        torch.testing.assert_close(layer.weight, points)


def test_a_group_that_is_added_later_is_pulled():
    model = calibrate(attach(convnet(), CPQConfig(weight_bits=3), example_inputs=IMAGES[:4]), [IMAGES])
    first, *_, last = [layer for _, layer in quantized_layers(model)]
    optimizer = torch.optim.SGD([first.weight], lr=0.0)
    Dampening(optimizer, {id(last.weight): [(whole, last.weight_quantizer)]}, lambda: 1.0)
    optimizer.add_param_group({"params": [last.weight]})
    points = quantized_weight(last)
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    optimizer.step()
    torch.testing.assert_close(last.weight, points)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_mixed_precision_skips_pulls_nothing(fused):
    model = calibrate(attach(convnet(), THREE, example_inputs=IMAGES[:4]), [IMAGES])
    layers = [layer for _, layer in quantized_layers(model)]
    owners = {id(layer.weight): [(whole, layer.weight_quantizer)] for layer in layers}
    optimizer = torch.optim.AdamW([layer.weight for layer in layers], fused=fused)
    Dampening(optimizer, owners, lambda: 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [layer.weight.detach().clone() for layer in layers]
    for finite in (False, True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(IMAGES), LABELS)
        scaler.scale(loss if finite else loss * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [not layer.weight.equal(w) for layer, w in zip(layers, before, strict=True)]
        assert all(moved) if finite else not any(moved)
