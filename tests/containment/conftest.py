"""Fixtures of the containment tests: those of the installed product."""

from tests.e2e.conftest import product

__all__ = ["product"]
