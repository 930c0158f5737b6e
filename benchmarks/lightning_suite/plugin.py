"""A pytest plugin that gives a CPQCallback to every Trainer of a test suite, and writes down how each test ended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.trainer.connectors.callback_connector import _CallbackConnector
from lightning.pytorch.tuner import Tuner

from cpq_lightning import CPQCallback, CPQConfig
from cpq_lightning.attach.loading import attaching
from cpq_lightning.attach.origin import quantizable_layers

# Set by the command: where outcomes are written, and whether the callback is given.
RECORD, WITH_CALLBACK = "CPQ_SUITE_RECORD", "CPQ_SUITE_WITH"


class Given(CPQCallback):
    """What this plugin has given, not a test."""


def _give(trainer: Any, module: Any) -> None:
    given = [c for c in trainer.callbacks if isinstance(c, Given)]
    quantizable = bool(quantizable_layers(module))
    if quantizable and not given:
        # Tests count the files of a run and what it prints.
        config = CPQConfig(weight_bits=8, act_bits=8)
        trainer.callbacks.insert(0, Given(config, levels_file=None, table=False))
    if given and not quantizable:
        # A Trainer that had another module before.
        trainer.callbacks.remove(given[0])


def _give_in_runs(attach: Any) -> Any:
    def attach_with(connector: Any) -> None:
        _give(connector.trainer, connector.trainer.lightning_module)
        attach(connector)

    return attach_with


def _give_in_tuner(tune: Any) -> Any:
    def tune_with(tuner: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        # It keeps lists of callbacks, which have to have this one from the start.
        _give(tuner._trainer, model)
        return tune(tuner, model, *args, **kwargs)

    return tune_with


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not os.environ.get(WITH_CALLBACK):
        yield
        return
    given = _give_in_runs(_CallbackConnector._attach_model_callbacks)
    monkeypatch.setattr(_CallbackConnector, "_attach_model_callbacks", given)
    for name in ("lr_find", "scale_batch_size"):
        monkeypatch.setattr(Tuner, name, _give_in_tuner(getattr(Tuner, name)))
    # As the README says of code that builds a module itself and loads a checkpoint into it.
    with attaching():
        yield


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the outcome of a test's call, and of a setup or teardown that failed."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    said = "" if report.longrepr is None else str(report.longrepr)
    row = {"test": report.nodeid, "when": report.when, "outcome": report.outcome, "said": said[-6000:]}
    with Path(os.environ[RECORD]).open("a") as file:
        file.write(json.dumps(row) + "\n")
