"""JSON that is read back. Its first line is a seal, a hash of everything else in it, so no flipped bit is believed.

    {
     "seal": "xxh3_128:6f0a...",
     "images": 500,
     ...

What is hashed is the content: indentation and the order of entries do not matter. Files of earlier versions have no
seal and are taken as they are, and so is a file whose seal was deleted by somebody who edited it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from sslvit import durable
from sslvit.errors import DataError

SEAL, MARK = "seal", "xxh3_128:"
LONGEST = 1 << 20
LARGEST = 1e300  # of a number: what is larger is infinite in a float, or no number at all
NUMBER = int | float


def text(content: dict[str, Any], indent: int | None = 1) -> bytes:
    """The file that holds this."""
    content = json.loads(json.dumps(content))  # as it will be read: keys are strings, tuples lists
    return (json.dumps({SEAL: _seal(content)} | content, indent=indent) + "\n").encode()


def write(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    durable.replace(file, [text(content)])


def read(file: Path, /, *, longest: int = LONGEST, must: bool = False, **kinds: Any) -> dict[str, Any]:
    """What is in the file. must: one without a seal is refused too. kinds: entries that are needed, with their types.

    Raises ValueError with the reason, or OSError.
    """
    content = opened(durable.read(Path(os.path.realpath(file)), longest=longest), must=must)
    check(content, **kinds)
    return content


def intact(file: Path) -> dict[str, Any]:
    """What is in the file; nothing where it is missing or damaged."""
    try:
        return read(file)
    except (OSError, ValueError):
        return {}


def opened(written: bytes, *, must: bool = False) -> dict[str, Any]:
    """The content of a file, without its seal; ValueError if it is not what was sealed."""
    try:
        return _opened(json.loads(written, object_pairs_hook=_once), must)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _opened(content: Any, must: bool) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    # One flipped bit can spoil the seal's name or its mark, not both: it cannot make a sealed file an unsealed one.
    if SEAL not in content and not any(isinstance(one, str) and one.startswith(MARK) for one in content.values()):
        if must:
            raise ValueError("it has no seal, as in earlier versions")
        return content
    seal = content.pop(SEAL, None)
    if seal != _seal(content):
        raise ValueError(
            f'its content does not fit its seal: it is damaged, or was edited; then delete its line "{SEAL}" too'
        )
    return content


def check(content: dict[str, Any], /, **kinds: Any) -> None:
    """That the entries are there and of these types, numbers finite; else ValueError."""
    for name, kind in kinds.items():
        if name not in content:
            raise ValueError(f"it has no {name!r}")
        value = content[name]
        if not isinstance(value, kind) or (isinstance(value, NUMBER) and not abs(value) < LARGEST):
            raise ValueError(f"its {name!r} is {repr(value)[:40]}, of another kind than it must be")


@contextmanager
def readable(file: Path, remedy: str = "restore it from a copy") -> Iterator[None]:
    """What is wrong with a file that is read inside is one sentence, with the way out."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{file} cannot be read ({reason}): {remedy}") from error


def _seal(content: dict[str, Any]) -> str:
    return MARK + xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it names an entry twice")
    return found
