"""An ONNX file is right on every processor: also on those that add two products of bytes in 16 bits.

x86 without VNNI saturates such a sum if the weights are signed bytes. ARM without the dot-product instructions lets it
overflow, which changes its sign.
"""

import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, export_model
from cpq_lightning.export.onnx import write
from cpq_lightning.export.onnx.pairs import cut_off
from cpq_lightning.export.onnx.runtime import OnnxArtefact
from cpq_lightning.export.samples import Samples
from cpq_lightning.export.verify import MismatchError, verify
from tests.models import Branches

# What its tests share takes seconds to make.
pytestmark = pytest.mark.xdist_group("processors")

IMAGES = 2 * torch.rand(8, 32, 8, 8, generator=torch.Generator().manual_seed(0))
W8A8 = CPQConfig(weight_bits=8, act_bits=8)


class Net(nn.Module):
    """Each form of an integer product, in the order in which they run: a convolution in front of a quantizer, as
    matrices in front of a sum, a linear layer. Weights of an output have one sign: products cancel nothing.
    """

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))
        self.hidden, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
        generator = torch.Generator().manual_seed(1)
        for layer in (self.first, self.second, self.third, self.hidden, self.head):
            sign = torch.ones(len(layer.weight)).where(torch.rand(len(layer.weight), generator=generator) < 0.5, -1.0)
            layer.weight.data = layer.weight.data.abs() * sign.reshape(-1, *[1] * (layer.weight.dim() - 1))

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(x + self.third(torch.relu(self.second(x))))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


def quantized(model, config, x=IMAGES):
    torch.manual_seed(0)
    return calibrate(attach(model, config), [x]).eval()


def shipped(model, folder, x=IMAGES, **settings):
    return export_model(model, folder, format="onnx", samples=x, **settings).path


def as_before(model, folder, monkeypatch):
    """A file whose weights are all signed, as they were once written; not verified."""
    with monkeypatch.context() as patch:
        patch.setattr(write, "use_unsigned_bytes", lambda graph: None)
        return shipped(model, folder, name="signed", verify=False)


def initializers(graph):
    return {i.name: onnx.numpy_helper.to_array(i) for i in graph.graph.initializer}


def kernels(path, folder):
    """Of each integer kernel that ONNX Runtime runs: the matrix that it multiplies by, (summed up, outputs), and the
    largest byte that it multiplies.
    """
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options)
    graph = onnx.load(options.optimized_model_filepath)
    known, made = initializers(graph), {name: node for node in graph.graph.node for name in node.output}
    for node in graph.graph.node:
        if node.op_type in ("QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat"):
            weight = known[node.input[1 if node.op_type == "MatMulIntegerToFloat" else 3]]
            before = made.get(node.input[0])
            while before is not None and before.op_type not in ("Clip", "QuantizeLinear", "QLinearConv"):
                before = made.get(before.input[0])
            top = int(known[before.input[2]]) if before is not None and before.op_type == "Clip" else 255
            yield node.op_type, weight.reshape(len(weight), -1).T if weight.ndim == 4 else weight, top


def signed_levels(weight):
    return weight.astype(np.int64) - (128 if weight.dtype == np.uint8 else 0)


def largest_pair(weight, byte):
    """The largest sum of two products by trying all pairs of the largest weights of an output."""
    magnitudes = [np.sort(np.where(sign * weight > 0, abs(weight), 0), axis=0)[-2:].sum(0) for sign in (1, -1)]
    return byte * int(np.max(magnitudes))


def saturating(bytes_, weight):
    """What a kernel computes that adds two neighbouring products in 16 bits and cuts off."""
    products = bytes_[:, :, None] * weight[None]
    if products.shape[1] % 2:
        products = np.pad(products, ((0, 0), (0, 1), (0, 0)))
    pairs = products[:, ::2] + products[:, 1::2]
    return pairs.clip(-(2**15), 2**15 - 1).sum(1)


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory):
    model, folder = quantized(Net(), W8A8), tmp_path_factory.mktemp("eight")
    with pytest.MonkeyPatch.context() as patch:
        return model, shipped(model, folder), as_before(model, folder, patch)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Four bits, and eight in the first and last layer, which are the default."""
    model = quantized(Net(), CPQConfig())
    return model, shipped(model, tmp_path_factory.mktemp("usual"))


# What is stored ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["usual", "eight_bits"])
def test_two_signed_products_are_never_more_than_16_bits_hold(file, request, tmp_path):
    path, found = request.getfixturevalue(file)[1], []
    for kind, weight, top in kernels(path, tmp_path):
        found.append((kind, weight.dtype))
        if weight.dtype == np.int8:
            # Where the sign bit of bytes is flipped, 0 is -128.
            assert largest_pair(weight.astype(int), max(top, 128)) <= 2**15 - 1
    assert {kind for kind, _ in found} == {"QLinearConv", "MatMulIntegerToFloat"}
    assert len(found) == 5
    dtypes = {np.dtype("uint8")} if file == "eight_bits" else {np.dtype("uint8"), np.dtype("int8")}
    assert {dtype for _, dtype in found} == dtypes


@pytest.mark.parametrize("file", ["usual", "eight_bits"])
def test_emulated_saturation_changes_nothing_that_is_stored_signed(file, request, tmp_path):
    generator = np.random.default_rng(0)
    for _, weight, top in kernels(request.getfixturevalue(file)[1], tmp_path):
        levels = signed_levels(weight)
        bytes_ = np.concatenate([generator.integers(0, top + 1, (4, len(levels))), np.full((1, len(levels)), top)])
        exact = bytes_ @ levels
        # Kernels order what they sum up in their own ways: as the file has it, at random, the largest together.
        for order in (np.arange(len(levels)), generator.permutation(len(levels)), np.argsort(levels[:, 0])):
            same = (saturating(bytes_[:, order], levels[order]) == exact).all()
            assert same == (weight.dtype == np.int8)


def test_weights_that_fit_stay_signed(tmp_path):
    dtypes = {(8, 8): np.uint8, (7, 8): np.int8, (8, 7): np.int8, (4, 8): np.int8}
    names = {f"w{weight_bits}a{act_bits}": (weight_bits, act_bits) for weight_bits, act_bits in dtypes}
    overrides = {name: {"weight_bits": w, "act_bits": a} for name, (w, a) in names.items()}
    torch.manual_seed(0)
    model = quantized(
        Branches({name: nn.Conv2d(32, 4, 3) for name in names}),
        CPQConfig(first_last_bits=None, per_channel=False, overrides=overrides),
    )
    content = initializers(onnx.load(shipped(model, tmp_path)))
    assert {bits: content[f"{name}.weight_codes"].dtype for name, bits in names.items()} == dtypes


def test_two_weights_of_the_lowest_level_are_too_much_where_bytes_are_made_signed(tmp_path):
    """There -128 · -128 + -128 · -128 is one more than 16 bits hold, however few bits the activations have."""
    model = Branches({"one": nn.Conv2d(32, 4, 3), "two": nn.Conv2d(32, 4, 3)})
    with torch.no_grad():
        model["one"].weight.mul_(0.1)[0, :1, 0, 0] = -50.0
        model["two"].weight.mul_(0.1)[0, :2, 0, 0] = -50.0
    config = CPQConfig(weight_bits=8, act_bits=4, weight_range="max", first_last_bits=None, per_channel=False)
    path = shipped(quantized(model, config), tmp_path)
    content, codes = initializers(onnx.load(path)), OnnxArtefact(path).weight_codes()
    for name, lowest, dtype in (("one", 1, np.int8), ("two", 2, np.uint8)):
        assert content[f"{name}.weight_codes"].dtype == dtype
        assert int((codes[name] == -128).sum()) == lowest


# What computes it ----------------------------------------------------------------------------------------------------

CHILD = """
import sys
import numpy as np, onnxruntime
images = np.load(sys.argv[1])
for path in sys.argv[2:]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    print(*session.run(None, {"input": images})[0].ravel().tolist())
"""


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Runs files in processes that take this processor for an older one."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("hiding what a processor can do takes Linux on x86 and a C compiler")
    folder = tmp_path_factory.mktemp("masked")
    source, library = Path(__file__).with_name("without_vnni.c"), folder / "without_vnni.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    np.save(folder / "images.npy", IMAGES.numpy())

    def run(hide, *files):
        environment = os.environ | {"LD_PRELOAD": str(library), "HIDE": hide, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", CHILD, folder / "images.npy", *files]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode == 77:
            pytest.skip("this machine does not let a process answer CPUID itself")
        assert done.returncode == 0, done.stderr
        return [torch.tensor([float(word) for word in line.split()]).reshape(8, 4) for line in done.stdout.splitlines()]

    return run


@pytest.mark.parametrize("hide", ["vnni", "avx512"])
def test_files_are_right_on_x86_without_vnni(hide, usual, eight_bits, masked):
    """Signed, the weights of eight bits are not: that such a processor is at work."""
    expected = usual[0](IMAGES).detach(), eight_bits[0](IMAGES).detach()
    four, eight, signed = masked(hide, usual[1], *eight_bits[1:])
    torch.testing.assert_close(four, expected[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(eight, expected[1], rtol=0.02, atol=0.02)
    assert (signed - expected[1]).abs().max() > 0.1


@pytest.mark.parametrize("at_fault", ["processor", "file"])
def test_the_verification_tells_saturation_from_other_faults_by_name(at_fault, eight_bits, monkeypatch):
    """Stands in for a processor that cuts off: other codes where two products are more than 16 bits hold."""
    model, path, signed = eight_bits
    # The file that is right on every processor, so that this machine may be one that cuts off.
    compute = functools.partial(OnnxArtefact.codes, OnnxArtefact(path))

    def wrong(artefact, inputs, given):
        codes, outputs = compute(inputs, given)
        if at_fault == "file" or cut_off(artefact._graph):
            codes["third", 0] = codes["third", 0] + 2
        return codes, outputs

    monkeypatch.setattr(OnnxArtefact, "codes", wrong)
    difference = "Activation codes of layer 'third' are up to 2 levels apart"
    with pytest.raises(MismatchError, match=difference) as raised:
        verify(model, OnnxArtefact(signed), Samples.of(IMAGES))
    name = "Integer products saturate on this processor"
    if at_fault == "file":
        assert name not in str(raised.value)
        with pytest.raises(MismatchError, match=f"^{difference}"):
            verify(model, OnnxArtefact(path), Samples.of(IMAGES))
    else:
        assert str(raised.value).startswith(name)
        assert "of the layers 'first', 'second', 'third', 'hidden', 'head'. With those" in str(raised.value)
        verify(model, OnnxArtefact(path), Samples.of(IMAGES))
