"""Models come back from their state_dict: by the code of whoever saved it, within `loading`, to the bit."""

import copy
import threading
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

import cpq_lightning
from benchmarks.processes import run_processes
from cpq_lightning import CPQConfig, attach, calibrate, detach, levels
from cpq_lightning.attach.layers import is_attached, quantizers

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 256, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


def trained(config, model=None, batch=X):
    """Attached, calibrated, and moved a little by training."""
    model = attach(net() if model is None else model, config)
    calibrate(model, [batch])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return model.eval()


def same(model, other, batch=X):
    with torch.no_grad():
        return torch.equal(model.eval()(batch), other.eval()(batch))


CONFIGS = {
    "W8A8": CPQConfig(weight_bits=8, act_bits=8),
    "weights alone": CPQConfig(weight_bits=3, act_bits=None),
    "channels": CPQConfig(per_channel=True, weight_estimator="argmax"),
    "some layers": CPQConfig(ignore=["3"], overrides={"6": {"weight_bits": 2, "act_bits": None}}),
    "DropBits": CPQConfig(weight_bits=4, min_bits=2, keep_prob=0.7),
    "learned": CPQConfig(weight_bits=8, min_bits=2, learn_bits=True, learn_act_bits=True, act_bits=8),
    "learned channels": CPQConfig(weight_bits=6, min_bits=2, learn_bits=True, gate_sharing="channel"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_state_is_enough(config, tmp_path):
    model = trained(config)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    rebuilt = net()
    with cpq_lightning.loading():
        rebuilt.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(model, rebuilt)
    assert [q.settings for _, q in quantizers(rebuilt)] == [q.settings for _, q in quantizers(model)]
    # All that it can do it can do again.
    assert levels(rebuilt) == levels(model)
    rebuilt.train()(X).sum().backward()
    assert all(q.log_scale.grad is not None for _, q in quantizers(rebuilt))
    detach(rebuilt)


def test_products_are_known_again():
    make = lambda: timm.create_model("test_vit", num_classes=4, img_size=32)  # noqa: E731
    torch.manual_seed(0)
    batch = torch.randn(2, 3, 32, 32)
    model = trained(CPQConfig(attention=True, ignore=["blocks.1.attn"]), make(), batch)
    rebuilt = make()
    with cpq_lightning.loading():
        rebuilt.load_state_dict(model.state_dict())
    assert same(model, rebuilt, batch)
    assert levels(rebuilt) == levels(model)


def test_an_averaged_plan_is_the_plan():
    model = attach(timm.create_model("test_vit", num_classes=4, img_size=32), CPQConfig(attention=True))
    averaged = copy.deepcopy(model)
    for own, other in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
        own.copy_(0.9999 * own + 0.0001 * other)
    rebuilt = timm.create_model("test_vit", num_classes=4, img_size=32)
    with cpq_lightning.loading():
        rebuilt.load_state_dict(averaged.state_dict())
    assert [m.product_plan for m in rebuilt.modules() if hasattr(m, "product_plan")] == [
        m.product_plan for m in model.modules() if hasattr(m, "product_plan")
    ]


def test_multihead_attention_and_encoders():
    def make():
        torch.manual_seed(3)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    batch = torch.randn(4, 5, 8)
    model = trained(CPQConfig(weight_bits=2), make(), batch)
    rebuilt = make()
    with cpq_lightning.loading():
        rebuilt.load_state_dict(model.state_dict())
    assert same(model, rebuilt, batch)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_layers_that_share_a_parameter_share_its_quantizer():
    torch.manual_seed(0)
    batch = torch.randn(4, 8)
    model = trained(CPQConfig(), Tied(), batch)
    rebuilt = Tied()
    with cpq_lightning.loading():
        rebuilt.load_state_dict(model.state_dict())
    assert rebuilt.a.weight_quantizer is rebuilt.b.weight_quantizer
    assert same(model, rebuilt, batch)


def test_a_part_alone():
    model = trained(CPQConfig())
    rebuilt = net()
    with cpq_lightning.loading():
        for name, child in rebuilt.named_children():
            child.load_state_dict(model[int(name)].state_dict())
    assert same(model, rebuilt)


def test_a_model_on_the_meta_device():
    model = trained(CPQConfig())
    with torch.device("meta"):
        rebuilt = net()
    with cpq_lightning.loading():
        rebuilt.load_state_dict(model.state_dict(), assign=True)
    assert same(model, rebuilt)


def test_a_compiled_model():
    model = trained(CPQConfig())
    rebuilt = torch.compile(net(), backend="eager")
    with cpq_lightning.loading():
        rebuilt.load_state_dict({f"_orig_mod.{key}": value for key, value in model.state_dict().items()})
    assert same(model, rebuilt)


def test_what_is_attached_already_is_loaded_as_ever():
    model, other = trained(CPQConfig()), attach(net(), CPQConfig())
    with cpq_lightning.loading():
        other.load_state_dict(model.state_dict())
    assert same(model, other)


def test_what_is_attached_in_part_gets_the_rest():
    model = trained(CPQConfig(weight_bits=2))
    rebuilt = net()
    attach(rebuilt[0], CPQConfig(act_bits=None))
    with pytest.raises(RuntimeError, match="Load it within"):
        rebuilt.load_state_dict(model.state_dict(), strict=False)
    with cpq_lightning.loading():
        rebuilt.load_state_dict(model.state_dict())
    assert same(model, rebuilt)


@pytest.mark.parametrize("strict", [True, False])
def test_outside_the_first_words_are_the_cure(strict):
    model, plain = trained(CPQConfig()), net()
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"^Load it within `with cpq_lightning.loading\(\):`"):
        plain.load_state_dict(model.state_dict(), strict=strict)
    assert not is_attached(plain)
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())


def test_full_precision_weights_alone_load_anywhere():
    model, plain = trained(CPQConfig()), net()
    kept = {key: value for key, value in model.state_dict().items() if "_quantizer." not in key}
    plain.load_state_dict(kept)
    assert not is_attached(plain)


def test_it_nests_and_ends_with_an_exception():
    model = trained(CPQConfig())

    def fail():
        with cpq_lightning.loading():
            with cpq_lightning.loading():
                net().load_state_dict(model.state_dict())
            net().load_state_dict(model.state_dict())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with pytest.raises(RuntimeError, match="Load it within"):
        net().load_state_dict(model.state_dict())


def test_it_holds_for_the_thread_that_entered_it():
    model, found = trained(CPQConfig()), []

    def load():
        try:
            net().load_state_dict(model.state_dict())
        except RuntimeError as error:
            found.append(str(error))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with cpq_lightning.loading():
            thread = threading.Thread(target=load)
            thread.start()
            thread.join()
    assert found[0].startswith("Load it within")
    assert any("no load_state_dict has met" in str(w.message) for w in said)


def test_loading_nothing_that_is_quantized_is_said():
    with pytest.warns(UserWarning, match="no load_state_dict has met the state of a quantized model"):
        with cpq_lightning.loading():
            net().load_state_dict(net().state_dict())


def broken(state, how):
    if how == "another shape":
        state["8.weight"] = torch.zeros(4, 17)
    elif how == "a missing key":
        del state["0.bias"]
    elif how == "a damaged state":
        state["6.weight_quantizer.state"] = state["6.weight_quantizer.state"] * float("nan")
    elif how == "another layer":
        state["1.weight_quantizer.state"] = state["0.weight_quantizer.state"]
    return state


@pytest.mark.parametrize("how", ["another shape", "a missing key", "a damaged state", "another layer"])
def test_what_fails_leaves_the_model_as_it_was(how):
    state, plain = broken(dict(trained(CPQConfig()).state_dict()), how), net()
    before, classes = set(plain.state_dict()), [type(m) for m in plain.modules()]
    with cpq_lightning.loading():
        with pytest.raises((RuntimeError, ValueError)):
            plain.load_state_dict(state)
    assert set(plain.state_dict()) == before
    assert [type(m) for m in plain.modules()] == classes
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks


def test_pruned_layers():
    def make():
        model = net()
        prune.l1_unstructured(model[6], "weight", 0.5)
        return model

    model, rebuilt = trained(CPQConfig(), make()), make()
    with cpq_lightning.loading():
        rebuilt.load_state_dict(model.state_dict())
    assert same(model, rebuilt)


def load_and_evaluate(folder):
    model = net()
    with cpq_lightning.loading():
        model.load_state_dict(torch.load(folder / "state.pt"))
    out = model.eval()(X)
    torch.save(out, folder / "out.pt")
    return out


def test_in_a_process_of_its_own(tmp_path):
    torch.save(trained(CPQConfig()).state_dict(), tmp_path / "state.pt")
    (done,) = run_processes(load_and_evaluate, tmp_path)
    assert done.returncode == 0, done.stderr
    there = torch.load(tmp_path / "out.pt")
    assert torch.equal(there, load_and_evaluate(tmp_path))
