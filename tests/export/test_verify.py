"""A verification that finds what is wrong: it names the layer, and no file is left."""

import onnx
import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, export_model, extras
from cpq_lightning.attach.layers import quantized_layers
from cpq_lightning.export import export as shipping
from cpq_lightning.export.formats import FORMATS, Job
from cpq_lightning.export.integer_model import InputGrid
from cpq_lightning.export.runtimes import PackedArtefact
from cpq_lightning.export.samples import Samples
from cpq_lightning.export.table import export_table
from cpq_lightning.export.verify import MismatchError, verify
from tests.marks import thorough

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 36, 4),
    )  # fmt: skip


@pytest.fixture
def model():
    model = attach(net(), CPQConfig(first_last_bits=None))
    calibrate(model, [X])
    return model.eval()


def spoil_codes(artefact, layer="3", count=1):
    codes = artefact._codes[layer].reshape(-1)
    codes[:count] = codes[:count] - torch.where(codes[:count] > 0, 1, -1).to(codes.dtype)


def spoil_grid(artefact, layer="3", factor=1.01):
    grid = artefact.module.get_submodule(layer).input_grid
    grid.step *= factor


def spoil_top(artefact, layer="3"):
    grid = artefact.module.get_submodule(layer).input_grid
    grid.high -= 8


def spoil_weight(artefact, layer="0"):
    artefact.module.get_submodule(layer).weight.data += 0.05


def spoil_last(artefact):
    artefact.module.get_submodule("6").weight.data *= 1.01


def spoil_head(artefact):
    head = artefact.module.get_submodule("6")
    head.bias.data += torch.tensor([5.0, 0, 0, 0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_codes, r"1 of 2304 weight codes of layer '3' differ"),
        (spoil_grid, r"of the activation codes of layer '3' differ, computed from the trained model's values"),
        (spoil_top, r"codes of layer '3' are up to . levels apart"),
        (spoil_weight, r"of layer '3'"),
        (spoil_last, r"the part after the last quantized input differs"),
        (spoil_head, r"the part after the last quantized input differs"),
    ],
)
@pytest.mark.parametrize("format", ["packed"])
def test_each_kind_of_difference_is_found_and_leaves_no_file(format, spoil, message, model, tmp_path, monkeypatch):
    kind = FORMATS[format]

    def spoiled(job):
        artefact = kind.load(job)
        spoil(artefact)
        return artefact

    monkeypatch.setitem(FORMATS, format, kind._replace(load=spoiled))
    (tmp_path / "model.safetensors").write_bytes(b"older")
    with pytest.raises(MismatchError, match=message) as raised:
        export_model(model, tmp_path, format=format, samples=X)
    assert "model.safetensors was not written, it would not be the trained model" in str(raised.value)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"older"]


@pytest.mark.parametrize("container", ["int8", *thorough("int4")])
def test_a_changed_onnx_file_is_found(container, model, tmp_path):
    """Each number in the file counts: one changed in any of them, and the file is another model."""
    path = export_model(model, tmp_path, format="onnx", container=container, samples=X).path
    for part in ("weight_codes", "weight_scale", "bias", "scale"):
        graph = onnx.load(path)
        tensor = next(t for t in graph.graph.initializer if t.name.endswith(part))
        values = onnx.numpy_helper.to_array(tensor).reshape(-1)
        values = values[::-1] if part == "weight_codes" else values * values.dtype.type(1.3)
        changed = onnx.numpy_helper.from_array(values.reshape(tuple(tensor.dims)).copy(), tensor.name)
        assert changed.data_type == tensor.data_type
        tensor.CopyFrom(changed)
        onnx.save(graph, tmp_path / "changed.onnx")
        artefact = FORMATS["onnx"].load(Job(model, tmp_path / "changed.onnx", Samples.of(X)))
        with pytest.raises(MismatchError):
            verify(model, artefact, Samples.of(X))


def test_a_program_with_other_codes_is_found(model, tmp_path):
    path = export_model(model, tmp_path, format="torch", samples=X).path
    artefact = FORMATS["torch"].load(Job(model, path, Samples.of(X)))
    verify(model, artefact, Samples.of(X))
    with torch.no_grad():
        artefact.program.state_dict["3.input_grid.step"].mul_(1.02)
    with pytest.raises(MismatchError, match="layer '3'"):
        verify(model, artefact, Samples.of(X))


def test_the_layers_of_an_artefact_go_on_from_what_they_are_given(model, tmp_path):
    """Layers are compared one by one: an early difference is not blamed on the layers behind it."""
    path = export_model(model, tmp_path, samples=X).path
    artefact = PackedArtefact(path, net())
    spoil_weight(artefact, "3")
    with pytest.raises(MismatchError, match="layer '6'"):
        verify(model, artefact, Samples.of(X))


class Auxiliary(nn.Module):
    """With a second head, which only training uses."""

    def __init__(self):
        super().__init__()
        self.first, self.head, self.auxiliary = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        features = self.first(x).relu()
        return (self.head(features), self.auxiliary(features)) if self.training else self.head(features)


def test_layers_that_only_training_uses_are_left_out_with_a_word(tmp_path, caplog):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    model = attach(Auxiliary(), CPQConfig(first_last_bits=None))
    calibrate(model, [x], forward=lambda _: model.train()(x))
    written = export_model(model, tmp_path, format="onnx", samples=x)
    assert written.verification.left_out == ("auxiliary",)
    assert written.verification.weights == 2
    assert "does not use the layers auxiliary with these samples" in caplog.text
    named, shown = (list(column.cells) for column in export_table(written).columns)
    assert shown[named.index("left out, as unused  ")] == "auxiliary"


def test_synthetic_samples_are_called_so(model, tmp_path):
    from rich.console import Console

    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    written = export_model(model, tmp_path, samples=Samples.synthetic([[3, 8, 8]]))
    console.print(export_table(written))
    assert not written.verification.real
    assert "of 16 synthetic samples" in console.export_text(clear=False)
    written = export_model(model, tmp_path, samples=X, verify=False)
    console.print(export_table(written))
    assert written.verification is None
    assert "switched off: the file was not compared with the trained model" in console.export_text()


def test_int8_falls_back_to_the_exact_form(model, tmp_path, monkeypatch, caplog):
    tried = []
    real = verify

    def strict(model, artefact, samples):
        tried.append(artefact)
        if len(tried) == 1:
            raise MismatchError("The classes agree on 90.0% of 64 samples.")
        return real(model, artefact, samples)

    monkeypatch.setattr(shipping, "verify", strict)
    with caplog.at_level("WARNING", "cpq_lightning"):
        written = export_model(model, tmp_path, format="onnx", samples=X)
    assert "Written once more without integer biases" in caplog.text
    assert len(tried) == 2
    graph = onnx.load(written.path)
    assert not any(i.name.endswith("bias_codes") for i in graph.graph.initializer)


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_ship_says_why(tmp_path):
    with pytest.raises(ValueError, match="is not quantized: expected one that"):
        export_model(net(), tmp_path, samples=X)
    model = attach(net(), CPQConfig())
    with pytest.raises(ValueError, match="ranges of activations are not known"):
        export_model(model, tmp_path, samples=X)
    calibrate(model, [X])
    for _, layer in quantized_layers(model):
        layer.weight_quantizer.configure(active=False)
    with pytest.raises(ValueError, match="Quantization has not begun in layer '0'"):
        export_model(model, tmp_path, samples=X)
    assert list(tmp_path.iterdir()) == []


def test_arguments_are_checked(model, tmp_path):
    for settings, message in (
        ({"format": "tflite"}, "format must be one of"),
        ({"container": "int2"}, "container must be one of"),
        ({"name": "../x"}, "name must be a file's name"),
        ({"samples": torch.zeros(0, 3, 8, 8)}, "at least one"),
        ({"samples": (X, X[:2])}, "the same number of samples"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(model, tmp_path, **({"samples": X} | settings))
    with pytest.raises(TypeError, match="samples must be tensors, got"):
        export_model(model, tmp_path, samples=[1, 2])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_how_to_install_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "requirements", lambda extra: [Requirement("no-such-runtime>=1.20")])
    message = r"ONNX needs no-such-runtime>=1.20 \(not installed\): pip install 'no-such-runtime>=1.20'$"
    with pytest.raises(ImportError, match=message):
        export_model(model, tmp_path, format="onnx", samples=X)


def test_the_model_is_left_as_it_was(model, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    for format in ("packed", "torch", "onnx"):
        export_model(model, tmp_path, format=format, samples=X)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, InputGrid) for m in model.modules())
