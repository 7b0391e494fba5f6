"""Fixtures of the tests that drive the installed product."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.machine import Machine
from tests.support.product import Product, unique_prefix


@pytest.fixture
def product(machine: Machine) -> Iterator[Product]:
    """The installed product; the agents that a test adds are its own, and gone afterwards."""
    product = Product(machine, unique_prefix())
    yield product
    product.close()
