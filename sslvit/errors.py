"""What stops a run, in one sentence, and the exit code that says it to a script."""

import os
import sys
import traceback
from collections.abc import Callable

DONE, DIVERGED, BAD_DATA, NO_INPUT, INTERNAL, CANNOT_WRITE, PREEMPTED, BAD_CONFIGURATION = 0, 3, 65, 66, 70, 73, 75, 78


class Stop(Exception):
    """A run cannot go on, and the message says why and what to do. Plain ValueErrors are bad configurations."""

    code = INTERNAL


class Diverged(Stop):
    """Training left the numbers, or its features collapsed."""

    code = DIVERGED


class DataError(Stop, ValueError):
    """Data that cannot be used."""

    code = BAD_DATA


class NoInput(DataError):
    """There is no data where we were told to look."""

    code = NO_INPUT


class CannotWrite(Stop, OSError):
    """Output cannot be written, or belongs to another run."""

    code = CANNOT_WRITE


class Preempted(Stop):
    """A signal asked us to stop, and everything was saved."""

    code = PREEMPTED


def at_the_door(main: Callable[[], None]) -> None:
    """Runs a recipe: what stops it is one sentence and an exit code; SSLVIT_TRACEBACK=1 shows where it came from."""
    try:
        main()
    except SystemExit as end:
        sys.exit(BAD_CONFIGURATION if end.code == 2 else end.code)  # the command line's parser says 2
    except (Stop, ValueError) as error:
        if os.environ.get("SSLVIT_TRACEBACK"):
            traceback.print_exc()
        for bar in list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else ():
            bar.close()  # which ends its line
        print(f"{'stopped' if isinstance(error, Preempted) else 'error'}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.code if isinstance(error, Stop) else BAD_CONFIGURATION)
