"""Weights that are computed from other tensors: quantized as they are now, all the way to an export."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from cpq_lightning import (
    CPQCallback,
    CPQConfig,
    attach,
    calibrate,
    detach,
    export_model,
    levels,
    load_quantized,
    loading,
)
from cpq_lightning.attach.layers import quantized_layers
from cpq_lightning.bitwidth.model_cost import float_bytes
from cpq_lightning.callbacks import ClusterPull
from tests.models import Classifier

KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}
X = torch.randn(8, 3, 12, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def net(kind):
    torch.manual_seed(0)
    how = KINDS[kind]
    layers = [how(nn.Conv1d(3, 8, 3)), nn.ReLU(), how(nn.ConvTranspose1d(8, 8, 3)), nn.Flatten(), how(nn.Linear(96, 2))]
    return nn.Sequential(*layers)


def trained(kind):
    model = calibrate(attach(net(kind)), [X]).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_weight_behind_the_last_update(kind):
    model = trained(kind)
    seen = {name: layer.read_weight().detach().clone() for name, layer in quantized_layers(model)}
    errors = [record.relative_error for record in levels(model) if record.kind == "weight"]
    model.eval()(X)
    for (name, layer), error in zip(quantized_layers(model), errors, strict=True):
        assert layer.weight.equal(seen[name])
        apart = layer.weight_quantizer.nearest(layer.weight) - layer.weight
        assert error == pytest.approx(float(apart.square().sum() / layer.weight.square().sum()), rel=1e-4)
    # Reading it in training has moved nothing that a normalization keeps.
    again = trained(kind)
    for _ in range(3):
        for _, layer in quantized_layers(again):
            layer.read_weight()
    assert again.eval()(X).equal(model(X))


@pytest.mark.parametrize("kind", KINDS)
def test_what_computes_it_is_no_product_that_stayed_unquantized(kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stayed unquantized")
        model = calibrate(attach(net(kind)).train(), [X])
        model(X).sum().backward()
        model.eval()(X)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_detached_copied_and_loaded_as_it_is(kind):
    model = trained(kind)
    plain = copy.deepcopy(model)
    for _, layer in quantized_layers(plain):
        layer.input_quantizer.configure(active=False)
    wanted = plain.eval()(X)
    torch.testing.assert_close(detach(plain)(X), wanted)
    assert {"0.weight", "2.weight", "4.weight"} <= set(dict(plain.named_parameters()))
    # The copy has lost what computes it, and the model has not.
    assert "0.weight" not in dict(model.named_parameters())
    wanted = model.eval()(X)
    rebuilt = net(kind)
    with loading():
        rebuilt.load_state_dict(model.state_dict())
    assert rebuilt.eval()(X).equal(wanted)
    if kind in ("weight_norm", "spectral_norm"):
        # torch pickles no module with a parametrization.
        return
    file = io.BytesIO()
    torch.save(model.train(), file)
    file.seek(0)
    assert torch.load(file, weights_only=False).eval()(X).equal(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_packed_and_loads_into_the_network_as_it_is_built(kind, tmp_path):
    model = trained(kind)
    export = export_model(model, tmp_path, samples=X)
    assert export.verification.weights == 3
    assert export.float_bytes == 4 * sum(p.numel() for p in detach(copy.deepcopy(model)).parameters())
    loaded = load_quantized(export.path, net(kind))
    torch.testing.assert_close(loaded(X), model.eval()(X))
    model.train()(X).sum().backward()


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_it_is_exported(format, tmp_path):
    assert export_model(trained("old weight_norm"), tmp_path, samples=X, format=format).verification.weights == 3


def test_a_layer_that_is_left_out_behind_a_forward_in_training_is_exported(tmp_path):
    model = calibrate(attach(net("old weight_norm"), CPQConfig(ignore=["2"])), [X]).train()
    model(X)
    assert export_model(model, tmp_path, samples=X).verification.weights == 2


def test_what_is_loaded_before_attachment_is_what_is_fitted():
    large = net("old weight_norm")
    with torch.no_grad():
        large[2].weight_g.mul_(100)
    model = net("old weight_norm")
    model.load_state_dict(large.state_dict())
    attach(model, CPQConfig(act_bits=None))
    assert all(record.relative_error < 0.02 for record in levels(model))


def test_a_model_that_does_not_fit_a_file_keeps_what_computes_its_weights(tmp_path):
    path = export_model(trained("weight_norm"), tmp_path, samples=X).path
    other = nn.Sequential(*net("weight_norm")[:4], nn.Linear(96, 3))
    with pytest.raises(ValueError, match="does not fit the network"):
        load_quantized(path, other)
    assert "0.parametrizations.weight.original0" in other.state_dict()


def test_cluster_pull_names_what_it_leaves_alone(fit):
    module = Classifier()
    nn.utils.weight_norm(module.net[3])
    with pytest.warns(UserWarning, match=r"ClusterPull leaves 1 layers alone.*: net\.3\."):
        fit(module, [CPQCallback(table=False, levels_file=None), ClusterPull(start=0.0)], max_epochs=1)


def test_a_shared_weight_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert float_bytes(attach(model)) == 4 * 24
