"""Requirements of the package's extras, and whether they are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shlex
from collections.abc import Sequence

from packaging.requirements import Requirement

PACKAGE = "cpq-lightning"


def requirements(extra: str, package: str = PACKAGE) -> list[Requirement]:
    """Requirements that an extra adds to those of its package; none if the package has no installed metadata."""
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    added = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        is_of_extra = marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})
        if is_of_extra and requirement.name != package:
            requirement.marker = None
            added.append(requirement)
    return added


def unmet(extra: str) -> list[Requirement]:
    """Requirements of an extra that are not installed, or are installed in another version."""
    return [requirement for requirement in requirements(extra) if not _is_met(requirement)]


def how_to_install(needed: Sequence[Requirement]) -> str:
    """A pip command that names the packages: ``cpq-lightning[extra]`` works only if this package is on an index."""
    return " ".join(["pip install", *(shlex.quote(str(requirement)) for requirement in needed)])


def require(what: str, extra: str) -> None:
    """Raise an error unless all requirements of an extra are met.

    Args:
        what: The feature that needs the extra, the subject of the message's sentence.
        extra: Name of the extra.

    Raises:
        ImportError: packages are missing or have another version; the message names them and how to install them.
    """
    missing = unmet(extra)
    if missing:
        raise ImportError(f"{what} needs {', '.join(map(_described, missing))}: {how_to_install(missing)}")


def _is_met(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    if version is None:
        # Another distribution may provide the module, as onnxruntime-gpu provides onnxruntime.
        return importlib.util.find_spec(requirement.name.replace("-", "_")) is not None
    nested = (part for extra in requirement.extras for part in requirements(extra, requirement.name))
    return requirement.specifier.contains(version, prereleases=True) and all(map(_is_met, nested))


def _described(requirement: Requirement) -> str:
    version = _version(requirement.name)
    return f"{requirement} ({'not installed' if version is None else f'installed: {version}'})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
