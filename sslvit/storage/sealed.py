"""JSON that is read back. Its first entry is a seal, a hash of everything else in it, so no flipped bit goes unnoticed.

    {
     "seal": "xxh3_128:6f0a...",
     "images": 500,
     ...

The hash is of the content: indentation and the order of entries do not matter. Files without a seal, of earlier
versions or edited by hand, are read as they are.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from sslvit.errors import DataError
from sslvit.storage import durable

SEAL, MARK = "seal", "xxh3_128:"
LONGEST = 1 << 20
LARGEST = 1e300  # of a number: larger ones are infinite as a float
NUMBER = int | float


def text(content: dict[str, Any], indent: int | None = 1) -> bytes:
    """The file's bytes."""
    content = plain(content)
    return (json.dumps({SEAL: _seal(content)} | content, indent=indent) + "\n").encode()


def plain(content: Any) -> Any:
    """As it will be read: keys are strings, tuples lists."""
    return json.loads(json.dumps(content))


def write(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    durable.replace(file, [text(content)])


def read(file: Path, /, *, longest: int = LONGEST, require_seal: bool = False, **kinds: Any) -> dict[str, Any]:
    """The content of a file. kinds: required entries and their types. Raises ValueError with the reason, or OSError."""
    content = opened(durable.read(Path(os.path.realpath(file)), longest=longest), require_seal=require_seal)
    check(content, **kinds)
    return content


def intact(file: Path) -> dict[str, Any]:
    """The content of a file; empty if it is missing or damaged."""
    try:
        return read(file)
    except (OSError, ValueError):
        return {}


def opened(written: bytes, *, require_seal: bool = False) -> dict[str, Any]:
    """The content of a file, without its seal; ValueError if it is not what was sealed."""
    try:
        content = json.loads(written, object_pairs_hook=_unique)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        # One flipped bit can spoil the seal's name or its mark, not both: it cannot make a sealed file an unsealed one.
        if SEAL not in content and not any(isinstance(one, str) and one.startswith(MARK) for one in content.values()):
            if require_seal:
                raise ValueError("it has no seal, as in earlier versions")
            return content
        if content.pop(SEAL, None) != _seal(content):
            raise ValueError(
                f'its content does not match its seal: it is damaged, or was edited; then delete its line "{SEAL}" too'
            )
        return content
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check(content: dict[str, Any], /, **kinds: Any) -> None:
    """Raises ValueError unless these entries exist with these types, and numbers are finite."""
    for name, kind in kinds.items():
        if name not in content:
            raise ValueError(f"it has no {name!r}")
        value = content[name]
        if not isinstance(value, kind) or (isinstance(value, NUMBER) and not abs(value) < LARGEST):
            raise ValueError(f"its {name!r} is {repr(value)[:40]}, which is not of the required type")


@contextmanager
def readable(file: Path, remedy: str = "restore it from a copy") -> Iterator[None]:
    """Errors of reading the file in the `with` block become one sentence, with the way out."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{file} cannot be read ({reason}): {remedy}") from error


def _seal(content: dict[str, Any]) -> str:
    return MARK + xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("it names an entry twice")
    return content
