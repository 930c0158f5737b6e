"""``embeddings=True``: tables that are looked up, quantized by row."""

import copy

import pytest
import torch
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, coverage, detach, export_model, load_quantized
from cpq_lightning.attach import full_precision_copy, loading, quantized_layers
from cpq_lightning.attach.origin import late_layers

CONFIG = CPQConfig(embeddings=True)
TOKENS = torch.randint(0, 11, (8, 5), generator=torch.Generator().manual_seed(0))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.bag = nn.Embedding(11, 8, padding_idx=0, sparse=True), nn.EmbeddingBag(11, 8)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, tokens):
        return self.last(self.first(self.embed(tokens).mean(1) + self.bag(tokens)).relu())


def quantized(config=CONFIG):
    return calibrate(attach(Text(), config), [TOKENS])


def test_tables_are_quantized_by_row_at_the_width_of_inner_layers():
    layers = dict(quantized_layers(quantized()))
    shown = {n: (q.bits, q.settings.channels) for n, layer in layers.items() for q in [layer.weight_quantizer]}
    assert shown == {"embed": (4, 11), "bag": (4, 11), "first": (8, 8), "last": (8, 11)}
    assert [n for n, layer in layers.items() if layer.input_quantizer is None] == ["embed", "bag"]
    assert "embed" not in dict(quantized_layers(quantized(CPQConfig())))


def test_rows_are_looked_up_quantized_and_have_gradients():
    model = quantized()
    row = model.embed(torch.tensor([3]))
    assert row.equal(model.embed.weight_quantizer(model.embed.weight)[3:4])
    assert len(row.unique()) <= 16
    assert model.embed(torch.tensor([0])).abs().sum() == 0
    assert coverage(model, example_inputs=TOKENS).weights == 1
    model.train()(TOKENS).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert not model.embed.weight.grad.is_sparse


def test_states_copies_files_and_the_plain_model_again(tmp_path):
    model = quantized().eval()
    with loading():
        fresh = Text()
        fresh.load_state_dict(model.state_dict())
    for other in (fresh.eval(), copy.deepcopy(model)):
        assert other(TOKENS).equal(model(TOKENS))
        assert {n for n, _ in quantized_layers(other)} == {"embed", "bag", "first", "last"}
    for form, most in (("packed", 0), ("onnx", 1e-5)):
        written = export_model(model, tmp_path, format=form, samples=TOKENS)
        assert written.verification.largest_difference <= most
    assert load_quantized(tmp_path / "model.safetensors", Text())(TOKENS).equal(model(TOKENS))
    rows = model.embed.weight_quantizer(model.embed.weight).detach()
    plain = full_precision_copy(model)
    detach(model)
    for module in (plain, model):
        assert type(module.embed) is nn.Embedding
        assert module.embed.sparse
    assert model.embed.weight.equal(rows)


def test_an_embedding_that_shares_the_head_has_its_quantizer():
    model = Text()
    model.last = nn.Linear(8, 11)
    model.last.weight = model.embed.weight
    attach(model, CONFIG)
    assert model.embed.weight_quantizer is model.last.weight_quantizer
    assert {n for n, _ in quantized_layers(model)} == {"bag", "first", "last"}


def test_what_cannot_be_quantized_is_refused_and_what_is_left_out_stays():
    model = Text()
    model.embed.max_norm = 1.0
    with pytest.raises(ValueError, match=r"'embed' has max_norm=1.*ignore"):
        attach(model, CONFIG)
    attach(model, CPQConfig(embeddings=True, ignore=["embed"], overrides={"EmbeddingBag": {"weight_bits": 2}}))
    assert "embed" not in dict(quantized_layers(model))
    assert model.bag.weight_quantizer.bits == 2


def test_an_embedding_that_is_added_later_is_late():
    model = quantized()
    model.embed = nn.Embedding(11, 8)
    assert list(late_layers(model)) == ["embed"]
    other = quantized(CPQConfig())
    other.embed = nn.Embedding(11, 8)
    assert not late_layers(other)
    attach(model)
    assert "embed" in dict(quantized_layers(model))
