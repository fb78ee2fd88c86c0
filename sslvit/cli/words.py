"""What a user typed: the command, the nearest right word, lists of words in a sentence."""

import difflib
import os
import sys
from collections.abc import Iterable

ELSEWHERE = {  # what other programs call our options
    "imgsz": "image_size", "img_size": "image_size", "input_size": "image_size", "resolution": "image_size",
    "batch": "batch_size", "bs": "batch_size", "num_workers": "workers", "learning_rate": "lr", "wd": "weight_decay",
    "arch": "model", "data_path": "data", "output_dir": "out", "pretrained": "init_from", "checkpoint": "init_from",
    "amp": "precision", "accum_iter": "accumulation",
}  # fmt: skip
HELP, HELP_ALL = ("-h", "--help"), ("--help-all", "--help_all")


def started_as() -> str:
    """The command as it was started: sslvit, python -m sslvit, python recipes/mpp.py."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    script = sys.argv[0]
    if os.path.basename(script) == "sslvit":  # the console command
        return "sslvit"
    here = os.path.relpath(script) if script else ""
    return f"python {script if here.startswith('..') else here}"


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant, or nothing."""
    plain = {_plain(one): one for one in known}
    if (ours := ELSEWHERE.get(_plain(word), "")) in plain:
        return plain[ours]
    close = difflib.get_close_matches(_plain(word), plain, n=1, cutoff=0.6)
    return plain[close[0]] if close else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")


def meant(word: str, known: Iterable[str], before: str = "") -> str:
    """The question after an error, or nothing where no known word is near."""
    near = nearest(word, known)
    return f"; did you mean {before}{near}?" if near else ""


def one_of(words: Iterable[object], last: str = "or") -> str:
    """a, b or c"""
    *first, end = map(str, words)
    return f"{', '.join(first)} {last} {end}" if first else end
