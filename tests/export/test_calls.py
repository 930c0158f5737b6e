"""Samples and outputs of any form in files of all formats: names, containers, constants, and what no file can hold."""

import copy
import dataclasses
import json
import pickle
from collections import OrderedDict, UserDict, namedtuple

import onnx
import onnxruntime
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils import _pytree

from cpq_lightning import CPQConfig, attach, calibrate, export_model, load_quantized
from cpq_lightning.export.calls import flat_outputs
from cpq_lightning.export.onnx.store import KEY
from cpq_lightning.export.sample_file import read_samples, write_samples
from cpq_lightning.export.samples import Samples
from cpq_lightning.export.table import export_table
from tests.marks import thorough

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.rand(12, 1, generator=torch.Generator().manual_seed(1))
Named = namedtuple("Named", "u v")
Unknown = namedtuple("Unknown", "u v")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    scale: float = 3.0


@dataclasses.dataclass
class Foreign:
    x: object


class Cache:
    """As transformers' are: an object with tensors."""


@dataclasses.dataclass
class Reply:
    logits: torch.Tensor
    loss: torch.Tensor | None
    more: Foreign


class Output(OrderedDict):
    """As transformers' are: a mapping that is registered without keys."""


if Output not in _pytree.SUPPORTED_NODES:
    _pytree.register_pytree_node(
        Output, lambda o: (list(o.values()), list(o)), lambda vs, ks: Output(zip(ks, vs, strict=True)),
        serialized_type_name="tests.Output",
    )  # fmt: skip
if Record not in _pytree.SUPPORTED_NODES:
    torch.export.register_dataclass(Record, serialized_type_name="tests.Record")
    _pytree._register_namedtuple(Named, serialized_type_name="tests.Named")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def net(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


class Rich(Net):
    """Containers in each other, arguments by name, constants, a tensor without a dimension; a dict with None in it."""

    def forward(self, batch, *rest, mask, gain, power=1.0, flag=False, note=None):
        logits = self.net(batch["image"][0]) * mask * gain**power + sum(rest) * flag
        return {"logits": logits, "more": (logits.sum(1), None, {"mask": mask * 2})}


class Keywords(Net):
    def forward(self, x, **more):
        return self.net(x) * more["mask"], more["mask"]


class OfOutput(Net):
    def forward(self, given):
        return Output(logits=self.net(given["x"]), mask=given["mask"] * 2)


class OfForeign(Net):
    """Returns containers that torch's pytree does not know."""

    def forward(self, x, **more):
        return Reply(self.net(x), None, Foreign((more["mask"], UserDict(x=x + 1))))


class OfNamed(Net):
    def forward(self, pair):
        return self.net(pair.u) + pair.v


class OfRecord(Net):
    def forward(self, record, mask):
        return self.net(record.x * record.scale) * mask


class Colliding(Net):
    """Its arguments and outputs have the names of each other, and of values inside the graph."""

    def forward(self, relu, val_3):
        return {"relu": self.net(relu), "linear": val_3 + 1}


RICH = Samples.called_with({"image": [X]}, MASK, mask=MASK, gain=torch.tensor(2.0), flag=True, note="a")


def trained(cls, samples):
    torch.manual_seed(0)
    model = attach(cls(), CPQConfig())
    args, kwargs = Samples.of(samples, model).call()
    return calibrate(model, [0], forward=lambda _: model(*args, **kwargs)).eval()


@pytest.mark.parametrize(
    ("cls", "samples"),
    [
        (Rich, RICH),
        (Keywords, {"x": X, "mask": MASK}),
        (OfNamed, Named(X, MASK)),
        (OfRecord, (Record(X), MASK)),
        (OfOutput, ({"x": X, "mask": MASK},)),
    ],
)
@pytest.mark.parametrize("format", ["packed", "torch"])
def test_pytorch_takes_and_returns_what_the_model_does(format, cls, samples, tmp_path):
    model = trained(cls, samples)
    written = export_model(model, tmp_path, format=format, samples=samples)
    if format == "packed":
        network = load_quantized(written.path, cls())
    else:
        program = torch.export.load(written.path)
        network = program.module()
        # They would be data.
        assert program.example_inputs is None
    args, kwargs = Samples.of(samples, model).first(5).call()
    torch.testing.assert_close(network(*args, **kwargs), model(*args, **kwargs))


def test_a_program_returns_dicts_in_place_of_containers_that_torch_does_not_know(tmp_path):
    samples = {"x": X, "mask": MASK}
    model = trained(OfForeign, samples)
    program = torch.export.load(export_model(model, tmp_path, format="torch", samples=samples).path).module()
    expected = model(**samples)
    torch.testing.assert_close(
        program(**samples),
        {"logits": expected.logits, "loss": None, "more": {"x": (MASK, {"x": X + 1})}},
    )


@pytest.mark.parametrize(
    ("cls", "samples", "inputs", "outputs"),
    [
        (Rich, RICH, ["batch.image.0", "rest.0", "mask", "gain"], ["logits", "more.0", "more.2.mask"]),
        (Colliding, (X, MASK), ["relu", "val_3"], ["output.relu", "linear"]),
        (OfForeign, {"x": X, "mask": MASK}, ["x", "mask"], ["logits", "more.x.0", "more.x.1.x"]),
        *thorough(
            (Keywords, {"x": X, "mask": MASK}, ["x", "mask"], ["output_0", "output_1"]),
            (OfNamed, Named(X, MASK), ["pair.u", "pair.v"], ["output"]),
            (OfRecord, (Record(X), MASK), ["record.x", "mask"], ["output"]),
            (OfOutput, (Output(x=X, mask=MASK),), ["given.0", "given.1"], ["logits", "mask"]),
        ),
    ],
)
def test_onnx_names_tensors_after_arguments_and_keys(cls, samples, inputs, outputs, tmp_path):
    model = trained(cls, samples)
    path = export_model(model, tmp_path, format="onnx", samples=samples).path
    session = onnxruntime.InferenceSession(path)
    assert [i.name for i in session.get_inputs()] == inputs
    assert [o.name for o in session.get_outputs()] == outputs
    few = Samples.of(samples, model).first(5)
    args, kwargs = few.call()
    found = session.run(None, {name: t.numpy() for name, t in zip(inputs, few.inputs, strict=True)})
    expected = flat_outputs(model(*args, **kwargs))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs.detach(), rtol=1e-3, atol=1e-3)
    constants = json.loads({p.key: p.value for p in onnx.load(path).metadata_props}[KEY])["constants"]
    assert constants == ({"flag": True, "note": "a"} if cls is Rich else Samples.of(samples, model).places(model)[1])


def test_constants_are_said_where_they_are_part_of_the_file(tmp_path, caplog):
    model = trained(Rich, RICH)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for format in ("packed", "torch"):
        console.print(export_table(export_model(model, tmp_path, format=format, samples=RICH)))
        told = "flag=True, note='a'"
        assert (f"constants of the torch file: {told}." in caplog.text) == (format == "torch")
        assert (f"the arguments {told}" in console.export_text()) == (format == "torch")


# What is refused -----------------------------------------------------------------------------------------------------


def returns(make):
    class Returning(Net):
        def forward(self, x):
            return make(self.net(x))

    return Returning


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda y: {"y": y, "names": ["a"]}, "the output 'names.0' of the model is str"),
        (lambda y: (y, (None, Foreign(Cache()))), "the output '1.1.x' of the model is Cache.*use_cache=False"),
        (lambda y: "a", "the output of the model is str"),
        (lambda y: (y, 3), "the output '1' of the model is int"),
        (lambda y: None, "returns no tensor"),
    ],
)
@pytest.mark.parametrize("format", ["packed", "torch", "onnx"])
def test_an_output_that_no_file_can_hold_is_named(format, make, words, tmp_path):
    with pytest.raises(TypeError, match=words):
        export_model(trained(returns(make), X), tmp_path, format=format, samples=X)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cls", "samples", "error", "words"),
    [
        (OfRecord, (Foreign(X), MASK), TypeError, "^samples: the argument 'record' is Foreign.*register_dataclass"),
        (OfRecord, (Record([Foreign(X)]), MASK), TypeError, "^samples: the argument 'record.x.0' is Foreign"),
        (OfNamed, {"pair": X, "other": X}, TypeError, r"^samples: OfNamed.forward\(pair\) cannot be called.*'other'"),
        (OfNamed, (1, 2), TypeError, r"^samples must be tensors, got \['int', 'int'\]"),
        (OfNamed, Named(X, MASK[:3]), ValueError, "^samples must be tensors with the same number of samples"),
        (OfNamed, {"u": X}, ValueError, r"^samples: the forward of OfNamed fails with them, which are pair.u: \(4,\)"),
    ],
)
def test_samples_that_the_model_cannot_take_are_named(cls, samples, error, words, tmp_path):
    model = trained(OfNamed, Named(X, MASK)) if cls is OfNamed else trained(OfRecord, (Record(X), MASK))
    with pytest.raises(error, match=words):
        export_model(model, tmp_path / "out", samples=samples)
    assert not (tmp_path / "out").exists()


def test_a_class_that_no_file_can_name_ships_packed_alone(tmp_path):
    model, samples = trained(OfNamed, (Unknown(X, MASK),)), (Unknown(X, MASK),)
    export_model(model, tmp_path, samples=samples)
    with pytest.raises(TypeError, match=r"^samples: an argument is .* that cannot be serialized.*Unknown"):
        export_model(model, tmp_path, format="torch", samples=samples)
    with pytest.raises(TypeError, match="cannot be serialized"):
        write_samples(Samples.of(samples), tmp_path / "samples.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


# Samples -------------------------------------------------------------------------------------------------------------


def same(one, other):
    return (
        one.form == other.form
        and one.real == other.real
        and all(a.equal(b) for a, b in zip(one.inputs, other.inputs, strict=True))
    )


@pytest.mark.parametrize("samples", [RICH, Samples.of((Named(X, Record(MASK)), X)), Samples.of({"x": X, "n": None})])
def test_samples_of_any_form_come_back_from_a_file_and_from_copies(samples, tmp_path):
    path = write_samples(samples, tmp_path / "x.safetensors")
    for other in (read_samples(path), copy.deepcopy(samples), pickle.loads(pickle.dumps(samples))):
        assert same(other, samples)


def test_batches_are_parts_of_the_same_call():
    sizes = [[tuple(t.shape) for t in batch.inputs] for batch in RICH.batches(8)]
    assert sizes == [[(8, 4), (8, 1), (8, 1), ()], [(4, 4), (4, 1), (4, 1), ()]]
    assert same(Samples.joined(RICH.batches(5)), RICH)
    args, kwargs = RICH.first(3).pair().call()
    assert args[0]["image"][0].equal(X[:2])
    assert (kwargs["flag"], kwargs["note"]) == (True, "a")
    other = Samples.called_with({"image": [X]}, MASK, mask=MASK, gain=torch.tensor(3.0), flag=True, note="a")
    with pytest.raises(ValueError, match="differs between batches"):
        Samples.joined([RICH, other])


def test_samples_for_the_arguments_of_others():
    model = Rich()
    fewer = Samples.called_with(batch={"image": [X[:2]]}, mask=MASK[:2], gain=torch.tensor(1.0))
    found = RICH.for_arguments_of(fewer, model)
    assert found.places(model) == (["batch.image.0", "mask", "gain"], {})
    assert len(found) == 12
    assert fewer.for_arguments_of(RICH, model) is None
