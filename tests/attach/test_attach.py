import abc
import copy
import io
import pickle
import warnings

import pytest
import timm
import torch
from torch import nn

from cpq_lightning import CPQConfig, attach, calibrate, detach, levels
from cpq_lightning.attach.attach import set_active
from cpq_lightning.attach.layers import QuantizedLayer, is_attached, quantized_layers, quantizers
from tests.marks import thorough
from tests.models import convnet

BACKBONES = [
    "test_vit", "test_efficientnet", *thorough("resnet18", "mobilenetv3_small_050", "test_convnext", "test_byobnet"),
]  # fmt: skip
SIZE = {"resnet18": 32, "mobilenetv3_small_050": 32}


def backbone(name):
    return timm.create_model(name, num_classes=10)


def images(model, name, count=2):
    size = SIZE.get(name) or model.default_cfg["input_size"][-1]
    return torch.randn(count, 3, size, size)


def attached(config=None):
    model = attach(convnet(), config or CPQConfig())
    return calibrate(model, [torch.randn(8, 3, 8, 8)])


@pytest.mark.parametrize("name", BACKBONES)
def test_timm_backbones_train_evaluate_and_detach(name):
    model = backbone(name)
    x = images(model, name)
    full_precision = copy.deepcopy(model).eval()(x)
    keys = list(model.state_dict())
    parameters = dict(model.named_parameters())
    attach(model, CPQConfig(weight_bits=3, act_bits=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [x])
    assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
    model.train()(x).square().sum().backward()
    for n, p in model.named_parameters():
        assert p.grad is not None, n
        assert torch.isfinite(p.grad).all(), n
    model.eval()
    quantized = model(x)
    assert not torch.allclose(quantized, full_precision)
    assert model(x).equal(quantized)
    weights_only = copy.deepcopy(model)
    for _, quantizer in quantizers(weights_only):
        if quantizer.kind == "activation":
            quantizer.configure(active=False)
    expected = weights_only(x)
    assert detach(weights_only)(x).equal(expected)
    assert list(weights_only.state_dict()) == keys
    assert not is_attached(weights_only)


def test_a_layer_multiplies_by_its_weight_quantized():
    model = attached(CPQConfig(weight_bits=2, first_last_bits=None)).eval()
    layer = model[3]
    assert isinstance(layer, nn.Conv2d)
    assert isinstance(layer, QuantizedLayer)
    assert layer.weight is dict(model.named_parameters())["3.weight"]
    quantized = layer.weight_quantizer(layer.weight)
    assert all(len(channel.unique()) <= 4 for channel in quantized)
    x = torch.randn(2, 8, 8, 8)
    assert layer(x).equal(layer._conv_forward(layer.input_quantizer(x), quantized, layer.bias))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_evaluate_alike(how):
    model = attached().eval()
    x = torch.randn(4, 3, 8, 8)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        copied = attach(convnet()).eval()
        copied.load_state_dict(torch.load(file, weights_only=True))
    assert copied(x).equal(model(x))
    copied[0].weight.data.zero_()
    assert not copied(x).equal(model(x))


def test_a_checkpoint_before_its_first_forward_pickles_and_audits_once():
    model = pickle.loads(pickle.dumps(attach(convnet())))
    model(torch.randn(2, 3, 8, 8))
    again = pickle.loads(pickle.dumps(model))
    for mode in (True, False):
        again.train(mode)(torch.randn(2, 3, 8, 8))
    assert again.__dict__["_cpq_unaudited"] == []


def test_full_precision_checkpoints_load_with_the_keys_named():
    plain, model = convnet(), attached()
    with pytest.warns(UserWarning, match="full-precision Sequential: its weights were loaded"):
        assert not any(model.load_state_dict(plain.state_dict()))
    assert not any(q.fitted for _, q in quantizers(model))
    short = {key: value for key, value in plain.state_dict().items() if key != "0.bias"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: '0.bias'"):
        model.load_state_dict(short)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: 'more'"):
        model.load_state_dict({**plain.state_dict(), "more": torch.ones(1)})
    missing, extra = model.load_state_dict(plain.state_dict(), strict=False)
    assert not extra
    assert all("_quantizer." in key for key in missing)
    assert model[3].weight.equal(plain[3].weight)


def test_full_precision_weights_bring_steps_of_their_own():
    plain, model = convnet(), attached()
    with torch.no_grad():
        plain[3].weight.mul_(10)
    model.load_state_dict(plain.state_dict(), strict=False)
    record = next(r for r in levels(model) if r.name == "3" and r.kind == "weight")
    assert record.relative_error < 0.05
    with pytest.raises(RuntimeError, match="calibrate"):
        model.eval()(torch.randn(2, 3, 8, 8))


def test_evaluation_before_calibration_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"calibrate\(model, batches\)"):
        attach(convnet()).eval()(torch.randn(2, 3, 8, 8))


def test_a_training_forward_sets_ranges_from_its_first_batch():
    model = attach(convnet())
    model(torch.randn(4, 3, 8, 8))
    first = [q.start_scale.clone() for _, q in quantizers(model)]
    model(100 * torch.randn(4, 3, 8, 8))
    assert all(q.fitted for _, q in quantizers(model))
    assert all(a.equal(q.start_scale) for a, (_, q) in zip(first, quantizers(model), strict=True))


def test_activation_signs_follow_the_data():
    model = attached()
    signed = {name: q.signed for name, q in quantizers(model) if q.kind == "activation"}
    assert signed == {"0.input_quantizer": True, "3.input_quantizer": False, "6.input_quantizer": False}


def test_act_bits_none_leaves_activations_alone():
    model = attach(convnet(), CPQConfig(act_bits=None))
    assert {q.kind for _, q in quantizers(model)} == {"weight"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(torch.randn(2, 3, 8, 8))


def test_inactive_is_full_precision_with_gradients_for_all_parameters():
    model = convnet()
    x = torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(model)(x)
    attach(model)
    set_active(model, False)
    out = model(x)
    assert out.equal(expected)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(q.log_scale.grad.abs().sum() == 0 for _, q in quantizers(model))


def test_detach_writes_inactive_weights_unquantized():
    model = convnet()
    expected = copy.deepcopy(model.state_dict())
    attach(model)
    set_active(model, False)
    detach(model)
    assert all(value.equal(model.state_dict()[key]) for key, value in expected.items())


def test_per_channel_steps_reduce_the_error_of_uneven_channels():
    def error(per_channel):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 2, 3), nn.Linear(4, 4))
        with torch.no_grad():
            model[1].weight.mul_(torch.tensor([1.0, 10, 100, 1000]).reshape(-1, 1, 1, 1))
            model[2].weight.mul_(torch.tensor([1.0, 1000]).reshape(1, -1, 1, 1))
        records = levels(attach(model, CPQConfig(per_channel=per_channel, act_bits=None)))
        # The largest channel fills a per-tensor grid, so errors are compared on the smallest.
        rows = [(m.weight - m.weight_quantizer(m.weight)).movedim(d, 0)[0] for m, d in ((model[1], 0), (model[2], 1))]
        scale = [model[i].weight.movedim(d, 0)[0].norm() for i, d in ((1, 0), (2, 1))]
        return [(r.norm() / s).item() for r, s in zip(rows, scale, strict=True)], records

    together, _ = error(False)
    apart, records = error(True)
    assert all(a < 0.2 * t for a, t in zip(apart, together, strict=True))
    assert [len(r.scale) for r in records] == [4, 4, 2, 4]


def test_a_shared_weight_is_quantized_in_both_places():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[2].weight
    attach(model, CPQConfig(weight_bits=2, first_last_bits=None, act_bits=None))
    model(torch.randn(2, 4)).sum().backward()
    assert model[1].weight is model[2].weight
    assert model[1].weight.equal(model[2].weight)
    x = torch.randn(2, 4)
    expected = model(x)
    assert detach(model)(x).equal(expected)


# Selection --------------------------------------------------------------------------------------------------------


def bits(model):
    return {r.name: r.bits for r in levels(model) if r.kind == "weight"}


def test_first_and_last_layer_keep_eight_bits():
    assert bits(attach(convnet(), CPQConfig(weight_bits=2))) == {"0": 8, "3": 2, "6": 8}
    assert bits(attach(convnet(), CPQConfig(weight_bits=2, first_last_bits=None))) == {"0": 2, "3": 2, "6": 2}
    first_or_last = [r.name for r in levels(attach(convnet())) if r.first_or_last]
    assert first_or_last == ["0", "0", "6", "6"]


def test_timm_names_the_first_and_last_layer():
    model = attach(backbone("test_vit"), CPQConfig(weight_bits=2))
    assert {name for name, b in bits(model).items() if b == 8} == {"patch_embed.proj", "head"}


def test_inside_another_module_the_backbones_head_is_last_only_if_nothing_follows():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timm.create_model("test_efficientnet", num_classes=0)
            self.head = nn.Linear(256, 10)

    model = attach(Both(), CPQConfig(weight_bits=2))
    assert {name for name, b in bits(model).items() if b == 8} == {"body.conv_stem", "head"}


def test_registration_order_is_corrected_by_the_order_of_calls():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.middle(self.first(x)).relu())

    model = attach(Reversed(), CPQConfig(weight_bits=2))
    assert bits(model) == {"last": 8, "middle": 2, "first": 2, "unused": 8}
    with pytest.warns(UserWarning, match=r"2 quantizers were never called.*unused"):
        calibrate(model, [torch.randn(4, 4)])
    assert bits(model) == {"last": 8, "middle": 2, "first": 8, "unused": 2}
    assert {r.name: r.bits for r in levels(model) if r.kind == "activation"}["first"] == 8


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("3", {"3"}),
        ("[36]", {"3", "6"}),
        ("Linear", {"6"}),
        ("torch.nn.Conv2d", {"0", "3"}),
        ("Conv2d", {"0", "3"}),
    ],
)
def test_patterns_match_names_and_types(pattern, expected):
    config = CPQConfig(overrides={pattern: {"weight_bits": 3}}, weight_bits=5)
    assert {name for name, b in bits(attach(convnet(), config)).items() if b == 3} == expected
    ignored = set(bits(attach(convnet(), CPQConfig(ignore=[pattern]))))
    assert ignored == {"0", "3", "6"} - expected


def test_the_last_override_that_matches_wins_setting_by_setting():
    config = CPQConfig(
        weight_bits=4, overrides={"*": {"weight_bits": 3, "act_bits": 5}, "3": {"weight_bits": 2, "per_channel": True}}
    )
    model = attach(convnet(), config)
    assert bits(model) == {"0": 3, "3": 2, "6": 3}
    assert model[3].input_quantizer.bits == 5
    assert len(model[3].weight_quantizer.log_scale) == 8
    assert not any(r.first_or_last for r in levels(model))


def test_an_exempt_layer_drops_no_bits_unless_it_has_a_width_of_its_own():
    config = CPQConfig(weight_bits=4, overrides={"*": {"min_bits": 2}, "6": {"weight_bits": 6}})
    spans = {n: (q.min_bits, q.bits) for n, q in quantizers(attach(convnet(), config)) if q.kind == "weight"}
    assert spans == {"0.weight_quantizer": (8, 8), "3.weight_quantizer": (2, 4), "6.weight_quantizer": (2, 6)}


def tied():
    """Four layers, of which the two in the middle share a weight."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[1].weight = model[2].weight
    return model


def widths(model):
    return {name: (layer.weight_quantizer.bits, layer.input_quantizer.bits) for name, layer in quantized_layers(model)}


@pytest.mark.parametrize("name", ["1", "2"])
def test_what_one_layer_is_given_of_a_shared_weight_holds_in_all_that_share_it(name):
    config = CPQConfig(overrides={name: {"weight_bits": 3, "act_bits": 6}})
    model = attach(tied(), config)
    assert widths(model) == {"0": (8, 8), "1": (3, 4), "2": (3, 4), "3": (8, 8), **{name: (3, 6)}}
    assert model[1].weight_quantizer is model[2].weight_quantizer
    # Also behind a forward that shows other layers to be the first and last ones.
    calibrate(model, [torch.randn(4, 4)])
    assert widths(model)["1"][0] == widths(model)["2"][0] == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            CPQConfig(overrides={"1": {"weight_bits": 3}, "2": {"weight_bits": 5}}),
            r"^overrides: the layers '1' and '2' share one weight, .* '1' is given weight_bits=3, '2' weight_bits=5\. "
            "Give both the same",
        ),
        (CPQConfig(overrides={"*": {"per_channel": False}, "2": {"per_channel": True}}), "'2' per_channel=True"),
        (CPQConfig(ignore=["2"]), r"^ignore: the layers '2' and '1' share one weight, and '2' alone is left out"),
        (
            CPQConfig(levels_from={n: {"weight": 3 + (n == "2"), "activation": 4} for n in "0123"}),
            r"^levels_from: the layers '1' and '2' share one weight, and have the widths \[3\] and \[4\] in it",
        ),
    ],
)
def test_layers_that_share_a_weight_are_not_told_different_things_of_it(config, message):
    model = tied()
    with pytest.raises(ValueError, match=message):
        attach(model, config)
    assert not any(True for _ in quantized_layers(model))


def test_layers_that_share_a_weight_may_be_told_different_things_of_their_inputs_or_be_left_out_together():
    assert widths(attach(tied(), CPQConfig(overrides={"1": {"act_bits": 3}, "2": {"act_bits": 5}})))["2"] == (4, 5)
    assert set(widths(attach(tied(), CPQConfig(ignore=["[12]"])))) == {"0", "3"}


def test_a_layer_with_several_names_is_meant_by_each_of_them():
    def aliased():
        model = nn.ModuleDict({"body": nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))})
        model["middle"] = model["body"][1]
        return model

    assert bits(attach(aliased(), CPQConfig(overrides={"middle": {"weight_bits": 3}})))["body.1"] == 3
    of_all = CPQConfig(overrides={"*": {"weight_bits": 2}, "middle": {"weight_bits": 3}})
    assert bits(attach(aliased(), of_all)) == {"body.0": 2, "body.1": 3, "body.2": 2}
    assert set(bits(attach(aliased(), CPQConfig(ignore=["middle"])))) == {"body.0", "body.2"}


def test_layers_in_metrics_are_left_alone():
    from torchmetrics import Metric

    class Judged(Metric):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(3, 3)

        def update(self):
            pass

        def compute(self):
            pass

    model = nn.ModuleDict({"net": nn.Linear(2, 2), "metric": Judged()})
    assert [name for name, _ in quantized_layers(attach(model))] == ["net"]


# Errors, each of which leaves the model as it was -------------------------------------------------------------------


def broken(value):
    model = convnet()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = value
    return model


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (lambda: nn.BatchNorm2d(3), CPQConfig(), "no layer to quantize"),
        (lambda: broken(float("nan")), CPQConfig(), r"layer '3' has 1 NaN or infinite of 576 values"),
        (lambda: broken(float("inf")), CPQConfig(), r"layer '3' has 1 NaN or infinite"),
        (convnet, CPQConfig(ignore=["4"]), r"ignore: the pattern '4' matches no layer"),
        (convnet, CPQConfig(overrides={"Conv3d": {"weight_bits": 2}}), r"overrides: the pattern 'Conv3d'.*Conv2d"),
        (lambda: nn.Sequential(convnet()), CPQConfig(ignore=["0"]), r"write '0\.\*'"),
        (convnet, CPQConfig(ignore=["*"]), "leaves no layer"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), CPQConfig(), "lazy"),
    ],
)
def test_bad_input_is_refused_and_nothing_changes(model, config, message):
    model = model()
    state = dict(model.state_dict())
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        attach(model, config)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(state)


def test_a_class_that_python_does_not_let_change_is_refused():
    class Layer(abc.ABC, nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Layer(4, 4))
    with pytest.raises(TypeError, match=r"Layer cannot be quantized.*Name the nn.Module first.*ignore=\['Layer'\]"):
        attach(model, CPQConfig())
    assert [type(m) for m in model] == [nn.Linear, Layer]
    assert is_attached(attach(model, CPQConfig(ignore=["Layer"])))


def test_attaching_twice_and_detaching_a_plain_model_are_refused():
    with pytest.raises(ValueError, match="call detach"):
        attach(attach(convnet()))
    with pytest.raises(ValueError, match="nothing to detach"):
        detach(convnet())
    with pytest.raises(ValueError, match="call attach"):
        levels(convnet())


def test_detaching_leaves_a_shared_embedding_in_full_precision():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    model = attach(Tied(), CPQConfig(weight_bits=2, act_bits=None, first_last_bits=None)).eval()
    before = model(torch.arange(6))
    assert torch.equal(detach(model)(torch.arange(6)), before)


def test_a_detached_model_has_no_attribute_more_than_before():
    model = convnet()
    before = [set(vars(module)) for module in model.modules()]
    attach(model)
    model(torch.randn(2, 3, 8, 8))
    assert [set(vars(module)) for module in detach(model).modules()] == before
