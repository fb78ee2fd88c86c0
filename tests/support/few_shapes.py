"""The built-in set has 4,000 images to evaluate on, and nearly every test needs only some of them."""

import pytest

from sslvit.data import spec

FEW = 400


def take_few() -> None:
    spec.SHAPES_SIZES["test"] = FEW


take_few()  # this is imported before the tests


@pytest.fixture
def all_shapes(monkeypatch) -> None:
    """For a test whose numbers are those of all."""
    monkeypatch.setitem(spec.SHAPES_SIZES, "test", 4000)
