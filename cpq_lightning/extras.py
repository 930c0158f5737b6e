"""What the package's extras ask for, and whether it is here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shlex
from collections.abc import Iterator

from packaging.requirements import Requirement

PACKAGE = "cpq-lightning"


def requirements(extra: str) -> Iterator[Requirement]:
    """What an extra adds to the package's own needs, other extras within it left out."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        # A checkout that is on the path and not installed.
        lines = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        of_the_extra = marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})
        if of_the_extra and requirement.name != PACKAGE:
            requirement.marker = None
            yield requirement


def unmet(extra: str) -> list[Requirement]:
    """What an extra asks for and is not here, or not in a version that will do."""
    return [requirement for requirement in requirements(extra) if not _is_met(requirement)]


def how_to_install(needed: list[Requirement]) -> str:
    """The packages by their names: ``cpq-lightning[extra]`` could be had only where the package itself is on an index."""
    return "pip install " + " ".join(shlex.quote(str(requirement)) for requirement in needed)


def require(what: str, extra: str) -> None:
    """Refuse what needs an extra that is not here.

    Args:
        what: Who needs it, as the beginning of the sentence.
        extra: Name of the extra.

    Raises:
        ImportError: naming what is missing or too old, and how to install it.
    """
    needed = unmet(extra)
    if needed:
        raise ImportError(f"{what} needs {', '.join(map(_described, needed))}: {how_to_install(needed)}")


def _is_met(requirement: Requirement) -> bool:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        # The same module may come by another name, as onnxruntime does in onnxruntime-gpu.
        return importlib.util.find_spec(requirement.name.replace("-", "_")) is not None
    return requirement.specifier.contains(version, prereleases=True)


def _described(requirement: Requirement) -> str:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name}, which is not installed"
    return f"{requirement.name}{requirement.specifier} (here is {version})"
