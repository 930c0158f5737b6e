"""The packed file: small, whole or not there, and refused with a reason where anything about it is wrong."""

import json
import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from benchmarks.processes import SERVER
from cpq_lightning import CPQConfig, attach, calibrate, export_model, load_quantized
from cpq_lightning.attach.layers import quantized_layers
from cpq_lightning.export.packed import KEY, write_packed
from cpq_lightning.export.read import read_packed
from tests.models import convnet, quantized_weight

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
MIXED = CPQConfig(weight_bits=8, min_bits=1, learn_bits=True, act_bits=4, first_last_bits=None)


def quantized(model=None, config=MIXED, x=IMAGES):
    model = attach(convnet() if model is None else model, config)
    calibrate(model, [x])
    for _, layer in quantized_layers(model):
        logit = layer.weight_quantizer.gates.logit
        if logit is not None:
            logit.data.uniform_(-4, 4)
    return model.eval()


@pytest.fixture
def written(tmp_path):
    model = quantized()
    return model, write_packed(model, tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        MIXED,
        CPQConfig(weight_bits=1, act_bits=1, first_last_bits=None),
        CPQConfig(weight_bits=5, per_channel=True),
        CPQConfig(weight_bits=7, min_bits=2, learn_bits=True, learn_act_bits=True, gate_sharing="channel"),
        CPQConfig(weight_bits=3, act_bits=None),
        CPQConfig(weight_bits=4, ignore=["3"]),
    ],
    ids=["mixed", "one bit", "steps by channel", "widths by channel", "weights only", "a layer left out"],
)
def test_weights_are_identical_and_outputs_equal(config, tmp_path):
    model = quantized(config=config)
    loaded = load_quantized(write_packed(model, tmp_path / "net.safetensors"), convnet())
    for name, layer in quantized_layers(model):
        assert torch.equal(loaded.get_submodule(name).weight, quantized_weight(layer))
    assert (loaded(IMAGES) - model(IMAGES)).abs().max() <= 1e-5


class Odd(nn.Module):
    """Kinds of layers, a weight that two of them share, an embedding that is tied to another, a layer called twice."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.embedding, self.head = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.up(self.one(x)).relu()
        x = self.b(self.a(self.a(x.mean(1)))) + self.embedding(x.new_zeros((), dtype=torch.int64))
        return self.head(x)


def test_shared_weights_and_odd_layers(tmp_path):
    x = torch.randn(6, 4, 4)
    model = quantized(Odd(), CPQConfig(weight_bits=3, act_bits=4, per_channel=False, first_last_bits=None), x)
    path = write_packed(model, tmp_path / "odd.safetensors")
    loaded = load_quantized(path, Odd())
    assert (loaded(x) - model(x)).abs().max() <= 1e-5
    assert loaded.embedding.weight is loaded.head.weight
    assert loaded.a.weight is loaded.b.weight
    assert sum("weight_codes" in name for name in read_packed(path).tensors) == 4


def test_three_bits_are_three_bits_on_disk(tmp_path):
    model = timm.create_model("resnet18")
    attach(model, CPQConfig(weight_bits=3, act_bits=None, first_last_bits=None))
    path = write_packed(model.eval(), tmp_path / "resnet18.safetensors")
    size = path.stat().st_size
    rest = sum(4 * p.numel() for n, p in model.state_dict().items() if "quantizer" not in n and "bn" in n)
    weights = sum(layer.weight.numel() for _, layer in quantized_layers(model))
    # All but what is not a quantized weight: batch norms, biases and the header are the 'rest'.
    content = read_packed(path)
    codes = sum(t.numel() for n, t in content.tensors.items() if n.endswith("weight_codes"))
    assert 8 * codes / weights <= 3.05
    assert 8 * (size - rest) / weights <= 3.15


def test_nothing_is_unpickled_and_lightning_is_not_needed(written, tmp_path):
    model, path = written
    torch.save(model(IMAGES), tmp_path / "expected.pt")
    code = f"""
import sys
for name in ("lightning", "pytorch_lightning", "jsonargparse"):
    sys.modules[name] = None
import pickle, torch
from cpq_lightning import load_quantized
from tests.models_plain import convnet
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
def refused(*args, **kwargs):
    raise AssertionError("unpickled")
pickle.Unpickler = pickle.load = pickle.loads = pickle._Unpickler = refused
torch.load = torch.serialization.load = refused
torch.manual_seed(0)
x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
assert (load_quantized({str(path)!r}, convnet())(x) - expected).abs().max() <= 1e-5
"""
    code = code.replace("from tests.models_plain import convnet", CONVNET)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


CONVNET = """
from torch import nn
def convnet(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 4))
"""


# Damage --------------------------------------------------------------------------------------------------------------


def corrupted(data, r):
    """One way in which a file goes wrong."""
    data = bytearray(data)
    kind = r.choice(["truncate", "flip", "flip in header", "overwrite", "length", "digit", "drop", "append", "swap"])
    place = r.randrange(len(data))
    (length,) = struct.unpack("<Q", data[:8])
    if kind == "truncate":
        return bytes(data[:place])
    if kind == "flip":
        data[place] ^= 1 << r.randrange(8)
    elif kind == "flip in header":
        data[r.randrange(8 + length)] ^= 1 << r.randrange(8)
    elif kind == "overwrite":
        size = r.randrange(1, 64)
        data[place : place + size] = r.randbytes(size)
    elif kind == "length":
        data[r.randrange(8)] = r.randrange(256)
    elif kind == "digit":
        digits = [i for i in range(8, 8 + length) if 48 <= data[i] < 58]
        data[r.choice(digits)] = r.randrange(48, 58)
    elif kind == "drop":
        del data[place : place + r.randrange(1, 64)]
    elif kind == "append":
        data += r.randbytes(r.randrange(1, 64))
    else:
        other = r.randrange(len(data))
        data[place], data[other] = data[other], data[place]
    return bytes(data)


def test_a_thousand_corruptions_are_refused(written, tmp_path):
    _, path = written
    data, target = path.read_bytes(), tmp_path / "bad.safetensors"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tried = 0
    for seed in range(1100):
        bad = corrupted(data, random.Random(seed))
        if bad == data:
            continue
        target.write_bytes(bad)
        with pytest.raises(ValueError, match=r"(is damaged or was edited|is no packed model of cpq-lightning): "):
            load_quantized(target, convnet())
        tried += 1
    assert tried >= 1000
    # In kilobytes; the file has some ten.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def edited(path, change):
    """A file whose JSON was changed by somebody who knows safetensors, but not the checksum."""
    with safetensors.safe_open(path, "pt") as file:
        signature, _, text = file.metadata()[KEY].partition("\n")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(text)
    change(header)
    safetensors.torch.save_file(tensors, path, metadata={KEY: f"{signature}\n{json.dumps(header)}"})


def test_an_edited_header_is_refused(written):
    _, path = written
    edited(path, lambda header: header["layers"][0].update(bits=2))
    with pytest.raises(ValueError, match="was edited: the checksum of its header does not match"):
        load_quantized(path, convnet())


def resigned(path, change):
    """A file as another version might write it: changed, and signed."""
    import hashlib

    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[KEY].partition("\n")[2])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header)
    text = json.dumps(header)
    signed = f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"
    safetensors.torch.save_file(tensors, path, metadata={KEY: signed})


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(version=[1]),
        lambda h: h.update(version=True),
        lambda h: h.pop("layers"),
        lambda h: h.pop("sha256"),
        lambda h: h.pop("rest"),
        lambda h: h.update(architecture=3),
        lambda h: h.update(rest=["nothing"]),
        lambda h: h["rest"]["float32"].update(nothing=[3]),
        lambda h: h["rest"]["float32"].update({"0.bias": [-8]}),
        lambda h: h["rest"]["float32"].update({"0.bias": [8.0]}),
        lambda h: h["rest"].update(nothing={"0.bias": [8]}),
        lambda h: h["layers"].append(h["layers"][0]),
        lambda h: h["layers"][0].update(bits=[]),
        lambda h: h["layers"][0].update(bits="4"),
        lambda h: h["layers"][0].update(bits=0),
        lambda h: h["layers"][0].update(shape=[8, -3, 3, 3]),
        lambda h: h["layers"][0].update(shape=[2**40, 2**20]),
        lambda h: h["layers"][0].update(shape=[2**2000, 2**20]),
        lambda h: h["layers"][0].update(channel_dim=7),
        lambda h: h["layers"][0].update(steps=3),
        lambda h: h["layers"][0].update(group_size=4),
        lambda h: h["layers"][-1].update(group_size=-1),
        lambda h: h["layers"][-1].update(group_size="4"),
        lambda h: h["layers"][-1].update(group_size=4),
        lambda h: h["layers"][0].update(source="nothing"),
        lambda h: h["layers"][0].update(input="u99"),
        lambda h: h["layers"][0].update(input="4"),
        lambda h: h["layers"][0].update(input=""),
        lambda h: h["layers"][0].update(input=4),
        lambda h: h.update(tied={"0.bias": "nothing"}),
        lambda h: h.update(tied=["3"]),
    ],
)
def test_a_signed_header_that_describes_no_model_is_refused(change, written):
    _, path = written
    resigned(path, change)
    with pytest.raises(ValueError, match=r"is damaged or was edited: |of the packed format"):
        load_quantized(path, convnet())


def test_arguments_that_do_not_fit_the_file_allocate_nothing(tmp_path):
    model = attach(timm.create_model("test_resnet", num_classes=10), CPQConfig(act_bits=None)).eval()
    known = {"timm": "test_resnet", "arguments": {"num_classes": 10}}
    path = write_packed(model, tmp_path / "net.safetensors", architecture=known)
    for arguments, message in (
        ({"num_classes": 100_000_000}, r"has the shape .* in the file and \(100000000"),
        ({"num_classes": 10, "nothing": 1}, "arguments that timm does not accept"),
    ):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resigned(path, lambda h, a=arguments: h["architecture"].update(arguments=a))
        with pytest.raises(ValueError, match=message):
            load_quantized(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_newer_version_names_who_reads_it(written):
    _, path = written
    resigned(path, lambda header: header.update(version=6, written_by="cpq-lightning 9.1"))
    with pytest.raises(
        ValueError, match=r"version 6 of the packed format, written by cpq-lightning 9\.1; .* version 1, 2, 3, 4, 5"
    ):
        load_quantized(path, convnet())


def test_a_file_that_would_load_others_is_refused(written):
    _, path = written
    for name, arguments in (("hf-hub:somebody/net", {}), ("resnet18", {"checkpoint_path": "weights.pth"})):
        resigned(path, lambda h, n=name, a=arguments: h.update(architecture={"timm": n, "arguments": a}))
        with pytest.raises(ValueError, match="would load other files"):
            load_quantized(path)


def test_an_unknown_architecture_names_its_timm(written):
    _, path = written
    resigned(path, lambda h: h.update(architecture={"timm": "resnet18x", "arguments": {}, "version": "7.0"}))
    with pytest.raises(ValueError, match=r"'resnet18x', which timm .* does not have: install the timm .*7\.0"):
        load_quantized(path)


def test_another_network_is_refused_by_its_first_difference(written):
    _, path = written
    with pytest.raises(ValueError, match=r"'0\.bias' has the shape \(8,\) in the file and \(9,\) in the network"):
        load_quantized(path, convnet(9))


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is no packed model of cpq-lightning: its metadata has no entry"):
        load_quantized(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes are no safetensors file"):
        load_quantized(path)
    with pytest.raises(FileNotFoundError):
        load_quantized(tmp_path / "nothing.safetensors")


def test_no_architecture_asks_for_the_network(written):
    _, path = written
    with pytest.raises(ValueError, match="names no timm architecture: give the network"):
        load_quantized(path)


def test_the_first_version_still_loads():
    """A file that version 1 of the format has written; it stays as it is."""
    path = Path(__file__).parent / "data" / "version_1.safetensors"
    loaded = load_quantized(path, nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3)))
    x = torch.linspace(-1, 1, 2 * 2 * 9).reshape(2, 2, 3, 3)
    expected = json.loads(path.with_suffix(".json").read_text())
    torch.testing.assert_close(loaded(x), torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", [3, 4])
def test_files_of_versions_three_and_four_are_read(version):
    """Version 3 knew signed and unsigned grids; the file of version 4 has offset and balanced ones."""
    path = Path(__file__).parent / "data" / f"version_{version}.safetensors"
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(4, 3))
    x = torch.linspace(-1, 1, 2 * 2 * 9).reshape(2, 2, 3, 3)
    expected = json.loads(path.with_suffix(".json").read_text())
    torch.testing.assert_close(load_quantized(path, network)(x), torch.tensor(expected), rtol=0, atol=1e-6)
    assert read_packed(path).header["version"] == version


def test_attention_of_the_fourth_version_is_read_as_it_was_written():
    """It multiplied by its in-projection in full precision, inside of torch's attention."""
    path = Path(__file__).parent / "data" / "version_4_attention.safetensors"
    network = nn.Sequential(
        nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True), nn.Linear(4, 2)
    )
    x = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    expected = json.loads(path.with_suffix(".json").read_text())
    torch.testing.assert_close(load_quantized(path, network)(x), torch.tensor(expected), rtol=0, atol=1e-6)


# Writing -------------------------------------------------------------------------------------------------------------


def write_again_and_again(folder):
    model = attach(timm.create_model("test_resnet", num_classes=10), CPQConfig(act_bits=None)).eval()
    known = {"timm": "test_resnet", "arguments": {"num_classes": 10}}
    while True:
        export_model(model, folder, name="net", architecture=known, samples=torch.zeros(1, 3, 32, 32), verify=False)


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "net.safetensors"
    writer = SERVER.Process(target=write_again_and_again, args=(tmp_path,))
    writer.start()
    try:
        seen = 0
        end = time.monotonic() + 60
        while seen < 20 and time.monotonic() < end:
            if path.exists():
                assert load_quantized(path)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
                seen += 1
        assert seen
    finally:
        writer.kill()
        writer.join()
    load_quantized(path)
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {path.name}


def test_a_failed_write_leaves_what_was_there(written, monkeypatch):
    _, path = written
    before = path.read_bytes()

    def broken(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    with pytest.raises(OSError, match="No space left"):
        export_model(quantized(), path.parent, name="net", samples=IMAGES)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


class Twice(nn.Module):
    """A layer and a norm under two names, as CoaT's blocks share their position encoding."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.again, self.head = self.first, nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.again(self.first(x)))


def test_a_module_under_several_names_is_stored_once(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    net = calibrate(attach(Twice()), [x]).eval()
    export = export_model(net, tmp_path, samples=x)
    with safetensors.safe_open(export.path, "pt") as file:
        assert not [name for name in file.keys() if name.startswith("again")]  # noqa: SIM118
    plain = load_quantized(export.path, Twice())
    assert plain.first is plain.again
    assert torch.equal(plain(x), net(x))
