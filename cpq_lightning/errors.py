"""The errors that may be caught by kind; each one is also an instance of a builtin exception.

An argument of a wrong type or out of its range is a TypeError or a ValueError, as elsewhere in Python.
"""

from __future__ import annotations


class CPQError(Exception):
    """Base class of this package's own errors."""


class UnreadableFileError(CPQError, ValueError):
    """A file is damaged, incomplete or edited, or it is of another program or of a newer version."""


class StateDictError(CPQError, RuntimeError, ValueError):
    """A ``state_dict`` or a checkpoint does not fit the quantizers, or the layers, of the module that loads it."""


class ExportError(CPQError, ValueError):
    """A model cannot be exported in its present state."""


class ResumeError(CPQError):
    """A run cannot be resumed from this checkpoint; also a MisconfigurationException of Lightning."""
