"""Integers that define a module: buffers, with a copy on the host."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn


class HostIntegers(nn.Module):
    """A module whose integer state is in ``state_dict`` and can be read without asking the device.

    Each name in ``_INTEGERS`` has a buffer ``name_`` of one int64; its value is held on the host as well.
    """

    _INTEGERS: ClassVar[tuple[str, ...]] = ()

    def _register_integers(self, device: torch.device | None) -> None:
        for name in self._INTEGERS:
            self.register_buffer(f"{name}_", torch.zeros(1, dtype=torch.int64, device=device))
        self._host: dict[str, int] = dict.fromkeys(self._INTEGERS, 0)

    def configure(self, **values: int) -> None:
        """Set some of the integer state, in the buffers and in their copy on the host."""
        for name, value in values.items():
            self._host[name] = int(value)
            getattr(self, f"{name}_").fill_(int(value))

    def take_integers(self, other: HostIntegers) -> None:
        """Set the integer state to that of another module of the same class."""
        self.configure(**other._host)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self._INTEGERS:
            buffer = getattr(self, f"{name}_")
            if not buffer.is_meta:
                self._host[name] = int(buffer)
