"""Published models of other packages are quantized whole: torchvision's here, others where they are installed."""

import importlib.util

import pytest

from benchmarks.model_coverage import MODELS, Row, cover, table
from tests.marks import thorough

# Detectors take up to a minute.
LONG = ("ssdlite320_mobilenet_v3_large", "RF-DETR Nano")
# What torch counts, where it is not all: recurrent layers it does not count.
COUNTED = {"TemporalFusionTransformer": 0.653}


def models():
    for name, (package, _) in MODELS.items():
        missing = importlib.util.find_spec(package) is None
        param = pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))
        yield from thorough(name) if name in LONG else [param]


@pytest.mark.parametrize("name", models())
def test_nothing_that_multiplies_is_left(name):
    row = cover(name)
    assert row.macs > 0.98, row.left
    assert row.counted == pytest.approx(COUNTED.get(name, 1), rel=0.01)
    assert row.without_gradient == []


def test_the_table_names_what_is_left():
    row = Row("Net", "package 1.0", 1000, 0.5, 0.75, 1.0, [("a", 0.1), ("b", 0.08), ("c", 0.04), ("d", 0.03)])
    assert "| 50.0% | 75.0% | a (10.0%); b (8.0%); c (4.0%) and 1 more | 100.0% |" in table({"Net": row})
