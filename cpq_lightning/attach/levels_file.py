"""Read widths from a file: ``CPQConfig(levels_from=...)``."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cpq_lightning.config import CPQConfig
from cpq_lightning.errors import UnreadableFileError

FORMAT = "cpq-levels"


def read_levels(path: str | Path) -> dict[str, Any]:
    """The content of a ``levels.json``.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFileError: it is not a ``levels.json`` of this package.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnreadableFileError(f"{path} is not JSON ({error}): expected a levels.json as a fit writes it.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UnreadableFileError(f"{path} is no levels.json: expected 'format': '{FORMAT}' in it.")
    return content


def with_levels_read(config: CPQConfig | Mapping[str, Any]) -> CPQConfig:
    """The config with the path in ``levels_from`` replaced by the widths, so that the file is not needed again.

    Raises:
        TypeError: it is neither a config nor a mapping of its settings.
        ValueError: there is no such file, or it is no ``levels.json``; or a setting is unknown or out of its range.
    """
    config = CPQConfig.of(config)
    if not isinstance(config.levels_from, str):
        return config
    try:
        content = read_levels(config.levels_from)
    except OSError as error:
        raise ValueError(f"levels_from: {config.levels_from} cannot be read ({error.strerror}).") from None
    except UnreadableFileError as error:
        raise UnreadableFileError(f"levels_from: {error}") from None
    widths = {
        layer["name"]: {kind: layer[kind] and layer[kind]["bits"] for kind in ("weight", "activation")}
        for layer in content["layers"]
    }
    widths |= {
        operand["name"]: {"weight": None, "activation": operand["bits"]} for operand in content.get("products", [])
    }
    return dataclasses.replace(config, levels_from=widths)


def check_names(config: CPQConfig, names: Iterable[str]) -> None:
    """Refuse widths for other layers than those of the model.

    Raises:
        ValueError: with the numbers of missing and unknown layers, and an example.
    """
    if not isinstance(config.levels_from, dict):
        return
    known, names = set(config.levels_from), list(names)
    missing = [name for name in names if name not in known]
    unknown = sorted(known - set(names))
    if not missing and not unknown:
        return
    example = (missing or unknown)[0]
    near = difflib.get_close_matches(example, known if missing else names, n=1, cutoff=0.3)
    hint = f" (near: {near[0]!r})" if near else ""
    raise ValueError(
        f"levels_from: its {len(known)} layers are not the {len(names)} that are quantized here: {len(missing)} of "
        f"these are not in it, {len(unknown)} of it are not here, such as {example!r}{hint}. Read the levels of a run "
        "of the same network with the same ignore and attention."
    )


def at_read_widths(settings: CPQConfig, config: CPQConfig, name: str) -> CPQConfig:
    """Settings of one layer, or of one operand of a product, with its widths from ``levels_from``."""
    if not isinstance(config.levels_from, dict) or name not in config.levels_from:
        return settings
    widths = read_weight_widths(config, name) or [settings.weight_bits]
    return dataclasses.replace(
        settings,
        weight_bits=max(widths),
        min_bits=min(widths),
        act_bits=config.levels_from[name].get("activation"),
        gate_sharing="channel" if len(widths) > 1 else settings.gate_sharing,
    )


def read_weight_widths(config: CPQConfig, name: str) -> list[int] | None:
    """The widths of one layer's weight in ``levels_from``: one, or one per channel; ``None`` without them."""
    if not isinstance(config.levels_from, dict) or name not in config.levels_from:
        return None
    weight = config.levels_from[name]["weight"]
    if weight is None:
        return None
    return list(weight) if isinstance(weight, list) else [weight]
