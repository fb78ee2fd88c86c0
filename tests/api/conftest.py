"""One thread, as in all tests, also where the call under test takes all cores by itself."""

import os

import pytest


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
