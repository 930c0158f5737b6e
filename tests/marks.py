"""Marks of parameters."""

import pytest


def thorough(*parameters):
    """Parameters that run with ``-m thorough`` only; a tuple is the values of several names."""
    return [pytest.param(*(p if isinstance(p, tuple) else (p,)), marks=pytest.mark.thorough) for p in parameters]
