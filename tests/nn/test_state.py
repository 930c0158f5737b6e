"""The state of a quantizer: what it says survives every way in which copies of a model follow it."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cpq_lightning import CPQConfig, attach, calibrate
from cpq_lightning.attach.attach import refit, set_active
from cpq_lightning.attach.layers import quantizers
from cpq_lightning.nn.quantizer import Quantizer
from cpq_lightning.nn.state import HEADER, SIGNED, Settings, decode, encode, layout_differences, read
from tests.marks import thorough

GOLDEN = Path(__file__).parent / "data" / "state_v1.safetensors"
X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
ODD = Settings(
    kind="activation", bits=7, min_bits=2, grid="offset", doubled_zero_points=(2, 0, 6, 0, 4, 16, 26, 200),
    settled=True, fixed=True, first_or_last=True,
    estimator="argmax", nesting="resolution", range_rule="max", channels=70_000, channel_dim=1, gate_count=6,
    gate_rows=3, gates_learned=True, gate_sharing="channel", gate_estimator="concrete",
    width_count=2**21, key=2**30, seed=2**64 - 1, numel=2**50 + 1,
    has_facts=True, execution_index=321, macs=2**51 + 3, steps=10**9, pending=True,
    pending_zero_points=(0, 1, 2, 3, 4, 5, 6, 510), fitted=True,
)  # fmt: skip


@pytest.mark.parametrize("settings", [Settings(), ODD])
@pytest.mark.parametrize("revision", [0, 3, 8, 30])
def test_what_is_written_is_read(settings, revision):
    assert decode(encode(settings, revision).tolist()) == (settings, min(revision, 8))


@pytest.mark.parametrize("share", [0.5, 1e-3, 1e-5])
def test_a_mixture_of_an_old_and_a_new_state_is_the_new_one(share):
    unknown = {"has_facts": False, "execution_index": 0, "macs": 0, "steps": 0, "pending": False, "fitted": False}
    old = ODD._replace(
        bits=8, min_bits=8, active=False, doubled_zero_points=SIGNED, fixed=False, pending_zero_points=SIGNED, **unknown
    )
    for revision in range(7):
        mixed = (1 - share) * encode(old, revision) + share * encode(ODD, revision + 1)
        settings, _ = decode(mixed.tolist())
        assert settings == ODD


def test_damage_is_refused_in_plain_words():
    state = Quantizer("weight", CPQConfig()).state
    with pytest.raises(ValueError, match=r"damaged.*float32"):
        read(state.half().float())
    with pytest.raises(ValueError, match=r"version 3.*reads versions up to 2"):
        decode(encode(Settings(version=3), 0).tolist())
    with pytest.raises(ValueError, match="its header requires"):
        read(torch.cat([state, state]))
    with pytest.raises(ValueError, match="at least"):
        read(state[: HEADER - 1])


def test_a_layer_s_state_is_enough_to_rebuild_its_quantizers():
    for settings in ({}, {"per_channel": True}, {"learn_bits": True, "min_bits": 2, "gate_sharing": "channel"}):
        model = calibrate(attach(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)), CPQConfig(**settings)), [X])
        for name, quantizer in quantizers(model):
            state = {key.removeprefix(f"{name}."): v for key, v in model.state_dict().items() if key.startswith(name)}
            twin = Quantizer.from_state(state).eval()
            x = model[0].weight if quantizer.kind == "weight" and quantizer.numel == 48 else X
            x = model[1].weight if quantizer.kind == "weight" and quantizer.numel == 12 else x
            assert twin.settings == quantizer.settings
            assert twin(x).equal(quantizer.eval()(x))


def test_states_of_version_1_are_read():
    """Written once, never again: a file that an earlier release has left."""
    tensors = load_file(GOLDEN)
    model = attach(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), _golden_config())
    model.load_state_dict({name: value for name, value in tensors.items() if not name.startswith("_")})
    assert [q.settings.bits for _, q in quantizers(model)] == [8, 8, 8, 8]
    torch.testing.assert_close(model.eval()(tensors["_input"]), tensors["_output"], rtol=1e-5, atol=1e-6)


def test_states_of_version_2_are_read():
    """Also written once: offsets of inputs, and weights that are balanced at one bit."""
    tensors = load_file(GOLDEN.with_name("state_v2.safetensors"))
    config = CPQConfig(weight_bits=6, min_bits=1, learn_bits=True, per_channel=True, first_last_bits=None)
    model = attach(nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 3)), config)
    model.load_state_dict({name: value for name, value in tensors.items() if not name.startswith("_")})
    zero_points = [q.settings.zero_point(k) for _, q in quantizers(model) for k in (1, q.bits)]
    assert 0.5 in zero_points
    assert any(0 < q.zero_point < 2 ** (q.bits - 1) for _, q in quantizers(model))
    torch.testing.assert_close(model.eval()(tensors["_input"]), tensors["_output"], rtol=1e-5, atol=1e-6)


def _golden_config():
    return CPQConfig(weight_bits=6, min_bits=2, learn_bits=True, per_channel=True)


def test_few_keys():
    model = attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    actual = [key for key in model.state_dict() if "_quantizer." in key]
    assert len(actual) == 4 * 4
    assert {key.rpartition(".")[2] for key in actual} == {"log_scale", "noise_logit", "temperature", "state"}


# Copies --------------------------------------------------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


class ByHand:
    """A loop over a state_dict, as many people write it."""

    def __init__(self, model, how):
        self.module, self.how = copy.deepcopy(model), how

    def update(self, model):
        actual, other = self.module.state_dict(), model.state_dict()
        for name, value in actual.items():
            if self.how == "copy_":
                value.copy_(other[name])
            elif self.how == "data":
                value.data.copy_(other[name].data)
            elif self.how == "mixed":
                value.copy_(0.9 * value + 0.1 * other[name])
            elif value.is_floating_point():
                value.mul_(0.9).add_(other[name], alpha=0.1)


def _averaged(model, **settings):
    average = AveragedModel(model, **settings)
    average.update = average.update_parameters
    return average


AVERAGES = {
    "AveragedModel": _averaged,
    "AveragedModel, buffers too": lambda m: _averaged(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "ModelEmaV2": lambda m: ModelEmaV2(m, decay=0.9),
    "ModelEmaV3": lambda m: ModelEmaV3(m, decay=0.9),
    "copy_": lambda m: ByHand(m, "copy_"),
    "data": lambda m: ByHand(m, "data"),
    "mixed": lambda m: ByHand(m, "mixed"),
    "in place": lambda m: ByHand(m, "in place"),
}


@pytest.mark.parametrize("moment", ["quantize_from", *thorough("calibration", "freeze")])
@pytest.mark.parametrize("name", AVERAGES)
def test_a_copy_that_was_made_early_follows(name, moment):
    """The network is the same at all times, so that an average of it has to be that network, quantized."""
    learned = CPQConfig(weight_bits=8, min_bits=2, learn_bits=True)
    model = attach(net(), learned if moment == "freeze" else CPQConfig())
    if moment == "freeze":
        calibrate(model, [X])
    if moment == "quantize_from":
        set_active(model, False)
    average = AVERAGES[name](model)
    if moment == "calibration":
        calibrate(model, [X])
    elif moment == "quantize_from":
        set_active(model, True)
        refit(model)
        with torch.no_grad():
            model.train()(X)
    else:
        for _, quantizer in quantizers(model):
            if quantizer.learns_bits:
                quantizer.fix_widths([3])
    for _ in range(3):
        average.update(model)
    wanted, copied = model.eval(), average.module.eval()
    for (_, actual), (_, other) in zip(quantizers(wanted), quantizers(copied), strict=True):
        assert actual.settings._replace(steps=0) == other.settings._replace(steps=0)
    with torch.no_grad():
        torch.testing.assert_close(copied(X), wanted(X), rtol=1e-4, atol=1e-5)
        twin = attach(net(), learned if moment == "freeze" else CPQConfig())
        if moment == "freeze":
            for _, quantizer in quantizers(twin):
                quantizer.configure(fixed=False)
        twin.load_state_dict(copied.state_dict())
        torch.testing.assert_close(twin.eval()(X), copied(X), rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True])
def test_from_the_meta_device(assign):
    with torch.device("meta"):
        model = attach(net())
    plain = net()
    if assign:
        model.load_state_dict(plain.state_dict(), strict=False, assign=True)
    else:
        model.to_empty(device="cpu").load_state_dict(plain.state_dict(), strict=False)
    calibrate(model, [X])
    wanted = calibrate(attach(net()), [X])
    assert model.eval()(X).equal(wanted.eval()(X))
    with torch.device("meta"):
        model = attach(net())
    model.to_empty(device="cpu").load_state_dict(wanted.state_dict())
    assert model.eval()(X).equal(wanted(X))


def test_what_two_layouts_differ_in_is_named_by_the_setting():
    ours = Settings(bits=8, min_bits=2, gate_count=6)
    assert layout_differences(ours, ours) == {}
    for changed, named in (
        ({"min_bits": 4, "gate_count": 4}, {"min_bits": (4, 2)}),
        ({"gate_count": 4}, {"min_bits (its gate count)": (4, 6)}),
        ({"channels": 3}, {"per_channel": (True, False)}),
        ({"channels": 6, "group_size": 4}, {"group_size": (4, None)}),
        ({"gate_sharing": "channel", "gate_rows": 3}, {"gate_sharing": ("channel", "tensor")}),
        ({"nesting": "resolution"}, {"nesting": ("resolution", "range")}),
    ):
        assert layout_differences(ours._replace(**changed), ours) == named


@pytest.mark.parametrize("share", [0.5, 0.01, 0.0001])
def test_an_average_of_two_ranges_has_a_zero_point_between_theirs_however_often_it_changed(share):
    one, other = (Quantizer("activation", CPQConfig(act_bits=4)) for _ in range(2))
    x = nn.functional.silu(torch.randn(64, 9))
    for q in (one, other):
        q(x)
    for _ in range(20):
        # As a run from random weights does, in which ranges are fitted again and again.
        for shift in (0.3, 0.0):
            other.refit_next()
            other(x - shift)
    other.refit_next()
    other(x - 0.6)
    average = Quantizer("activation", CPQConfig(act_bits=4)).eval()
    average.load_state_dict(
        {name: (1 - share) * value + share * other.state_dict()[name] for name, value in one.state_dict().items()}
    )
    low, high = sorted((one.zero_point, other.zero_point))
    assert low < high
    assert low <= average.zero_point <= high
    assert average.zero_point % 1 == 0
    assert average(x).isfinite().all()
