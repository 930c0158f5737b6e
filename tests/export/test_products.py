"""Products without a weight, quantized, in each format."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, export_model, load_quantized
from cpq_lightning.attach.products import modules_with_products
from cpq_lightning.export.integer_model import uncalled
from tests.attach.test_products import Attention, Outer, X
from tests.export.test_packed import resigned

CONFIG = CPQConfig(attention=True)


@pytest.fixture(scope="module")
def net():
    """Shared by tests, which leave it as it is."""
    torch.manual_seed(0)
    return calibrate(attach(Outer(), CONFIG, example_inputs=X), [X]).eval()


@pytest.fixture
def path(net, tmp_path):
    return export_model(net, tmp_path, samples=X, verify=False).path


@pytest.mark.parametrize("format", ["packed", "torch", "onnx"])
def test_the_file_computes_what_the_model_computes(net, format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        # Runtimes multiply matrices: an einsum is none of theirs.
        torch.manual_seed(0)
        plain = nn.Sequential(Attention(), nn.ReLU(), nn.Linear(8, 3))
        net = calibrate(attach(plain, CONFIG, example_inputs=X), [X]).eval()
    export = export_model(net, tmp_path, format=format, samples=X)
    products = sum(len(module.product_operands) for _, module in modules_with_products(net))
    # Each operand's codes are compared, twice for the module that is called twice.
    assert export.verification.activations >= products + sum(1 for m in net.modules() if isinstance(m, nn.Linear))
    assert export.verification.largest_difference < 1e-4


def test_a_packed_file_builds_them_around_a_plain_network(net, tmp_path):
    path = export_model(net, tmp_path, samples=X).path
    plain = load_quantized(path, Outer())
    assert torch.equal(plain(X), net(X))
    assert [name for name, _ in modules_with_products(plain)] == ["", "inner"]


@pytest.mark.parametrize("format", ["packed", "torch"])
def test_a_module_whose_products_are_left_out_is_exported(format, tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(Attention(), Attention())
    config = CPQConfig(attention=True, ignore=["1", "1.*"])
    net = calibrate(attach(copy.deepcopy(plain), config, example_inputs=X), [X]).eval()
    path = export_model(net, tmp_path, format=format, samples=X).path
    if format == "packed":
        assert torch.equal(load_quantized(path, plain)(X), net(X))


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(products=3),
        lambda h: h["products"].append(h["products"][0]),
        lambda h: h["products"][0].update(module=5),
        lambda h: h["products"][0].update(plan=[1, 1, 1]),
        lambda h: h["products"][0].update(plan=[10**9]),
        lambda h: h["products"][0].update(plan=[1, 1]),
        lambda h: h["products"][0].update(plan=""),
        lambda h: h["products"][0].update(counts=[]),
        lambda h: h["products"][0].update(counts=[9]),
        lambda h: h["products"][0]["operands"].pop("0_left"),
        lambda h: h["products"][0]["operands"].update({"0_left": "u99"}),
        lambda h: h["products"][0]["operands"].update({"0_left": None}),
        lambda h: h["products"][0]["operands"].update({"0_left": 4}),
        lambda h: h.pop("products"),
    ],
)
def test_nonsense_about_products_is_refused(path, change):
    resigned(path, change)
    with pytest.raises(ValueError, match="damaged or was edited"):
        load_quantized(path, Outer())


def test_the_second_version_still_loads():
    """A file that version 2 of the format has written; it stays as it is."""
    path = Path(__file__).parent / "data" / "version_2.safetensors"
    x = torch.linspace(-1, 1, 2 * 6 * 8).reshape(2, 6, 8)
    expected = json.loads(path.with_suffix(".json").read_text())
    torch.testing.assert_close(load_quantized(path, Outer())(x), torch.tensor(expected), rtol=0, atol=1e-6)


def test_a_file_loads_whether_attention_is_fused_or_not(tmp_path):
    torch.manual_seed(0)
    net = calibrate(attach(Attention(), CONFIG, example_inputs=X), [X]).eval()
    path = export_model(net, tmp_path, samples=X).path
    torch.testing.assert_close(load_quantized(path, Attention(fused=False))(X), net(X))


def test_ranges_that_are_not_known_are_named(tmp_path):
    net = attach(Outer(), CONFIG, example_inputs=X)
    calibrate(net, [X])
    for name in ("0_left", "1_right"):
        net.product_operands[name].input_quantizer.configure(fitted=False)
    assert uncalled(net) == ["product_operands.0_left", "product_operands.1_right"]


@pytest.mark.parametrize("module", ["head.input_grid", "inner.product_operands.1_left", "inner.product_operands"])
def test_products_of_what_the_file_brings_are_refused(path, module):
    resigned(path, lambda h: h["products"][1].update(module=module))
    with pytest.raises(ValueError, match="quantizes the products of"):
        load_quantized(path, Outer())


def test_products_of_a_module_that_the_network_lacks_are_refused(path):
    resigned(path, lambda h: h["products"][1].update(module="other"))
    with pytest.raises(ValueError, match="quantizes the products of 'other'"):
        load_quantized(path, Outer())
