"""The compiled kernels of the CPU: built by the machine's own C compiler when first needed, and kept.

Nothing is built at install. Without a compiler functional computes, and :func:`describe` says why. A library that is
loaded runs as the user: it is kept only where nobody else can have written it, and else built for each process alone.
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

# Values are held to those of functional: no reordering, nothing assumed of NaN or infinity.
_FLAGS = ("-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_pointer, _count, _number, _flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SOURCES = ("quantize.c", "moments.h", "vectors.h")
_enabled = os.environ.get("CPQ_KERNELS", "").lower() not in ("0", "off", "false", "no")


class Unavailable(Exception):
    """Why there is no compiled kernel; the reason is its message."""


class _Library(ctypes.CDLL):
    """The compiled kernels.

    Attributes:
        alone: Why they were built for this process alone; empty of the cache's.
    """

    alone = ""


class _NoCache(Exception):
    """Why the user's cache is not used; the reason is its message."""


def is_enabled() -> bool:
    """Whether kernels are wanted."""
    return _enabled


def library() -> ctypes.CDLL | None:
    """The compiled kernels; ``None`` where functional computes."""
    return built() if _enabled else None


def built() -> ctypes.CDLL | None:
    """The compiled kernels, wanted or not: what was begun with them ends with them."""
    found = _library()
    return None if isinstance(found, str) else found


def describe() -> str:
    """Which computation runs on the CPU, and why, in a sentence."""
    if not _enabled:
        return "CPU: functional, in PyTorch operations (kernels are switched off)"
    found = _library()
    if isinstance(found, str):
        return f"CPU: functional, in PyTorch operations ({found})"
    if found.alone:
        return f"CPU: compiled kernels, built for this process alone ({found.alone})"
    return f"CPU: compiled kernels, {found._name}"


@contextmanager
def use_kernels(wanted: bool) -> Iterator[None]:
    """Switch kernels on or off meanwhile; for good with the environment variable ``CPQ_KERNELS=off``.

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
        loaded = _declared(_loaded())
    except (Unavailable, OSError, subprocess.SubprocessError) as error:
        log.info("CPQ kernels are not available (%s): quantizers compute in PyTorch operations.", error)
        return str(error)
    if loaded.alone:
        log.warning("CPQ kernels are built for each process anew, a second each: %s.", loaded.alone)
    else:
        log.info("CPQ kernels: %s", loaded._name)
    return loaded


def _declared(library: _Library) -> _Library:
    library.cpq_forward.argtypes = [_pointer] * 3 + [_count] * 3 + [_number] * 2 + [_flag]
    library.cpq_backward.argtypes = [_pointer] * 7 + [_count] * 3 + [_number] * 2 + [_flag] * 2
    library.cpq_chain.argtypes = [_pointer] * 10 + [_count] + [_number] * 2
    library.cpq_forward.restype = library.cpq_chain.restype = None
    return library


def _loaded() -> _Library:
    """The library, with threads where torch brings an OpenMP that it can use."""
    try:
        return _open("-fopenmp")
    except (Unavailable, OSError) as error:
        log.info("CPQ kernels run on one thread: %s", error)
        return _open()


def _open(*threads: str) -> _Library:
    """The library, of the cache or built: one for each source, compiler and kind of processor."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("there is no C compiler: cc, gcc and clang are not found, and CC names none")
    here = files("cpq_lightning.kernels")
    sources = {name: here.joinpath(name).read_text(encoding="utf-8") for name in _SOURCES}
    version = _run([compiler, "--version"])
    identity = "\n".join([*sources.values(), version, *_FLAGS, *threads, _processor()])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    try:
        kept = _kept(f"quantize-{key}.so", lambda folder: _build(folder, compiler, sources, threads))
    except _NoCache as error:
        # Its folder is this user's alone, and gone when the library is loaded. (Windows keeps what is in use.)
        try:
            with tempfile.TemporaryDirectory(prefix="cpq_lightning-", ignore_cleanup_errors=True) as folder:
                loaded = _Library(str(_build(Path(folder), compiler, sources, threads)))
        except OSError as problem:
            raise Unavailable(f"{problem}; they were built for this process alone, since {error}") from None
        loaded.alone = str(error)
        return loaded
    return _Library(str(kept))


def _kept(name: str, build: Callable[[Path], Path]) -> Path:
    """Path of a library in the user's cache, built if it is not there yet.

    Raises:
        _NoCache: there is no cache that can be written, or others may write to it.
    """
    try:
        folder = _cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Of a link what it leads to now is checked, and used: the link itself may be led elsewhere meanwhile.
        folder = folder.resolve(strict=True)
    # RuntimeError: there is no home for a cache.
    except (OSError, RuntimeError) as error:
        raise _NoCache(f"the cache cannot be made: {error}") from None
    _check_own(folder, stat.S_ISDIR)
    target = folder / name
    if os.path.lexists(target):
        _check_own(target, stat.S_ISREG)
        return target
    log.info("CPQ kernels are being built for this machine, once: about a second.")
    try:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = build(Path(work))
            # Whatever the umask lets linkers do.
            made.chmod(0o700)
            # Several processes may build at once: each puts a whole file in place.
            os.replace(made, target)
    except OSError as error:
        raise _NoCache(f"the cache cannot be written: {error}") from None
    return target


def _check_own(path: Path, kind: Callable[[int], bool]) -> None:
    """Refuse what somebody else owns or may write to, as another user could have put code there.

    Raises:
        _NoCache: with what is wrong with it, and what to do.
    """
    user: Callable[[], int] | None = getattr(os, "geteuid", None)
    if user is None:
        raise _NoCache(f"on {platform.system()} nothing tells whether others may write to {path}")
    try:
        found = os.lstat(path)
        above = os.stat(path.parent)
    except OSError as error:
        raise _NoCache(f"the cache cannot be read: {error}") from None
    remedy = "remove it, or set XDG_CACHE_HOME to a folder of your own"
    if not kind(found.st_mode):
        raise _NoCache(f"{path} is not what this package has put there: {remedy}")
    if found.st_uid != user():
        raise _NoCache(f"{path} belongs to user {found.st_uid}, not to user {user()} who runs this: {remedy}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _NoCache(f"others may write to {path}: chmod go-w, once you trust what is in it, or {remedy}")
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        # In a folder like /tmp, which is sticky, nobody but its owner can put another in its place.
        raise _NoCache(f"others may replace {path}, since everybody may write to {path.parent}: chmod o-w that")


def _build(work: Path, compiler: str, sources: Mapping[str, str], threads: Sequence[str]) -> Path:
    """Compile and link within an empty folder; path of the library."""
    written, compiled, made = (work / f"quantize.{kind}" for kind in ("c", "o", "so"))
    for name, source in sources.items():
        (work / name).write_text(source, encoding="utf-8")
    # What a processor of its own kind allows; a compiler that does not know the word builds for any of them.
    for machine in (["-march=native"], ["-mcpu=native"], []):
        try:
            _run([compiler, *_FLAGS, *threads, *machine, "-c", "-o", str(compiled), str(written)])
            break
        except Unavailable:
            if not machine:
                raise
    # Linked without an OpenMP of its own: that of torch, which is loaded, is found then.
    _run([compiler, "-shared", "-o", str(made), str(compiled), "-lm"])
    return made


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Unavailable(f"{command[0]} failed: {lines[0] if lines else done.returncode}")
    return done.stdout


def _processor() -> str:
    """What a library that was built for this machine may rely on: a shared home is seen by others too."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return "\n".join([platform.system(), platform.machine(), *flags])


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cpq_lightning"
