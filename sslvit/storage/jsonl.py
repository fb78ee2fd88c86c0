"""Lines of JSON; a damaged line costs no other."""

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
    """The objects of a file, none if it does not exist. Damaged lines are left out, with a warning for each."""
    try:
        return [line.values for line in parse(file, file.read_bytes())]
    except FileNotFoundError:
        return []


def parse(file: Path, text: bytes, first: int = 1) -> list[Line]:
    """The lines that hold an object. first: the number of the first one. A torn last line, without its end, is skipped.

    Damaged ones are shown in a warning: a log that continues is rewritten without them.
    """
    lines = []
    for number, line in enumerate(text.split(b"\n")[:-1], first):
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError("it is not an object")
        except (ValueError, RecursionError):  # ValueError: also bytes that are not text
            warn_of_damage(file, number, line)
        else:
            lines.append(Line(number, values, line))
    return lines


def warn_of_damage(file: Path, number: int, line: bytes) -> None:
    shown = ascii(line[:SHOWN])[2:-1] + ("..." if len(line) > SHOWN else "")
    log.warning("%s: line %d is damaged and left out: %s", file, number, shown)
