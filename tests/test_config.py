"""The settings: validated, frozen, plain."""

import copy
import dataclasses
import json
import math
import os
import pathlib
import pickle
from collections import UserDict, UserList

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn

from cpq_lightning import CPQCallback, CPQConfig, QuantizedModule, attach
from cpq_lightning.attach.levels_file import with_levels_read
from cpq_lightning.attach.origin import attached_config, set_attached_config
from cpq_lightning.config import LAYER_SETTINGS
from cpq_lightning.nn.quantizer import Quantizer

# A setting, a wrong value, the error, and words of the message.
ERRORS = [
    *((name, value, TypeError, [name, "whole number"]) for name in ("weight_bits", "act_bits", "first_last_bits",
      "min_bits") for value in (4.0, "4", True)),
    *((name, value, ValueError, [name, "1 to 8", str(value)]) for name in ("weight_bits", "act_bits",
      "first_last_bits", "min_bits") for value in (0, 9, -1)),
    ("weight_bits", None, TypeError, ["weight_bits", "whole number"]),
    ("min_bits", 5, ValueError, ["min_bits", "at most weight_bits=4", "5", "lower min_bits or raise weight_bits"]),
    ("nesting", "rings", ValueError, ["nesting", "'range'", "'resolution'", "'rings'"]),
    ("weight_estimator", "ste", ValueError, ["weight_estimator", "'argmax'", "'expectation'", "'ste'"]),
    ("act_estimator", None, ValueError, ["act_estimator", "'argmax'", "'expectation'"]),
    ("gate_sharing", "layer", ValueError, ["gate_sharing", "'tensor'", "'channel'", "'element'", "'layer'"]),
    ("weight_range", "mean", ValueError, ["weight_range", "'mse'", "'max'", "'mean'"]),
    ("act_range", ["mse"], ValueError, ["act_range", "'mse'", "'max'"]),
    *((name, value, ValueError, [name, "over 0 and up to 1"]) for name in ("temperature", "keep_prob")
      for value in (0, 0.0, -0.5, 1.01, math.nan, math.inf)),
    *((name, value, TypeError, [name, "number over 0 and up to 1"]) for name in ("temperature", "keep_prob")
      for value in ("1", None, True)),
    ("per_channel", 1, TypeError, ["per_channel", "True or False"]),
    ("seed", 1.5, TypeError, ["seed", "whole number"]),
    ("seed", True, TypeError, ["seed", "whole number"]),
    ("ignore", "head", TypeError, ["ignore", "list of patterns", "'head'"]),
    ("ignore", [3], TypeError, ["ignore", "list of patterns"]),
    ("ignore", None, TypeError, ["ignore", "list of patterns"]),
    ("overrides", [("a", {})], TypeError, ["overrides", "map patterns to settings"]),
    ("overrides", None, TypeError, ["overrides", "map patterns to settings"]),
    ("overrides", {"a": 4}, TypeError, ["overrides['a']", "map settings to values"]),
    ("overrides", {"a": {"weight_bit": 4}}, ValueError, ["overrides['a']", "'weight_bit'", "mean 'weight_bits'?"]),
    ("overrides", {"a": {"zzz": 4}}, ValueError, ["overrides['a']", "unknown setting 'zzz'", "nesting"]),
    ("overrides", {"a": {"seed": 4}}, ValueError, ["overrides['a']", "'seed', which is one for the whole model"]),
    ("overrides", {"a": {"gate_estimator": "concrete"}}, ValueError, ["'gate_estimator'", "outside of overrides"]),
    ("overrides", {"ok": {}, "b.*": {"weight_bits": 9}}, ValueError, ["overrides['b.*']", "weight_bits", "1 to 8"]),
    ("overrides", {"b.*": {"act_bits": 2.5}}, TypeError, ["overrides['b.*']", "act_bits", "whole number"]),
    ("overrides", {"b.*": {"min_bits": 6}}, ValueError, ["overrides['b.*']", "min_bits", "weight_bits=4"]),
    ("overrides", {"b.*": {"weight_bits": 3, "min_bits": 4}}, ValueError, ["overrides['b.*']", "weight_bits=3"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "error", "words"), ERRORS, ids=[f"{name}={value!r}" for name, value, *_ in ERRORS]
)
def test_a_wrong_setting_is_named_together_with_what_is_allowed(name, value, error, words):
    CPQConfig()
    with pytest.raises(error) as raised:
        CPQConfig(**{name: value})
    assert type(raised.value) is error
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_is_allowed(bits):
    config = CPQConfig(weight_bits=bits, act_bits=bits, min_bits=bits, first_last_bits=bits)
    assert (config.weight_bits, config.act_bits, config.narrowest_bits, config.first_last_bits) == (bits,) * 4


@pytest.mark.parametrize("value", [1, 1.0, 0.5, 1e-6])
def test_temperature_and_keep_prob_take_all_of_the_half_open_interval(value):
    config = CPQConfig(temperature=value, keep_prob=value)
    assert config.temperature == config.keep_prob == value


def test_it_is_frozen():
    config = CPQConfig()
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"replace.config, {field.name}=7.5"):
            setattr(config, field.name, 7.5)
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"{field.name} cannot be deleted"):
            delattr(config, field.name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.weight_bit = 4
    assert config == CPQConfig()


def test_a_field_may_be_written_back_as_it_is():
    """Lightning rebuilds every dataclass among hyperparameters, and in batches, in this way."""
    config = CPQConfig(ignore=["head"], overrides={"a": {"weight_bits": 8}})
    again = apply_to_collection({"config": config}, torch.Tensor, torch.Tensor.double)["config"]
    assert again == config
    assert again is not config


def test_what_the_caller_does_to_its_own_containers_does_not_change_it():
    ignore, overrides = ["head"], {"a": {"weight_bits": 8}}
    config = CPQConfig(ignore=ignore, overrides=overrides)
    ignore.append("*")
    overrides["a"]["weight_bits"] = 99
    overrides["*"] = {"weight_bits": 2}
    assert config == CPQConfig(ignore=("head",), overrides={"a": {"weight_bits": 8}})


FULL = {
    "weight_bits": 6, "act_bits": None, "min_bits": 2, "nesting": "resolution", "first_last_bits": None,
    "weight_estimator": "argmax", "act_estimator": "argmax", "per_channel": True, "temperature": 0.5,
    "group_size": 32, "keep_prob": 0.75, "gate_sharing": "element", "gate_estimator": "concrete",
    "ignore": ["head", "*.fc"],
    "overrides": {
        "*.downsample.*": {"weight_bits": 8, "per_channel": False, "group_size": None}, "Linear": {"act_bits": 3},
    },
    "weight_range": "max", "act_range": "max", "seed": 7, "learn_bits": True, "attention": False,
    "embeddings": True,
    "learn_act_bits": False,
    "min_act_bits": 3, "levels_from": None, "weight_grid": "balanced", "act_grid": "offset", "deploy": "qonnx",
}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, FULL], ids=["defaults", "everything set"])
def test_it_survives_the_way_through_plain_values(settings):
    config = CPQConfig(**settings)
    plain = config.to_dict()
    assert CPQConfig(**plain) == config
    assert CPQConfig(**json.loads(json.dumps(plain))) == config
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert set(plain) == {field.name for field in dataclasses.fields(CPQConfig)}


def test_the_plain_values_are_those_given_and_a_copy():
    config = CPQConfig(**FULL)
    assert config.to_dict() == FULL
    assert set(FULL) == {field.name for field in dataclasses.fields(CPQConfig)}
    config.to_dict()["overrides"]["Linear"]["act_bits"] = 99
    config.to_dict()["ignore"].append("x")
    assert config.to_dict() == FULL


def test_any_difference_makes_two_unequal():
    for name, value in FULL.items():
        if value == getattr(CPQConfig(), name) and name != "act_bits":
            continue
        others = {"weight_bits": 6} if name == "min_bits" else {}
        assert CPQConfig(**{name: value}, **others) != CPQConfig(**others), name


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"group_size": 32.0}, TypeError, "group_size must be a whole number of inputs"),
        ({"group_size": True}, TypeError, "group_size must be a whole number of inputs"),
        ({"group_size": 1}, ValueError, "group_size must be at least 2"),
        ({"group_size": 32, "per_channel": False}, ValueError, "set per_channel=True, or group_size=None"),
        ({"group_size": 32, "gate_sharing": "channel"}, ValueError, "use one width for each layer"),
        (
            {"group_size": 32, "overrides": {"a": {"per_channel": False}}},
            ValueError,
            r"overrides\['a'\]: group_size=32",
        ),
    ],
)
def test_groups_need_scales_of_channels_and_one_width(settings, error, message):
    with pytest.raises(error, match=message):
        CPQConfig(**settings)


def test_overrides_are_laid_over_setting_by_setting():
    config = CPQConfig(weight_bits=4, act_bits=4)
    layer = config.for_layer({"weight_bits": 2, "per_channel": True})
    assert (layer.weight_bits, layer.act_bits, layer.per_channel) == (2, 4, True)
    assert config.for_layer({}) == config
    assert config == CPQConfig(weight_bits=4, act_bits=4)


def test_a_layer_s_settings_hold_no_overrides_of_their_own():
    config = CPQConfig(overrides={"a": {"weight_bits": 8}})
    assert config.for_layer(config.overrides["a"]) == CPQConfig(weight_bits=8)


def test_every_setting_of_a_layer_can_be_overridden():
    changes = {name: FULL[name] for name in LAYER_SETTINGS}
    layer = CPQConfig(overrides={"a": changes}).for_layer(changes)
    assert {name: getattr(layer, name) for name in LAYER_SETTINGS} == changes


def test_an_override_of_the_width_takes_the_general_floor_down_with_it():
    config = CPQConfig(weight_bits=6, min_bits=4, overrides={"a": {"weight_bits": 3}, "b": {"weight_bits": 8}})
    narrow, wide = (config.for_layer(config.overrides[name]) for name in "ab")
    assert (narrow.weight_bits, narrow.min_bits) == (3, 3)
    assert (wide.weight_bits, wide.min_bits) == (8, 4)


def test_a_layer_whose_overrides_contradict_each_other_is_refused():
    with pytest.raises(ValueError, match="min_bits must be at most weight_bits=3"):
        CPQConfig(weight_bits=8).for_layer({"min_bits": 5, "weight_bits": 3})


@pytest.mark.parametrize("act_bits", [None, 4])
def test_a_first_or_last_layer_has_its_own_width_and_drops_nothing(act_bits):
    config = CPQConfig(weight_bits=4, min_bits=2, act_bits=act_bits, first_last_bits=8)
    first_or_last = config.for_first_or_last()
    assert (first_or_last.weight_bits, first_or_last.narrowest_bits) == (8, 8)
    assert first_or_last.act_bits == (None if act_bits is None else 8)
    assert CPQConfig(weight_bits=4, min_bits=2, first_last_bits=None).for_first_or_last().weight_bits == 4


def test_a_narrow_first_layer_does_not_collide_with_other_layers_overrides():
    config = CPQConfig(weight_bits=6, first_last_bits=2, overrides={"layer3.*": {"min_bits": 4}})
    assert config.for_first_or_last().weight_bits == 2


def test_the_narrowest_width_is_the_width_where_nothing_is_dropped():
    assert CPQConfig(weight_bits=5).narrowest_bits == 5
    assert CPQConfig(weight_bits=5, min_bits=3).narrowest_bits == 3


def test_learned_activations_have_a_floor_of_their_own():
    config = CPQConfig(weight_bits=8, min_bits=2, act_bits=6, learn_act_bits=True)
    assert config.narrowest_act_bits == 2
    assert CPQConfig(act_bits=6, learn_act_bits=True, min_act_bits=3).narrowest_act_bits == 3
    assert CPQConfig(act_bits=6, min_act_bits=3).narrowest_act_bits == 6
    assert config.for_layer({"act_bits": None}).learn_act_bits is False


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"act_bits": 4, "min_act_bits": 5}, "min_act_bits must be at most act_bits=4"),
        ({"act_bits": None, "learn_act_bits": True}, "learn_act_bits=True needs act_bits"),
        ({"levels_from": "levels.json", "learn_bits": True}, "nothing is left to learn"),
    ],
)
def test_contradictions_in_what_is_learned_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        CPQConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "nesting"),
    [({}, "range"), ({"learn_bits": True}, "resolution"), ({"learn_bits": True, "nesting": "range"}, "range")],
)
def test_nesting_follows_what_is_learned(settings, nesting):
    assert CPQConfig(min_bits=2, **settings).nests_by == nesting


SETTINGS = {
    "ignore": ["head", "*.fc"],
    "overrides": {"*.a": {"weight_bits": 3}, "Linear": {"act_bits": None}},
    "levels_from": {"a": {"weight": [3, 4], "activation": 8}},
}


def of_other_kinds(value):
    """The same in mappings and sequences of other kinds."""
    if isinstance(value, dict):
        return UserDict({key: of_other_kinds(inner) for key, inner in value.items()})
    return UserList(map(of_other_kinds, value)) if isinstance(value, list) else value


def test_any_mapping_and_sequence_will_do_and_plain_ones_are_kept():
    config = CPQConfig(**of_other_kinds(SETTINGS))
    assert config == CPQConfig(**SETTINGS)
    assert json.loads(json.dumps(config.to_dict())) == CPQConfig(**SETTINGS).to_dict()
    assert type(config.levels_from["a"]["weight"]) is list
    assert CPQConfig(levels_from=pathlib.Path("a") / "levels.json").levels_from == os.path.join("a", "levels.json")


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))


# Whatever takes a config, and what it makes of one.
TAKERS = {
    "CPQConfig.of": CPQConfig.of,
    "CPQCallback": lambda config: CPQCallback(config).config,
    "QuantizedModule": lambda config: attached_config(QuantizedModule(net(), num_classes=4, quantization=config)),
    "attach": lambda config: attached_config(attach(net(), config)),
    "with_levels_read": with_levels_read,
    "set_attached_config": lambda config: (set_attached_config(model := net(), config), attached_config(model))[1],
    "Quantizer": lambda config: Quantizer("weight", config).bits,
}


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_a_mapping_will_do_where_a_config_is_expected(take):
    settings = UserDict(weight_bits=3, overrides=UserDict({"*1": UserDict(weight_bits=5)}))
    assert take(settings) == take(CPQConfig(weight_bits=3, overrides={"*1": {"weight_bits": 5}}))
    with pytest.raises(ValueError, match=r"has the unknown setting 'weight_bit';.* Did you mean 'weight_bits'\?"):
        take({"weight_bit": 3})
    with pytest.raises(ValueError, match=r"overrides\['1'\] has the unknown setting 'bits'"):
        take({"overrides": {"1": {"bits": 3}}})
    with pytest.raises(ValueError, match=r"(config|quantization): weight_bits must be from 1 to 8 bits, got 9"):
        take({"weight_bits": 9})
    with pytest.raises(TypeError, match="must be a CPQConfig, or a mapping of its settings"):
        take(3)
