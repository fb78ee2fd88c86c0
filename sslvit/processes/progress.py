"""A progress bar: as notebooks draw it where ipywidgets are installed, else on stderr."""

import sys
import warnings
from typing import Any

from tqdm import tqdm


def progress_bar(*iterable: Any, **options: Any) -> tqdm:
    """tqdm's arguments. It starts no thread, which would outlive it, so `miniters` must not be large."""
    kind: type[tqdm] = tqdm
    if in_notebook():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is experimental; or without ipywidgets, that it is a plain one
            from tqdm import autonotebook
        kind = autonotebook.tqdm
    return type("Bar", (kind,), {"monitor_interval": 0})(*iterable, **options)


def in_notebook() -> bool:
    return "ipykernel.zmqshell" in sys.modules
