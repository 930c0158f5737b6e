"""The figures as they are kept: what was measured, newest first served, each with the run that it comes from."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_step.measure import ROOT, Figures, Setting
from cpq_lightning.kernels.dispatch import describe

RESULT = ROOT / "benchmarks" / "results" / "train_step.json"
_PACKAGES = ("torch", "timm", "brevitas", "nncf")


def load(path: Path = RESULT) -> dict[str, Any]:
    """What is kept: ``runs`` by their time, and ``figures`` by setting and variant; both empty where there is no file.

    Raises:
        ValueError: the file is none of ours.
    """
    if not path.is_file():
        return {"runs": {}, "figures": {}}
    known = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(known, dict) or not {"runs", "figures"} <= known.keys():
        raise ValueError(
            f"{path} holds no figures of this benchmark: expected 'runs' and 'figures' in it. Move it away."
        )
    return known


def save(figures: Figures, setting: Setting, arguments: Sequence[str], path: Path = RESULT) -> None:
    """Add figures to those that are kept, in place of older ones of the same setting and variant.

    Args:
        figures: By variant.
        setting: What was trained.
        arguments: The command's.
        path: The file.
    """
    known = load(path)
    run = describe_run(setting, arguments)
    of_setting = known["figures"].setdefault(setting.name, {})
    for name, figure in figures.items():
        of_setting[name] = {**figure, "run": run["time"]}
    known["runs"][run["time"]] = run
    used = {figure["run"] for variants in known["figures"].values() for figure in variants.values()}
    known["runs"] = {time: run for time, run in sorted(known["runs"].items()) if time in used}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def describe_run(setting: Setting, arguments: Sequence[str]) -> dict[str, Any]:
    """Where figures come from; nothing in it names the machine or a place on it."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.train_step", *arguments]),
        "commit": commit(),
        "machine": {
            "processor": processor(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": setting.threads,
        },
        "versions": {"python": platform.python_version(), **versions()},
        # The sentence names the library's place.
        "compiled_kernels": describe().startswith("CPU: compiled"),
    }


def commit() -> str:
    """The commit, with ``-dirty`` where code differs from it: results may."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if dirty else "")


def device_name(accelerator: str) -> str:
    """What computes: the GPU's name, or the processor's."""
    return torch.cuda.get_device_name() if accelerator == "gpu" else processor()


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """Of the packages that figures depend on, as far as they are installed."""
    by_package = {}
    for name in _PACKAGES:
        try:
            by_package[name] = version(name)
        except PackageNotFoundError:
            continue
    return by_package
