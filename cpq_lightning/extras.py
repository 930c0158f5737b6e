"""What the package's extras ask for, and whether it is here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shlex
from collections.abc import Sequence

from packaging.requirements import Requirement

PACKAGE = "cpq-lightning"


def requirements(extra: str, package: str = PACKAGE) -> list[Requirement]:
    """What an extra adds to its package's own needs; nothing of a package that is on the path and not installed."""
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        of_the_extra = marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})
        if of_the_extra and requirement.name != package:
            requirement.marker = None
            found.append(requirement)
    return found


def unmet(extra: str) -> list[Requirement]:
    """What an extra asks for and is not here, or not in a version that will do."""
    return [requirement for requirement in requirements(extra) if not _is_met(requirement)]


def how_to_install(needed: Sequence[Requirement]) -> str:
    """A command that names the packages: ``cpq-lightning[extra]`` holds only where this package is on an index."""
    return " ".join(["pip install", *(shlex.quote(str(requirement)) for requirement in needed)])


def require(what: str, extra: str) -> None:
    """Refuse what needs an extra that is not here.

    Args:
        what: Who needs it, as the beginning of the sentence.
        extra: Name of the extra.

    Raises:
        ImportError: naming what is missing, or here in another version, and how to install it.
    """
    needed = unmet(extra)
    if needed:
        raise ImportError(f"{what} needs {', '.join(map(_described, needed))}: {how_to_install(needed)}")


def _is_met(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    if version is None:
        # The same module may come by another name, as onnxruntime does in onnxruntime-gpu.
        return importlib.util.find_spec(requirement.name.replace("-", "_")) is not None
    inside = (part for extra in requirement.extras for part in requirements(extra, requirement.name))
    return requirement.specifier.contains(version, prereleases=True) and all(map(_is_met, inside))


def _described(requirement: Requirement) -> str:
    version = _version(requirement.name)
    return f"{requirement} ({'not installed' if version is None else f'here is {version}'})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
