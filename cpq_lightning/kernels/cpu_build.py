"""The compiled CPU kernels: built with the machine's C compiler on first use, and cached.

Nothing is built at installation. Without a compiler, functional computes, and :func:`describe` gives the reason. A
library is code that runs with the user's rights, so it is cached only in a folder that no other user can write to;
otherwise each process builds it for itself.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path

log = logging.getLogger("cpq_lightning")

# Values must equal those of functional: no reordering, no assumptions about NaN or infinity.
_FLAGS = ("-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_pointer, _count, _number, _flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SOURCES = ("quantize.c", "moments.h", "vectors.h")
SWITCHED_OFF = "kernels are switched off"
_enabled = os.environ.get("CPQ_KERNELS", "").lower() not in ("0", "off", "false", "no")


class Unavailable(Exception):
    """There are no compiled kernels; the message is the reason."""


class _Library(ctypes.CDLL):
    """The compiled kernels.

    Attributes:
        alone: Reason why they were built for this process alone; empty if they are from the cache.
    """

    alone = ""


class _NoCache(Exception):
    """The user's cache cannot be used; the message is the reason."""


def is_enabled() -> bool:
    """Whether kernels are switched on."""
    return _enabled


def library() -> ctypes.CDLL | None:
    """The compiled kernels; ``None`` if functional computes instead."""
    return built() if _enabled else None


def unavailable() -> str | None:
    """Reason why the compiled kernels cannot be used, or ``None``."""
    result = _library() if _enabled else SWITCHED_OFF
    return result if isinstance(result, str) else None


def built() -> ctypes.CDLL | None:
    """The compiled kernels, even if switched off: the backward of their forward needs them."""
    result = _library()
    return None if isinstance(result, str) else result


def describe() -> str:
    """Which computation runs on the CPU, and why, in one line."""
    result = _library() if _enabled else SWITCHED_OFF
    if isinstance(result, str):
        return f"CPU: functional, in PyTorch operations ({result})"
    if result.alone:
        return f"CPU: compiled kernels, built for this process alone ({result.alone})"
    return f"CPU: compiled kernels, {result._name}"


@contextmanager
def use_kernels(wanted: bool) -> Iterator[None]:
    """Switch kernels on or off within a block. The environment variable ``CPQ_KERNELS=off`` switches them off always.

    Example:
        >>> with use_kernels(False):
        ...     describe()
        'CPU: functional, in PyTorch operations (kernels are switched off)'
    """
    global _enabled
    before, _enabled = _enabled, wanted
    try:
        yield
    finally:
        _enabled = before


@cache
def _library() -> _Library | str:
    """The library, or the reason why there is none."""
    try:
        loaded = _with_signatures(_load())
    except (Unavailable, OSError, subprocess.SubprocessError) as error:
        log.info("CPQ kernels are not available (%s): quantizers compute in PyTorch operations.", error)
        return str(error)
    if loaded.alone:
        log.warning("CPQ kernels are built again for each process, which takes about a second: %s.", loaded.alone)
    else:
        log.info("CPQ kernels: %s", loaded._name)
    return loaded


def _with_signatures(library: _Library) -> _Library:
    library.cpq_forward.argtypes = [_pointer] * 3 + [_count] * 3 + [_number] * 2 + [_flag]
    library.cpq_backward.argtypes = [_pointer] * 7 + [_count] * 3 + [_number] * 2 + [_flag] * 2
    library.cpq_chain.argtypes = [_pointer] * 10 + [_count] + [_number] * 2
    library.cpq_forward.restype = library.cpq_chain.restype = None
    return library


def _load() -> _Library:
    """The library, with threads if it can use the OpenMP of torch."""
    try:
        return _open("-fopenmp")
    except (Unavailable, OSError) as error:
        log.info("CPQ kernels run on one thread: %s", error)
        return _open()


def _open(*threads: str) -> _Library:
    """Load the library from the cache, or build it: one for each source, compiler and kind of processor."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("there is no C compiler: cc, gcc and clang were not found, and the variable CC names none")
    here = files("cpq_lightning.kernels")
    sources = {name: here.joinpath(name).read_text(encoding="utf-8") for name in _SOURCES}
    version = _run([compiler, "--version"])
    identity = "\n".join([*sources.values(), version, *_FLAGS, *threads, _processor()])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    try:
        cached = _cached(f"quantize-{key}.so", lambda folder: _build(folder, compiler, sources, threads))
    except _NoCache as error:
        # Only this user can access the folder. It is removed once the library is loaded (except open files on Windows).
        try:
            with tempfile.TemporaryDirectory(prefix="cpq_lightning-", ignore_cleanup_errors=True) as folder:
                loaded = _Library(str(_build(Path(folder), compiler, sources, threads)))
        except OSError as problem:
            raise Unavailable(f"{problem}; they were built for this process alone, because {error}") from None
        loaded.alone = str(error)
        return loaded
    return _Library(str(cached))


def _cached(name: str, build: Callable[[Path], Path]) -> Path:
    """Path of a library in the user's cache; it is built if it does not exist yet.

    Raises:
        _NoCache: the cache cannot be written, or other users may write to it.
    """
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The target of a link is checked and used, because the link itself may change after the check.
        folder = folder.resolve(strict=True)
    # RuntimeError: there is no home folder.
    except (OSError, RuntimeError) as error:
        raise _NoCache(f"the cache cannot be made: {error}") from None
    _check_owner(folder, stat.S_ISDIR)
    target = folder / name
    if os.path.lexists(target):
        _check_owner(target, stat.S_ISREG)
        return target
    log.info("CPQ kernels are being built for this machine, once: about a second.")
    try:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            linked = build(Path(work))
            # Linkers set permissions by the umask, which may let others write.
            linked.chmod(0o700)
            # Several processes may build at once: each replaces the file atomically.
            os.replace(linked, target)
    except OSError as error:
        raise _NoCache(f"the cache cannot be written: {error}") from None
    return target


def _check_owner(path: Path, kind: Callable[[int], bool]) -> None:
    """Raise an error if another user owns the path or may write to it, and so may have put code there.

    Raises:
        _NoCache: the message says what is wrong and what to do.
    """
    user: Callable[[], int] | None = getattr(os, "geteuid", None)
    if user is None:
        raise _NoCache(f"on {platform.system()} it is not known whether others may write to {path}")
    try:
        status = os.lstat(path)
        parent = os.stat(path.parent)
    except OSError as error:
        raise _NoCache(f"the cache cannot be read: {error}") from None
    remedy = "remove it, or set XDG_CACHE_HOME to a folder that only you can write to"
    if not kind(status.st_mode):
        raise _NoCache(f"{path} was not created by this package: {remedy}")
    if status.st_uid != user():
        raise _NoCache(f"{path} belongs to user {status.st_uid}, not to user {user()} who runs this: {remedy}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _NoCache(f"others may write to {path}: chmod go-w if you trust its content, or {remedy}")
    if parent.st_mode & stat.S_IWOTH and not parent.st_mode & stat.S_ISVTX:
        # In a sticky folder such as /tmp, only the owner of an entry can replace it.
        raise _NoCache(
            f"others may replace {path}, because everybody may write to {path.parent}: chmod o-w {path.parent}"
        )


def _build(work: Path, compiler: str, sources: Mapping[str, str], threads: Sequence[str]) -> Path:
    """Compile and link in an empty folder; returns the path of the library."""
    source_file, compiled, linked = (work / f"quantize.{kind}" for kind in ("c", "o", "so"))
    for name, source in sources.items():
        (work / name).write_text(source, encoding="utf-8")
    # Use all instructions of this processor; compilers that do not know either flag build for a generic one.
    for machine in (["-march=native"], ["-mcpu=native"], []):
        try:
            _run([compiler, *_FLAGS, *threads, *machine, "-c", "-o", str(compiled), str(source_file)])
            break
        except Unavailable:
            if not machine:
                raise
    # Not linked with an OpenMP library: its symbols resolve to that of torch, which is loaded.
    _run([compiler, "-shared", "-o", str(linked), str(compiled), "-lm"])
    return linked


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Unavailable(f"{command[0]} failed: {lines[0] if lines else done.returncode}")
    return done.stdout


def _processor() -> str:
    """Processor features that a build relies on: machines with different processors may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return "\n".join([platform.system(), platform.machine(), *flags])


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cpq_lightning"
