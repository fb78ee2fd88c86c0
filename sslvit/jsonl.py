"""Lines of JSON, of which a damaged one costs itself and no more."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger(__name__)
SHOWN = 80  # characters of a damaged line


class Line(NamedTuple):
    number: int  # in the file, from 1
    values: dict[str, Any]
    text: bytes  # without its end


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file, none where there is no such file. Damaged lines are left out, with a warning of each."""
    try:
        return [line.values for line in parse(file, file.read_bytes())]
    except FileNotFoundError:
        return []


def parse(file: Path, text: bytes, first: int = 1) -> list[Line]:
    """The lines that hold an object. first: the number of the first one. A last line without an end is torn: not one.

    The damaged ones are named, and shown in the warning: they are the user's to judge, and a log that goes on is
    rewritten without them.
    """
    *whole, _ = text.split(b"\n")
    found = []
    for number, line in enumerate(whole, first):
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError("it is not an object")
        except (ValueError, RecursionError):  # bytes that are no text are ValueErrors too
            damaged(file, number, line)
        else:
            found.append(Line(number, values, line))
    return found


def damaged(file: Path, number: int, line: bytes) -> None:
    shown = ascii(line[:SHOWN])[2:-1] + ("..." if len(line) > SHOWN else "")
    log.warning("%s: line %d is damaged and left out: %s", file, number, shown)
