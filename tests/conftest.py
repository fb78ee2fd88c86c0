"""One thread a process: the tests' tensors are small, and threads that wait for each other make them much slower.

Tests marked `slow` or `timing` run only where -m names one of their markers, so that `-m "not processes"` stays short.
"""

import os
import re

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
ONLY_IF_NAMED = {"slow", "timing"}
pytest_plugins = ("few_shapes",)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = set(re.findall(r"\w+", config.getoption("markexpr")))
    chosen, left_out = [], []
    for item in items:
        needed = ONLY_IF_NAMED & {marker.name for marker in item.iter_markers()}
        (left_out if needed and not needed & named else chosen).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen
