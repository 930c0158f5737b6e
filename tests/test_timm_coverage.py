"""The smallest models of timm's modules, taken through everything: a sample here, all of them with ``-m timm``."""

import json

import pytest
import timm

from benchmarks.timm_coverage import RESULTS, cover, smallest_model, timm_modules
from tests.marks import thorough

# Products with a weight that stay in full precision: the operation, and why.
EXCEPTIONS = {
    "matmul": "an embedding of positions that is multiplied to be read, or a single query vector; attention=True "
    "quantizes those that meet an activation (gemma4)",
    "einsum": "the same, written otherwise: relative positions (mvitv2, sam)",
}
# Each of these has once needed something; large ones are built smaller.
SAMPLE = {
    # F.linear on a layer's weight, behind a relative position bias.
    "beit": {"depth": 2, "embed_dim": 96, "num_heads": 3},
    # Branches that are to be joined after training.
    "byobnet": {},
    # Modules registered under several names, and called several times.
    "coat": {"serial_depths": (1, 1, 1, 1), "parallel_depth": 1},
    # Layer scales of 1e-6, depthwise convolutions.
    "convnext": {},
    # Products with fixed matrices, and attention that does not see its input.
    "csatv2": {"depths": (1, 1, 2, 2)},
    # Depthwise convolutions with dynamic padding.
    "efficientnet": {},
    # Attention in a loop over heads, each of which sees the one before.
    "efficientvit_msra": {"depth": (1, 1, 1)},
    # F.linear on a layer's weight, rotary positions.
    "eva": {"depth": 2},
    # A table of positions that is multiplied to be read, and rotary frequencies that are no activations.
    "gemma4_vit": {"depth": 1},
    # Linear layers and their norm in one module.
    "levit": {},
    # Convolutions over a part of the channels.
    "mambaout": {},
    # Attention with a relative position bias, in blocks with convolutions.
    "maxxvit": {},
    # Standardized weights, gains that start at zero.
    "nfnet": {},
    # Gates that norms over a batch of two look at.
    "rexnet": {},
    # Recurrent layers.
    "sequencer": {"layers": (1, 1, 1, 1)},
    # An activation times a Parameter.
    "swiftformer": {},
    # F.linear on a layer's weight, an MLP over positions alone.
    "swin_transformer_v2": {"depths": (1, 1, 1, 1), "embed_dim": 24},
    "vision_transformer": {},
    # Standardized weights in front of attention.
    "vision_transformer_hybrid": {"depth": 2},
    # Relative positions by einsum.
    "vision_transformer_sam": {"depth": 2, "embed_dim": 96, "num_heads": 3},
}
# Those that take longest, with what the others have too.
LONG = (
    "coat", "convnext", "csatv2", "efficientvit_msra", "gemma4_vit", "levit", "maxxvit", "nfnet", "rexnet",
    "sequencer", "swiftformer", "swin_transformer_v2", "vision_transformer", "vision_transformer_hybrid",
)  # fmt: skip


def _check(row):
    assert row.problems == []
    assert row.sites > 0
    assert {op for _, op, _ in row.unquantized} <= EXCEPTIONS.keys()


@pytest.mark.parametrize("module", [*(m for m in SAMPLE if m not in LONG), *thorough(*LONG)])
def test_the_smallest_model_of_a_module(module, recorded):
    model = recorded[module]["model"]
    if not timm.is_model(model):
        pytest.skip(f"timm {timm.__version__} has no {model}")
    _check(cover(module, model, **SAMPLE[module]))


@pytest.mark.timm
@pytest.mark.parametrize("module", timm_modules())
def test_the_smallest_model_of_any_module(module):
    _check(cover(module, smallest_model(module)))


@pytest.fixture(scope="module")
def recorded():
    return {row["module"]: row for row in json.loads((RESULTS / "timm_coverage.json").read_text())["rows"]}


def test_the_written_table_has_every_module_of_its_timm_and_no_failure(recorded):
    table = (RESULTS / "timm_coverage.md").read_text()
    assert len(recorded) == 98
    assert [module for module in recorded if f"| {module} | {recorded[module]['model']} |" not in table] == []
    assert [module for module, row in recorded.items() if row["problems"]] == []
    assert {op for row in recorded.values() for _, op, _ in row["unquantized"]} <= EXCEPTIONS.keys()


def test_the_sample_is_of_20_modules(recorded):
    assert len(SAMPLE) == 20
    assert SAMPLE.keys() <= recorded.keys()
