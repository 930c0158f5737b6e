"""Weights that a quantized layer shares with a module that only reads them, such as an embedding."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cpq_lightning
from cpq_lightning import CPQConfig, attach, calibrate, detach
from cpq_lightning.attach.layers import quantizers
from tests.models import quantized_weight

TOKENS = torch.arange(40).reshape(8, 5)
CONFIG = CPQConfig(weight_bits=3, first_last_bits=None)


class Own(nn.Module):
    """An embedding of somebody's own."""

    def __init__(self, rows=40, size=16):
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, size))

    def forward(self, tokens):
        return self.table[tokens] * 2


class Text(nn.Module):
    """An embedding, and the head that is tied to it."""

    def __init__(self, embedding=None):
        super().__init__()
        self.embedding = embedding or nn.Embedding(40, 16)
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 40)
        self.head.weight = next(self.embedding.parameters())

    def forward(self, tokens):
        return self.head(torch.relu(self.body(self.embedding(tokens))))


def text(config=CONFIG, embedding=None):
    torch.manual_seed(0)
    return calibrate(attach(Text(embedding), config), [TOKENS])


EMBEDDINGS = {
    "embedding": lambda: nn.Embedding(40, 16, padding_idx=3),
    "sparse": lambda: nn.Embedding(40, 16, sparse=True),
    "bag": lambda: nn.EmbeddingBag(40, 16, mode="mean"),
    "own": Own,
}


@pytest.mark.parametrize("make", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_what_is_tied_to_a_layer_reads_its_weight_quantized_and_trains_it(make):
    plain = Text(make())
    model = text(embedding=make())
    assert model.embedding.weight_quantizer is model.head.weight_quantizer
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
    with torch.no_grad():
        plain.head.weight.copy_(quantized_weight(model.head))
    assert torch.equal(model.embedding(TOKENS[:2]), plain.embedding(TOKENS[:2]))
    parameter, found = model.head.weight, []
    for parts in (["embedding"], ["head"], ["embedding", "head"]):
        model.zero_grad()
        out = {"embedding": lambda: model.embedding(TOKENS[:2]), "head": lambda: model.head(torch.ones(1, 16))}
        sum(out[part]().square().sum() for part in parts).backward()
        found.append((parameter.grad, model.head.weight_quantizer.log_scale.grad))
        assert parameter.grad.layout is torch.strided
    (looked_up, step), *_ = found
    assert looked_up[:10].abs().sum() > 0
    assert (looked_up[10:] == 0).all()
    for one, other, both in zip(*found, strict=True):
        torch.testing.assert_close(one + other, both)
    assert step.abs().sum() > 0


@pytest.mark.parametrize("sharing", ["tensor", "channel", "element"])
@pytest.mark.parametrize("learned", [False, True])
def test_one_forward_gives_both_the_same_gates(sharing, learned):
    if learned and sharing == "element":
        return
    settings = {"weight_bits": 8, "min_bits": 2, "gate_sharing": sharing, "learn_bits": learned, "keep_prob": 0.5}
    model = attach(Text(), CPQConfig(first_last_bits=None, act_bits=None, **settings)).train()
    seen = []
    model.embedding.register_forward_hook(lambda module, args, out: seen.append(out))
    model.head.register_forward_pre_hook(lambda module, args: seen.append(quantized_weight(module)))
    outs = []
    for _ in range(2):
        seen.clear()
        model(TOKENS)
        looked_up, weight = seen
        assert torch.equal(looked_up, weight[TOKENS])
        outs.append(weight)
    assert not torch.equal(*outs)


def test_state_lives_once_and_is_named_after_the_layer():
    model = text()
    assert [name for name, _ in quantizers(model) if "weight" in name] == [
        "body.weight_quantizer",
        "head.weight_quantizer",
    ]
    model.head.weight_quantizer.fix_widths([2])
    assert all(len(row.unique()) <= 4 for row in model.embedding(TOKENS).flatten(0, -2))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_tied_as_the_original_is(copied):
    model = text().eval()
    again = copied(model)
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert again.embedding.weight is again.head.weight
    assert again.embedding.weight_quantizer is again.head.weight_quantizer


def test_it_compiles_whole():
    model = text().eval()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))


@pytest.mark.parametrize("make", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_detaching_gives_plain_modules_back_that_are_tied(make):
    model = text(embedding=make()).eval()
    before, kind, sparse = model.embedding(TOKENS), type(make()), getattr(make(), "sparse", None)
    detach(model)
    assert type(model.embedding) is kind
    assert getattr(model.embedding, "sparse", None) == sparse
    assert next(model.embedding.parameters()) is model.head.weight
    assert torch.equal(model.embedding(TOKENS), before)


def test_one_that_is_left_out_reads_in_full_precision_and_stays_so_when_detached():
    model = text(CPQConfig(weight_bits=2, first_last_bits=None, ignore=["embedding"])).eval()
    weight, quantized = model.embedding.weight.detach().clone(), quantized_weight(model.head)
    assert torch.equal(model.embedding(TOKENS), weight[TOKENS])
    detach(model)
    assert torch.equal(model.embedding.weight, weight)
    assert torch.equal(model.head.weight, quantized)


def test_what_reads_quantized_stays_tied_where_another_reads_in_full_precision():
    class Three(Text):
        def __init__(self):
            super().__init__()
            self.other = nn.Embedding(40, 16)
            self.other.weight = self.head.weight

        def forward(self, tokens):
            return super().forward(tokens) + self.other(tokens).sum()

    model = attach(Three(), CPQConfig(first_last_bits=None, act_bits=None, ignore=["other"])).eval()
    before = model(TOKENS)
    assert torch.equal(detach(model)(TOKENS), before)
    assert model.embedding.weight is model.head.weight
    assert model.other.weight is not model.head.weight


def test_a_pattern_of_overrides_means_layers_alone():
    with pytest.raises(ValueError, match="overrides: the pattern 'embedding' matches no layer"):
        attach(Text(), CPQConfig(overrides={"embedding": {"weight_bits": 4}}))


def test_an_embedding_that_rewrites_its_rows_is_refused():
    model = Text(nn.Embedding(40, 16, max_norm=1.0))
    with pytest.raises(
        ValueError, match=r"'embedding' is tied to the weight of layer 'head', and with max_norm=1 .*ignore"
    ):
        attach(model)
    assert type(model.body) is nn.Linear
    attach(model, CPQConfig(ignore=["embedding"]))


def said(caught):
    return [str(w.message) for w in caught if "full precision" in str(w.message)]


def test_a_weight_that_a_module_around_the_layer_has_is_named():
    class Around(Text):
        def __init__(self):
            super().__init__()
            self.table = self.head.weight
            del self.embedding

        def forward(self, tokens):
            return self.head(self.body(F.embedding(tokens, self.table)))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(attach(Around(), CONFIG), [TOKENS])
    assert "weight of layer 'head' is the Parameter 'table' of 'Around' too" in said(caught)[0]
    assert "1 lookups in the weight of a quantized layer" in said(caught)[1]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_lookup_in_full_precision_is_named_unless_the_config_asks_for_it(ignored):
    model = Text()
    model.embedding.weight = nn.Parameter(model.head.weight.detach().clone())
    if ignored:
        model.embedding.weight = model.head.weight
    attach(model, CPQConfig(first_last_bits=None, ignore=["embedding"] if ignored else []))
    # Too late to be read quantized.
    model.embedding.weight = model.head.weight
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(model, [TOKENS])
    assert [m.partition(":")[2][:34] for m in said(caught)] == (
        [] if ignored else [" embedding (the weight of head). T"]
    )


@pytest.mark.parametrize("ignore", [[], ["embedding"]])
@pytest.mark.parametrize("apart", [False, True])
def test_a_state_says_who_reads_quantized(ignore, apart):
    model = text(CPQConfig(weight_bits=2, first_last_bits=None, ignore=ignore)).eval()
    rebuilt = Text()
    with cpq_lightning.loading():
        if apart:
            for name, child in rebuilt.named_children():
                child.load_state_dict(model.get_submodule(name).state_dict())
        else:
            rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt.eval()(TOKENS), model(TOKENS))
    assert apart or bool(ignore) or rebuilt.embedding.weight_quantizer is rebuilt.head.weight_quantizer
    assert detach(rebuilt).embedding.weight.equal(detach(model).embedding.weight)


def test_a_state_in_which_the_embedding_was_in_full_precision_loads_so():
    """As releases wrote it that quantized the head alone."""
    model = text(CPQConfig(weight_bits=2, first_last_bits=None, ignore=["embedding"])).eval()
    assert not any(key.startswith("embedding.weight_quantizer") for key in model.state_dict())
    attached = attach(Text(), CONFIG)
    with pytest.raises(RuntimeError, match=r"Missing key.*embedding\.weight_quantizer"):
        attached.load_state_dict(model.state_dict())


def test_a_full_precision_state_is_loaded_into_both():
    model, plain = text(), Text()
    with pytest.warns(UserWarning, match="full-precision"):
        model.load_state_dict(plain.state_dict())
    assert not model.head.weight_quantizer.fitted
    assert model.embedding.weight.equal(plain.embedding.weight)
