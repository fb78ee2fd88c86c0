"""How a public function ends: an error is one exception, whose message names arguments and not options."""

import functools
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

from sslvit.errors import Error, Preempted

P = ParamSpec("P")
T = TypeVar("T")
SWITCHES = "resume|overwrite|allow_data_change|follow_links|scratch"


def public(function: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Preempted as stopped:
            raise Preempted(for_python(str(stopped))) from None
        except (Error, ValueError) as error:
            error.args = tuple(for_python(one) if isinstance(one, str) else one for one in error.args)
            if isinstance(error, Error):  # whose message says what caused it
                raise error from None
            raise

    return call


def for_python(message: str) -> str:
    """A message to someone at a command line, for someone who writes Python."""
    message = message.replace(" (--foreign leave_head=true)", "").replace("he same command", "he same call")
    parts = message.split("`")  # every other one is a command, which stays
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"--([a-z_]+)\b", r"\1", re.sub(rf"--({SWITCHES})\b", r"\1=True", parts[i]))
    return "`".join(parts)


def check_names(given: dict[str, object], known: set[str], function: str) -> None:
    """A misspelt argument is an error that names the nearest right one, before anything happens."""
    for name in given:
        if name not in known:
            nearest = get_close_matches(name, sorted(known), n=1)
            hint = f": did you mean {nearest[0]}?" if nearest else f"; it has {', '.join(sorted(known))}"
            raise TypeError(f"{function} has no argument {name!r}{hint}")
