"""Samples in a file: what is read is what was written, and anything else is refused in a sentence."""

import json

import pytest
import safetensors.torch
import torch

from cpq_lightning.export.packed import KEY
from cpq_lightning.export.sample_file import read_samples, write_samples
from cpq_lightning.export.samples import Samples


def test_what_was_written_is_read(tmp_path):
    shared = torch.randn(4, 3, 5)
    inputs = (shared, shared, torch.arange(8).reshape(2, 4).T, torch.tensor([True, False] * 2))
    for real in (True, False):
        read = read_samples(write_samples(Samples(inputs, real), tmp_path / "new" / "x.safetensors"))
        assert read.real == real
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(read.inputs, inputs, strict=True))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def edited(path, tensors=None, **changes):
    with safetensors.safe_open(path, "pt") as file:
        header, found = json.loads(file.metadata()[KEY]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = {KEY: json.dumps(header | changes)}
    safetensors.torch.save_file(found if tensors is None else tensors, path, metadata=metadata)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def foreign(path):
    safetensors.torch.save_file({"input.0": torch.zeros(2, 3)}, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b""), "safetensors cannot read it"),
        (truncated, "safetensors cannot read it"),
        (flipped, "do not match the checksums in its header"),
        (foreign, "its header is not that of samples"),
        (lambda path: edited(path, format="cpq-lightning-packed"), "its header is not that of samples"),
        (lambda path: edited(path, sha256=None), "do not match the checksums in its header"),
        (lambda path: edited(path, tensors={"other": torch.zeros(2)}), "do not match the checksums in its header"),
        (lambda path: edited(path, version=3), "is of version 3 of the file of samples"),
    ],
)
def test_a_file_that_is_none_of_ours_or_damaged_is_refused(tmp_path, damage, words):
    path = write_samples(Samples.of(torch.randn(2, 3)), tmp_path / "x.safetensors")
    damage(path)
    with pytest.raises(ValueError, match=f"^samples={path} .*{words}"):
        read_samples(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no file: expected a file of samples"):
        read_samples(tmp_path)
