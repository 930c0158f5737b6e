"""Marks of parameters, and the version that some depend on."""

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def thorough(*parameters):
    """Parameters that run with ``-m thorough`` only; a tuple is the values of several names."""
    return [pytest.param(*(p if isinstance(p, tuple) else (p,)), marks=pytest.mark.thorough) for p in parameters]
