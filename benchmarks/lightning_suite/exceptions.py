"""The tests of Lightning's that do not pass with a CPQCallback, and why: they count callbacks, parameters or calls."""

from __future__ import annotations

from typing import NamedTuple


class Exempt(NamedTuple):
    """Tests that need not pass.

    Attributes:
        tests: A regular expression that is found in their names.
        reason: Why what they assert is not so.
    """

    tests: str
    reason: str


_HOOKS = (
    "It compares the list of all calls of hooks: CPQCallback calls `configure_model` before the module's `setup`, "
    "since the layers that it makes have to exist to be quantized, and runs the first batches through the module "
    "before the sanity check."
)
_CALIBRATION = "It counts calls: calibration reads the first training batches ahead and runs them through the module."
_CALLBACKS = "It compares lists of callbacks, and the harness gives one more when the run begins."
EXCEPTIONS = [
    Exempt(r"test_hooks\.py::test_trainer_model_hook_system_(eval|fit|predict)", _HOOKS),
    Exempt(r"test_hooks\.py::test_trainer_datamodule_hook_system", _HOOKS),
    Exempt(r"test_configure_callbacks_hook_multiple_calls", _CALLBACKS),
    Exempt(r"test_evaluation_loop_sampler_set_epoch_called", _CALIBRATION),
    Exempt(r"test_transfer_hooks_with_unpacking", _CALIBRATION),
    Exempt(r"test_train_loop_system", _CALIBRATION),
    Exempt(
        r"test_fx_validator_integration",
        "It expects `log` to be refused in a hook, which calibration calls too, when nothing is logged.",
    ),
    Exempt(
        r"test_dataloaders_load_only_once(\b|_passed)",
        "It compares the order of calls: calibration loads the training data ahead of the sanity check.",
    ),
    Exempt(
        r"test_hpc_restore_attempt",
        "It expects each parameter to be other than zero: the logarithm of a scale begins at zero.",
    ),
    Exempt(
        r"test_cpu\.py::(test_early_stopping_cpu_model|test_cpu_model|test_all_features_cpu_model)",
        "It compares all parameters with those from before the fit, when there were none of quantizers.",
    ),
    Exempt(
        r"test_gradient_clipping_by_(norm|value)\[32-true\]",
        "It takes the gradients of all parameters: those of quantizers, which are in no optimizer of the Trainer, are "
        "not clipped; a bound holds what an update does to them.",
    ),
    Exempt(
        r"test_datamodules\.py::test_full_loop",
        "It expects an accuracy over 0.57 of 160 samples, and gets 0.569 where the run without gets 0.588; over seeds "
        "7 to 11 the mean is 0.654 without and 0.651 with.",
    ),
    Exempt(
        r"test_gradient_accumulation_scheduling_last_batch",
        "It expects a step to change every entry of the `state_dict`: settings of quantizers stay.",
    ),
    Exempt(
        r"test_multiple_pruning_callbacks",
        "It compares the text that the layers are printed as: a quantized one tells of its quantizers.",
    ),
    Exempt(
        r"test_custom_model_summary_callback_summarize",
        "It compares the name of a layer's class: it is a subclass, `QuantizedLinear`.",
    ),
]
