"""Processes that begin with everything imported: a server imports once, and each process is forked from it.

A fork of the calling process would inherit its threads and what it has set. A new program imports for seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lightning.pytorch.cli", "torchmetrics", "timm", "cpq_lightning.cli.main"])
_STREAMS = ("stdout", "stderr")


class Done(NamedTuple):
    """How a process ended: its exit code, negative for a signal, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_processes(
    call: Callable[..., Any], *arguments: Any, environments: Sequence[Mapping[str, str]] = ({},), timeout: float = 300
) -> list[Done]:
    """Call a function in one process for each environment, all at once.

    Args:
        call: A function of a module, with any arguments that can be pickled.
        arguments: Its arguments.
        environments: For each process, variables of the environment to add.
        timeout: Seconds for all of them; processes that take longer are killed.

    Returns:
        How each process ended, in the order of ``environments``.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(i) for i in range(len(environments))]
        for folder in folders:
            folder.mkdir()
        processes = [
            SERVER.Process(target=_run, args=(call, arguments, dict(added), folder))
            for added, folder in zip(environments, folders, strict=True)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        return [
            Done(process.exitcode or 0, *((folder / name).read_text() for name in _STREAMS))
            for process, folder in zip(processes, folders, strict=True)
        ]


def run_program(
    path: str | Path, *arguments: Any, cwd: str | Path, environment: Mapping[str, str] | None = None
) -> Done:
    """Run a Python file, or a module by its dotted name, as ``python`` would, with its arguments."""
    (done,) = run_processes(
        _program, str(path), [str(a) for a in arguments], str(cwd), environments=[environment or {}], timeout=600
    )
    return done


def _program(path: str, arguments: list[str], cwd: str) -> None:
    os.chdir(cwd)
    sys.argv = [path, *arguments]
    if path.endswith(".py"):
        runpy.run_path(path, run_name="__main__")
    else:
        runpy.run_module(path, run_name="__main__", alter_sys=True)


def _run(call: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], folder: Path) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    for number, name in enumerate(_STREAMS, 1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    code = 0
    try:
        call(*arguments)
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Without what the interpreter does at its end, which waits for threads of libraries.
    os._exit(code)
