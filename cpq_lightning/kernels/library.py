"""The compiled kernels of the CPU: built by the machine's own C compiler when first needed, and kept.

Nothing is built at install. Without a compiler functional computes, and :func:`describe` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
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
def _library() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    try:
        loaded = _declared(_loaded())
    # RuntimeError: there is no home for a cache.
    except (Unavailable, OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.info("CPQ kernels are not available (%s): quantizers compute in PyTorch operations.", error)
        return str(error)
    log.info("CPQ kernels: %s", loaded._name)
    return loaded


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.cpq_forward.argtypes = [_pointer] * 3 + [_count] * 3 + [_number] * 2 + [_flag]
    library.cpq_backward.argtypes = [_pointer] * 7 + [_count] * 3 + [_number] * 2 + [_flag] * 2
    library.cpq_chain.argtypes = [_pointer] * 10 + [_count] + [_number] * 2
    library.cpq_forward.restype = library.cpq_chain.restype = None
    return library


def _loaded() -> ctypes.CDLL:
    """The library, with threads where torch brings an OpenMP that it can use."""
    try:
        return ctypes.CDLL(str(_built("-fopenmp")))
    except (Unavailable, OSError) as error:
        log.info("CPQ kernels run on one thread: %s", error)
        return ctypes.CDLL(str(_built()))


def _built(*threads: str) -> Path:
    """Path of the library, built if it is not there yet: one for each source, compiler and kind of processor."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("there is no C compiler: cc, gcc and clang are not found, and CC names none")
    here = files("cpq_lightning.kernels")
    sources = {name: here.joinpath(name).read_text(encoding="utf-8") for name in _SOURCES}
    version = _run([compiler, "--version"])
    identity = "\n".join([*sources.values(), version, *_FLAGS, *threads, _processor()])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = _cache_folder()
    target = folder / f"quantize-{key}.so"
    if target.is_file():
        return target
    log.info("CPQ kernels are being built for this machine, once: about a second.")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        written, compiled, made = (Path(work) / f"quantize.{kind}" for kind in ("c", "o", "so"))
        for name, source in sources.items():
            (Path(work) / name).write_text(source, encoding="utf-8")
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
        # Several processes may build at once: each puts a whole file in place.
        os.replace(made, target)
    return target


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
