import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cpq_lightning import attach, calibrate, levels
from cpq_lightning.attach.calibrate import recording
from cpq_lightning.attach.layers import quantizers
from tests.models import convnet


def test_ranges_cover_all_batches():
    small, large = torch.randn(8, 3, 8, 8), 10 * torch.randn(8, 3, 8, 8)
    torch.manual_seed(0)
    one = calibrate(attach(convnet()), [small])
    torch.manual_seed(0)
    both = calibrate(attach(convnet()), [small, large])
    assert both[0].input_quantizer.scale() > 4 * one[0].input_quantizer.scale()


def test_ranges_do_not_depend_on_how_samples_are_batched():
    x = torch.randn(16, 3, 8, 8)
    steps = []
    for batches in ([x], x.split(8), x.split(4)):
        torch.manual_seed(0)
        model = calibrate(attach(convnet().eval()), batches)
        steps.append([q.start_scale for _, q in quantizers(model)])
    for other in steps[1:]:
        assert all(a.equal(b) for a, b in zip(steps[0], other, strict=True))


@pytest.mark.parametrize("form", ["tensor", "pair", "list", "dict", "loader"])
def test_forms_of_batches(form):
    x = torch.randn(4, 5)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(x)

    batches = {
        "tensor": [x],
        "pair": [(x, torch.zeros(4))],
        "list": [[x]],
        "dict": [{"x": x}],
        "loader": DataLoader(TensorDataset(x, torch.zeros(4)), 2),
    }[form]
    model = calibrate(attach(Net()), batches)
    assert all(q.fitted for _, q in quantizers(model))


def test_buffers_mode_and_random_state_are_left_alone():
    model = nn.Sequential(convnet(), nn.Dropout(0.5))
    attach(model)
    buffers = copy.deepcopy({k: v for k, v in model.state_dict().items() if "running" in k or "tracked" in k})
    torch.manual_seed(9)
    expected = torch.randn(3)
    torch.manual_seed(9)
    calibrate(model, [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))])
    assert torch.randn(3).equal(expected)
    assert model.training
    assert buffers
    assert all(value.equal(model.state_dict()[key]) for key, value in buffers.items())


def test_a_failure_half_way_changes_nothing():
    model = attach(convnet())
    with pytest.raises(RuntimeError):
        calibrate(model, [torch.randn(4, 3, 8, 8), torch.randn(4, 5, 8, 8)])
    activations = [q for _, q in quantizers(model) if q.kind == "activation"]
    assert not any(q.fitted for q in activations)


@pytest.mark.parametrize("batches", [[], iter(()), DataLoader(TensorDataset(torch.zeros(0, 3)), 2)])
def test_no_batch_is_refused(batches):
    with pytest.raises(ValueError, match="no batch"):
        calibrate(attach(convnet()), batches)


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="call attach"):
        calibrate(convnet(), [torch.randn(1, 3, 8, 8)])


def test_recorded_usage_appears_in_the_levels():
    x = torch.randn(8, 3, 8, 8)
    model = calibrate(attach(convnet()), [x]).eval()
    assert {r.used_levels for r in levels(model) if r.kind == "activation"} == {None}
    seen = []
    model[3].input_quantizer.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with recording(model):
        model(x)
    record = next(r for r in levels(model) if r.name == "3" and r.kind == "activation")
    before, after = seen[0]
    assert record.used_levels == len(after.unique())
    assert record.relative_error == pytest.approx(((before - after).norm() / before.norm()).square().item(), rel=1e-4)
