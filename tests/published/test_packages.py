"""Published packages fit, save, load and predict a quantized model by their own means, to the bit."""

import subprocess
import sys

import pytest
import torch

from cpq_lightning.attach.layers import quantizers
from tests.published.packages import JOURNEYS, callbacks

pytestmark = [pytest.mark.published, pytest.mark.filterwarnings("ignore")]
SEEDS = range(3)


@pytest.mark.parametrize("name", JOURNEYS)
def test_it_fits_saves_loads_and_predicts_the_same(name, tmp_path):
    journey = JOURNEYS[name]
    pytest.importorskip(journey.package, reason=f"{journey.package} is not installed: see the extras published-*")
    quantized = [journey.train(callbacks(), seed) for seed in SEEDS]
    module = getattr(quantized[0], "model", quantized[0])
    assert all(q.fitted for _, q in quantizers(module))
    assert len(dict(quantizers(module))) > 2
    journey.save(quantized[0], tmp_path / "model")
    with pytest.raises(RuntimeError, match=r"^Load it with"):
        journey.load(tmp_path / "model")
    subprocess.run([sys.executable, "-m", "tests.published.packages", name, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "predicted.pt"), journey.predict(quantized[0]))
    full_precision = [journey.error(journey.train([], seed)) for seed in SEEDS]
    errors = [journey.error(model) for model in quantized]
    print(name, "full precision", full_precision, "W8A8", errors)
    # Level with it within what seeds differ by.
    spread = max(full_precision) - min(full_precision)
    assert sum(errors) / 3 <= sum(full_precision) / 3 + max(spread, 0.1 * max(full_precision))
